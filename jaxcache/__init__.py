"""KV-cache memory for JAX inference engines: paged pools, prefix sharing, and steps that update memory in place.

The names below stand in the order of the flow: request, prefix match, page allocation, KV write, insert and evict, and
the manager that drives it all.
"""

from jaxcache.errors import ArgumentError as ArgumentError
from jaxcache.errors import BorrowedError as BorrowedError
from jaxcache.errors import BrokenInvariant as BrokenInvariant
from jaxcache.errors import CacheError as CacheError
from jaxcache.errors import DeadViewError as DeadViewError
from jaxcache.errors import DoubleFreeError as DoubleFreeError
from jaxcache.errors import LockedError as LockedError
from jaxcache.errors import NotInPlaceError as NotInPlaceError
from jaxcache.errors import OwnershipError as OwnershipError
from jaxcache.errors import ReceiptError as ReceiptError
from jaxcache.errors import ReleasedError as ReleasedError
from jaxcache.errors import RequestStateError as RequestStateError
from jaxcache.errors import ShardingError as ShardingError
from jaxcache.errors import SnapshotError as SnapshotError
from jaxcache.errors import StalePoolError as StalePoolError
from jaxcache.errors import TraceError as TraceError
from jaxcache.errors import UnsupportedError as UnsupportedError

# ruff: isort: split
from jaxcache.request import Request as Request
from jaxcache.request import RequestState as RequestState

# ruff: isort: split
from jaxcache.compat.pymllm import EvictResult as EvictResult
from jaxcache.compat.pymllm import InsertResult as InsertResult
from jaxcache.index.component import FULL as FULL
from jaxcache.index.component import Component as Component
from jaxcache.index.hashing import compute_node_hash as compute_node_hash
from jaxcache.index.hashing import content_digest as content_digest
from jaxcache.index.hashing import hash_bytes as hash_bytes
from jaxcache.index.hashing import hash_to_int64 as hash_to_int64
from jaxcache.index.hashing import hash_token_ids as hash_token_ids
from jaxcache.index.key import BigramKey as BigramKey
from jaxcache.index.key import Namespace as Namespace
from jaxcache.index.key import RadixKey as RadixKey
from jaxcache.index.policies.registry import Policy as Policy
from jaxcache.index.tree import RadixTree as RadixTree

# ruff: isort: split
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator as BaseTokenToKVPoolAllocator
from jaxcache.pages.allocator import PageState as PageState
from jaxcache.pages.graph import PageAllocatorState as PageAllocatorState
from jaxcache.pages.paged import AscendPagedTokenToKVPoolAllocator as AscendPagedTokenToKVPoolAllocator
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator as PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator as SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator as StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator as TokenToKVPoolAllocator

# ruff: isort: split
from jaxcache.compat.ascend import AscendMLAPagedTokenToKVPool as AscendMLAPagedTokenToKVPool
from jaxcache.compat.ascend import AscendTokenToKVPool as AscendTokenToKVPool
from jaxcache.device.donation import donating as donating
from jaxcache.device.donation import reading as reading
from jaxcache.kernels.in_place import assert_in_place as assert_in_place
from jaxcache.kernels.in_place import prove_in_place as prove_in_place
from jaxcache.pools.base import KVCache as KVCache
from jaxcache.pools.double_sparse import DoubleSparseConfig as DoubleSparseConfig
from jaxcache.pools.double_sparse import DoubleSparseTokenToKVPool as DoubleSparseTokenToKVPool
from jaxcache.pools.hybrid import HybridConfig as HybridConfig
from jaxcache.pools.hybrid import HybridKVPool as HybridKVPool
from jaxcache.pools.layout import Layout as Layout
from jaxcache.pools.mamba import MambaConfig as MambaConfig
from jaxcache.pools.mamba import MambaPool as MambaPool
from jaxcache.pools.mha import MHAConfig as MHAConfig
from jaxcache.pools.mha import MHATokenToKVPool as MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig as MLAConfig
from jaxcache.pools.mla import MLATokenToKVPool as MLATokenToKVPool
from jaxcache.pools.swa import SWAConfig as SWAConfig
from jaxcache.pools.swa import SWAKVPool as SWAKVPool
from jaxcache.tables.device_table import RequestTable as RequestTable
from jaxcache.tables.hybrid_table import HybridReqToTokenPool as HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool as ReqToTokenPool

# ruff: isort: split
from jaxcache.caches.base import BasePrefixCache as BasePrefixCache
from jaxcache.caches.base import MatchResult as MatchResult
from jaxcache.caches.chunk import ChunkCache as ChunkCache
from jaxcache.caches.chunk import SWAChunkCache as SWAChunkCache
from jaxcache.caches.lora_radix import LoRAKey as LoRAKey
from jaxcache.caches.lora_radix import LoRARadixCache as LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache as MambaRadixCache
from jaxcache.caches.multimodal import MultiModalCache as MultiModalCache
from jaxcache.caches.radix import RadixCache as RadixCache
from jaxcache.caches.radix import RadixCache as RadixCacheCpp  # noqa: F401  what that name promises is the speed
from jaxcache.caches.swa_radix import SWARadixCache as SWARadixCache
from jaxcache.events.consumer import EventConsumer as EventConsumer
from jaxcache.events.events import AllBlocksCleared as AllBlocksCleared
from jaxcache.events.events import BlockRemoved as BlockRemoved
from jaxcache.events.events import BlockStored as BlockStored
from jaxcache.events.events import StorageMedium as StorageMedium

# ruff: isort: split
from jaxcache.manager.config import MemoryConfig as MemoryConfig
from jaxcache.manager.manager import MemoryManager as MemoryManager
from jaxcache.manager.manager import init_memory_pool_and_cache as init_memory_pool_and_cache
from jaxcache.snapshot.load import load_snapshot as load_snapshot
from jaxcache.snapshot.load import verify_snapshot as verify_snapshot
from jaxcache.snapshot.save import save_snapshot as save_snapshot
from jaxcache.steps.batch import Batch as Batch
from jaxcache.steps.loop import DecodeLoop as DecodeLoop
from jaxcache.steps.loop import LoopShape as LoopShape
from jaxcache.steps.loop_plan import LoopPlan as LoopPlan
from jaxcache.steps.loop_plan import LoopReplay as LoopReplay
from jaxcache.steps.plan import StepPlan as StepPlan
