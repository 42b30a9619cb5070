"""What a step need not compute: tokens that the cache has by now, and those that it computes for another request.

    work, in order      in the tree    planned by those before    its own          pages
    a: tokens 0..96     0..32          -                          32..96           1 2 | fresh 3 4 5 6
    b: tokens 0..90     0..32          32..80                     80..90           1 2 | 3 4 5 | fresh 7

A plan keeps a tree of its own, of what its requests will have computed: each is looked up there before it is planned.
So twins that are admitted together compute a prefix once. A page that has several readers is PLANNED until its step is
dispatched: nothing else in the cache knows it. Then it is the tree's, and its readers lock it like any other prefix.

    extend ──► PLANNED ──run──► TREE            the step writes all rows of a layer before it reads any
                  └───cancel, or one of the requests ends──► the plan takes all of its pages back

A recurrent state stands for the end of a step, and a step that attends to its new tokens apart from the pool reads no
page that it has just written: there the twin waits, and finds in the tree what the other one left.

Source: jaxcache's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.caches.base import MatchResult
from jaxcache.caches.radix import RadixCache
from jaxcache.components.base import MemoryComponent
from jaxcache.index.component import FULL
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree
from jaxcache.request import Request
from jaxcache.steps.plan import NO_PAGES
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class Part:
    """What a step is to do for one request: compute its tokens from `start` to `stop`.

    Attributes:
      request: Which.
      start: Tokens that others computed, or it has computed before.
      stop: Tokens that it has afterwards.
      found: What the tree has of it beyond what it computed; None if that is no more.
      lock: On that.
      taken: int32 names of the pages behind those, up to `start`, that others of the plan compute: -1 for the first
        fresh page of the plan, -2 for the second, ...; or a page that one of them has begun to fill.
    """

    request: Request
    start: int
    stop: int
    found: MatchResult | None
    lock: Receipt | None
    taken: Int32[np.ndarray, " pages"]

    def num_held(self, page_size: int) -> int:
        """Pages that it starts with."""
        return -(-self.start // page_size)


def resolved(names: Int32[np.ndarray, " pages"], fresh: Int32[np.ndarray, " fresh"]) -> Int32[np.ndarray, " pages"]:
    """The pages with these names, once the plan has its fresh ones."""
    pages = names.copy()
    pages[names < 0] = fresh[-1 - names[names < 0]]
    return pages


class PlanSearch:
    """Looks for what the requests of one plan need not compute.

    Args:
      cache: Where prefixes are.
      table: Where the requests are.
      stepping: Components that say where a step should stop.
      undo: What gives back the locks that are taken meanwhile.
      in_step: Whether requests may read what the same step writes.
    """

    def __init__(
        self,
        cache: RadixCache,
        table: ReqToTokenPool,
        stepping: Sequence[MemoryComponent],
        undo: contextlib.ExitStack,
        in_step: bool,
    ):
        self._cache, self._table, self._stepping, self._undo = cache, table, stepping, undo
        self._in_step = in_step and not stepping
        self._size = cache.page_size
        self._planned = RadixTree(self._size, [FULL], element_bytes=cache.tree.element_bytes)
        self._begun: list[int] = []  # pages that requests of the plan go on to fill
        self._ends: dict[int, int] = {}  # by the name of its last whole page: tokens of a request afterwards
        self._num_fresh = 0
        self._is_alone = True

    def parts(self, work: Sequence[tuple[Request, int]]) -> list[Part]:
        """The plan of each request, in order. Who waits for what another one computes is left out, never the first."""
        self._is_alone = len(work) == 1
        found = (self._part(request, most) for request, most in work)
        return [part for part in found if part is not None]

    def _part(self, request: Request, most: int) -> Part | None:
        found = self._cache.longer_prefix(request)
        start = request.kv_len if found is None else found.prefix_len
        taken = self._planned_by_others(request, start)
        if len(taken):
            end = start // self._size * self._size + len(taken) * self._size
            if self._in_step:
                start = end
            elif self._is_worth_waiting(request, int(taken[-1]), end):
                return None
            else:
                taken = NO_PAGES
        lock = None
        if found is not None:
            lock = self._cache.inc_lock_ref(found)
            self._undo.callback(self._cache.dec_lock_ref, lock)
        part = Part(request, start, self._stop(request, found, start, most), found, lock, taken)
        self._register(part)
        return part

    def _planned_by_others(self, request: Request, start: int) -> np.ndarray:
        """Names of the pages behind `start` whole tokens that others of this plan compute."""
        limit = request.matchable_len
        if not len(self._planned) or limit // self._size * self._size <= start:
            return NO_PAGES
        names = self._planned.match(self._cache.key_of(request, limit)).pages[start // self._size :]
        is_planned = (names < 0) | np.isin(names, self._begun)
        return names if is_planned.all() else names[: int(is_planned.argmin())]

    def _is_worth_waiting(self, request: Request, last: int, end: int) -> bool:
        """Whether the tree will have what another one computes up to its end, or all that this one could use."""
        if self._stepping:
            return self._ends.get(last) == end
        return last in self._ends or end == request.matchable_len // self._size * self._size

    def _stop(self, request: Request, found: MatchResult | None, start: int, most: int) -> int:
        if start <= request.kv_len:
            return request.kv_len + most
        stop = min(start + most, request.num_tokens)
        branching_len = request.branching_len if found is None else found.mamba_branching_seqlen or 0
        for component in self._stepping:
            stop = component.next_stop(start, stop, request.num_tokens, branching_len)
        return stop

    def _register(self, part: Part) -> None:
        """What a request will have computed can be found by those after it."""
        size, num_held = self._size, part.num_held(self._size)
        first_fresh = self._num_fresh
        self._num_fresh += -(-part.stop // size) - num_held
        if self._is_alone or self._cache.disable or part.stop - part.start == 1:  # one token is not worth a walk
            return
        key = self._cache.key_of(part.request, part.stop)
        whole = key.length // size
        if whole <= part.start // size:
            return
        names = np.concatenate([self._held(part), -1 - np.arange(first_fresh, self._num_fresh, dtype=np.int32)])
        if part.start % size:
            self._begun.append(int(names[num_held - 1]))
        self._planned.insert(key, [names])
        self._ends[int(names[whole - 1])] = part.stop

    def _held(self, part: Part) -> np.ndarray:
        """The pages that a request starts with."""
        num_taken = len(part.taken)
        if part.found is not None:
            own = part.found.pages
        else:
            row = part.request.req_pool_idx or 0
            own = self._table.row_pages(row, 0, part.num_held(self._size) - num_taken)
        return np.concatenate([own, part.taken])
