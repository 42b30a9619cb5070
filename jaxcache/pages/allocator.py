"""An allocator of one kind of pages: an owner for each page, and a list of the free ones.

    alloc_pages:  free list --front--> pages, owner PRIVATE
    transfer:     pages, owner A ----> pages, owner B
    release:      pages, owner A ----> [pending, in a free group] ----> free list

Source: SGLang 0.5.2 allocator.py (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator).
"""

from __future__ import annotations

import abc

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import as_count, as_int32, require_kind
from jaxcache.errors import ArgumentError, BrokenInvariantError, DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.base import BaseTokenToKVPoolAllocator as BaseTokenToKVPoolAllocator
from jaxcache.pages.batch import batch_last_loc
from jaxcache.pages.free_list import FreeList, concatenated
from jaxcache.pages.free_list import FreeOrder as FreeOrder
from jaxcache.pages.marks import Mark as Mark
from jaxcache.pages.marks import Position
from jaxcache.pages.ownership import PageOwners, require_owner
from jaxcache.pages.ownership import PageState as PageState
from jaxcache.pages.runs import rows_of
from jaxcache.pages.sglang import CpuCopyable as CpuCopyable
from jaxcache.state_dict import Columns, StateDict

_KEPT = (PageState.FREE, PageState.TREE, PageState.QUARANTINED, PageState.SINK)  # what survives its process


