"""What a cache keeps beside the tokens in its tree: one keeper a component.

The tree decides, a keeper executes: what the tree takes becomes the tree's, what it lets go is freed, and so is what a
request still has of its own when it ends. A keeper knows no walk; all it is told are pages and states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.index.component import FULL, Component
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState

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
          values: What the tree has of this component: for each of these pages, or 0; or every state.
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
        return 0 if allocator is None else allocator.available_size() // allocator.page_size

    def claim(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Pages the tree is about to take become the tree's.

        Raises:
          OwnershipError: One is not privately owned. Nothing changes.
        """
        if self._allocator is not None:
            self._allocator.transfer(pages, PageState.PRIVATE, PageState.TREE)

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
        if self._allocator is None:
            return
        are_owned = (self._allocator.owner_of(pages) == PageState.TREE).all()
        if not are_owned or not len(np.unique(pages)) == len(pages) == self._allocator.count(PageState.TREE):
            yield f"the tree holds {len(pages)} pages, the allocator disagrees"
