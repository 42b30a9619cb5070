"""MambaRadixCache: for models whose linear-attention layers carry a state from token to token.

tokens   0 ........ 100 ........ 200 ........ 250      three nodes
full     7 8 9 ...   | 1 2 ...    | 3 4 ...            always there
state              3 |            |             4      saved after 100 and 250 tokens, valid there only
stops                100                       250     a lookup of 220 tokens finds 100, and branches at 220
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.caches.options import CacheOptions
from jaxcache.caches.radix import RadixCache
from jaxcache.components.base import TreeComponent
from jaxcache.components.full import FullPages
from jaxcache.components.state import CHECKPOINT_INTERVAL, RecurrentStates
from jaxcache.components.window import WindowPages
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.tables.hybrid_table import HybridReqToTokenPool

if TYPE_CHECKING:
    from typing import Unpack


class MambaRadixCache(RadixCache):
    """Prefix cache for full attention and linear attention; with a window size, for sliding windows as well.

    A prefix is reusable only where a state was saved, so only those are cached: a request is shared up to its
    checkpoint (`HybridReqToTokenPool.set_saved`), and when it ends up to its end. A match gives the state, which is
    copied into the request's working state before anything is computed, and never written to itself.

    Args:
      req_to_token_pool: As for `RadixCache`; knows the states of each row.
      token_to_kv_pool_allocator: Owner of the pages.
      state_allocator: Owner of the states.
      page_size: Any. States are saved where pages end.
      sliding_window_size: As for `SWARadixCache`; None if no layer has a window.
      state_interval: Tokens between the checkpoints of a decoding request, rounded up to whole pages.
      **options: As for `RadixCache`.

    Attributes:
      state_allocator: As given.

    Raises:
      ArgumentError: The parts do not fit together.

    Source: pymllm mamba_radix_cache; SGLang 0.5.3 mamba_radix_cache.py.
    """

    def __init__(
        self,
        req_to_token_pool: HybridReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
        state_allocator: StateAllocator,
        page_size: int,
        sliding_window_size: float | None = None,
        *,
        state_interval: int = CHECKPOINT_INTERVAL,
        **options: Unpack[CacheOptions],
    ):
        self.state_allocator = state_allocator
        full: FullPages | None = None
        components: list[TreeComponent] = []
        if sliding_window_size is not None:
            window = WindowPages(token_to_kv_pool_allocator, sliding_window_size)
            full, components = window.full, [window]
        takes_checkpoints = not options.get("disable", False)
        components.append(
            RecurrentStates(state_allocator, req_to_token_pool, state_interval, takes_checkpoints=takes_checkpoints)
        )
        super().__init__(
            req_to_token_pool, token_to_kv_pool_allocator, page_size, **options, full=full, components=components
        )
