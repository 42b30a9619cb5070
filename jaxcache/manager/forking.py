"""Forks of a running request: samples of one prompt, or beams. What is computed is shared; a partial page is copied.

    request   | whole pages: the tree's, locked by all of them | its last page |
    fork 1    | the same                                       | a copy        | a copy of its state
    fork 2    | the same                                       | a copy        | a copy of its state

Source: jaxcache's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import numpy as np

from jaxcache.arguments import as_count
from jaxcache.caches.radix import RadixCache
from jaxcache.components.base import MemoryComponent
from jaxcache.errors import ArgumentError, RequestStateError, UnsupportedError
from jaxcache.index.receipt import Receipt
from jaxcache.request import Request
from jaxcache.slots import page_slots
from jaxcache.steps.planner import StepPlanner
from jaxcache.steps.runner import StepRunner
from jaxcache.tables.request_table import ReqToTokenPool


@dataclass(frozen=True, eq=False)
class _Share:
    """What one fork starts with: a lock on its prefix, those pages, pages of its own behind them, its row."""

    lock: Receipt
    pages: np.ndarray
    fresh: np.ndarray
    row: int
    values: tuple[tuple[MemoryComponent, int], ...]


class Forking:
    """Forks requests of one manager.

    Args:
      cache: Holds what is shared.
      table: Has rows.
      planner: Makes room for pages.
      runner: Holds the pool.
    """

    def __init__(self, cache: RadixCache, table: ReqToTokenPool, planner: StepPlanner, runner: StepRunner):
        self._cache, self._table, self._planner, self._runner = cache, table, planner, runner
        self._stepping = tuple(component for component in cache.components if component.per_request)

    def fork(self, request: Request, n: int) -> list[Request] | None:
        """`MemoryManager.fork` has the contract. The forks have rows; the caller adds them to those that run."""
        row, n = self._planner.require_settled(request), as_count("n", n)
        if n < 1:
            raise ArgumentError("n must be at least 1: that many requests are made")
        if request.pending or request.kv_len > request.num_tokens:
            raise RequestStateError(f"request {request.rid} has tokens pending: append what was sampled first")
        if self._cache.disable:
            raise UnsupportedError("fork: this memory shares nothing: admit requests with the same tokens")
        if self._table.available_size() < n:
            return None
        for component in self._stepping:
            component.before_step(np.array([row], np.intp), self._runner)
        self._cache.cache_unfinished_req(request)
        with contextlib.ExitStack() as undo:
            shares = []
            for _ in range(n):
                share = self._take(request, undo)
                if share is None:
                    return None
                shares.append(share)
            self._copy(request, row, shares)
            undo.pop_all()
        return [self._start(request, i, share) for i, share in enumerate(shares)]

    def _take(self, request: Request, undo: contextlib.ExitStack) -> _Share | None:
        """What one fork starts with; None if memory is short."""
        found = self._cache.match_prefix(request.computed_key)
        lock = self._cache.inc_lock_ref(found)
        undo.callback(self._cache.dec_lock_ref, lock)
        values: list[tuple[MemoryComponent, int]] = []
        for component in self._stepping:
            value = component.reserve(self._cache)
            if value is None:
                return None
            undo.callback(component.cancel_reservation, value)
            values.append((component, value))
        fresh = self._planner.take_pages(request.num_pages - len(found.pages))
        if fresh is None:
            return None
        undo.callback(self._cache.full.release_request, -1, fresh)
        (row,) = self._table.alloc(1) or (-1,)
        undo.callback(self._table.free, row)
        self._table.write_pages(row, 0, found.pages)
        self._table.write_pages(row, len(found.pages), fresh)
        return _Share(lock, found.pages, fresh, row, tuple(values))

    def _copy(self, request: Request, row: int, shares: list[_Share]) -> None:
        """Copies what no other can have on the device: pages that are not shared, and states."""
        size = self._table.page_size
        sources, targets = [], []
        for share in shares:
            pages = self._table.row_pages(row, len(share.pages), request.num_pages)
            count = request.kv_len - len(share.pages) * size
            sources.append(page_slots(pages, size)[:count])
            targets.append(page_slots(share.fresh, size)[:count])
        source, target = np.concatenate(sources), np.concatenate(targets)
        if len(source):
            self._runner.send_changes()  # so that the device knows all that belongs to the fresh pages
            self._runner.pool = self._runner.pool.copy_tokens(source, target)
        working = self._table.states_of(np.array([row], np.intp))
        for i, component in enumerate(self._stepping):
            values = np.array([share.values[i][1] for share in shares], np.int32)
            component.copy(self._runner, np.repeat(working, len(values)), values)

    def _start(self, request: Request, index: int, share: _Share) -> Request:
        fork = dataclasses.replace(request, rid=f"{request.rid}/{index + 1}", output_ids=list(request.output_ids))
        for component, value in share.values:
            component.start_request(share.row, value, None)
        fork.lock, fork.cached_tokens = share.lock, request.kv_len
        fork.enter(self._table, share.row)
        fork.kv_len, fork.num_pages = request.kv_len, request.num_pages
        fork.branching_len = request.branching_len
        return fork