class FreeListAllocator(BaseTokenToKVPoolAllocator, abc.ABC):
    """Allocates pages out of one free list. Subclasses choose the page size and `free_order`, nothing else.

    The arguments, attributes and errors are those of `BaseTokenToKVPoolAllocator`.
    """

    def __init__(
        self, size: int, page_size: int, *, kvcache: CpuCopyable | None = None, need_sort: bool = False
    ) -> None:
        super().__init__(size, page_size, kvcache=kvcache, need_sort=need_sort)
        self._page_owners = PageOwners(self.num_pages)
        self._free = FreeList(self.num_pages, self.free_order, need_sort)
        self._start_empty()

    def clear(self) -> None:
        self._page_owners.clear()
        self._free.reset(np.arange(1, self.num_pages + 1, dtype=np.int32))
        self._start_empty()

    def _start_empty(self) -> None:
        self._pending: list[np.ndarray] = []
        self._num_available = self.num_pages
        self._group_depth = 0

    @property
    def _owners(self) -> PageOwners:
        return self._page_owners

    # What is where.

    def available_size(self) -> int:
        return self._num_available * self.page_size

    def full_available_size(self) -> int:
        return self._num_available * self.page_size

    def pending_size(self) -> int:
        return sum(map(len, self._pending)) * self.page_size

    @property
    def free_pages(self) -> np.ndarray:
        """See `BaseTokenToKVPoolAllocator.free_pages`."""
        return self._free.pages

    @property
    def release_pages(self) -> np.ndarray:
        """See `BaseTokenToKVPoolAllocator.release_pages`."""
        return self._free.released

    # Pages.

    def has(self, n: int) -> bool:
        """Whether `n` pages can be taken. O(1)."""
        return as_count("n", n) <= self._num_available

    def _take(self, n: int, sort_above: int) -> np.ndarray | None:
        if n > self._num_available:
            return None
        if self.need_sort and sort_above > self._free.ready:
            self.merge_and_sort_free()
        if n > self._free.ready:
            self._join_pending()
            self.merge_and_sort_free()
        taken = self._free.take(n)
        self._num_available -= n
        self._page_owners.assign(rows_of(taken), PageState.PRIVATE)
        return taken

    def _release(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        if len(pages) == 0:
            return
        in_order = self._free.sorts_calls
        pages, rows = self._page_owners.require(name, pages, owner, DoubleFreeError, in_order)
        self._num_available += len(pages)
        if self._group_depth:
            self._page_owners.assign(rows, PageState.PENDING)
            self._pending.append(pages.copy())  # The caller may write to its own array.
        else:
            self._page_owners.assign(rows, PageState.FREE)
            self._free.put(pages)

    def transfer(self, pages: ArrayLike, source: PageState, target: PageState) -> None:
        pages = as_int32("pages", pages)
        require_owner("source", source)
        require_owner("target", target)
        _, rows = self._page_owners.require("pages", pages, source, repeated=OwnershipError)
        self._page_owners.assign(rows, target)

    def _require_last_loc(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike) -> np.ndarray:
        return batch_last_loc(prefix_lens, seq_lens, last_loc, self.page_size, self._page_owners)

    def merge_and_sort_free(self) -> None:
        if self._free.has_released:
            self._free.reset(np.flatnonzero(self.states == PageState.FREE))

    # Free groups.

    @property
    def in_free_group(self) -> bool:
        """See `SGLangNames.in_free_group`."""
        return self._group_depth > 0

    def free_group_begin(self) -> None:
        self._group_depth += 1

    def free_group_end(self) -> None:
        if self._group_depth == 0:
            raise ArgumentError("free_group_end needs an open free group, there is none: call free_group_begin first")
        self._group_depth -= 1
        if self._group_depth == 0:
            self._join_pending()

    def _join_pending(self) -> None:
        """Moves all pending pages to the free list (or the released ones), as if one call had freed them."""
        if not self._pending:
            return
        pages = concatenated(self._pending)
        in_order = self._free.sorts_calls
        pages, rows = self._page_owners.require("pages", pages, PageState.PENDING, DoubleFreeError, in_order)
        self._pending = []
        self._page_owners.assign(rows, PageState.FREE)
        self._free.put(pages)

    # Marks.

    def end_marks(self) -> None:
        """Refuses to return to any mark made before, as after a free. O(1)."""
        self._free.end_marks()

    def _positions(self) -> tuple[Position, ...]:
        return (self._free.position,)

    def _rewind(self, mark: Mark) -> None:
        self._return(self._taken_since(mark.positions[0]), mark.positions[0])

    def _taken_since(self, position: Position) -> np.ndarray:
        """The pages taken since. Raises SnapshotError if one of them has changed owner."""
        taken = self._free.taken_since(position)
        moved = taken[self.states[taken] != PageState.PRIVATE]
        if len(moved):
            raise SnapshotError(
                "every page taken since the mark must still be PRIVATE, but "
                f"{self._page_owners.describe(int(moved[0]))}: free what was allocated since instead"
            )
        return taken

    def _return(self, taken: np.ndarray, position: Position) -> None:
        """Frees the pages that `_taken_since` found."""
        self._page_owners.assign(rows_of(taken), PageState.FREE)
        self._num_available += len(taken)
        self._free.rewind(position)

    def check(self) -> None:
        free = np.concatenate([self.free_pages, self.release_pages])
        pending = concatenated(self._pending)
        for what, pages, state in (("free", free, PageState.FREE), ("pending", pending, PageState.PENDING)):
            expected = np.flatnonzero(self.states == state)
            if not np.array_equal(np.sort(pages), expected):
                odd = np.setxor1d(pages, expected)[:5]
                raise BrokenInvariantError(f"{len(pages)} pages are listed as {what}, {len(expected)} are; see {odd}")
        if self._num_available != (found := len(free) + len(pending)):
            raise BrokenInvariantError(f"{self._num_available} pages are counted as free, {found} are")

    # What a snapshot of the whole cache keeps.

    def state_dict(self) -> StateDict:
        theirs = np.flatnonzero(~np.isin(self.states, _KEPT))
        if len(theirs):
            raise SnapshotError(
                f"{len(theirs)} pages are neither free nor the tree's: {self._page_owners.describe(int(theirs[0]))}, "
                "for one; free them first"
            )
        return {"states": self.states.copy(), "free": self.free_pages, "released": self.release_pages}

    def load_state_dict(self, saved: Columns) -> None:
        require_kind("saved", saved, Columns)
        states = saved.ints("states", self.num_pages + 1, high=PageState.SINK)
        free, released = saved.ints("free", high=self.num_pages), saved.ints("released", high=self.num_pages)
        are_free = np.flatnonzero(states == PageState.FREE)
        is_kept = states[0] == PageState.SINK and np.isin(states[1:], _KEPT[:-1]).all()
        if not is_kept or not np.array_equal(np.sort(np.concatenate([free, released])), are_free):
            raise SnapshotError(
                "states, free: every page must be the tree's, withheld, or once in the list of free ones"
            )
        self._page_owners.load(states)
        self._free.reset(free.astype(np.int32), released.astype(np.int32))
        self._num_available = len(are_free)
