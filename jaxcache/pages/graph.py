"""The allocator as a pytree, for steps that allocate without leaving the graph: several decode steps in one `lax.scan`.

Fed the same calls, it and the host's allocator have the same free list and give the same slots. That is how the host
keeps up: it makes the calls itself, and reads nothing from the device. What a graph cannot do is raise: there are no
state bytes here, it is the host's calls that find a wrong use.

Source: SGLang 0.5.2 allocator.py, made functional.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.device.placing import on_device
from jaxcache.errors import ArgumentError
from jaxcache.kernels import alloc_pages
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, FreeOrder

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageAllocatorState:
    """A ring of free pages. Immutable: every method returns a new state, and works in `jit` and `scan`.

    Attributes:
      ring: int32 (num_pages,), the free pages at positions `head` .. `head + count - 1`, modulo num_pages.
      head: int32 scalar, position of the page that is taken next.
      count: int32 scalar, number of free pages.
      page_size: Slots a page; static.
      free_order: Where freed pages go; static.
    """

    ring: Int32[Array, " num_pages"]
    head: Int32[Array, ""]
    count: Int32[Array, ""]
    page_size: int = dataclasses.field(metadata={"static": True})
    free_order: FreeOrder = dataclasses.field(metadata={"static": True})

    def alloc_pages(
        self, n: Int32[Array, ""] | int, *, most: int
    ) -> tuple[PageAllocatorState, Int32[Array, " most"], Bool[Array, ""]]:
        """`BaseTokenToKVPoolAllocator.alloc_pages` in the graph.

        Args:
          n: Number of pages, at most `most`.
          most: Length of the result, but for a pool of fewer pages; static.

        Returns:
          The new state; the pages in free-list order, then page 0; and whether it worked. It does not if pages are
          short or `n` is not in [0, most]: then the state is unchanged and all pages are 0.

        Cost: O(most), whatever the size of the pool.
        """
        n, front = jnp.asarray(n, jnp.int32), self._front(most)
        pages = jnp.where(jnp.arange(front.shape[0], dtype=jnp.int32) < n, front, 0)
        return self._taken(n, pages, (n >= 0) & (n <= most))

    def alloc_extend(
        self,
        prefix_lens: Int32[Array, " bs"],
        seq_lens: Int32[Array, " bs"],
        last_loc: Int32[Array, " bs"],
        *,
        num_tokens: int,
    ) -> tuple[PageAllocatorState, Int32[Array, " num_tokens"], Bool[Array, ""]]:
        """`BaseTokenToKVPoolAllocator.alloc_extend` in the graph.

        Args:
          prefix_lens: Tokens of each request that have a slot already.
          seq_lens: Tokens of each request afterwards. A padding row has `seq_lens == prefix_lens`.
          last_loc: Slot of token `prefix_lens - 1`, -1 where the prefix is empty. Trusted.
          num_tokens: Length of the result, at least `sum(seq_lens - prefix_lens)`; static.

        Returns:
          The new state; the slots, request after request, then slot 0; and whether it worked. It does not if pages are
          short, lengths are not `0 <= prefix_lens <= seq_lens`, or `num_tokens` is too small: then the state is
          unchanged and all slots are 0.

        Cost: O(bs + num_tokens), whatever the size of the pool.
        """
        before, after = -(-prefix_lens // self.page_size), -(-seq_lens // self.page_size)
        most_pages = num_tokens // self.page_size + prefix_lens.shape[0]
        slots = alloc_pages.alloc_extend(
            prefix_lens, seq_lens, last_loc, self._front(most_pages), page_size=self.page_size, num_tokens=num_tokens
        )
        fits = jnp.sum(seq_lens - prefix_lens, dtype=jnp.int32) <= num_tokens
        valid = jnp.all((prefix_lens >= 0) & (seq_lens >= prefix_lens)) & fits
        return self._taken(jnp.sum(after - before, dtype=jnp.int32), slots, valid)

    def alloc_decode(
        self, seq_lens: Int32[Array, " bs"], last_loc: Int32[Array, " bs"]
    ) -> tuple[PageAllocatorState, Int32[Array, " bs"], Bool[Array, ""]]:
        """`BaseTokenToKVPoolAllocator.alloc_decode` in the graph.

        Args:
          seq_lens: Length of each request with the new token counted. 0 marks a padding row.
          last_loc: Slot of token `seq_lens - 2`, -1 where there is none. Trusted.

        Returns:
          The new state; one slot a row, 0 for padding; and whether it worked. It does not if pages are short or a
          length is negative: then the state is unchanged and all slots are 0.

        Cost: O(bs), whatever the size of the pool.
        """
        slots = alloc_pages.alloc_decode(seq_lens, last_loc, self._front(seq_lens.shape[0]), page_size=self.page_size)
        starts_page = (seq_lens > 0) & ((seq_lens - 1) % self.page_size == 0)
        return self._taken(jnp.sum(starts_page, dtype=jnp.int32), slots, jnp.all(seq_lens >= 0))

    def free(self, pages: Int32[Array, " n"], count: Int32[Array, ""] | int) -> PageAllocatorState:
        """`BaseTokenToKVPoolAllocator.release` in the graph, unchecked.

        Args:
          pages: Distinct pages, none of them free, padded with 0 behind the first `count`.
          count: How many there are.

        Returns:
          The new state. More pages than can be in use are not freed at all: a lost page is better than one with two
          owners.

        Cost: O(n log n); the ring is updated in place where the caller's step lets XLA (as a scan does).
        """
        size = self.ring.shape[0]
        count = jnp.clip(jnp.asarray(count, jnp.int32), 0, pages.shape[0])
        count = jnp.where(self.count + count <= size, count, 0)
        order = jnp.arange(pages.shape[0], dtype=jnp.int32)
        given = order < count
        head, start = self.head, self.head + self.count
        if self.free_order is FreeOrder.LIFO:
            pages = jnp.sort(jnp.where(given, pages, jnp.iinfo(jnp.int32).max))
            head = start = (self.head - count) % size
        ring = self.ring.at[jnp.where(given, (start + order) % size, size)].set(pages, mode="drop")
        return dataclasses.replace(self, ring=ring, head=head, count=self.count + count)

    def _front(self, most: int) -> Int32[Array, " most"]:
        """The next `most` pages, fewer if there are not that many at all; those past `count` are not free."""
        size = self.ring.shape[0]
        return self.ring[(self.head + jnp.arange(min(most, size), dtype=jnp.int32)) % size]

    def _taken(
        self, num_pages: Int32[Array, ""], slots: Int32[Array, " n"], valid: Bool[Array, ""]
    ) -> tuple[PageAllocatorState, Int32[Array, " n"], Bool[Array, ""]]:
        """The state without its first `num_pages` pages, if there are as many, and the slots in them."""
        ok = valid & (num_pages <= self.count)
        num_pages = jnp.where(ok, num_pages, 0)
        head = (self.head + num_pages) % self.ring.shape[0]
        state = dataclasses.replace(self, head=head, count=self.count - num_pages)
        return state, jnp.where(ok, slots, alloc_pages.SINK_SLOT), ok


def state_of(allocator: BaseTokenToKVPoolAllocator) -> PageAllocatorState:
    """The state with the same free list as `allocator`, on the default device.

    Raises:
      ArgumentError: if the allocator has `need_sort` (the graph does not sort) or pages pending in a free group.

    Cost: uploads `num_pages` int32; meant for once per session, not per step.
    """
    if allocator.need_sort:
        raise ArgumentError("allocator must have need_sort=False, got True: the in-graph free list is never sorted")
    if allocator.pending_size():
        pending = allocator.pending_size()
        raise ArgumentError(f"allocator must have no pending pages, got {pending} slots of them: end the free group")
    free = allocator.free_pages
    ring = np.zeros(allocator.num_pages, np.int32)
    ring[: len(free)] = free
    return PageAllocatorState(
        ring=on_device(ring),
        head=on_device(np.int32(0)),
        count=on_device(np.int32(len(free))),
        page_size=allocator.page_size,
        free_order=allocator.free_order,
    )
