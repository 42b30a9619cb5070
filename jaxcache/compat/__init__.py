"""Names of other systems, so that their users find them: SGLang's `mem_cache` (0.5.2) and pymllm's caches.

Each is importable from here and from `jaxcache`, which loads this module on first use. Most are classes of ours under
the name that SGLang gives them; those written for this purpose are in the modules of this folder:

- `compat.ascend`: page-major pools under their Ascend names.
- `compat.host_pool`: host pools by slots of tokens, over the host pools of `jaxcache.tiers`.
- `compat.pymllm`: prefix caches that are driven by keys and slots instead of requests. `InsertResult` and `EvictResult`
  are what these return. `RadixCache` and the other request-driven caches return neither: `insert` and `evict` there
  say what they return themselves.

What has another name here, and every difference in behaviour, is in the documentation: "Coming from other systems".
"""

from jaxcache.caches.base import BasePrefixCache as BasePrefixCache
from jaxcache.caches.base import MatchResult as MatchResult
from jaxcache.caches.chunk import SWAChunkCache as SWAChunkCache
from jaxcache.caches.lora_radix import LoRAKey as LoRAKey
from jaxcache.caches.lora_radix import LoRARadixCache as LoRARadixCache
from jaxcache.caches.multimodal import MultiModalCache as MultiModalCache
from jaxcache.caches.radix import RadixCache
from jaxcache.compat.ascend import AscendMLAPagedTokenToKVPool as AscendMLAPagedTokenToKVPool
from jaxcache.compat.ascend import AscendTokenToKVPool as AscendTokenToKVPool
from jaxcache.compat.host_pool import HostKVCache as HostKVCache
from jaxcache.compat.host_pool import MHATokenToKVPoolHost as MHATokenToKVPoolHost
from jaxcache.compat.host_pool import MLATokenToKVPoolHost as MLATokenToKVPoolHost
from jaxcache.compat.host_pool import synchronized as synchronized
from jaxcache.compat.pymllm import EvictResult as EvictResult
from jaxcache.compat.pymllm import InsertResult as InsertResult
from jaxcache.errors import BrokenInvariantError
from jaxcache.events.consumer import EventConsumer as EventConsumer
from jaxcache.events.events import AllBlocksCleared as AllBlocksCleared
from jaxcache.events.events import BlockRemoved as BlockRemoved
from jaxcache.events.events import BlockStored as BlockStored
from jaxcache.events.events import StorageMedium as StorageMedium
from jaxcache.index.component import FULL as FULL
from jaxcache.index.component import Component as Component
from jaxcache.index.hashing import compute_node_hash as compute_node_hash
from jaxcache.index.hashing import content_digest as content_digest
from jaxcache.index.hashing import hash_bytes as hash_bytes
from jaxcache.index.hashing import hash_to_int64 as hash_to_int64
from jaxcache.index.hashing import hash_token_ids as hash_token_ids
from jaxcache.index.key import BigramKey as BigramKey
from jaxcache.index.key import RadixKey as RadixKey
from jaxcache.index.media import MediaRange as MediaRange
from jaxcache.index.tree import RadixTree as RadixTree
from jaxcache.kernels.in_place import assert_in_place as assert_in_place
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator as BaseTokenToKVPoolAllocator
from jaxcache.pages.allocator import PageState as PageState
from jaxcache.pages.graph import PageAllocatorState as PageAllocatorState
from jaxcache.pages.paged import AscendPagedTokenToKVPoolAllocator as AscendPagedTokenToKVPoolAllocator
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator as PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator as SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator as StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator as TokenToKVPoolAllocator
from jaxcache.pools.base import KVCache as KVCache
from jaxcache.pools.double_sparse import DoubleSparseConfig as DoubleSparseConfig
from jaxcache.pools.double_sparse import DoubleSparseTokenToKVPool as DoubleSparseTokenToKVPool
from jaxcache.pools.hybrid import HybridConfig as HybridConfig
from jaxcache.steps.loop import LoopShape as LoopShape
from jaxcache.tables.device_table import RequestTable as RequestTable
from jaxcache.tables.hybrid_table import HybridReqToTokenPool as HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool as ReqToTokenPool
from jaxcache.tiers.host_layout import HostLayout as HostLayout
from jaxcache.tiers.host_memory import HostConfig as HostConfig
from jaxcache.tiers.host_memory import HostMemory as HostMemory
from jaxcache.tiers.host_pool import HostPool as HostPool
from jaxcache.tiers.host_states import HostState as HostState

RadixCacheCpp = RadixCache  # what that name promises is the speed
MemoryStateInt = HostState
BrokenInvariant = BrokenInvariantError  # its name before 0.1.0
