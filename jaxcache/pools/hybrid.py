"""The pool of a hybrid model: KV for its attention layers, states for its Mamba or linear-attention layers.

Each kind of layer is counted by itself, from 0 (or from `start_layer`) on: a model scans over the attention layers of
`pool.kv` and over the recurrent ones of `pool.states`.

Source: SGLang 0.5.2 memory_pool.py, HybridLinearKVPool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import ArrayLike

from jaxcache.pools.buffers import BufferInfo
from jaxcache.pools.config import KVCacheConfig, require
from jaxcache.pools.copies import CpuCopy, PoolCopy
from jaxcache.pools.layer_pages import LayerPages
from jaxcache.pools.mamba import MambaConfig, MambaPool
from jaxcache.pools.stack import LayerStack, MemoryPool
from jaxcache.pools.swa import SWAConfig, SWACpuCopy

if TYPE_CHECKING:
    from jaxtyping import Int32

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Sizes of a `HybridKVPool`.

    Attributes:
      kv: Of the attention layers' KV; its kind chooses the pool.
      states: Of the recurrent layers' states, on the same devices.

    Raises:
      ArgumentError: on parts that are of other kinds, or not sharded alike.
    """

    kv: KVCacheConfig | SWAConfig
    states: MambaConfig

    def __post_init__(self) -> None:
        is_kv = isinstance(self.kv, (KVCacheConfig, SWAConfig))
        require(is_kv, "kv", "must be a KVCacheConfig or SWAConfig", type(self.kv).__name__)
        require(isinstance(self.states, MambaConfig), "states", "must be a MambaConfig", type(self.states).__name__)
        mine, theirs = (self.states.axis_name, self.states.shards), (self.kv.axis_name, self.kv.shards)
        require(mine == theirs, "states", f"must have the axis_name and shards of kv, {theirs}", mine)

    @property
    def pool_type(self) -> type[HybridKVPool]:
        """The class of the pools of these sizes."""
        return HybridKVPool


@dataclass(frozen=True, eq=False)
class HybridCpuCopy(PoolCopy):
    """What a request has in both pools, in host memory.

    Attributes:
      kv: Rows of its tokens.
      states: Its states.
    """

    kv: CpuCopy | SWACpuCopy
    states: CpuCopy

    @property
    def config(self) -> HybridConfig:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The configuration of the pools they came from."""
        return HybridConfig(kv=self.kv.config, states=self.states.config)  # pyright: ignore[reportArgumentType]

    @property
    def num_tokens(self) -> int:
        return self.kv.num_tokens

    def tokens(self, start: int, stop: int) -> HybridCpuCopy:
        """KV of tokens `[start, stop)` of the copy, in the same memory, and all of the states.

        Raises:
          ArgumentError: if tokens at the end are left out: the states have read them.
        """
        is_whole = stop == self.num_tokens or self.states.num_tokens == 0
        require(is_whole, "stop", f"must be {self.num_tokens}, where the copied states stand", stop)
        return HybridCpuCopy(self.kv.tokens(start, stop), self.states)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridKVPool(MemoryPool):
    """A KV pool and a pool of states, donated together. Make one with `create`.

    Update a part and put it back: `pool.with_kv(pool.kv.set_kv_buffer(...))`. Outside a jit this consumes the part, and
    with it the pool that it was taken from.

    Attributes:
      kv: Any KV pool, also one with windows.
      states: The pool of states.
    """

    copy_type = HybridCpuCopy

    kv: MemoryPool
    states: MambaPool

    @classmethod
    def create(
        cls,
        config: HybridConfig,
        *,
        device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
    ) -> Self:
        kv: Any = config.kv
        states = MambaPool.create(config.states, device=device, mesh=mesh)
        return cls(kv.pool_type.create(kv, device=device, mesh=mesh), states)

    @classmethod
    def abstract(cls, config: HybridConfig, *, platform: str, mesh: Mesh | None = None) -> Self:
        kv: Any = config.kv
        states = MambaPool.abstract(config.states, platform=platform, mesh=mesh)
        return cls(kv.pool_type.abstract(kv, platform=platform, mesh=mesh), states)

    @property
    def config(self) -> HybridConfig:
        """The sizes."""
        return HybridConfig(kv=self.kv.config, states=self.states.config)

    @property
    def mesh(self) -> Mesh | None:
        return self.kv.mesh

    def partition_specs(self) -> Self:
        return type(self)(self.kv.partition_specs(), self.states.partition_specs())

    def stacks(self) -> dict[str, LayerStack]:
        return self.kv.stacks() | {"states": self.states}

    def with_stacks(self, stacks: Mapping[str, Any]) -> Self:
        return type(self)(self.kv.with_stacks(stacks), stacks["states"])

    def token_rows(self, loc: Int32[ArrayLike, " n"]) -> dict[str, Any]:
        """Those of the KV pool: states stand for prefixes."""
        return self.kv.token_rows(loc)

    def with_kv(self, kv: MemoryPool) -> Self:
        """This pool with its KV pool replaced, by an update of it."""
        return type(self)(kv, self.states)

    def with_states(self, states: MambaPool) -> Self:
        """This pool with its pool of states replaced, by an update of it."""
        return type(self)(self.kv, states)

    def pages(self, layer: Any) -> LayerPages:
        """The pages of an attention layer, as the KV pool's `pages` gives them."""
        kv: Any = self.kv
        return kv.pages(layer)

    def copy_tokens(self, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> Self:
        """See `MemoryPool.copy_tokens`. States are not those of tokens."""
        return self.with_kv(self.kv.copy_tokens(source, target))

    def get_kv_size_bytes(self) -> Any:
        """Bytes of the KV, as its pool gives them; `pool.states` gives those of the states."""
        return self.kv.get_kv_size_bytes()

    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where the rows of the KV pool lie, then those of the pool of states."""
        parts = ("kv", self.kv), ("states", self.states)
        return tuple(
            dataclasses.replace(info, name=f"{name}.{info.name}")
            for name, part in parts
            for info in part.get_contiguous_buf_infos()
        )

    def get_cpu_copy(self, indices: Int32[ArrayLike, " n"], states: Int32[ArrayLike, " m"] = _NONE) -> HybridCpuCopy:
        """Copies the KV of some slots, and some states, to host memory: see `KVCache.get_cpu_copy`, which it is twice.

        Args:
          indices: Slots.
          states: States, such as a retracted request's working state.
        """
        return HybridCpuCopy(self.kv.get_cpu_copy(indices), self.states.get_cpu_copy(states))

    def load_cpu_copy(
        self, copy: HybridCpuCopy, indices: Int32[ArrayLike, " n"], states: Int32[ArrayLike, " m"] = _NONE
    ) -> Self:
        """Writes what `get_cpu_copy` took to as many slots and states, the same or others.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError, ArgumentError, ShardingError: as `KVCache.load_cpu_copy`.
        """
        self.require_copy_of_such(copy)
        self.require_donatable()
        self.states.require_loadable(copy.states, states)  # else the KV would be lost when the states are refused
        kv = self.kv.load_cpu_copy(copy.kv, indices)
        return type(self)(kv, self.states.load_cpu_copy(copy.states, states))
