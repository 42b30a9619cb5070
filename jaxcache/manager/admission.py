"""Admission: a request becomes a running one in one transaction, all or nothing.

match and lock ─► reserve ─► pages of a host copy ─► a row ─► load ─► running
    each step leaves behind how to undo it; short of memory, or failing, all of them are undone
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np

from jaxcache.caches.base import MatchResult
from jaxcache.caches.radix import RadixCache
from jaxcache.components.base import MemoryComponent
from jaxcache.errors import RequestStateError
from jaxcache.guard import Told
from jaxcache.index.receipt import Receipt
from jaxcache.manager.room import RoomSearch
from jaxcache.manager.swap import KeptCopy
from jaxcache.request import Request, RequestState
from jaxcache.steps.planner import StepPlanner
from jaxcache.steps.runner import StepRunner
from jaxcache.tables.request_table import ReqToTokenPool

_NO_PAGES = np.empty(0, np.int32)


@dataclass(frozen=True, eq=False)
class Entry:
    """What a request starts with.

    Attributes:
      found: Its cached prefix.
      lock: The lock on that.
      kept: Its host copy, if that goes further than the prefix.
      kv_len: Tokens whose KV is there.
      fresh: Pages of its own, for what the host copy adds.
      row: Its row in the request table.
    """

    found: MatchResult
    lock: Receipt
    kept: KeptCopy | None
    kv_len: int
    fresh: np.ndarray
    row: int


class Admission:
    """Admits requests to one manager.

    Args:
      room: Knows what can never be admitted.
      cache: Finds prefixes, and evicts.
      table: Has rows.
      planner: Makes room for pages.
      runner: Holds the pool.
    """

    def __init__(
        self, room: RoomSearch, cache: RadixCache, table: ReqToTokenPool, planner: StepPlanner, runner: StepRunner
    ):
        self._room = room
        self._cache, self._table, self._planner, self._runner = cache, table, planner, runner
        self._reserving = tuple(component for component in cache.components if component.per_request)

    def admit(self, request: Request) -> Entry | None:
        """`MemoryManager.admit` has the contract. `start` makes the request a running one."""
        self._room.require_possible(request)
        if request.pending:
            raise RequestStateError(
                f"request {request.rid} waits for {request.pending} tokens that it sampled: append them to output_ids"
            )
        self._runner.require_resumed()
        if request.cpu_copy is not None:
            request.cpu_copy.require_fitting(request.rid, self._runner.pool, self._table.page_size)
        if not self._table.available_size():
            return None
        with contextlib.ExitStack() as undo:  # undoes everything, unless `pop_all` keeps it
            entry = self._take(request, undo)
            if entry is None:
                return None
            undo.pop_all()
        return entry

    def _take(self, request: Request, undo: contextlib.ExitStack) -> Entry | None:
        """All that the request starts with; None if memory is short."""
        found = self._match(request)
        lock = self._cache.inc_lock_ref(found)
        undo.callback(self._cache.dec_lock_ref, lock)
        kept, kv_len = self._worth_loading(request, lock.length)
        reservations = undo.enter_context(contextlib.ExitStack())
        reserved = self._reserve(reservations)
        if reserved is None:
            return None
        fresh = self._take_kept_pages(kept, lock.length, kv_len)
        if fresh is None:
            return None
        undo.callback(self._cache.full.release_request, -1, fresh)
        (row,) = self._table.alloc(1) or (-1,)
        undo.callback(self._table.free, row)
        self._table.write_pages(row, 0, found.pages)
        self._table.write_pages(row, len(found.pages), fresh)
        reservations.pop_all()  # they are the row's from now on
        for component, value in reserved:
            undo.callback(component.release_request, row, _NO_PAGES)
            component.start_request(row, value, found.state if kept is None else None)
        if kept is not None:
            self._runner.send_changes()  # so that what is loaded can be read before the request's first step
            components = self._cache.components
            self._runner.pool = kept.loaded(self._runner.pool, components, row, fresh, lock.length, kv_len)
        return Entry(found, lock, kept, kv_len, fresh, row)

    def _match(self, request: Request) -> MatchResult:
        """Its cached prefix, which leaves one token to compute."""
        return self._cache.match_prefix(request.key[: request.matchable_len])

    def _worth_loading(self, request: Request, cached: int) -> tuple[KeptCopy | None, int]:
        """The host copy, if it goes further than what is cached, and the tokens that are there with it."""
        kept: KeptCopy | None = request.cpu_copy
        if kept is None:
            return None, cached
        restorable = kept.restorable_tokens(self._cache.components, request.num_tokens - 1)
        return (kept, restorable) if restorable > cached else (None, cached)

    def _reserve(self, undo: contextlib.ExitStack) -> list[tuple[MemoryComponent, int]] | None:
        """What each component keeps beside the pages; None if one is short."""
        reserved: list[tuple[MemoryComponent, int]] = []
        for component in self._reserving:
            value = component.reserve(self._cache)
            if value is None:
                return None
            undo.callback(component.cancel_reservation, value)
            reserved.append((component, value))
        return reserved

    def _take_kept_pages(self, kept: KeptCopy | None, start: int, stop: int) -> np.ndarray | None:
        """Pages for the tokens `[start, stop)` of a host copy; none without one; None if memory is short."""
        if kept is None:
            return _NO_PAGES
        size = self._table.page_size
        first, num_pages = start // size, -(-stop // size) - start // size
        spared = kept.spared(first, num_pages)
        self._planner.make_room(num_pages, spared)
        return self._cache.full.alloc_pages(num_pages, spared)

    def start(self, request: Request, entry: Entry) -> None:
        """The request runs with what `admit` took for it."""
        is_first = request.state is RequestState.WAITING
        request.lock = entry.lock
        request.enter(self._table, entry.row)
        request.kv_len, request.num_pages = entry.kv_len, len(entry.found.pages) + len(entry.fresh)
        request.branching_len = entry.found.mamba_branching_seqlen or 0
        request.cpu_copy = None
        self._count(request, entry, is_first)

    def _count(self, request: Request, entry: Entry, is_first: bool) -> None:
        """Each token of a request is asked for once: what comes back after a retraction is no hit of the cache's."""
        found, loaded = entry.lock.length, entry.kv_len - entry.lock.length
        resumed = 0 if is_first else found
        if is_first:
            request.cached_tokens = found
        request.resumed_tokens += resumed
        request.loaded_tokens += loaded
        observer = self._cache.observer
        if observer is not None and is_first:
            with Told(observer):
                observer.admitted(request.num_tokens, found)
        if observer is not None and (loaded or not is_first):
            with Told(observer):
                observer.resumed(resumed, loaded)
