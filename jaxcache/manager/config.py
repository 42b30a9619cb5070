"""What memory there is to be: one record, and the parts that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxcache.caches.chunk import ChunkCache, SWAChunkCache
from jaxcache.caches.lora_radix import LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.options import CacheOptions
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import ArgumentError
from jaxcache.index.policies.registry import Policy
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pages.of_size import allocator_of
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pools.base import KVCacheConfig
from jaxcache.pools.hybrid import HybridConfig, HybridKVPool
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.stack import MemoryPool
from jaxcache.pools.swa import SWAConfig
from jaxcache.steps.buckets import Buckets
from jaxcache.tables.hybrid_table import HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool


@dataclass(frozen=True)
class MemoryConfig:
    """Everything `init_memory_pool_and_cache` decides from.

    Attributes:
      kv: Sizes, layers and dtype of the KV pool; its kind chooses the pool class.
      max_running: Requests that can run at once.
      max_context_len: Longest request, in tokens.
      chunk: Prompt tokens a step computes at most.
      buckets: Sizes that steps are compiled for; by default `Buckets.default`. The largest of `extend_tokens` is then
        the most that a step computes, whatever `chunk` is.
      policy: Eviction order of the prefix cache. The default adapts to the load, see `Policy`.
      disable_radix_cache: Share nothing between requests.
      enable_kv_cache_events: Queue an event for each cached block.
      need_sort: Hand out pages in ascending order where possible (contiguous transfers).
      sliding_window_size: Tokens that the window layers of an `SWAConfig` attend to. Give the window side room for a
        chunk, and for a window and three pages a running request, or steps find memory short. With states, room for
        `state_interval` tokens more a request keeps its checkpoints.
      states: Sizes of the recurrent states, for a model that has some: a working one and a checkpoint for each running
        request, and those that are cached.
      state_interval: Tokens between checkpoints of the state of a decoding request.
      enable_lora: Requests name their adapter, as `Namespace(lora_id=...)`; adapters can be dropped.
      is_eagle: Cache by pairs of neighbouring tokens, for EAGLE's draft model.

    Raises:
      ArgumentError: The parts contradict each other.
    """

    kv: KVCacheConfig | SWAConfig
    max_running: int
    max_context_len: int
    chunk: int = 8192
    policy: Policy = Policy.ADAPTIVE
    disable_radix_cache: bool = False
    enable_kv_cache_events: bool = False
    need_sort: bool = False
    sliding_window_size: int | None = None
    states: MambaConfig | None = None
    state_interval: int = 256
    enable_lora: bool = False
    is_eagle: bool = False
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        """Checks what no single part can check."""
        if (self.sliding_window_size is not None) != self.has_window:
            raise ArgumentError(
                f"sliding_window_size is {self.sliding_window_size}, kv is a {type(self.kv).__name__}: "
                "an SWAConfig needs one, no other has one"
            )
        if self.states is not None and self.states.num_states < 2 and not self.disable_radix_cache:
            raise ArgumentError(
                f"states: num_states must be at least 2, got {self.states.num_states}: a request that finds a cached "
                "state copies it to one of its own"
            )
        if self.buckets is not None and self.buckets.contexts and self.buckets.contexts[-1] < self.max_context_len:
            raise ArgumentError(
                f"buckets: the last of contexts must be at least max_context_len = {self.max_context_len}, got "
                f"{self.buckets.contexts[-1]}: no step could take longer requests"
            )

    @property
    def step_sizes(self) -> Buckets:
        """`buckets`, or the default."""
        return self.buckets or Buckets.default(self.max_running, self.chunk, self.kv.page_size)

    @property
    def has_window(self) -> bool:
        """Whether some layers attend to a sliding window."""
        return isinstance(self.kv, SWAConfig)

    def new_parts(
        self, mesh: Mesh | None = None, pool: Any = None
    ) -> tuple[Any, BaseTokenToKVPoolAllocator, ReqToTokenPool, RadixCache]:
        """What a `MemoryManager` is made of beside this config: pool (by default new), allocator, table and cache."""
        pool = self.new_pool(mesh) if pool is None else pool
        allocator, table = self.new_allocator(), self.new_table()
        return pool, allocator, table, self.new_cache(table, allocator, self.new_state_allocator())

    @property
    def num_values(self) -> int:
        """Pages and states in all, free or not; window pages go with theirs."""
        states = 0 if self.states is None else self.states.num_states
        return self.kv.size // self.kv.page_size + states

    @property
    def window_size(self) -> int:
        """Usable slots of the window side; 0 without one."""
        return self.kv.size_swa if isinstance(self.kv, SWAConfig) else 0

    def new_pool(self, mesh: Mesh | None = None) -> MemoryPool:
        """The device pool, on `mesh` if it is sharded.

        Raises:
          ArgumentError: There is no pool for this kind of `kv`, or its sizes do not fit together.
        """
        if not isinstance(self.kv, (KVCacheConfig, SWAConfig)):
            raise ArgumentError(f"kv must be an MHAConfig, MLAConfig or SWAConfig, got {type(self.kv).__name__}")
        if self.states is not None:
            return HybridKVPool.create(HybridConfig(kv=self.kv, states=self.states), mesh=mesh)
        kv: Any = self.kv  # the config of its own pool type
        return kv.pool_type.create(kv, mesh=mesh)

    def new_allocator(self) -> BaseTokenToKVPoolAllocator:
        """The owner of the pool's pages."""
        kv = self.kv
        if isinstance(kv, SWAConfig):
            return SWATokenToKVPoolAllocator(kv.full.size, kv.window.size, kv.page_size, need_sort=self.need_sort)
        return allocator_of(kv.size, kv.page_size, need_sort=self.need_sort)

    def new_state_allocator(self) -> StateAllocator | None:
        """The owner of the recurrent states, if there are any."""
        return None if self.states is None else StateAllocator(self.states.num_states)

    def new_table(self) -> ReqToTokenPool:
        """The host's request table."""
        table = ReqToTokenPool if self.states is None else HybridReqToTokenPool
        return table(self.max_running, self.max_context_len, self.kv.page_size)

    def new_cache(
        self, table: ReqToTokenPool, allocator: BaseTokenToKVPoolAllocator, states: StateAllocator | None
    ) -> RadixCache:
        """The prefix cache over these.

        Source: SGLang 0.5.2 scheduler.py: a chunk cache where nothing is shared, as prompts are computed in chunks;
        else the tree for the kind of memory; else the one for adapters.
        """
        size, window, interval = self.kv.page_size, self.sliding_window_size, self.state_interval
        options: CacheOptions = {
            "disable": self.disable_radix_cache,
            "enable_kv_cache_events": self.enable_kv_cache_events,
            "policy": self.policy,
            "is_eagle": self.is_eagle,
        }
        if states is not None and isinstance(table, HybridReqToTokenPool):
            return MambaRadixCache(table, allocator, states, size, window, state_interval=interval, **options)
        if isinstance(allocator, SWATokenToKVPoolAllocator) and window is not None:
            if self.disable_radix_cache:
                return SWAChunkCache(table, allocator, size, window)
            return SWARadixCache(table, allocator, window, size, **options)
        if self.disable_radix_cache:
            return ChunkCache(table, allocator, size)
        return (LoRARadixCache if self.enable_lora else RadixCache)(table, allocator, size, **options)
