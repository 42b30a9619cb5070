"""Recurrent states: what linear-attention layers keep of a whole prefix, at its end.

    reserve       a request gets a working state of its own
    start         it is to be filled from the state that the cache found, or emptied
    before_step   those copies are made; then the model updates working states in place
    after_step    where a page ends and it is worth caching, a copy is made: the request's checkpoint
    shareable     the checkpoint is offered to the cache, with the pages before it
    at the end    the working state itself becomes the last checkpoint, if a page ends there

A state stands for exactly the tokens before it. It cannot be cut; all one can do is to stop at the right places.

Source: SGLang 0.5.2 memory_pool.py, HybridReqToTokenPool; pymllm mamba_radix_cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.components.base import (
    NOT_SHAREABLE,
    Evictor,
    PoolHolder,
    TreeComponent,
    allocator_digest,
    are_all_of,
    private_problem,
    used_slots,
)
from jaxcache.errors import ArgumentError, OwnershipError
from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.state_dict import Columns, StateDict, prefixed
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32

CHECKPOINT_INTERVAL = 256
"""Tokens between checkpoints of a decoding request, by default."""


class RecurrentStates(TreeComponent):
    """States of linear-attention layers: one at the end of a node, valid there and nowhere else.

    Args:
      allocator: Their owner.
      table: Which request has which. None for a cache that sees no requests.
      interval: Tokens between the checkpoints of a decoding request, rounded up to whole pages.
      takes_checkpoints: Whether requests leave any; False where nothing is cached.

    Raises:
      ArgumentError: `allocator` is no StateAllocator, the table knows no states, or `interval` is not positive.
    """

    name = "state"
    stack_names = ("states",)
    per_request = 1
    component = Component(name, reach=1, spans=False)

    def __init__(
        self,
        allocator: StateAllocator,
        table: HybridReqToTokenPool | None,
        interval: int = CHECKPOINT_INTERVAL,
        *,
        takes_checkpoints: bool = True,
    ):
        if not isinstance(allocator, StateAllocator):
            raise ArgumentError(f"state_allocator must be a StateAllocator, got {allocator!r}")
        if table is not None and not isinstance(table, HybridReqToTokenPool):
            raise ArgumentError(f"req_to_token_pool: requests with states need a HybridReqToTokenPool, got {table!r}")
        if interval < 1:
            raise ArgumentError(f"state_interval must be at least 1, got {interval}")
        self._allocator, self._table = allocator, table
        self._interval, self._takes_checkpoints = interval, takes_checkpoints

    def available(self) -> int:
        """See `TreeComponent.available`."""
        return self._allocator.available_size()

    def size(self) -> int:
        """See `TreeComponent.size`."""
        return self._allocator.size

    # ---- running requests ----------------------------------------------------------------------------------------

    def reserve(self, cache: Evictor) -> int | None:
        """A working state, evicting a cached one if none is free."""
        cache.make_room_for({self.name: 1})
        return self._allocator.alloc_track_slot()

    def cancel_reservation(self, value: int) -> None:
        """See `MemoryComponent.cancel_reservation`."""
        self._allocator.free_track_slot(value)

    def start_request(self, row: int, value: int, source: int | None) -> None:
        """See `MemoryComponent.start_request`."""
        self._rows().set_state(row, value, NO_COPY if source is None else source)

    def restart_request(self, row: int, source: int) -> None:
        """See `MemoryComponent.restart_request`. Its checkpoint, which is of an earlier prefix, is freed."""
        working, *saved = self._rows().take_states(row).tolist()
        self._free_private(np.array(saved, np.int32))
        self._rows().set_state(row, working, source)

    def before_step(self, rows: Int32[np.ndarray, " requests"], device: PoolHolder) -> None:
        """Fills the working states of these rows, if any wait for it."""
        table = self._rows()
        source, target = table.state_copies(rows)
        if len(source):
            self.copy(device, source, target)
            table.copied(rows)

    def waits(self, rows: Int32[np.ndarray, " requests"]) -> bool:
        """See `MemoryComponent.waits`."""
        return len(self._rows().state_copies(rows)[1]) > 0

    def after_step(
        self,
        rows: Int32[np.ndarray, " requests"],
        seq_len: Int32[np.ndarray, " requests"],
        is_prompt: bool,
        cache: Evictor,
        device: PoolHolder,
    ) -> None:
        """Takes checkpoints: of a prompt wherever a chunk ends at a page boundary, else every `interval` tokens.

        Only the last one of a request is kept. A shortage of states means no checkpoint, and no reason to stop.
        """
        if not self._takes_checkpoints:
            return
        table = self._rows()
        size = table.page_size
        wanted = seq_len % (size if is_prompt else -(-self._interval // size) * size) == 0
        taken: list[tuple[int, int, int]] = []
        for row, length in zip(rows[wanted].tolist(), seq_len[wanted].tolist(), strict=True):
            state = table.take_saved(row)[0] or self.reserve(cache)
            if state is not None:
                taken.append((row, state, length))
        if taken:
            sources, states, _ = np.array(taken, np.int32).T
            self.copy(device, table.state[sources], states)
        for row, state, length in taken:
            table.set_saved(row, state, length)

    def copy(self, device: PoolHolder, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> None:
        """See `MemoryComponent.copy`."""
        device.pool = device.pool.with_states(device.pool.states.copy_states(source, target))

    def next_stop(self, kv_len: int, end: int, num_tokens: int, branching_len: int) -> int:
        """Stops at the branch point, else at the last page boundary that leaves one token to compute."""
        if not self._takes_checkpoints:
            return end
        if kv_len < branching_len <= end:
            return branching_len
        size = self._rows().page_size
        boundary = min(end, num_tokens - 1) // size * size
        return boundary if boundary > kv_len else end

    def warmed_up(self, pool: Any, max_running: int) -> Any:
        """See `MemoryComponent.warmed_up`."""
        return pool.with_states(pool.states.warmed_up(min(max_running, self._allocator.size)))

    # ---- the tree ------------------------------------------------------------------------------------------------

    def candidates(self, pages: Int32[np.ndarray, " pages"], value: int) -> Int32[np.ndarray, " 1"]:
        """The state.

        Raises:
          OwnershipError: It is not privately owned.
        """
        if not 0 < value <= self._allocator.size or self._allocator.states[value] != PageState.PRIVATE:
            raise OwnershipError(f"state must be PRIVATE, but state {value} is not: leave it to its owner")
        return np.array([value], np.int32)

    def require_insertable(
        self, num_tokens: int, page_size: int, pages: Int32[np.ndarray, " pages"], value: int
    ) -> None:
        """Refuses a prefix without a state, or one that does not end where a page does."""
        if not value:
            raise ArgumentError("state: this cache keeps one with every prefix, got none: give what was saved there")
        if num_tokens % page_size:
            raise ArgumentError(
                f"state: it stands for the {num_tokens} tokens of the key, which are not whole pages of {page_size}: "
                "save one where a page ends"
            )

    def adopt(
        self, pages: Int32[np.ndarray, " pages"], value: int, inserted: Insertion, spare: Int32[np.ndarray, " spare"]
    ) -> None:
        """See `TreeComponent.adopt`."""
        if inserted.length and not len(spare):
            self._allocator.transfer([value], PageState.PRIVATE, PageState.TREE)

    def free(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `TreeComponent.free`."""
        self._allocator.release(values, PageState.TREE)

    def release_request(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """See `TreeComponent.release_request`."""
        self._free_private(self._rows().take_states(row))

    def shareable(self, row: int, length: int) -> tuple[int, int]:
        """The checkpoint, and the tokens that it stands for."""
        table = self._rows()
        state = int(table.saved[row])
        return state, int(table.saved_len[row]) if state else NOT_SHAREABLE

    def release_checkpoint(self, row: int) -> None:
        """See `TreeComponent.release_checkpoint`."""
        state, _ = self._rows().take_saved(row)
        self._free_private(np.array([state], np.int32))

    def checkpoint_working(self, row: int, kv_len: int) -> None:
        """See `TreeComponent.checkpoint_working`."""
        table = self._rows()
        is_filled = table.state[row] and table.state_from[row] == NO_COPY
        if is_filled and not table.saved[row] and kv_len and kv_len % table.page_size == 0:
            table.save_working(row, kv_len)

    def keep_stop(self, row: int, stop: int, keep: bool) -> int:
        """Where the checkpoint stands, if that is kept: it is of no use without what comes before it."""
        state, length = self.shareable(row, stop)
        if not state or length >= stop:
            return stop
        if keep:
            return length
        self.release_checkpoint(row)
        return stop

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `TreeComponent.problems`."""
        self._allocator.check()
        if not are_all_of(self._allocator, values):
            yield f"the tree holds {len(values)} states, the allocator disagrees"

    # ---- the other rooms ------------------------------------------------------------------------------------------

    def rows_in_use(self) -> Int32[np.ndarray, " states"]:
        """See `MemoryComponent.rows_in_use`."""
        return used_slots(self._allocator)

    def token_rows(
        self, row: int, pages: Int32[np.ndarray, " pages"], start: int, stop: int
    ) -> Int32[np.ndarray, " tokens"]:
        """The working state, as that of the last token."""
        rows = np.zeros(stop - start, np.int32)
        rows[-1] = self._rows().state[row]
        return rows

    def restorable_tokens(self, num_tokens: int, limit: int) -> int:
        """All of them or none: a state can be used at its own position only."""
        return num_tokens if num_tokens <= limit else 0

    def clear(self) -> None:
        """See `MemoryComponent.clear`."""
        self._allocator.clear()

    def private_problems(self, pages: Int32[np.ndarray, " pages"]) -> Iterator[str]:
        """See `MemoryComponent.private_problems`."""
        table = self._rows()
        yield from private_problem("states", table.held_states, self._allocator)
        sources = table.state_from[table.state_from > 0]
        if (self._allocator.owner_of(sources) != PageState.TREE).any():
            yield f"states: {sources} are to be copied, but not all of them are the tree's"

    def state_dict(self) -> StateDict:
        """See `MemoryComponent.state_dict`."""
        return prefixed("states", self._allocator.state_dict())

    def load_state_dict(self, columns: Columns) -> None:
        """See `MemoryComponent.load_state_dict`."""
        self._allocator.load_state_dict(columns.part("states"))

    def digest(self) -> tuple[Any, ...]:
        """See `MemoryComponent.digest`."""
        return allocator_digest(self._allocator)

    def _free_private(self, states: np.ndarray) -> None:
        """Frees those that did not become the tree's."""
        self._allocator.release(states[self._allocator.owner_of(states) == PageState.PRIVATE], PageState.PRIVATE)

    def _rows(self) -> HybridReqToTokenPool:
        if self._table is None:
            raise ArgumentError("req: this cache was built without a request table; it takes no requests")
        return self._table
