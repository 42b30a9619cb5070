"""The list of free pages: a ring buffer whose both ends cost O(pages moved), never O(pages there are).

Taken pages stay written until the next put, so that `rewind` can hand them back in O(1):

    pages:  . . . 7 8 9 4 5 6 . . .
                  ^head       ^head + count
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int32


class PageRing:
    """An ordered list of at most `capacity` page ids. It checks nothing: the allocator's state bytes do.

    Attributes:
      head: Position of the first page; positions are taken modulo `capacity`.
      count: Number of pages in the list.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.head = 0
        self.count = 0
        self._pages = np.zeros(capacity, np.int32)

    def reset(self, pages: np.ndarray) -> None:
        """Replaces the whole list. O(len(pages))."""
        self.head, self.count = 0, len(pages)
        self._pages[: len(pages)] = pages

    def peek(self, head: int, n: int) -> Int32[np.ndarray, " n"]:
        """A copy of the `n` entries from position `head` on. O(n)."""
        pages = self._pages[head : head + n]
        return np.concatenate((pages, self._pages[: n - len(pages)])) if len(pages) < n else pages.copy()

    def take(self, n: int) -> Int32[np.ndarray, " n"]:
        """Removes the first `n <= count` pages and returns them in order. O(n)."""
        pages = self.peek(self.head, n)
        self.head = (self.head + n) % self.capacity
        self.count -= n
        return pages

    def rewind(self, head: int, count: int) -> None:
        """Undoes every `take` since the list had this `head` and `count`; there must have been no put. O(1)."""
        self.head, self.count = head, count

    def put_front(self, pages: np.ndarray) -> None:
        """Inserts `pages` before the first one, in their order. O(len(pages))."""
        self.head = (self.head - len(pages)) % self.capacity
        self._write(self.head, pages)

    def put_back(self, pages: np.ndarray) -> None:
        """Appends `pages` behind the last one, in their order. O(len(pages))."""
        self._write((self.head + self.count) % self.capacity, pages)

    def _write(self, position: int, pages: np.ndarray) -> None:
        until_wrap = self.capacity - position
        if len(pages) <= until_wrap:
            self._pages[position : position + len(pages)] = pages
        else:
            self._pages[position:] = pages[:until_wrap]
            self._pages[: len(pages) - until_wrap] = pages[until_wrap:]
        self.count += len(pages)
