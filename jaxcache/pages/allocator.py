"""Who owns which page: the host's truth, in NumPy.

Every page has one state byte, and every call is checked against it before it changes anything, always:

            alloc                  transfer                     release, free
    FREE ----------> PRIVATE ------------------> TREE ... -----------------------> FREE
                        |     (any two owners)                (PENDING in between,
                        +-- restore_state --> FREE             inside a free group)

The allocator hands out integers. It never touches KV, never evicts, and waits for no device. A shortage is an answer
(`None`, and no page changes hands); a wrong use is an error, raised before anything has changed.

Source: SGLang 0.5.2 allocator.py (BaseTokenToKVPoolAllocator).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.errors import ArgumentError, DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.arguments import MAX_SLOTS, as_count, int32_array, require_rows
from jaxcache.pages.batch import batch_last_loc, batch_lengths
from jaxcache.pages.expand import distinct_pages, extend_slots, page_slots, pages_of
from jaxcache.pages.ownership import PageOwners, PageState, require_owner
from jaxcache.pages.ring import PageRing
from jaxcache.state_dict import Books, Columns

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8


_KEPT = (PageState.FREE, PageState.TREE, PageState.QUARANTINED, PageState.SINK)  # what survives its process


class FreeOrder(enum.Enum):
    """Where freed pages go in the free list; pages are taken from its front."""

    LIFO = "lifo"
    """To the front, ascending inside one call: pages used last are reused first."""
    FIFO = "fifo"
    """To the back, in the order given."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A point to which `restore_state` can return. Opaque; compared by identity."""

    head: int
    num_free: int


class CpuCopyable(Protocol):
    """What `get_cpu_copy` and `load_cpu_copy` need of a pool."""

    def get_cpu_copy(self, indices: Any) -> Any: ...
    def load_cpu_copy(self, cpu_copy: Any, indices: Any) -> CpuCopyable: ...


