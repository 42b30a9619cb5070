"""What a component of memory owes to everybody else: offer, adopt, free, release, check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState

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


def _are_all_of(allocator: BaseTokenToKVPoolAllocator, pages: np.ndarray) -> bool:
    """Whether `pages` are exactly the tree's pages, each once."""
    return np.array_equal(np.sort(pages), np.flatnonzero(allocator.states == PageState.TREE))
