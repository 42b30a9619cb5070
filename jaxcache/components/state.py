"""Recurrent states: what linear-attention layers keep at the end of a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.components.base import Keeper, _are_all_of
from jaxcache.errors import ArgumentError, OwnershipError
from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class StateKeeper(Keeper):
    """Keeps the states of linear-attention layers: one at the end of a node, valid there and nowhere else.

    Args:
      states: Their owner.
      table: Which request has which. None for a cache that sees no requests.

    Raises:
      ArgumentError: `states` is no StateAllocator, or the table knows no states.
    """

    component = Component("state", reach=1, spans=False)

    def __init__(self, states: StateAllocator, table: HybridReqToTokenPool | None):
        if not isinstance(states, StateAllocator):
            raise ArgumentError(f"state_allocator must be a StateAllocator, got {states!r}")
        if table is not None and not isinstance(table, HybridReqToTokenPool):
            raise ArgumentError(f"req_to_token_pool: requests with states need a HybridReqToTokenPool, got {table!r}")
        self._states = states
        self._table = table

    def available(self) -> int:
        """See `Keeper.available`."""
        return self._states.available_size()

    def offer(self, pages: Int32[np.ndarray, " pages"], state: int) -> Int32[np.ndarray, " 1"]:
        """The state.

        Raises:
          OwnershipError: It is not privately owned.
        """
        if not 0 < state <= self._states.size or self._states.states[state] != PageState.PRIVATE:
            raise OwnershipError(f"state must be PRIVATE, but state {state} is not: leave it to its owner")
        return np.array([state], np.int32)

    def took(self, pages: Int32[np.ndarray, " pages"], state: int, inserted: Insertion) -> None:
        """See `Keeper.took`."""
        if inserted.length and not len(inserted.spare[-1]):
            self._states.transfer([state], PageState.PRIVATE, PageState.TREE)

    def let_go(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `Keeper.let_go`."""
        self._states.release(values, PageState.TREE)

    def snapshot(self, row: int) -> tuple[int, int]:
        """The snapshot of the request in `row`, 0 if it has none, and the tokens it stands for."""
        table = self._rows()
        return int(table.saved[row]), int(table.saved_len[row])

    def save_working(self, row: int, kv_len: int) -> None:
        """The request in `row` ends after `kv_len` tokens: its working state is its snapshot, if it can be one."""
        table = self._rows()
        is_filled = table.state[row] and table.state_from[row] == NO_COPY
        if is_filled and not table.saved[row] and kv_len and kv_len % table.page_size == 0:
            table.save_working(row, kv_len)

    def forget_snapshot(self, row: int) -> None:
        """The snapshot of `row` was offered to the tree, which has it now or had one: the row has none any more."""
        state, _ = self._rows().take_saved(row)
        self._free_private(np.array([state], np.int32))

    def leave(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """See `Keeper.leave`."""
        self._free_private(self._rows().take_states(row))

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `Keeper.problems`."""
        if not _are_all_of(self._states, values):
            yield f"the tree holds {len(values)} states, the allocator disagrees"

    def _free_private(self, states: np.ndarray) -> None:
        """Frees those that did not become the tree's."""
        self._states.release(states[self._states.owner_of(states) == PageState.PRIVATE], PageState.PRIVATE)

    def _rows(self) -> HybridReqToTokenPool:
        if self._table is None:
            raise ArgumentError("req: this cache was built without a request table; it takes no requests")
        return self._table