class BaseTokenToKVPoolAllocator(abc.ABC):
    """Allocates pages, and the slots in them, out of a free list of pages 1 .. `num_pages`.

    Subclasses choose the page size and the `free_order`, nothing else.

    Args:
      size: Usable slots, a multiple of `page_size`. Device buffers have `size + page_size` rows: page 0 is the sink.
      page_size: Slots a page.
      kvcache: The pool that the slots belong to; only remembered, for `get_kvcache` and the CPU copies.
      need_sort: Keep freed pages apart until the free list runs short, then sort. Makes long runs of neighbouring
        pages, which are cheap to transfer between machines.

    Attributes:
      size: As given, in slots.
      page_size: As given.
      num_pages: `size // page_size`.
      kvcache: As given; assign the new pool after a donated step consumed the old one.
      need_sort: As given.

    Raises:
      ArgumentError: if `size` is not a positive multiple of `page_size`, or slots would not fit int32.

    Not thread-safe: one scheduler thread owns it.
    """

    def __init__(
        self, size: int, page_size: int, *, kvcache: CpuCopyable | None = None, need_sort: bool = False
    ) -> None:
        self.size, self.page_size = as_count("size", size), as_count("page_size", page_size)
        if self.page_size == 0 or self.size == 0 or self.size % self.page_size:
            raise ArgumentError(
                f"size must be a positive multiple of page_size, got size = {size}, page_size = {page_size}: "
                "round size down to whole pages"
            )
        if self.size + self.page_size > MAX_SLOTS:
            raise ArgumentError(f"size + page_size must be at most 2**31 (slots are int32), got size = {size}")
        self.num_pages = self.size // self.page_size
        self.kvcache = kvcache
        self.need_sort = need_sort
        self._owners = PageOwners(self.num_pages)
        self._free = PageRing(self.num_pages)
        self.clear()

    @property
    @abc.abstractmethod
    def free_order(self) -> FreeOrder:
        """Where freed pages go in the free list."""

    def clear(self) -> None:
        """Frees every page and forgets open groups and snapshots; the free list ascends again. O(num_pages)."""
        self._owners.clear()
        self._free.reset(np.arange(1, self.num_pages + 1, dtype=np.int32))
        self._released: list[np.ndarray] = []  # Oldest call first; used with need_sort only.
        self._pending: list[np.ndarray] = []
        self._num_available = self.num_pages
        self._group_depth = 0
        self._snapshots: list[Snapshot] = []  # Those that can be restored, oldest first.

    # Books.

    @property
    def states(self) -> UInt8[np.ndarray, " num_pages+1"]:
        """The `PageState` of every page, index = page id. A live, read-only view."""
        return self._owners.states

    def available_size(self) -> int:
        """Slots that `alloc` could hand out now: free, released and pending ones. O(1)."""
        return self._num_available * self.page_size

    def full_available_size(self) -> int:
        """`available_size` of the full-attention side, where there are two. O(1)."""
        return self.available_size()

    def pending_size(self) -> int:
        """Slots freed inside the open free group."""
        return sum(map(len, self._pending)) * self.page_size

    @property
    def free_pages(self) -> Int32[np.ndarray, " free"]:
        """A copy of the free list, in the order in which pages will be taken. O(free)."""
        return self._free.peek(self._free.head, self._free.count)

    @property
    def release_pages(self) -> Int32[np.ndarray, " released"]:
        """A copy of the pages that wait for the next sort (always empty without `need_sort`), in order. O(released)."""
        newest_first = self.free_order is FreeOrder.LIFO
        return _concatenate(self._released[::-1] if newest_first else self._released)

    def owner_of(self, pages: ArrayLike) -> UInt8[np.ndarray, " n"]:
        """The `PageState` of each page, 0 .. `num_pages`. O(n)."""
        pages = int32_array("pages", pages)
        self._owners.require_in_range("pages", pages, lowest=0)
        return self._owners.states[pages]

    def count(self, state: PageState) -> int:
        """Number of pages in `state`. O(num_pages)."""
        return int(np.count_nonzero(self.states == state))

    def debug_print(self) -> str:
        """One line with the number of pages in each state."""
        counts = ", ".join(f"{self.count(state)} {state.name.lower()}" for state in PageState)
        return f"{type(self).__name__}: {self.num_pages} pages of {self.page_size}: {counts}"

    # Pages.

    def alloc_pages(self, n: int) -> Int32[np.ndarray, " n"] | None:
        """Takes `n` pages from the front of the free list; they become PRIVATE. The caller frees them.

        Returns:
          Page ids in free-list order, or None if fewer than `n` are available (no page changes hands).

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
          ArgumentError: if `pages` is no list of integers, or `owner` cannot own pages.

        Cost: O(n) (O(n log n) to order them, where the free order is LIFO), whatever the size of the pool.
        """
        require_owner("owner", owner)
        self._release("pages", int32_array("pages", pages), owner)

    def transfer(self, pages: ArrayLike, source: PageState, target: PageState) -> None:
        """Passes pages from one owner to another, as when the tree adopts a request's pages.

        Args:
          pages: Distinct page ids, all of them `source`'s.
          source: Who has them.
          target: Who gets them.

        Raises:
          OwnershipError: if a page is not `source`'s, is named twice, or is no page of this allocator.
          ArgumentError: if `pages` is no list of integers, or `source` or `target` cannot own pages.

        Cost: O(n).
        """
        pages = int32_array("pages", pages)
        require_owner("source", source)
        require_owner("target", target)
        rows = self._owners.require("pages", pages, source, repeated=OwnershipError)
        self._owners.assign(rows, target)

    def require_owned(self, pages: Int32[np.ndarray, " n"], owner: PageState) -> None:
        """Raises unless `owner` has all of these pages and none is named twice. O(n).

        Raises:
          DoubleFreeError, OwnershipError: as `transfer`.
        """
        self._owners.require("pages", pages, owner, repeated=OwnershipError)

    # Slots: the names and results of SGLang.

    def alloc(self, need_size: int) -> Int32[np.ndarray, " need_size"] | None:
        """Slots of `need_size // page_size` fresh pages, page after page, or None if there are too few.

        Raises:
          ArgumentError: if `need_size` is not a multiple of `page_size`.
        """
        num_pages, rest = divmod(as_count("need_size", need_size), self.page_size)
        if rest:
            raise ArgumentError(
                f"need_size must be a multiple of page_size = {self.page_size}, got {need_size}: "
                "round it up, or use alloc_extend for a part of a page"
            )
        pages = self._take(num_pages, sort_above=num_pages)
        return None if pages is None else page_slots(pages, self.page_size)

    def alloc_extend(
        self, prefix_lens: ArrayLike, seq_lens: ArrayLike, last_loc: ArrayLike, extend_num_tokens: int
    ) -> Int32[np.ndarray, " extend_num_tokens"] | None:
        """Slots of the tokens that extend each request of a batch; its last page is filled before fresh ones are taken.

        Args:
          prefix_lens: int (bs,), tokens of each request that have a slot already.
          seq_lens: int (bs,), tokens of each request afterwards, `>= prefix_lens`.
          last_loc: int (bs,), slot of token `prefix_lens - 1`, or -1 exactly where the prefix is empty.
          extend_num_tokens: `sum(seq_lens - prefix_lens)`.

        Returns:
          The slots, request after request; None if there are too few pages (no page changes hands).

        Raises:
          ArgumentError: if the arguments contradict each other.
          OwnershipError: if `last_loc` lies in a page that nobody holds; or if its page is about to be filled, but is
            not PRIVATE, or is the last page of two requests.

        Cost: O(bs + pages + tokens). The pages are taken as by `extend_pages`.
        """
        prefix_lens, seq_lens = batch_lengths(prefix_lens, seq_lens, self.page_size)
        num_tokens = int((seq_lens - prefix_lens).sum())
        if as_count("extend_num_tokens", extend_num_tokens) != num_tokens:
            raise ArgumentError(
                f"extend_num_tokens must be sum(seq_lens - prefix_lens) = {num_tokens}, got {extend_num_tokens}"
            )
        last_loc = self._require_last_loc(prefix_lens, seq_lens, last_loc)
        pages = self._take_extension(prefix_lens, seq_lens, num_tokens)
        return None if pages is None else extend_slots(prefix_lens, seq_lens, last_loc, pages, self.page_size)

    def extend_pages(self, prefix_lens: ArrayLike, seq_lens: ArrayLike) -> Int32[np.ndarray, " new_pages"] | None:
        """The pages that `alloc_extend` would take, without the slots: those are left to `kernels.alloc_extend`.

        Args:
          prefix_lens: int (bs,), tokens of each request that have a slot already.
          seq_lens: int (bs,), tokens of each request afterwards, `>= prefix_lens`.

        Returns:
          New pages, each request's after those of the requests before it, now PRIVATE; None if there are too few.

        Raises:
          ArgumentError: if the arguments contradict each other.
        """
        prefix_lens, seq_lens = batch_lengths(prefix_lens, seq_lens, self.page_size)
        return self._take_extension(prefix_lens, seq_lens, int((seq_lens - prefix_lens).sum()))

    def alloc_decode(self, seq_lens: ArrayLike, last_loc: ArrayLike) -> Int32[np.ndarray, " bs"] | None:
        """Slot of one more token for each request.

        Args:
          seq_lens: int (bs,), length of each request with the new token counted.
          last_loc: int (bs,), slot of token `seq_lens - 2`, or -1 exactly where there is none.

        Returns:
          One slot a request; None if there are too few pages (no page changes hands).

        Raises:
          ArgumentError, OwnershipError: as `alloc_extend`.

        Cost: O(bs).
        """
        seq_lens = int32_array("seq_lens", seq_lens)
        require_rows(seq_lens > 0, "seq_lens must count the new token, so be at least 1", seq_lens=seq_lens)
        prefix_lens = seq_lens - 1
        last_loc = self._require_last_loc(prefix_lens, seq_lens, last_loc)
        starts_page = prefix_lens % self.page_size == 0
        pages = self._take(int(np.count_nonzero(starts_page)), sort_above=len(seq_lens))
        if pages is None:
            return None
        slots = last_loc + 1
        slots[starts_page] = pages * np.int32(self.page_size)
        return slots

    def free(self, free_index: ArrayLike) -> None:
        """Frees the PRIVATE pages of these slots. A page has one owner, so any one of its slots frees all of it.

        Raises:
          DoubleFreeError: if a page is free (or pending) already; with pages of one slot also if a slot is named twice.
          OwnershipError: if a page is not PRIVATE (the tree's pages go back through `release`) or cannot be owned.
          ArgumentError: if `free_index` is no list of integers.

        Cost: O(n) to find the pages, then as `release`.
        """
        slots = int32_array("free_index", free_index)
        pages = slots if self.page_size == 1 else distinct_pages(slots, self.page_size)
        self._release("free_index", pages, PageState.PRIVATE)

    # Free groups.

    def free_group_begin(self) -> None:
        """Opens a free group: what is freed until its end joins the free list in one step. Groups nest."""
        self._group_depth += 1

    def free_group_end(self) -> None:
        """Closes a free group. At the end of the outermost one the pending pages join the free list, ordered together.

        Raises:
          ArgumentError: if no group is open.
        """
        if self._group_depth == 0:
            raise ArgumentError("free_group_end needs an open free group, there is none: call free_group_begin first")
        self._group_depth -= 1
        if self._group_depth == 0:
            self._join_pending()

    @contextlib.contextmanager
    def free_group(self) -> Iterator[None]:
        """A free group around a `with` block; it ends when the block raises, too."""
        self.free_group_begin()
        try:
            yield
        finally:
            if self._group_depth:  # Else `clear` ended it.
                self.free_group_end()

    # Snapshots.

    def backup_state(self) -> Snapshot:
        """Remembers the free list, so that `restore_state` can take back every allocation made after this. O(1)."""
        if not (self._snapshots and self._snapshots[-1].num_free == self._free.count):
            self._snapshots.append(Snapshot(self._free.head, self._free.count))
        return self._snapshots[-1]

    def restore_state(self, snapshot: Snapshot) -> None:
        """Un-allocates every page taken since `snapshot`, as after rejected draft tokens. The snapshot stays good.

        Raises:
          SnapshotError: if this cannot be done exactly: a page was freed, the free list was sorted or an older snapshot
            was restored in between; a page taken since has changed owner; a free group is open; or the snapshot is
            another allocator's.

        Cost: O(pages taken since).
        """
        taken = self._taken_since(snapshot)
        self._owners.assign(taken, PageState.FREE)
        self._num_available += len(taken)
        self._free.rewind(snapshot.head, snapshot.num_free)
        del self._snapshots[self._snapshots.index(snapshot) + 1 :]

    def _taken_since(self, snapshot: Snapshot) -> np.ndarray:
        """The pages that restoring `snapshot` un-allocates. Raises SnapshotError if it cannot be done exactly."""
        if self._group_depth:
            raise SnapshotError("a snapshot must not be restored inside a free group: call free_group_end first")
        if snapshot not in self._snapshots:
            raise SnapshotError(
                "snapshot must be one of this allocator's, with no page freed or sorted and no older snapshot restored "
                f"since, got {snapshot}: free what was allocated since instead"
            )
        taken = self._free.peek(snapshot.head, snapshot.num_free - self._free.count)
        moved = taken[self.states[taken] != PageState.PRIVATE]
        if len(moved):
            raise SnapshotError(
                "every page taken since the snapshot must still be PRIVATE, but "
                f"{self._owners.describe(int(moved[0]))}: free what was allocated since instead"
            )
        return taken

    # Snapshots of the whole cache.

    def saved_books(self) -> Books:
        """Who owns which page, and the order in which free ones will be taken. O(num_pages).

        Raises:
          SnapshotError: if a page is somebody's who will not be there to free it: PRIVATE, IN_FLIGHT or PENDING.
        """
        theirs = np.flatnonzero(~np.isin(self.states, _KEPT))
        if len(theirs):
            raise SnapshotError(
                f"{len(theirs)} pages are neither free nor the tree's: {self._owners.describe(int(theirs[0]))}, for "
                "one; free them first"
            )
        return {"states": self.states.copy(), "free": self.free_pages, "released": self.release_pages}

    def restore_books(self, books: Columns) -> None:
        """Makes a new allocator what the one with these books was. O(num_pages log num_pages).

        Raises:
          SnapshotError: if these are no books of an allocator of this size. The allocator is of no use then.
        """
        states = books.ints("states", self.num_pages + 1, high=PageState.SINK)
        free, released = books.ints("free", high=self.num_pages), books.ints("released", high=self.num_pages)
        are_free = np.flatnonzero(states == PageState.FREE)
        is_kept = states[0] == PageState.SINK and np.isin(states[1:], _KEPT[:-1]).all()
        if not is_kept or not np.array_equal(np.sort(np.concatenate([free, released])), are_free):
            raise SnapshotError(
                "states, free: every page must be the tree's, withheld, or once in the list of free ones"
            )
        self._owners.assign(np.arange(self.num_pages + 1), states)
        self._free.reset(free)
        self._released = [released.astype(np.int32)] if len(released) else []
        self._num_available = len(are_free)

    # Sorting.

    def merge_and_sort_free(self) -> None:
        """Merges the released pages into the free list and sorts it, if there are any. O(num_pages)."""
        if not self._released:
            return
        self._released = []
        self._snapshots = []
        self._free.reset(np.flatnonzero(self.states == PageState.FREE))

    # The pool.

    def get_kvcache(self) -> CpuCopyable | None:
        """The pool that this allocator was last told of."""
        return self.kvcache

    def get_cpu_copy(self, indices: ArrayLike) -> Any:
        """The pool's CPU copy of these slots; see the pool's method of the same name."""
        return self._require_kvcache().get_cpu_copy(indices)

    def load_cpu_copy(self, kv_cache_cpu: Any, indices: ArrayLike) -> CpuCopyable:
        """Writes a CPU copy into these slots.

        Returns:
          The new pool; `kvcache` is set to it. Pools are functional: the old one was donated, do not use it again.
        """
        self.kvcache = self._require_kvcache().load_cpu_copy(kv_cache_cpu, indices)
        return self.kvcache

    def _require_kvcache(self) -> CpuCopyable:
        if self.kvcache is None:
            raise ArgumentError("CPU copies need a pool, but this allocator has none: construct it with kvcache=")
        return self.kvcache

    # Taking and giving back.

    def _take(self, n: int, sort_above: int) -> np.ndarray | None:
        """Takes `n` pages, or None. With `need_sort`, sorts first if the free list has fewer than `sort_above`."""
        if self.need_sort and sort_above > self._free.count:
            self.merge_and_sort_free()
        if self._free.count < n <= self._num_available:
            self._join_pending()
            self.merge_and_sort_free()
        if n > self._free.count:
            return None
        pages = self._free.take(n)
        self._num_available -= n
        self._owners.assign(pages, PageState.PRIVATE)
        return pages

    def _require_last_loc(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike) -> np.ndarray:
        """`last_loc` as int32; raises unless each request can go on behind it."""
        return batch_last_loc(prefix_lens, seq_lens, last_loc, self.page_size, self._owners)

    def _take_extension(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, num_tokens: int) -> np.ndarray | None:
        new_pages = int((pages_of(seq_lens, self.page_size) - pages_of(prefix_lens, self.page_size)).sum())
        return self._take(new_pages, sort_above=num_tokens // self.page_size + len(seq_lens) + 1)

    def _release(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        pages = self._in_free_order(pages)  # Not the caller's array: it may go on writing to that.
        rows = self._owners.require(name, pages, owner, repeated=DoubleFreeError)
        if len(pages) == 0:
            return
        self._num_available += len(pages)
        if self._group_depth:
            self._owners.assign(rows, PageState.PENDING)
            self._pending.append(pages)
        else:
            self._owners.assign(rows, PageState.FREE)
            self._recycle(pages)

    def _join_pending(self) -> None:
        """Moves all pending pages to the free list (or the released ones), as if one call had freed them."""
        if not self._pending:
            return
        pages = self._in_free_order(_concatenate(self._pending))
        self._pending = []
        self._owners.assign(pages, PageState.FREE)
        self._recycle(pages)

    def _in_free_order(self, pages: np.ndarray) -> np.ndarray:
        """The pages of one call in the order in which they join the free list, in an array of their own."""
        return np.sort(pages) if self.free_order is FreeOrder.LIFO else pages.copy()

    def _recycle(self, pages: np.ndarray) -> None:
        """Puts pages, which are FREE now and in free order, where `_take` finds them."""
        self._snapshots = []
        if self.need_sort:
            self._released.append(pages)
        elif self.free_order is FreeOrder.LIFO:
            self._free.put_front(pages)
        else:
            self._free.put_back(pages)


def _concatenate(chunks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
