"""Pages of models in which some layers attend to everything and the others to a window of the last tokens only.

A full page holds `page_size` tokens for the layers of full attention, a window page the same tokens for the window's
layers. Requests, tree and page table know full pages; a map says which window page each of them has:

                                      +-- full: an allocator of full pages
    SWATokenToKVPoolAllocator --------+-- map: full page -> window page
                                      +-- window: an allocator of window pages

Both pages of a pair have the same owner. A full page outlives its window page, never the other way round.

Source: SGLang 0.5.2 allocator.py (SWATokenToKVPoolAllocator), which has pages of one slot only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import as_count, as_int32, require_kind, require_same_length
from jaxcache.errors import ArgumentError, BrokenInvariantError, DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.allocator import FreeOrder
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, require_whole_pages
from jaxcache.pages.marks import Mark, Position
from jaxcache.pages.of_size import allocator_of
from jaxcache.pages.ownership import PageOwners, PageState, require_owner
from jaxcache.pages.sglang import CpuCopyable
from jaxcache.pages.window_map import WindowMap, require_pages
from jaxcache.slots import whole_pages
from jaxcache.state_dict import Columns, StateDict, prefixed
from jaxcache.tables.changes import TableChanges

if TYPE_CHECKING:
    from jaxtyping import Int32


class SWATokenToKVPoolAllocator(BaseTokenToKVPoolAllocator):
    """Allocates full pages, and a window page with each.

    Every call acts on both sides, all or nothing: `alloc*` are short if either side is, and what is freed or passed on
    takes its window page along. `states`, `count`, `free_pages` and the like tell of the full side; those of `window`
    of the other.

    Args:
      size: Usable slots of the full side, a multiple of `page_size`.
      size_swa: Usable slots of the window side, likewise.
      page_size: Slots a page, of both sides.
      kvcache: As in `BaseTokenToKVPoolAllocator`; a `SWAKVPool`.
      need_sort: As in `BaseTokenToKVPoolAllocator`. Each side sorts when it is short itself.

    Attributes:
      full: The allocator of full pages, for reading.
      window: The allocator of window pages, for reading. Pages are given and taken through this object, which keeps the
        map.

    Raises:
      ArgumentError: if a size is not a positive multiple of `page_size`, or slots would not fit int32.

    >>> allocator = SWATokenToKVPoolAllocator(size=32, size_swa=16, page_size=4)
    >>> allocator.alloc_pages(3, without_window=1)
    array([1, 2, 3], dtype=int32)
    >>> allocator.window_pages([1, 2, 3])
    array([0, 1, 2], dtype=int32)
    >>> allocator.free_swa([8])
    >>> allocator.translate_loc_from_full_to_swa([7, 8, 15])
    array([ 0,  0, 11], dtype=int32)
    """

    def __init__(
        self,
        size: int,
        size_swa: int,
        page_size: int = 1,
        *,
        kvcache: CpuCopyable | None = None,
        need_sort: bool = False,
    ) -> None:
        require_whole_pages("size_swa", size_swa, page_size)
        super().__init__(size, page_size, kvcache=kvcache, need_sort=need_sort)
        self.full = allocator_of(size, page_size, need_sort=need_sort)
        self.window = allocator_of(size_swa, page_size, need_sort=need_sort)
        self._map = WindowMap(self.full.num_pages, self.window.num_pages)

    @property
    def free_order(self) -> FreeOrder:
        """That of both sides."""
        return self.full.free_order

    @property
    def _owners(self) -> PageOwners:
        return self.full._owners

    def clear(self) -> None:
        """Frees every page of both sides, empties the map, and forgets groups and marks. O(num_pages)."""
        self.full.clear()
        self.window.clear()
        self._map.clear()

    # What is where.

    @property
    def size_full(self) -> int:
        """Usable slots of the full side."""
        return self.size

    @property
    def size_swa(self) -> int:
        """Usable slots of the window side."""
        return self.window.size

    def full_available_size(self) -> int:
        """Slots that the full side could hand out now. O(1)."""
        return self.full.available_size()

    def swa_available_size(self) -> int:
        """Slots that the window side could hand out now. O(1)."""
        return self.window.available_size()

    def available_size(self) -> int:
        """Slots that `alloc` could hand out now: those of the side that has fewer. O(1)."""
        return min(self.full_available_size(), self.swa_available_size())

    def pending_size(self) -> int:
        """Slots of the full side freed inside the open free group."""
        return self.full.pending_size()

    @property
    def free_pages(self) -> Int32[np.ndarray, " free"]:
        """The full side's `free_pages`."""
        return self.full.free_pages

    @property
    def release_pages(self) -> Int32[np.ndarray, " released"]:
        """The full side's `release_pages`."""
        return self.full.release_pages

    def debug_print(self) -> str:
        """One line with the number of pages in each state, for both sides."""
        return f"{super().debug_print()}; window: {self.window.debug_print()}"

    def check(self) -> None:
        """Verifies both sides, and that each window page in use belongs to one full page, of the same owner."""
        self.full.check()
        self.window.check()
        self._map.check(self.states, self.window.states)

    # The map.

    @property
    def full_to_window(self) -> Int32[np.ndarray, " num_pages+1"]:
        """The window page of every full page, index = full page id, 0 = none. A live, read-only view."""
        return self._map.full_to_window

    def window_pages(self, full_pages: ArrayLike) -> Int32[np.ndarray, " n"]:
        """The window page of each full page, 0 where there is none (and of page 0, the sink). O(n).

        Raises:
          ArgumentError: if `full_pages` is not a list of integers.
          OwnershipError: if a page is no page of this allocator.
        """
        pages = as_int32("full_pages", full_pages)
        self._owners.require_in_range("full_pages", pages, lowest=0)
        return self._map.windows_of(pages)

    def translate_loc_from_full_to_swa(self, kv_indices: ArrayLike) -> Int32[np.ndarray, " n"]:
        """The window slot of each full slot; 0, the sink, where there is none. O(n).

        Raises:
          ArgumentError: if `kv_indices` is not a list of integers.
          OwnershipError: if a slot lies in no page of this allocator.
        """
        slots = as_int32("kv_indices", kv_indices)
        pages = slots // self.page_size
        self._owners.require_in_range("kv_indices", pages, lowest=0)
        return self._map.slots_of(slots, self.page_size)

    def require_window_slots(self, name: str, slots: ArrayLike) -> Int32[np.ndarray, " n"]:
        """`translate_loc_from_full_to_swa` for a reader of what is there: 0, the sink, for the sink alone. O(n).

        Raises:
          ArgumentError: if a token's window page is gone, as page 0 would be read; or `slots` are not integers.
          OwnershipError: if a slot lies in no page of this allocator.
        """
        require_kind("name", name, str)
        slots = as_int32(name, slots)
        windows = self.translate_loc_from_full_to_swa(slots)
        is_there = (windows > 0) | (slots < self.page_size)
        if not is_there.all():
            page = slots[is_there.argmin()] // self.page_size
            raise ArgumentError(
                f"{name}: the window page of each must be there, but that of page {page} is gone: "
                "compute its tokens again"
            )
        return windows

    def num_changed(self) -> int:
        """Entries of the map waiting to be sent to the device."""
        return len(self._map.changes)

    def take_changes(self, limit: int) -> TableChanges:
        """At most `limit` changed entries of the map, for `SWAKVPool.with_window_map`; they count as sent."""
        return self._map.changes.take(limit)

    def send_all(self) -> None:
        """The device's copy of the map is a new one, of zeros: every entry waits that is not."""
        self._map.send_all()

    def give_back(self, changes: TableChanges) -> None:
        """Changes that were taken and did not reach the device wait again."""
        self._map.changes.give_back(changes)

    # Pages.

    def alloc_pages(self, n: int, without_window: int = 0) -> Int32[np.ndarray, " n"] | None:
        """Takes `n` full pages, and a window page for each but the first `without_window`. All become PRIVATE.

        Returns:
          Full pages in free-list order, or None if either side is short (nothing has changed).

        Raises:
          ArgumentError: if `n` or `without_window` is negative or no int, or `without_window` exceeds `n`.

        Cost: O(n), and an O(num_pages) scan when `need_sort` has to sort.
        """
        n, without_window = as_count("n", n), as_count("without_window", without_window)
        if without_window > n:
            raise ArgumentError(f"without_window must be at most n = {n}, got {without_window}")
        return self._take(n, sort_above=n, without_window=without_window)

    def _take(self, n: int, sort_above: int, without_window: int = 0) -> np.ndarray | None:
        if not self.full.has(n):
            return None
        windows = self.window.alloc_pages(n - without_window)
        pages = None if windows is None else self.full._take(n, sort_above)
        if windows is not None and pages is not None:
            self._map.pair(pages[without_window:], windows)
        return pages

    def transfer(self, pages: ArrayLike, source: PageState, target: PageState) -> None:
        """Passes full pages, and the window pages they have, from one owner to another. As in the base class."""
        pages = as_int32("pages", pages)
        self.full.transfer(pages, source, target)
        windows = self._map.windows_of(pages)
        self.window.transfer(windows[windows > 0], source, target)

    def _require_last_loc(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike) -> np.ndarray:
        slots = self.full._require_last_loc(prefix_lens, seq_lens, last_loc)
        filled = slots[(prefix_lens % self.page_size > 0) & (seq_lens > prefix_lens)] // self.page_size
        rule = "last_loc: page {} is to be filled, but its window page was freed: the last tokens must keep theirs"
        require_pages(self._map.windows_of(filled) > 0, rule, filled)
        return slots

    def _release(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        self.full._release(name, pages, owner)
        self._drop_windows(pages, owner)

    def merge_and_sort_free(self) -> None:
        """Merges and sorts the free lists of both sides, as in the base class."""
        self.full.merge_and_sort_free()
        self.window.merge_and_sort_free()

    # Windows alone.

    def free_windows(self, full_pages: ArrayLike, owner: PageState) -> None:
        """Frees the window pages of full pages that `owner` holds and keeps. Those that have none are passed over.

        Args:
          full_pages: Distinct full pages.
          owner: The state that every one of them must be in.

        Raises:
          DoubleFreeError: if a full page is free (or pending), or named twice.
          OwnershipError: if another owner has a full page, or it is the sink or no page of this allocator.
          ArgumentError: if `full_pages` is not a list of integers, or `owner` cannot own pages.

        Cost: O(n), as `release`.
        """
        require_owner("owner", owner)
        self._free_windows("full_pages", as_int32("full_pages", full_pages), owner)

    def free_swa(self, free_index: ArrayLike) -> None:
        """`free_windows` of the PRIVATE pages of these slots. Slots and pages may be named again and again.

        Raises:
          DoubleFreeError, OwnershipError, ArgumentError: as `free_windows`.
        """
        pages = as_int32("free_index", free_index) // self.page_size
        first_mention = np.sort(np.unique(pages, return_index=True)[1])  # Tokens are freed in the order given.
        self._free_windows("free_index", pages[first_mention], PageState.PRIVATE)

    def release_window_pages(self, window_pages: ArrayLike, owner: PageState) -> None:
        """`free_windows` for a caller that knows window pages: frees these, whose full pages `owner` holds and keeps.

        Raises:
          DoubleFreeError: if a window page is free (or pending) already, or named twice.
          OwnershipError: if another owner has it, or it is no window page.
          ArgumentError: if `window_pages` is not a list of integers, or `owner` cannot own pages.

        Cost: O(n), as `release`.
        """
        windows = as_int32("window_pages", window_pages)
        self.window.release(windows, owner)
        self._map.unpair(self._map.pages_of(windows), windows)

    def move_swa(self, source: ArrayLike, target: ArrayLike) -> None:
        """`move_windows` for a caller that knows slots, of whole pages, where the targets are PRIVATE too.

        Raises:
          OwnershipError, ArgumentError: as `move_windows`; or if slots are not whole pages.
        """
        pages = [whole_pages("source", source, self.page_size), whole_pages("target", target, self.page_size)]
        self.move_windows(*pages, owner=PageState.PRIVATE)

    def move_windows(self, source: ArrayLike, target: ArrayLike, owner: PageState = PageState.TREE) -> None:
        """Gives the window pages of a request's full pages to the tree's full pages for the same tokens.

        So a tree page that had lost its window page is whole again, and stays where its readers expect it.

        Args:
          source: Distinct PRIVATE full pages that have a window page each. They keep none.
          target: As many distinct full pages of `owner` that have none. Theirs become its.
          owner: Who holds the targets: the tree.

        Raises:
          OwnershipError: if a source is not PRIVATE, a target not of `owner`, or a page is named twice.
          ArgumentError: if the lists differ in length, a source has no window page, or a target has one.

        Cost: O(n). Marks end, as at a free.
        """
        require_owner("owner", owner)
        source, target = as_int32("source", source), as_int32("target", target)
        require_same_length(source=source, target=target)
        self._owners.require("source", source, PageState.PRIVATE, repeated=OwnershipError)
        self._owners.require("target", target, owner, repeated=OwnershipError)
        windows = self._map.movable(source, target)
        self.full.end_marks()
        self._map.unpair(source, windows)
        self._map.pair(target, windows)
        if owner is not PageState.PRIVATE:
            self.window.transfer(windows, PageState.PRIVATE, owner)

    def _free_windows(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        self._owners.require(name, pages, owner, repeated=DoubleFreeError)
        self._drop_windows(pages, owner)

    def _drop_windows(self, pages: np.ndarray, owner: PageState) -> None:
        """Frees the window pages that these full pages of `owner`, which have been checked, have."""
        windows = self._map.windows_of(pages)
        has_window = windows > 0
        windows = windows[has_window]
        self.window.release(windows, owner)
        self._map.unpair(pages[has_window], windows)

    # Free groups, marks and what a snapshot keeps, of both sides.

    @property
    def in_free_group(self) -> bool:
        """See `SGLangNames.in_free_group`."""
        return self.full.in_free_group

    def free_group_begin(self) -> None:
        """Opens a free group of both sides. Groups nest."""
        self.full.free_group_begin()
        self.window.free_group_begin()

    def free_group_end(self) -> None:
        """Closes a free group of both sides. As in the base class."""
        self.full.free_group_end()
        self.window.free_group_end()

    def _positions(self) -> tuple[Position, ...]:
        return self.full._positions() + self.window._positions()

    def _rewind(self, mark: Mark) -> None:
        full, window = mark.positions
        pages, windows = self.full._taken_since(full), self.window._taken_since(window)
        self.full._return(pages, full)
        self.window._return(windows, window)
        self._map.unpair(pages, self._map.windows_of(pages))

    def state_dict(self) -> StateDict:
        """The state of both sides, and the map. As in the base class."""
        both = self.full.state_dict() | prefixed("window", self.window.state_dict())
        return both | {"full_to_window": self.full_to_window.copy()}

    def load_state_dict(self, saved: Columns) -> None:
        """Makes a new allocator what the one with this saved state was; the device is yet to be told of the map."""
        self.full.load_state_dict(saved)
        self.window.load_state_dict(saved.part("window"))
        windows = saved.ints("full_to_window", self.num_pages + 1, high=self.window.num_pages)
        pages = np.flatnonzero(windows).astype(np.int32)
        self._map.pair(pages, windows[pages].astype(np.int32))
        try:
            self.check()
        except BrokenInvariantError as problem:
            raise SnapshotError(f"full_to_window: {problem}") from problem
