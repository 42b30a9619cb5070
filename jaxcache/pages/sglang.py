"""SGLang's names on allocators: slots instead of pages, free groups as a begin and an end, and the pool's CPU copies.

Nothing else in jaxcache calls them: caches and manager give and take pages. They stand beside the allocators and not in
`compat/`, because users call them on the allocators' own classes, whose base this is: a class cannot have methods of
a room that lies above its own.

Source: SGLang 0.5.2 allocator.py (BaseTokenToKVPoolAllocator, TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator).
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import as_count, as_int32, require_rows
from jaxcache.errors import ArgumentError
from jaxcache.pages.batch import batch_lengths
from jaxcache.pages.expand import extend_slots
from jaxcache.pages.ownership import PageState
from jaxcache.slots import distinct_pages, page_slots, pages_of

if TYPE_CHECKING:
    from jaxtyping import Int32


class CpuCopyable(Protocol):
    """What `get_cpu_copy` and `load_cpu_copy` need of a pool."""

    def get_cpu_copy(self, indices: Any) -> Any: ...
    def load_cpu_copy(self, cpu_copy: Any, indices: Any) -> CpuCopyable: ...


class PoolHolder(Protocol):
    """The one place of a pool, which every update replaces."""

    pool: Any


class _Place:
    """The place of a pool that was handed to an allocator."""

    def __init__(self, pool: CpuCopyable | None):
        self.pool = pool


class SGLangNames(abc.ABC):
    """Calls in slots, over an allocator that gives and takes pages.

    Args:
      page_size: Slots a page.
      kvcache: The pool that the slots belong to.
    """

    def __init__(self, page_size: int, kvcache: CpuCopyable | None):
        self.page_size = page_size
        self._pool_holder: PoolHolder = _Place(kvcache)

    # What an allocator gives and takes.

    @abc.abstractmethod
    def _take(self, n: int, sort_above: int) -> Int32[np.ndarray, " n"] | None:
        """Takes `n` pages, or None and nothing has changed.

        With `need_sort`, sorts first if fewer than `sort_above` are ready.
        """

    @abc.abstractmethod
    def _release(self, name: str, pages: Int32[np.ndarray, " n"], owner: PageState) -> None:
        """Frees the pages of the argument `name`, which `owner` holds."""

    @abc.abstractmethod
    def _require_last_loc(self, prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike) -> np.ndarray:
        """`last_loc` as int32; raises unless each request can go on behind it."""

    @abc.abstractmethod
    def free_group_begin(self) -> None:
        """Opens a free group: what is freed until its end joins the free list in one step. Groups nest."""

    @abc.abstractmethod
    def free_group_end(self) -> None:
        """Closes a free group. At the end of the outermost one the pending pages join the free list, ordered together.

        Raises:
          ArgumentError: if no group is open.
        """

    @property
    @abc.abstractmethod
    def in_free_group(self) -> bool:
        """Whether a free group is open."""

    # Slots.

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
          The slots, request after request; None if there are too few pages (nothing has changed).

        Raises:
          ArgumentError: if the arguments contradict each other.
          OwnershipError: if `last_loc` lies in a page without an owner; or if its page is about to be filled, but is
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
        pages = self._take_extension(prefix_lens, seq_lens)
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
        return self._take_extension(*batch_lengths(prefix_lens, seq_lens, self.page_size))

    def _take_extension(self, prefix_lens: np.ndarray, seq_lens: np.ndarray) -> np.ndarray | None:
        new_pages = int((pages_of(seq_lens, self.page_size) - pages_of(prefix_lens, self.page_size)).sum())
        num_tokens = int((seq_lens - prefix_lens).sum())
        return self._take(new_pages, sort_above=num_tokens // self.page_size + len(seq_lens) + 1)

    def alloc_decode(self, seq_lens: ArrayLike, last_loc: ArrayLike) -> Int32[np.ndarray, " bs"] | None:
        """Slot of one more token for each request.

        Args:
          seq_lens: int (bs,), length of each request with the new token counted.
          last_loc: int (bs,), slot of token `seq_lens - 2`, or -1 exactly where there is none.

        Returns:
          One slot a request; None if there are too few pages (nothing has changed).

        Raises:
          ArgumentError, OwnershipError: as `alloc_extend`.

        Cost: O(bs).
        """
        seq_lens = as_int32("seq_lens", seq_lens)
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
          ArgumentError: if `free_index` is not a list of integers.

        Cost: O(n) to find the pages, then as `release`.
        """
        slots = as_int32("free_index", free_index)
        pages = slots if self.page_size == 1 else distinct_pages(slots, self.page_size)
        self._release("free_index", pages, PageState.PRIVATE)

    @contextlib.contextmanager
    def free_group(self) -> Iterator[None]:
        """A free group around a `with` block; it ends when the block raises, too."""
        self.free_group_begin()
        try:
            yield
        finally:
            if self.in_free_group:  # Else `clear` ended it.
                self.free_group_end()

    # The pool.

    @property
    def kvcache(self) -> CpuCopyable | None:
        """The pool that the slots belong to: the manager's present one, or else the one that was last set; or None."""
        return self._pool_holder.pool

    @kvcache.setter
    def kvcache(self, pool: CpuCopyable | None) -> None:
        self._pool_holder.pool = pool

    def follow_pool(self, holder: PoolHolder) -> None:
        """From now on the pool is what `holder` has at the time. A manager's allocator follows its runner."""
        self._pool_holder = holder

    def get_kvcache(self) -> CpuCopyable | None:
        """`kvcache`, by SGLang's name."""
        return self.kvcache

    def get_cpu_copy(self, indices: ArrayLike) -> Any:
        """The pool's CPU copy of these slots; see the pool's method of the same name."""
        return self._require_kvcache().get_cpu_copy(indices)

    def load_cpu_copy(self, kv_cache_cpu: Any, indices: ArrayLike) -> CpuCopyable:
        """Writes a CPU copy into these slots.

        Returns:
          The new pool; `kvcache` is set to it. Pools are functional: the old one was donated, do not use it again.
        """
        pool = self.kvcache = self._require_kvcache().load_cpu_copy(kv_cache_cpu, indices)
        return pool

    def _require_kvcache(self) -> CpuCopyable:
        pool = self.kvcache
        if pool is None:
            raise ArgumentError("CPU copies need a pool, but this allocator has none: construct it with kvcache=")
        return pool
