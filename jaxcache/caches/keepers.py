"""What a cache keeps beside the tokens in its tree: one keeper a component.

    keeper   the tree takes                       the tree lets go       a request ends
    full     pages; they are the tree's now       frees them             frees its own pages
    window   the window pages of those, and       frees them; the full   (they go with its pages)
             those that fill a hole of the tree   pages stay
    state    a state; it is the tree's now        frees it               frees its working state and its snapshot

The tree decides, a keeper executes. It knows no walk: all it is told are pages, states and what an insert did.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import ArgumentError, OwnershipError
from jaxcache.index.component import FULL, Component
from jaxcache.index.node import Insertion
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.swa import SWATokenToKVPoolAllocator
from jaxcache.pools.hybrid_requests import NO_COPY, HybridReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class Keeper(ABC):
    """The owner's side of one component of the tree.

    Attributes:
      component: What it keeps.
    """

    component: Component

    @abstractmethod
    def available(self) -> int:
        """Pages, or states, that could be taken now."""

    @abstractmethod
    def offer(self, pages: Int32[np.ndarray, " pages"], state: int) -> Int32[np.ndarray, " values"]:
        """What these private pages and this private state are for the tree: an id a page, 0 for none; or one state."""

    @abstractmethod
    def took(self, pages: Int32[np.ndarray, " pages"], state: int, inserted: Insertion) -> None:
        """The tree was offered that, and took some of it: what it took is the tree's from now on."""

    @abstractmethod
    def let_go(self, values: Int32[np.ndarray, " values"]) -> None:
        """Frees values that the tree let go."""

    @abstractmethod
    def leave(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """Frees what the request in `row`, which ends, has of its own: `own_pages`, or what it has beside them."""

    @abstractmethod
    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """Where the owner's books and the tree disagree, one sentence each.

        Args:
          pages: Every page of the tree.
          values: What the tree has of this component: an id for each of these pages, or 0; or every state.
        """


class FullKeeper(Keeper):
    """Keeps the pages.

    Args:
      allocator: Their owner. None for tests and simulations: nothing is checked or freed.
    """

    component = FULL

    def __init__(self, allocator: BaseTokenToKVPoolAllocator | None):
        self._allocator = allocator

    def available(self) -> int:
        """See `Keeper.available`."""
        allocator = self._allocator
        return 0 if allocator is None else allocator.full_available_size() // allocator.page_size

    def offer(self, pages: Int32[np.ndarray, " pages"], state: int) -> Int32[np.ndarray, " pages"]:
        """The pages."""
        return pages

    def claim(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Pages the tree is about to take become the tree's, with their window pages.

        Raises:
          OwnershipError: One is not privately owned. Nothing changes.
        """
        if self._allocator is not None:
            self._allocator.transfer(pages, PageState.PRIVATE, PageState.TREE)

    def took(self, pages: Int32[np.ndarray, " pages"], state: int, inserted: Insertion) -> None:
        """Nothing is left to do: what the tree took was claimed before."""

    def let_go(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `Keeper.let_go`."""
        if self._allocator is not None:
            self._allocator.release(values, PageState.TREE)

    def leave(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """See `Keeper.leave`."""
        if self._allocator is not None and len(own_pages):
            self._allocator.release(own_pages.copy(), PageState.PRIVATE)

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `Keeper.problems`."""
        if self._allocator is not None and not _are_all_of(self._allocator, pages):
            yield f"the tree holds {len(pages)} pages, the allocator disagrees"


class WindowKeeper(Keeper):
    """Keeps the window pages that go with the pages.

    Args:
      allocator: Owner of both, with the map between them: a SWATokenToKVPoolAllocator.
      sliding_window_size: Tokens before a stopping point that a window layer needs: at least 1, or infinite.

    Raises:
      ArgumentError: `allocator` has no window pages, or the window is no such number.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator | None, sliding_window_size: float):
        if not isinstance(allocator, SWATokenToKVPoolAllocator):
            raise ArgumentError(
                f"token_to_kv_pool_allocator: window layers need a SWATokenToKVPoolAllocator, got {allocator!r}"
            )
        is_count = isinstance(sliding_window_size, (int, np.integer)) and sliding_window_size >= 1
        if not is_count and sliding_window_size != math.inf:
            raise ArgumentError(f"sliding_window_size must be an integer of at least 1, got {sliding_window_size!r}")
        self.component = Component("window", sliding_window_size)
        self._allocator = allocator
        self._page_size = allocator.page_size

    def available(self) -> int:
        """See `Keeper.available`."""
        return self._allocator.swa_available_size() // self._page_size

    def offer(self, pages: Int32[np.ndarray, " pages"], state: int) -> Int32[np.ndarray, " pages"]:
        """The window page of each page, 0 where it has none."""
        return self._allocator.full_to_window[pages]

    def took(self, pages: Int32[np.ndarray, " pages"], state: int, inserted: Insertion) -> None:
        """Window pages that fill a hole go over to the tree's full pages, which stay: somebody may be reading them."""
        size = self._page_size
        for node in inserted.healed:
            self._allocator.move_windows(pages[node.start // size : node.end // size], node.value)
        for node in inserted.added[:-1]:  # begins as a hole: window pages before the last gap are of no use to anybody
            if self._allocator.full_to_window[node.value].any():
                self._allocator.free_windows(node.value, PageState.TREE)

    def let_go(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `Keeper.let_go`."""
        self._allocator.release_window_pages(values, PageState.TREE)

    def leave(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """Nothing is left to do: window pages go with their pages."""

    def require_private(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Raises OwnershipError unless these are distinct private pages: any of them may be asked to fill a hole."""
        self._allocator.require_owned(pages, PageState.PRIVATE)

    def free_private(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Frees the window pages of private pages that stay."""
        self._allocator.free_windows(pages, PageState.PRIVATE)

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `Keeper.problems`."""
        self._allocator.check()
        if not np.array_equal(self._allocator.window_pages(pages), values):
            yield "the tree's window pages are not those that its pages have"
        if not _are_all_of(self._allocator.window, values[values > 0]):
            yield f"the tree holds {np.count_nonzero(values)} window pages, the allocator disagrees"


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


def _are_all_of(allocator: BaseTokenToKVPoolAllocator, pages: np.ndarray) -> bool:
    """Whether `pages` are exactly the tree's pages, each once."""
    return np.array_equal(np.sort(pages), np.flatnonzero(allocator.states == PageState.TREE))
