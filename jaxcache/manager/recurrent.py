"""The recurrent states of running requests: one each to work on, and snapshots for the cache.

    admit       the row gets a working state, to be filled from the state that the cache found, or emptied
    fill        before a step: those copies are made
    step        the model goes on from the working states, in place
    snapshot    after a step that ends at a page boundary worth caching: a copy is made, which the cache is offered

A state stands for exactly the tokens before it. It cannot be cut; all one can do is to stop at the right places.

Source: SGLang 0.5.2 memory_pool.py, HybridReqToTokenPool; pymllm mamba_radix_cache.
"""

from __future__ import annotations

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError
from jaxcache.pages.states import StateAllocator
from jaxcache.steps.buckets import StepKind
from jaxcache.steps.plan import StepPlan
from jaxcache.steps.runner import StepRunner
from jaxcache.tables.hybrid_table import HybridReqToTokenPool


class RunningStates:
    """Takes and fills states for the rows of one table. What takes them back is the cache, when a request ends.

    Args:
      table: Where each row's states are remembered.
      allocator: Owner of the states.
      cache: What is evicted for them, and offered snapshots; a disabled one is offered none.
      runner: Makes the copies.
      interval: Tokens between the snapshots of a decoding request, rounded up to whole pages.

    Raises:
      ArgumentError: `interval` is not positive.
    """

    def __init__(
        self,
        table: HybridReqToTokenPool,
        allocator: StateAllocator,
        cache: RadixCache,
        runner: StepRunner,
        interval: int,
    ):
        if interval < 1:
            raise ArgumentError(f"state_interval must be at least 1, got {interval}")
        self._table, self._allocator, self._cache, self._runner = table, allocator, cache, runner
        self._interval = -(-interval // table.page_size) * table.page_size

    def take(self) -> int | None:
        """A state of the caller's own, evicting a cached one if none is free; None if that cannot be."""
        self._cache.make_room(0, states=1)
        return self._allocator.alloc_track_slot()

    def place(self, row: int, state: int, source: int) -> None:
        """A row in use works on `state`, which is to hold what `source` does: see `HybridReqToTokenPool.set_state`."""
        self._table.set_state(row, state, source)

    def fill(self, rows: np.ndarray) -> None:
        """Makes the copies that these rows wait for, if any."""
        source, target = self._table.state_copies(rows)
        if len(source):
            self._runner.copy_states(source, target)
            self._table.copied(rows)

    def snapshot(self, plan: StepPlan) -> None:
        """The step of `plan` was dispatched: copies the working states that are worth caching.

        A prompt is worth it wherever a chunk ends at a page boundary, a decoding request every `interval` tokens; only
        the last snapshot of a request is kept. A shortage of states means no snapshot, and is no reason not to go on.
        """
        if self._cache.disable:
            return
        every = self._table.page_size if plan.bucket.kind is StepKind.EXTEND else self._interval
        wanted = plan.seq_len % every == 0
        saved: list[tuple[int, int, int]] = []
        for row, length in zip(plan.row[wanted].tolist(), plan.seq_len[wanted].tolist(), strict=True):
            state = self._table.take_saved(row)[0] or self.take()
            if state is not None:
                saved.append((row, state, length))
        if saved:
            rows, states, _ = np.array(saved, np.int32).T
            self._runner.copy_states(self._table.state[rows], states)
        for row, state, length in saved:
            self._table.set_saved(row, state, length)

    def next_stop(self, kv_len: int, end: int, num_tokens: int, branching_len: int) -> int:
        """Where a chunk that could reach `end` should stop, so that its state is found again.

        Where an earlier request went another way, else at the last page boundary that leaves a token: whoever comes
        with the same prompt has to compute one. At `end` where nothing is cached.
        """
        if self._cache.disable:
            return end
        if kv_len < branching_len <= end:
            return branching_len
        boundary = min(end, num_tokens - 1) // self._table.page_size * self._table.page_size
        return boundary if boundary > kv_len else end
