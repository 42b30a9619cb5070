"""What a cache keeps beside the tokens in its tree: one keeper a component.

    keeper   the tree takes                       the tree lets go       a request ends
    full     pages; they are the tree's now       frees them             frees its own pages
    window   the window pages of those, and       frees them; the full   (they go with its pages)
             those that fill a hole of the tree   pages stay
    state    a state; it is the tree's now        frees it               frees its working state and its snapshot

The tree decides, a keeper executes. It knows no walk: all it is told are pages, states and what an insert did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.components.base import Keeper, _are_all_of
from jaxcache.index.component import FULL
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState

if TYPE_CHECKING:
    from jaxtyping import Int32


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
