"""Window pages: what sliding-window layers keep beside the pages of the tree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.components.base import Keeper, _are_all_of
from jaxcache.errors import ArgumentError
from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator

if TYPE_CHECKING:
    from jaxtyping import Int32


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
