"""What every allocator of pages can do, whether it has one free list (`allocator.py`) or a pair (`pair.py`).

Every page has one state byte, and every call is checked against it before it changes anything, always:

            alloc                  transfer                     release, free
    FREE ----------> PRIVATE ------------------> TREE ... -----------------------> FREE
                        |     (any two owners)                (PENDING in between,
                        +-- restore_state --> FREE             inside a free group)

An allocator hands out integers. It never touches KV, never evicts, and waits for no device. A shortage is an answer
(`None`), a wrong use is an error, and either leaves everything as it was: owners, order of the free list, and marks.

Source: SGLang 0.5.2 allocator.py (BaseTokenToKVPoolAllocator).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import MAX_SLOTS, as_count, as_int32, require_kind
from jaxcache.errors import ArgumentError, OwnershipError, SnapshotError
from jaxcache.pages.free_list import FreeOrder
from jaxcache.pages.marks import Mark, Marks, Position
from jaxcache.pages.ownership import PageOwners, PageState, require_owner
from jaxcache.pages.sglang import CpuCopyable, SGLangNames
from jaxcache.state_dict import Columns, StateDict

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8


class BaseTokenToKVPoolAllocator(SGLangNames):
    """Allocates pages, and the slots in them, out of the pages 1 .. `num_pages`. Page 0 is the sink for padding.

    Args:
      size: Usable slots, a multiple of `page_size`. Device buffers have `size + page_size` rows.
      page_size: Slots a page.
      kvcache: The pool that the slots belong to, for `get_kvcache` and the CPU copies. A manager's allocator knows its
        pool without.
      need_sort: Keep freed pages apart until the free list runs short, then sort. Makes long runs of neighbouring
        pages, which are cheap to transfer between machines. A sort ends marks, as a free does.

    Attributes:
      size: As given, in slots.
      page_size: As given.
      num_pages: `size // page_size`.
      kvcache: As given; assign the new pool after a donated step consumed the old one. A manager does by itself.
      need_sort: As given.

    Raises:
      ArgumentError: if `size` is not a positive multiple of `page_size`, or slots would not fit int32.

    Not thread-safe: one scheduler thread owns it.
    """

    def __init__(self, size: int, page_size: int, *, kvcache: CpuCopyable | None, need_sort: bool):
        self.num_pages = require_whole_pages("size", size, page_size)
        self.size = self.num_pages * int(page_size)
        super().__init__(int(page_size), kvcache)
        self.need_sort = need_sort
        self._marks = Marks()

    @property
    @abc.abstractmethod
    def free_order(self) -> FreeOrder:
        """Where freed pages go in the free list."""

    @property
    @abc.abstractmethod
    def _owners(self) -> PageOwners:
        """Who owns the pages that this allocator hands out."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Frees every page and forgets open groups and marks; the free list ascends again. O(num_pages)."""

    # What is where.

    @property
    def states(self) -> UInt8[np.ndarray, " num_pages+1"]:
        """The `PageState` of every page, index = page id. A live, read-only view."""
        return self._owners.states

    @abc.abstractmethod
    def available_size(self) -> int:
        """Slots that `alloc` could hand out now: free, released and pending ones. O(1)."""

    @abc.abstractmethod
    def full_available_size(self) -> int:
        """`available_size` of the full-attention side, where there are two. O(1)."""

    @abc.abstractmethod
    def pending_size(self) -> int:
        """Slots freed inside the open free group."""

    @property
    @abc.abstractmethod
    def free_pages(self) -> Int32[np.ndarray, " free"]:
        """A copy of the free list, in the order in which pages will be taken. O(free)."""

    @property
    @abc.abstractmethod
    def release_pages(self) -> Int32[np.ndarray, " released"]:
        """A copy of the pages that wait for the next sort (always empty without `need_sort`), in order. O(released)."""

    def owner_of(self, pages: ArrayLike) -> UInt8[np.ndarray, " n"]:
        """The `PageState` of each page, 0 .. `num_pages`. O(n)."""
        pages = as_int32("pages", pages)
        self._owners.require_in_range("pages", pages, lowest=0)
        return self.states[pages]

    def count(self, state: PageState) -> int:
        """Number of pages in `state`. O(num_pages)."""
        require_kind("state", state, PageState)
        return int(np.count_nonzero(self.states == state))

    def debug_print(self) -> str:
        """One line with the number of pages in each state."""
        counts = ", ".join(f"{self.count(state)} {state.name.lower()}" for state in PageState)
        return f"{type(self).__name__}: {self.num_pages} pages of {self.page_size}: {counts}"

    @abc.abstractmethod
    def check(self) -> None:
        """Verifies that each free page is once in the list of free ones, and counted.

        Raises:
          BrokenInvariantError: names what is not.

        Cost: O(num_pages log num_pages).
        """

    # Pages.

    def alloc_pages(self, n: int) -> Int32[np.ndarray, " n"] | None:
        """Takes `n` pages from the front of the free list; they become PRIVATE. The caller frees them.

        Returns:
          Page ids in free-list order, or None if fewer than `n` are available (nothing has changed).

        Cost: O(n), and one O(num_pages) scan when `need_sort` has to sort.
        """
        n = as_count("n", n)
        return self._take(n, sort_above=n)

    def release(self, pages: ArrayLike, owner: PageState) -> None:
        """Frees pages that `owner` holds.

        Args:
          pages: Distinct page ids. Nothing happens if there are none.
          owner: The state that every one of them must be in: who is giving them up.

        Raises:
          DoubleFreeError: if a page is free (or pending) already, or named twice.
          OwnershipError: if another owner has a page, or it is the sink or no page of this allocator.
          ArgumentError: if `pages` is not a list of integers, or `owner` cannot own pages.

        Cost: O(n), by the run (to order pages that are neither sorted nor in runs O(n log n), where the free order is
        LIFO), whatever the size of the pool.
        """
        require_owner("owner", owner)
        self._release("pages", as_int32("pages", pages), owner)

    @abc.abstractmethod
    def transfer(self, pages: ArrayLike, source: PageState, target: PageState) -> None:
        """Passes pages from one owner to another, as when the tree adopts a request's pages.

        Args:
          pages: Distinct page ids, all of them `source`'s.
          source: Who has them.
          target: Who gets them.

        Raises:
          OwnershipError: if a page is not `source`'s, is named twice, or is no page of this allocator.
          ArgumentError: if `pages` is not a list of integers, or `source` or `target` cannot own pages.

        Cost: O(n).
        """

    def require_owned(self, pages: ArrayLike, owner: PageState) -> None:
        """Raises unless `owner` has all of these pages and none is named twice. O(n).

        Raises:
          DoubleFreeError, OwnershipError, ArgumentError: as `transfer`.
        """
        require_owner("owner", owner)
        self._owners.require("pages", as_int32("pages", pages), owner, repeated=OwnershipError)

    @abc.abstractmethod
    def merge_and_sort_free(self) -> None:
        """Merges the released pages into the free list and sorts it, if there are any. O(num_pages)."""

    # Marks.

    def backup_state(self) -> Mark:
        """Marks this point, so that `restore_state` can take back every allocation made after it. O(1)."""
        return self._marks.add(self._positions())

    def restore_state(self, mark: Mark) -> None:
        """Un-allocates every page taken since `mark`, as after rejected draft tokens. The mark stays good.

        Raises:
          SnapshotError: if this cannot be done exactly: a page was freed, the free list was sorted or an older mark
            was restored in between; a page taken since has changed owner; a free group is open; or the mark is another
            allocator's.
          ArgumentError: if it is no mark.

        Cost: O(pages taken since).
        """
        require_kind("mark", mark, Mark)
        if self.in_free_group:
            raise SnapshotError("a mark must not be restored inside a free group: call free_group_end first")
        self._marks.require(mark, self._positions())
        self._rewind(mark)
        self._marks.returned_to(mark)

    @abc.abstractmethod
    def _positions(self) -> tuple[Position, ...]:
        """Where the free list of each side is."""

    @abc.abstractmethod
    def _rewind(self, mark: Mark) -> None:
        """Frees what was taken since. Raises SnapshotError, and nothing has changed, if it has another owner by now."""

    # What a snapshot of the whole cache keeps.

    @abc.abstractmethod
    def state_dict(self) -> StateDict:
        """Who owns which page, and the order in which free ones will be taken. O(num_pages).

        Raises:
          SnapshotError: if a page has an owner that will not be there to free it: PRIVATE, IN_FLIGHT or PENDING.
        """

    @abc.abstractmethod
    def load_state_dict(self, saved: Columns) -> None:
        """Makes a new allocator what the one with this saved state was. O(num_pages log num_pages).

        Raises:
          SnapshotError: if this is no state of an allocator of this size. The allocator is of no use then.
        """


def require_whole_pages(name: str, size: Any, page_size: Any) -> int:
    """The pages that the slots of an allocator are; raises ArgumentError unless there is one at least, and no rest."""
    size, page_size = as_count(name, size), as_count("page_size", page_size)
    if page_size == 0 or size == 0 or size % page_size:
        raise ArgumentError(
            f"{name} must be a positive multiple of page_size, got {name} = {size}, page_size = {page_size}: "
            "round it down to whole pages"
        )
    if size + page_size > MAX_SLOTS:
        raise ArgumentError(f"{name} + page_size must be at most 2**31 (slots are int32), got {name} = {size}")
    return size // page_size
