"""KV-cache memory for JAX inference engines: paged pools, prefix sharing, and steps that update memory in place.

`__all__` is the documented interface: errors, requests, configs, pools, caches, steps, the manager and snapshots.
Everything else is imported from the module that owns it (`jaxcache.observe.draw`, `jaxcache.events.publisher`, ...).

Names of SGLang's and pymllm's memory layers that are not among them can be imported from here too, and are loaded on
first use: see `jaxcache.compat`.
"""

from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from jaxcache.caches.chunk import ChunkCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.device.donation import donating, reading
from jaxcache.errors import (
    ArgumentError,
    BorrowedError,
    BrokenInvariantError,
    CacheError,
    DeadViewError,
    DoubleFreeError,
    LockedError,
    NotInPlaceError,
    OwnershipError,
    ReceiptError,
    ReleasedError,
    RequestStateError,
    ShardingError,
    SnapshotError,
    StalePoolError,
    ThreadError,
    TraceError,
    TransferError,
    UnsupportedError,
)
from jaxcache.index.key import Namespace
from jaxcache.index.policies.registry import Policy
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.layout import Layout
from jaxcache.pools.mamba import MambaConfig, MambaPool
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.pools.swa import SWAConfig, SWAKVPool
from jaxcache.request import Request, RequestState
from jaxcache.snapshot.load import load_snapshot, verify_snapshot
from jaxcache.snapshot.save import save_snapshot
from jaxcache.steps.batch import Batch
from jaxcache.steps.loop import DecodeLoop
from jaxcache.steps.loop_plan import LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan

__version__: str  # what is installed says it: `__getattr__`

__all__ = [
    "ArgumentError",
    "Batch",
    "BorrowedError",
    "BrokenInvariantError",
    "CacheError",
    "ChunkCache",
    "DeadViewError",
    "DecodeLoop",
    "DoubleFreeError",
    "HybridKVPool",
    "Layout",
    "LockedError",
    "LoopPlan",
    "LoopReplay",
    "MHAConfig",
    "MHATokenToKVPool",
    "MLAConfig",
    "MLATokenToKVPool",
    "MambaConfig",
    "MambaPool",
    "MambaRadixCache",
    "MemoryConfig",
    "MemoryManager",
    "Namespace",
    "NotInPlaceError",
    "OwnershipError",
    "Policy",
    "RadixCache",
    "ReceiptError",
    "ReleasedError",
    "Request",
    "RequestState",
    "RequestStateError",
    "SWAConfig",
    "SWAKVPool",
    "SWARadixCache",
    "ShardingError",
    "SnapshotError",
    "StalePoolError",
    "StepPlan",
    "ThreadError",
    "TraceError",
    "TransferError",
    "UnsupportedError",
    "donating",
    "init_memory_pool_and_cache",
    "load_snapshot",
    "prove_in_place",
    "reading",
    "save_snapshot",
    "verify_snapshot",
]


def __getattr__(name: str) -> Any:
    """Names that are not loaded with the package: `__version__`, and other systems' names from `jaxcache.compat`."""
    if name == "__version__":
        return metadata.version("jaxcache")
    if not name.startswith("_") and name in (found := _compat()):
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is loaded, and what `__getattr__` finds."""
    return sorted({*globals(), *_compat(), "__version__"})


def _compat() -> dict[str, Any]:
    """The names of `jaxcache.compat`, without its modules."""
    found = vars(import_module("jaxcache.compat"))
    return {k: v for k, v in found.items() if not k.startswith("_") and not isinstance(v, ModuleType)}
