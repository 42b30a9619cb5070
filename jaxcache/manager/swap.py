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

from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.stack import MemoryPool
from jaxcache.pools.swa import SWAKVPool
from jaxcache.slots import page_slots


@dataclass(frozen=True, eq=False)
class KeptCopy:
    """KV, and the state if there is one, of the first tokens of a request, in host memory.

    Attributes:
      num_tokens: Tokens copied.
      page_size: Tokens a page.
      holes: Pages from the start that had no window page.
      kv: Their rows.
      state: The state after the last of them.
    """

    num_tokens: int
    page_size: int
    holes: int
    kv: Any
    state: Any

    @classmethod
    def of(
        cls, pool: MemoryPool, page_size: int, pages: np.ndarray, num_tokens: int, windows: np.ndarray, state: int
    ) -> KeptCopy:
        """Copies the first `num_tokens` tokens in `pages`. Blocks until done.

        Args:
          pool: Read, not consumed.
          page_size: Tokens a page.
          pages: Full pages.
          num_tokens: Tokens in them.
          windows: Window page of each of them, 0 for none; empty without window layers.
          state: The request's state; 0 without states.
        """
        slots = page_slots(pages, page_size)[:num_tokens]
        without = np.flatnonzero(windows == 0)
        holes = int(without[-1]) + 1 if len(without) else 0
        if not isinstance(pool, HybridKVPool):
            return cls(num_tokens, page_size, holes, pool.get_cpu_copy(slots), None)
        kept_state = pool.states.get_cpu_copy(np.array([state], np.int32))
        return cls(num_tokens, page_size, holes, pool.kv.get_cpu_copy(slots), kept_state)

    def worth(self, most: int) -> int:
        """How many tokens a request that may have `most` gets from this: a state is of use at its own position only."""
        if self.state is not None and self.num_tokens > most:
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
        slots = page_slots(pages, self.page_size)[: stop - start]
        part = self.kv.tokens(start, stop)
        if not isinstance(pool, HybridKVPool):
            return pool.load_cpu_copy(part, slots)
        pool = pool.with_kv(pool.kv.load_cpu_copy(part, slots))
        return pool.with_states(pool.states.load_cpu_copy(self.state, np.array([state], np.int32)))


def warmed_up(pool: MemoryPool) -> MemoryPool:
    """The pool, consumed and given back unchanged, with all that copies from and to it need compiled."""
    if isinstance(pool, HybridKVPool):
        return pool.with_kv(warmed_up(pool.kv)).with_states(_round_trip(pool.states))
    if isinstance(pool, SWAKVPool):
        return pool.with_full(_round_trip(pool.full)).with_window(_round_trip(pool.window))
    return _round_trip(pool)


def _round_trip(pool: Any) -> Any:
    return pool.load_cpu_copy(pool.get_cpu_copy([0]), [0])
