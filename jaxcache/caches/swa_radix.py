"""SWARadixCache: for models in which some layers attend to everything and the others to a window of the last tokens.

tokens   0 ........ 100 ........ 200 ........ 250      three nodes, a window of 64
full     7 8 9 ...   | 1 2 ...    | 3 4 ...            always there
window   -           | 5 6 ...    | 7 8 ...            evicted from the first node: a hole (tombstone)
stops                 164 ...................          everywhere from here on, the last 64 tokens are there
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.caches.options import CacheOptions
from jaxcache.caches.radix import RadixCache
from jaxcache.components.window import WindowPages
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from typing import Unpack


class SWARadixCache(RadixCache):
    """Prefix cache for full attention and sliding windows.

    A prefix is reusable only if its last W tokens still have window pages. Window pages are evicted before full ones,
    in the middle of a path too. The hole is filled by the next request that computes those tokens again: its window
    pages move to the tree's full pages, which stay where they are, as requests may be reading them.

    Args:
      req_to_token_pool: As for `RadixCache`.
      token_to_kv_pool_allocator: Owner of full and window pages.
      sliding_window_size: Tokens before a stopping point that the window layers need; `math.inf` for all of them.
      page_size: Any; the window need not be a multiple of it.
      **options: As for `RadixCache`.

    Raises:
      ArgumentError: The parts do not fit together.

    Source: SGLang 0.5.2 swa_radix_cache.py, for pages of one slot; pymllm radix_cache.
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: SWATokenToKVPoolAllocator,
        sliding_window_size: float,
        page_size: int,
        **options: Unpack[CacheOptions],
    ):
        window = WindowPages(token_to_kv_pool_allocator, sliding_window_size)
        super().__init__(
            req_to_token_pool, token_to_kv_pool_allocator, page_size, **options, full=window.full, components=(window,)
        )

    def sanity_check(self) -> None:
        """`check`, by the name that SGLang has for it."""
        self.check()

    def full_lru_list_evictable_size(self) -> int:
        """Tokens in the eviction order of the full pages, counted again. `full_evictable_size` must agree. O(nodes)."""
        return sum(node.tokens for node in self.tree.policies[0])

    def swa_lru_list_evictable_size(self) -> int:
        """The same of the window pages."""
        return sum(node.tokens for node in self.tree.policies[1])
