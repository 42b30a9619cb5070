"""The free pages of an allocator, in the order in which they will be taken.

    taken from here                                        freed pages go
    | ring of free pages                            |      LIFO: to the front, FIFO: to the back,
    v                                               v      need_sort: to the released ones, until the next sort
    [ 7 8 9 4 5 6 ]                     released [ 2 ] [ 1 3 ]

It checks nothing: the owner of each page does (`pages/ownership.py`).

Source: SGLang 0.5.2 allocator.py (free_pages, release_pages, need_sort).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.pages.marks import Position
from jaxcache.pages.ring import PageRing

if TYPE_CHECKING:
    from jaxtyping import Int32


class FreeOrder(enum.Enum):
    """Where freed pages go in the free list; pages are taken from its front."""

    LIFO = "lifo"
    """To the front, ascending inside one call: pages used last are reused first."""
    FIFO = "fifo"
    """To the back, in the order given."""


class FreeList:
    """The pages 1 .. `num_pages`, all of them free at first, ascending.

    Args:
      num_pages: The most there can be.
      order: Where freed pages go.
      need_sort: Keep freed pages apart until `sort`.
    """

    def __init__(self, num_pages: int, order: FreeOrder, need_sort: bool):
        self._num_pages, self._order, self._need_sort = num_pages, order, need_sort
        self._ring = PageRing(num_pages)
        self._edition = 0
        self.reset(np.arange(1, num_pages + 1, dtype=np.int32))

    def reset(self, free: Int32[np.ndarray, " free"], released: Int32[np.ndarray, " released"] | None = None) -> None:
        """Replaces the whole list. O(num_pages)."""
        self._edition += 1
        self._ring.reset(free)
        self._released = [] if released is None or not len(released) else [released]  # Oldest call first.

    @property
    def ready(self) -> int:
        """Pages that can be taken without a sort. O(1)."""
        return self._ring.count

    @property
    def has_released(self) -> bool:
        """Whether pages wait for a sort."""
        return bool(self._released)

    @property
    def pages(self) -> Int32[np.ndarray, " ready"]:
        """A copy of those that are ready, in order. O(ready)."""
        return self._ring.peek(self._ring.head, self._ring.count)

    @property
    def released(self) -> Int32[np.ndarray, " released"]:
        """A copy of those that wait for a sort, in order. O(released)."""
        newest_first = self._order is FreeOrder.LIFO
        return concatenated(self._released[::-1] if newest_first else self._released)

    def take(self, n: int) -> Int32[np.ndarray, " n"]:
        """Removes the first `n <= ready` pages and returns them, in order. O(n)."""
        return self._ring.take(n)

    @property
    def sorts_calls(self) -> bool:
        """Whether the pages of one call join the list in ascending order."""
        return self._order is FreeOrder.LIFO

    def put(self, pages: Int32[np.ndarray, " n"]) -> None:
        """Adds the pages that one call freed, of which there are some. O(n)."""
        self._edition += 1
        if self._need_sort:
            self._released.append(pages.copy())  # The caller may write to its own array.
        elif self._order is FreeOrder.LIFO:
            self._ring.put_front(pages)
        else:
            self._ring.put_back(pages)

    # Marks.

    @property
    def position(self) -> Position:
        """Where the list is now. O(1)."""
        return Position(self._edition, self._ring.head, self._ring.count)

    def end_marks(self) -> None:
        """Positions of before cannot be returned to any more."""
        self._edition += 1

    def taken_since(self, position: Position) -> Int32[np.ndarray, " n"]:
        """A copy of the pages taken since the list was at `position`, of the same edition. O(n)."""
        return self._ring.peek(position.head, position.pages - self._ring.count)

    def rewind(self, position: Position) -> None:
        """Puts back what was taken since. O(1)."""
        self._ring.rewind(position.head, position.pages)


def concatenated(chunks: list[np.ndarray]) -> Int32[np.ndarray, " n"]:
    """Arrays of pages one behind the other."""
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
