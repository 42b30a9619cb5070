"""One memory, two frameworks: PyTorch looks into jaxcache's pools, and JAX into PyTorch's tensors, without a copy.

    with borrow(pool) as kv: ...      torch tensors of a pool, for a block; donating it meanwhile is refused
    kv = share(pool)                  the same for good: the tensors stay valid while JAX updates the pool in place
    array = adopt(tensor)             a torch tensor becomes a JAX array

The first two give a `TorchKVPool`, with SGLang's method names. Writes need no synchronisation by the caller: each side
waits, on the device, for what the other was given before; `torch_bridge.streams` says how.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "torch_bridge needs PyTorch, which is the extra `torch`: pip install 'jaxcache[torch]'"
    raise ModuleNotFoundError(message, name="torch") from error

# ruff: isort: split
from torch_bridge.adopt import adopt as adopt
from torch_bridge.adopt import adopt_pool as adopt_pool
from torch_bridge.lend import borrow as borrow
from torch_bridge.lend import share as share
from torch_bridge.mha import TorchMHAPool as TorchMHAPool
from torch_bridge.mla import TorchMLAPool as TorchMLAPool
from torch_bridge.pool import TorchKVPool as TorchKVPool
from torch_bridge.pool import TorchPool as TorchPool
from torch_bridge.slots import TorchAllocator as TorchAllocator
from torch_bridge.slots import TorchPrefixCache as TorchPrefixCache
from torch_bridge.swa import TorchSWAPool as TorchSWAPool
