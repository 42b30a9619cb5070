"""What a retracted request keeps in host memory, so that nothing has to be computed again.

    tokens    0 ......... holes ......... num_tokens        full layers: all of them
                          | window layers |                 window layers: those whose window pages are still there
                                          state             recurrent layers: the state after the last token

Source: SGLang 0.5.2 memory_pool.py, get_cpu_copy and load_cpu_copy, as its decode servers use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcache.caches.base import expand_pages
from jaxcache.errors import ArgumentError
from jaxcache.index.key import RadixKey
from jaxcache.pages.base import BaseTokenToKVPoolAllocator
from jaxcache.pages.swa import SWATokenToKVPoolAllocator
from jaxcache.pools.copies import PoolCopy
from jaxcache.pools.hybrid import HybridCpuCopy, HybridKVPool
from jaxcache.pools.stack import MemoryPool
from jaxcache.pools.swa import SWAKVPool
from jaxcache.request import HostCopy


@dataclass(frozen=True, eq=False)
class KeptCopy(HostCopy):
    """KV, and the state if there is one, of the first tokens of a request, in host memory.

    Attributes:
      page_size: Tokens a page.
      holes: Pages from the start that had no window page.
      rows: Their rows, and the state after the last of them.
    """

    page_size: int
    holes: int
    rows: PoolCopy

    @classmethod
    def of(
        cls, key: RadixKey, pool: MemoryPool, page_size: int, pages: np.ndarray, windows: np.ndarray, state: int
    ) -> KeptCopy:
        """Copies the tokens of `key`, which are in `pages`. Blocks until done.

        Args:
          key: Their tokens, in their namespace.
          pool: Read, not consumed.
          page_size: Tokens a page.
          pages: Full pages.
          windows: Window page of each of them, 0 for none; empty without window layers.
          state: The request's state; 0 without states.
        """
        slots = expand_pages(pages, page_size)[: len(key)]
        without = np.flatnonzero(windows == 0)
        holes = int(without[-1]) + 1 if len(without) else 0
        if isinstance(pool, HybridKVPool):
            return cls(key, page_size, holes, pool.get_cpu_copy(slots, np.array([state], np.int32)))
        return cls(key, page_size, holes, pool.get_cpu_copy(slots))

    @property
    def num_tokens(self) -> int:
        """Tokens copied."""
        return len(self.key)

    def require_fitting(self, rid: str, pool: MemoryPool, page_size: int) -> None:
        """Raises ArgumentError unless this can be loaded into `pool`: it is of the same layers, rows, dtype and pages.

        Whether the weights are the same is the caller's to know.
        """
        remedy = "set its cpu_copy to None, and it is computed again"
        if self.page_size != page_size:
            raise ArgumentError(
                f"request {rid} has a host copy in pages of {self.page_size}, here they have {page_size}: {remedy}"
            )
        try:
            pool.require_copy_of_such(self.rows)
        except ArgumentError as error:
            raise ArgumentError(f"request {rid} has a host copy from elsewhere: {error}; {remedy}") from error

    def worth(self, most: int) -> int:
        """How many tokens a request that may have `most` gets from this: a state is of use at its own position only."""
        if isinstance(self.rows, HybridCpuCopy) and self.num_tokens > most:
            return 0
        return min(self.num_tokens, most)

    def without_window(self, first_page: int, num_pages: int) -> int:
        """How many of so many copied pages from `first_page` on, the first ones, need no window page."""
        return min(max(self.holes - first_page, 0), num_pages)

    def take_pages(self, allocator: BaseTokenToKVPoolAllocator, first_page: int, num_pages: int) -> np.ndarray | None:
        """Fresh pages for the copied tokens from page `first_page` on; without window pages where none were copied."""
        if isinstance(allocator, SWATokenToKVPoolAllocator):
            return allocator.alloc_pages(num_pages, without_window=self.without_window(first_page, num_pages))
        return allocator.alloc_pages(num_pages)

    def loaded(self, pool: MemoryPool, start: int, stop: int, pages: np.ndarray, state: int) -> Any:
        """The pool with the tokens `[start, stop)` in fresh pages, and the state in `state`; consumes the old one."""
        slots = expand_pages(pages, self.page_size)[: stop - start]
        rows: Any = self.rows.tokens(start, stop)
        if isinstance(pool, HybridKVPool):
            return pool.load_cpu_copy(rows, slots, np.array([state], np.int32))
        return pool.load_cpu_copy(rows, slots)


def warmed_up(pool: MemoryPool) -> MemoryPool:
    """The pool, consumed and given back unchanged, with all that copies from and to it need compiled."""
    if isinstance(pool, HybridKVPool):
        return pool.with_kv(warmed_up(pool.kv)).with_states(_round_trip(pool.states))
    if isinstance(pool, SWAKVPool):
        return pool.with_full(_round_trip(pool.full)).with_window(_round_trip(pool.window))
    return _round_trip(pool)


def _round_trip(pool: Any) -> Any:
    return pool.load_cpu_copy(pool.get_cpu_copy([0]), [0])
