"""Pages of models in which some layers attend to everything and the others to a window of the last tokens only.

A full page holds `page_size` tokens for the layers of full attention, a window page the same tokens for the window's
layers. Requests, tree and page table know full pages; a map says which window page each of them has:

    full page     1  2  3  4  5  6        full_to_window = [0, 0, 0, 2, 5, 0, 0]
    window page   -  -  2  5  -  -        0: none, because its tokens left every window

Both pages of a pair have the same owner. A full page outlives its window page, never the other way round.

Source: SGLang 0.5.2 allocator.py (SWATokenToKVPoolAllocator), which has pages of one slot only.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.errors import ArgumentError, BrokenInvariant, DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, CpuCopyable, FreeOrder, Snapshot
from jaxcache.pages.arguments import as_count, int32_array, require_same_length
from jaxcache.pages.ownership import PageState, require_owner
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.state_dict import Books, Columns, prefixed
from jaxcache.tables.changes import ChangeLog, TableChanges

if TYPE_CHECKING:
    from jaxtyping import Int32

_NOBODYS = (PageState.FREE, PageState.PENDING, PageState.SINK)


@dataclasses.dataclass(frozen=True, eq=False)
class SWASnapshot(Snapshot):
    """A point of both sides. Opaque; compared by identity."""

    window: Snapshot


class SWATokenToKVPoolAllocator(BaseTokenToKVPoolAllocator):
    """Allocates full pages, and a window page with each. It is the full side's allocator, and owns the window's.

    Every call of the base class acts on both sides, all or nothing: `alloc*` are short if either side is, and what is
    freed or passed on takes its window page along. `states`, `count`, `free_pages` and the like tell of the full side;
    those of `window` of the other.

    Args:
      size: Usable slots of the full side, a multiple of `page_size`.
      size_swa: Usable slots of the window side, likewise.
      page_size: Slots a page, of both sides.
      kvcache: As in `BaseTokenToKVPoolAllocator`; a `SWAKVPool`.
      need_sort: As in `BaseTokenToKVPoolAllocator`, for both sides.

    Attributes:
      window: The allocator of window pages. Its books are for reading; its pages are given and taken through this
        object, which keeps the map.

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
        self.window = _window_allocator(size_swa, page_size, need_sort)
        num_pages = as_count("size", size) // self.window.page_size
        self._full_to_window = np.zeros(num_pages + 1, np.int32)
        self._window_to_full = np.zeros(self.window.num_pages + 1, np.int32)
        self._changes = ChangeLog(self._full_to_window)
        super().__init__(size, page_size, kvcache=kvcache, need_sort=need_sort)

    @property
    def free_order(self) -> FreeOrder:
        return self.window.free_order

    def clear(self) -> None:
        """Frees every page of both sides, empties the map, and forgets groups and snapshots. O(num_pages)."""
        super().clear()
        self.window.clear()
        mapped = np.flatnonzero(self._full_to_window).astype(np.int32)
        self._unmap(mapped, self._full_to_window[mapped])

    # Books.

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
        return super().available_size()

    def swa_available_size(self) -> int:
        """Slots that the window side could hand out now. O(1)."""
        return self.window.available_size()

    def available_size(self) -> int:
        """Slots that `alloc` could hand out now: those of the side that has fewer. O(1)."""
        return min(self.full_available_size(), self.swa_available_size())

    def debug_print(self) -> str:
        """One line with the number of pages in each state, for both sides."""
        return f"{super().debug_print()}; window: {self.window.debug_print()}"

    def check(self) -> None:
        """Checks the map against the books: each window page in use belongs to one full page, of the same owner.

        Raises:
          BrokenInvariant: says what does not agree.

        Cost: O(num_pages) of both sides.
        """
        full = np.flatnonzero(self._full_to_window)
        windows = self._full_to_window[full]
        in_use = np.flatnonzero(~np.isin(self.window.states, _NOBODYS))
        if not np.array_equal(np.sort(windows), in_use):
            raise BrokenInvariant(
                "each window page in use must belong to one full page, see window pages "
                f"{_odd(windows, in_use)}, which the map and the window's allocator do not agree on"
            )
        if not np.array_equal(np.flatnonzero(self._window_to_full), in_use) or np.any(
            self._window_to_full[windows] != full
        ):
            raise BrokenInvariant(f"the two directions of the map differ for some of the full pages {full[:5]}")
        differs = self.states[full] != self.window.states[windows]
        if differs.any():
            page, window = full[differs][0], windows[differs][0]
            raise BrokenInvariant(
                f"full page {page} is {PageState(self.states[page]).name}, but its window page {window} is "
                f"{PageState(self.window.states[window]).name}"
            )

    # The map.

    @property
    def full_to_window(self) -> Int32[np.ndarray, " num_pages+1"]:
        """The window page of every full page, index = full page id, 0 = none. A live, read-only view."""
        view = self._full_to_window.view()
        view.flags.writeable = False
        return view

    def window_pages(self, full_pages: ArrayLike) -> Int32[np.ndarray, " n"]:
        """The window page of each full page, 0 where there is none (and of page 0, the sink). O(n).

        Raises:
          ArgumentError: if `full_pages` is no list of integers.
          OwnershipError: if a page is no page of this allocator.
        """
        pages = int32_array("full_pages", full_pages)
        self._owners.require_in_range("full_pages", pages, lowest=0)
        return self._full_to_window[pages]

    def translate_loc_from_full_to_swa(self, kv_indices: ArrayLike) -> Int32[np.ndarray, " n"]:
        """The window slot of each full slot; 0, the sink, where there is none. O(n).

        Raises:
          ArgumentError: if `kv_indices` is no list of integers.
          OwnershipError: if a slot lies in no page of this allocator.
        """
        slots = int32_array("kv_indices", kv_indices)
        pages = slots // self.page_size
        self._owners.require_in_range("kv_indices", pages, lowest=0)
        windows = self._full_to_window[pages]
        offsets = slots - pages * np.int32(self.page_size)
        return np.where(windows > 0, windows * np.int32(self.page_size) + offsets, np.int32(0))

    def require_window_slots(self, name: str, slots: ArrayLike) -> Int32[np.ndarray, " n"]:
        """`translate_loc_from_full_to_swa` for whoever reads what is there: 0, the sink, for the sink alone. O(n).

        Raises:
          ArgumentError: if a token's window page is gone, and page 0 would be read; or `slots` is no list of integers.
          OwnershipError: if a slot lies in no page of this allocator.
        """
        slots = int32_array(name, slots)
        windows = self.translate_loc_from_full_to_swa(slots)
        is_there = (windows > 0) | (slots < self.page_size)
        rule = name + ": the window page of each must be there, but that of page {} is gone: compute its tokens again"
        _require_pages(is_there, rule, slots // self.page_size)
        return windows

    def num_changed(self) -> int:
        """Entries of the map waiting to be sent to the device."""
        return len(self._changes)

    def take_changes(self, limit: int) -> TableChanges:
        """At most `limit` changed entries of the map, for `SWAKVPool.with_window_map`; they count as sent."""
        return self._changes.take(limit)

    def send_all(self) -> None:
        """The device's copy of the map is a new one, of zeros: every entry waits that is not."""
        self._changes.forget()
        self._changes.mark(np.flatnonzero(self._full_to_window).astype(np.int32))

    def give_back(self, changes: TableChanges) -> None:
        """Changes that were taken and did not reach the device wait again."""
        self._changes.give_back(changes)

    # Pages.

    def alloc_pages(self, n: int, without_window: int = 0) -> Int32[np.ndarray, " n"] | None:
        """Takes `n` full pages, and a window page for each but the first `without_window`. All become PRIVATE.

        Returns:
          Full pages in free-list order, or None if either side is short (no page changes hands).

        Raises:
          ArgumentError: if `n` or `without_window` is negative or no int, or `without_window` exceeds `n`.

        Cost: O(n), and an O(num_pages) scan when `need_sort` has to sort.
        """
        n, without_window = as_count("n", n), as_count("without_window", without_window)
        if without_window > n:
            raise ArgumentError(f"without_window must be at most n = {n}, got {without_window}")
        return self._take(n, sort_above=n, without_window=without_window)

    def transfer(self, pages: ArrayLike, source: PageState, target: PageState) -> None:
        """Passes full pages, and the window pages they have, from one owner to another. As in the base class."""
        pages = int32_array("pages", pages)
        super().transfer(pages, source, target)
        windows = self._full_to_window[pages]
        self.window.transfer(windows[windows > 0], source, target)

    def free_windows(self, full_pages: ArrayLike, owner: PageState) -> None:
        """Frees the window pages of full pages that `owner` holds and keeps. Those that have none are passed over.

        Args:
          full_pages: Distinct full pages.
          owner: The state that every one of them must be in.

        Raises:
          DoubleFreeError: if a full page is free (or pending), or named twice.
          OwnershipError: if another owner has a full page, or it is the sink or no page of this allocator.
          ArgumentError: if `full_pages` is no list of integers, or `owner` cannot own pages.

        Cost: O(n), as `release`.
        """
        require_owner("owner", owner)
        self._free_windows("full_pages", int32_array("full_pages", full_pages), owner)

    def free_swa(self, free_index: ArrayLike) -> None:
        """`free_windows` of the PRIVATE pages of these slots. Slots and pages may be named again and again.

        Raises:
          DoubleFreeError, OwnershipError, ArgumentError: as `free_windows`.
        """
        pages = int32_array("free_index", free_index) // self.page_size
        first_mention = np.sort(np.unique(pages, return_index=True)[1])  # Tokens are freed in the order given.
        self._free_windows("free_index", pages[first_mention], PageState.PRIVATE)

    def release_window_pages(self, window_pages: ArrayLike, owner: PageState) -> None:
        """`free_windows` for whoever knows window pages: frees these, whose full pages `owner` holds and keeps.

        Raises:
          DoubleFreeError: if a window page is free (or pending) already, or named twice.
          OwnershipError: if another owner has it, or it is no window page.
          ArgumentError: if `window_pages` is no list of integers, or `owner` cannot own pages.

        Cost: O(n), as `release`.
        """
        windows = int32_array("window_pages", window_pages)
        self.window.release(windows, owner)
        self._unmap(self._window_to_full[windows], windows)

    def move_swa(self, source: ArrayLike, target: ArrayLike) -> None:
        """`move_windows` for whoever knows slots, of whole pages, and where the targets are PRIVATE too.

        Raises:
          OwnershipError, ArgumentError: as `move_windows`; or if slots are not whole pages.
        """
        pages = [_whole_pages("source", source, self.page_size), _whole_pages("target", target, self.page_size)]
        self.move_windows(*pages, owner=PageState.PRIVATE)

    def move_windows(self, source: ArrayLike, target: ArrayLike, owner: PageState = PageState.TREE) -> None:
        """Gives the window pages of a request's full pages to the tree's full pages for the same tokens.

        So a tree page that had lost its window page is whole again, and stays where whoever reads it expects it.

        Args:
          source: Distinct PRIVATE full pages that have a window page each. They keep none.
          target: As many distinct full pages of `owner` that have none. Theirs become its.
          owner: Who holds the targets: the tree.

        Raises:
          OwnershipError: if a source is not PRIVATE, a target not of `owner`, or a page is named twice.
          ArgumentError: if the lists differ in length, a source has no window page, or a target has one.

        Cost: O(n). Snapshots end, as at a free.
        """
        require_owner("owner", owner)
        source, target = int32_array("source", source), int32_array("target", target)
        require_same_length(source=source, target=target)
        self._owners.require("source", source, PageState.PRIVATE, repeated=OwnershipError)
        self._owners.require("target", target, owner, repeated=OwnershipError)
        windows = self._full_to_window[source]
        _require_pages(windows > 0, "source: every page must have a window page, but page {} has none", source)
        has_none = self._full_to_window[target] == 0
        _require_pages(has_none, "target: every page must have no window page, but page {} has one", target)
        self._snapshots = []
        self._unmap(source, windows)
        self._map(target, windows)
        if owner is not PageState.PRIVATE:
            self.window.transfer(windows, PageState.PRIVATE, owner)

    # Free groups, snapshots and sorting, of both sides.

    def free_group_begin(self) -> None:
        """Opens a free group of both sides. Groups nest."""
        super().free_group_begin()
        self.window.free_group_begin()

    def free_group_end(self) -> None:
        """Closes a free group of both sides. As in the base class."""
        super().free_group_end()
        self.window.free_group_end()

    def backup_state(self) -> Snapshot:
        """Remembers both free lists, so that `restore_state` can take back every allocation made after this. O(1)."""
        window = self.window.backup_state()
        last = self._snapshots[-1] if self._snapshots else None
        if isinstance(last, SWASnapshot) and last.window is window and last.num_free == self._free.count:
            return last
        self._snapshots.append(SWASnapshot(self._free.head, self._free.count, window))
        return self._snapshots[-1]

    def restore_state(self, snapshot: Snapshot) -> None:
        """Un-allocates every page of both sides taken since `snapshot`. As in the base class.

        Raises:
          SnapshotError: also if a window page was freed or moved in between.
        """
        taken = self._taken_since(snapshot)
        if isinstance(snapshot, SWASnapshot):  # It is: it is one of this allocator's.
            self.window.restore_state(snapshot.window)
        super().restore_state(snapshot)
        self._unmap(taken, self._full_to_window[taken])

    def saved_books(self) -> Books:
        """The books of both sides, and the map. As in the base class."""
        both = super().saved_books() | prefixed("window", self.window.saved_books())
        return both | {"full_to_window": self._full_to_window.copy()}

    def restore_books(self, books: Columns) -> None:
        """Makes a new allocator what the one with these books was; the device is yet to be told of the map."""
        super().restore_books(books)
        self.window.restore_books(books.part("window"))
        windows = books.ints("full_to_window", self.num_pages + 1, high=self.window.num_pages)
        full = np.flatnonzero(windows)
        self._map(full.astype(np.int32), windows[full].astype(np.int32))
        try:
            self.check()
        except BrokenInvariant as problem:
            raise SnapshotError(f"full_to_window: {problem}") from problem

    def merge_and_sort_free(self) -> None:
        """Merges and sorts the free lists of both sides, as in the base class."""
        super().merge_and_sort_free()
        self.window.merge_and_sort_free()

    # Taking and giving back.

    def _take(self, n: int, sort_above: int, without_window: int = 0) -> np.ndarray | None:
        num_windows = n - without_window
        if self.window.available_size() < num_windows * self.page_size:
            return None
        pages = super()._take(n, sort_above)
        if pages is None:
            return None
        windows = self.window.alloc_pages(num_windows)
        if windows is None:
            raise BrokenInvariant(f"{num_windows} window pages are available, but cannot be taken")
        self._map(pages[without_window:], windows)
        return pages

    def _require_last_loc(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike) -> np.ndarray:
        slots = super()._require_last_loc(prefix_lens, seq_lens, last_loc)
        filled = slots[(prefix_lens % self.page_size > 0) & (seq_lens > prefix_lens)] // self.page_size
        rule = "last_loc: page {} is to be filled, but its window page was freed: the last tokens must keep theirs"
        _require_pages(self._full_to_window[filled] > 0, rule, filled)
        return slots

    def _release(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        super()._release(name, pages, owner)
        self._drop_windows(pages, owner)

    def _free_windows(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        self._owners.require(name, pages, owner, repeated=DoubleFreeError)
        self._drop_windows(pages, owner)

    def _drop_windows(self, pages: np.ndarray, owner: PageState) -> None:
        """Frees the window pages that these full pages of `owner`, which have been checked, have."""
        windows = self._full_to_window[pages]
        has_window = windows > 0
        windows = windows[has_window]
        self.window.release(windows, owner)
        self._unmap(pages[has_window], windows)

    def _map(self, pages: np.ndarray, windows: np.ndarray) -> None:
        """Pairs full with window pages."""
        self._full_to_window[pages] = windows
        self._window_to_full[windows] = pages
        self._changes.mark(pages.copy())  # The caller may write to its own array.

    def _unmap(self, pages: np.ndarray, windows: np.ndarray) -> None:
        """Forgets pairs of full and window pages."""
        self._full_to_window[pages] = 0
        self._window_to_full[windows] = 0
        self._changes.mark(pages.copy())


def _window_allocator(size_swa: int, page_size: int, need_sort: bool) -> BaseTokenToKVPoolAllocator:
    size_swa, page_size = as_count("size_swa", size_swa), as_count("page_size", page_size)
    if page_size == 0 or size_swa == 0 or size_swa % page_size:
        raise ArgumentError(
            f"size_swa must be a positive multiple of page_size, got size_swa = {size_swa}, page_size = {page_size}: "
            "round it to whole pages"
        )
    if page_size == 1:
        return TokenToKVPoolAllocator(size_swa, need_sort=need_sort)
    return PagedTokenToKVPoolAllocator(size_swa, page_size, need_sort=need_sort)


def _require_pages(holds: np.ndarray, rule: str, pages: np.ndarray) -> None:
    """Raises ArgumentError with the first page for which the rule does not hold."""
    if not holds.all():
        raise ArgumentError(rule.format(pages[holds.argmin()]))


def _whole_pages(name: str, slots: ArrayLike, page_size: int) -> np.ndarray:
    """The pages of these slots; raises ArgumentError if a page is not there whole and in order."""
    slots = int32_array(name, slots)
    pages = slots[::page_size] // page_size
    if not np.array_equal(slots, np.add.outer(pages * page_size, np.arange(page_size)).ravel()):
        raise ArgumentError(f"{name} must be whole pages: {page_size} consecutive slots from a multiple of {page_size}")
    return pages


def _odd(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """A few elements that only one side has, or that the first has twice."""
    values, counts = np.unique(mine, return_counts=True)
    return np.concatenate([np.setxor1d(values, theirs), values[counts > 1]])[:5]
