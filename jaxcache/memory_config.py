"""What memory there is to be: one record, and the parts that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError
from jaxcache.index.recency import Policy
from jaxcache.pages.base import BaseTokenToKVPoolAllocator
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.pools.base import KVCache, KVCacheConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.pools.requests import ReqToTokenPool


@dataclass(frozen=True)
class MemoryConfig:
    """Everything `init_memory_pool_and_cache` decides from.

    Attributes:
      kv: Sizes, layers and dtype of the KV pool; its kind chooses the pool class.
      max_running: Requests that can run at once.
      max_context_len: Longest request, in tokens.
      chunk: Prompt tokens a step computes at most.
      policy: Eviction order of the prefix cache.
      disable_radix_cache: Share nothing between requests.
      enable_kv_cache_events: Queue an event for each cached block.
      need_sort: Hand out pages in ascending order where possible (contiguous transfers).
    """

    kv: KVCacheConfig
    max_running: int
    max_context_len: int
    chunk: int = 8192
    policy: Policy = Policy.LRU
    disable_radix_cache: bool = False
    enable_kv_cache_events: bool = False
    need_sort: bool = False

    def new_pool(self, mesh: Mesh | None = None) -> KVCache:
        """The KV pool, on `mesh` if it is sharded.

        Raises:
          ArgumentError: There is no pool for this kind of `kv`, or its sizes do not fit together.
        """
        if isinstance(self.kv, MHAConfig):
            return MHATokenToKVPool.create(self.kv, mesh=mesh)
        if isinstance(self.kv, MLAConfig):
            return MLATokenToKVPool.create(self.kv, mesh=mesh)
        raise ArgumentError(f"kv must be an MHAConfig or MLAConfig, got {type(self.kv).__name__}")

    def new_allocator(self) -> BaseTokenToKVPoolAllocator:
        """The owner of the pool's pages."""
        if self.kv.page_size == 1:
            return TokenToKVPoolAllocator(self.kv.size, need_sort=self.need_sort)
        return PagedTokenToKVPoolAllocator(self.kv.size, self.kv.page_size, need_sort=self.need_sort)

    def new_table(self) -> ReqToTokenPool:
        """The host's request table."""
        return ReqToTokenPool(self.max_running, self.max_context_len, self.kv.page_size)

    def new_cache(self, table: ReqToTokenPool, allocator: BaseTokenToKVPoolAllocator) -> RadixCache:
        """The prefix cache over these two."""
        return RadixCache(
            table,
            allocator,
            self.kv.page_size,
            disable=self.disable_radix_cache,
            enable_kv_cache_events=self.enable_kv_cache_events,
            policy=self.policy,
        )
