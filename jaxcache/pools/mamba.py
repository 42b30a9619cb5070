"""The pool of recurrent states: what Mamba and linear-attention layers keep of all the tokens that they have read.

A state is a row of the pool. In each layer it has two parts: `conv`, the last inputs of the causal convolution, and
`temporal`, the recurrent matrix. Unlike KV it stands for a whole prefix, is valid at that prefix's end only, and is
overwritten by every step. So no two requests share one: each has a working state of its own, a cached state is copied
into it before the request's first step, and a snapshot for the cache is a copy of it. A step looks like this:

    pool = pool.copy_states(src, dst, count)                    # resume: from a cached state, or from 0, nothing read
    conv, temporal = pool.read(states, layer)                   # in each layer
    pool = pool.write(states, layer, new_conv, new_temporal)
    pool = pool.copy_states(working, saved, count)              # snapshot

State 0 is the sink, which is never handed out, never written and always zero: the state of an empty prefix. States come
from a `StateAllocator`, never from the rows of a request table, which begin at 0.

Source: SGLang 0.5.2 memory_pool.py, MambaPool; pymllm's GDNPool.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxcache.device.donation import donating, reading
from jaxcache.kernels.arguments import require_array
from jaxcache.kernels.copy_kv import copy_large_rows
from jaxcache.kernels.write_kv import put_rows
from jaxcache.pools.buffers import BufferInfo, piece_infos
from jaxcache.pools.config import PoolConfig, from_storage, pool_dtype, require, require_positive, to_storage
from jaxcache.pools.rows import bucketed, check_rows
from jaxcache.pools.stack import LayerStack

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped

    from jaxcache.pools.stack import LayerId

PoolT = TypeVar("PoolT", bound="MambaPool")


@dataclass(frozen=True, kw_only=True)
class MambaConfig(PoolConfig):
    """Sizes of a `MambaPool`; see `PoolConfig` for the fields that are not listed here.

    A sharded pool is cut along the first dimension of both parts, as tensor parallelism cuts the layer: channels and
    heads. The caller orders the channels so that those of one device stand together.

    Attributes:
      num_states: Usable states, 1 .. `num_states`: working states and cached ones together.
      conv_shape: The convolution's part in a layer, over all shards: `(channels, kernel - 1)`.
      temporal_shape: The recurrent part in a layer, over all shards: `(heads, head_dim, state_dim)`.
      conv_dtype: What the first part is to the caller; see `KVCacheConfig.dtype`.
      temporal_dtype: The same for the second part.

    Raises:
      ArgumentError: on sizes that do not fit together, or do not fit memory addresses.
    """

    cuts_rows = True

    num_states: int
    conv_shape: tuple[int, ...]
    temporal_shape: tuple[int, ...]
    conv_dtype: DTypeLike
    temporal_dtype: DTypeLike

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_states")
        for part in ("conv", "temporal"):
            name = f"{part}_shape"
            shape: Any = getattr(self, name)
            require(_is_shape(shape), name, "must be a tuple of positive integers", shape)
            rule = f"must begin with a multiple of shards = {self.shards}: repeat the heads if the model has fewer"
            require(shape[0] % self.shards == 0, name, rule, shape)
            name = f"{part}_dtype"
            object.__setattr__(self, name, pool_dtype(name, getattr(self, name)))
        require(self.rows < 2**31, "num_states", "must leave int32 ids, below 2**31 with the sink", self.num_states)
        num_bytes = self.state_bytes * self.rows
        require(num_bytes < 2**63, "num_states", "must leave a pool below 2**63 bytes", f"{num_bytes} bytes")

    @property
    def rows(self) -> int:
        """Rows of each layer: the usable states and the sink."""
        return self.num_states + 1

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The two parts."""
        return self.conv_shape, self.temporal_shape

    @property
    def row_dtypes(self) -> tuple[np.dtype, np.dtype]:
        """Those of the two parts."""
        return np.dtype(self.conv_dtype), np.dtype(self.temporal_dtype)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state, over all layers and shards."""
        parts = zip(self.row_shapes, self.row_dtypes, strict=True)
        return self.layer_num * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)

    @property
    def pool_type(self) -> type[MambaPool]:
        return MambaPool


@functools.partial(jax.tree_util.register_dataclass, data_fields=("conv", "temporal"), meta_fields=("config",))
@dataclass(frozen=True)
class MambaPool(LayerStack):
    """States of all layers. Make one with `create`; see `LayerStack` for the rules of `states` arguments and layers.

    Attributes:
      config: The sizes.
      conv: `(layers, num_states + 1, *conv_shape)` in storage dtype.
      temporal: `(layers, num_states + 1, *temporal_shape)` in storage dtype.
    """

    config: MambaConfig
    conv: Shaped[Array, "layers states *conv"]
    temporal: Shaped[Array, "layers states *temporal"]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the convolution's part and of the recurrent one, the sink included."""
        return self.conv.nbytes, self.temporal.nbytes

    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where each layer of `conv` lies, then of `temporal`. A page is a state.

        Of a sharded pool this is one device's share, and the same on all of them.
        """
        rows, ids = self.config.rows, [(layer,) for layer in self.config.layer_ids]
        parts = zip(("conv", "temporal"), self.buffers, self.config.shard_row_shapes, strict=True)
        return tuple(
            info
            for name, buffer, row in parts
            for info in piece_infos(name, ids, (rows, *row), rows, buffer.dtype.itemsize)
        )

    def read(
        self, states: Int32[Array, " n"], layer: LayerId
    ) -> tuple[Float[Array, "n *conv"], Float[Array, "n *temporal"]]:
        """Both parts of `n` states in one layer, in the pool's dtypes. State 0 reads as zeros.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on a layer or state outside the pool.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: reads and writes `n` rows of the layer.
        """
        self._require_one_shard()
        conv, temporal = _read(self, self.checked_loc("states", states), self._layer_index(layer))
        return conv, temporal

    def write(
        self,
        states: Int32[Array, " n"],
        layer: LayerId,
        conv: Float[Array, "n *conv"],
        temporal: Float[Array, "n *temporal"],
    ) -> Self:
        """Overwrites both parts of `n` states in one layer.

        Args:
          states: Distinct but for 0, which is padding and not written.
          layer: Global layer id; may be traced.
          conv: The convolution's part; cast to the pool's dtype, saturated if it is fp8.
          temporal: The recurrent part, likewise.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on a layer or state outside the pool, a state named twice, wrong shapes, or rows that are not
            floats for a pool of floats.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: reads and writes `n` rows of the layer.
        """
        self._require_one_shard()
        states, index = self.target_loc("states", states), self._layer_index(layer)
        parts = zip(self.config.shard_row_shapes, self.config.row_dtypes, strict=True)
        for name, rows, (shape, dtype) in zip(("conv", "temporal"), (conv, temporal), parts, strict=True):
            check_rows(name, rows, (states.shape[0], *shape), dtype)
        return _write(self, index, states, conv, temporal)

    def copy_states(
        self, src: Int32[Array, " n"], dst: Int32[Array, " n"], count: int | Int32[Array, ""] | None = None
    ) -> Self:
        """Copies state `src[i]` over state `dst[i]`, in all layers.

        They are copied as if all at the same instant: a state may be read by one copy and overwritten by another. Lists
        on the host (with their count) may do so in any order. Lists on the device, or traced, are not read back: bring
        them into `reading_order` where they are made.

        Args:
          src: States to read; 0 empties the target.
          dst: States to overwrite, as many, distinct but for 0, which is padding.
          count: How many copies there are, if the lists are longer; may be traced. What follows is not looked at.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on lists of different lengths, states outside the pool, a target named twice, a count beyond
            the lists, or copies in a ring.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: as `copy_large_rows`: reads and writes `count` states, with temporary memory for one of them or none.
        Source: pymllm GDNPool.copy_states.
        """
        self._require_one_shard()
        sources, targets = self.checked_loc("src", src), self.checked_loc("dst", dst)
        n = sources.shape[0]
        require(targets.shape == (n,), "dst", f"must be as many as src, {n}", targets.shape[0])
        limit: Any = n if count is None else count
        if isinstance(limit, (int, np.integer)):
            require(bool(0 <= limit <= n), "count", f"must be in [0, {n}], the length of the lists", limit)
            if isinstance(sources, np.ndarray) and isinstance(targets, np.ndarray):
                sources, targets = reading_order(sources[:limit], targets[:limit])
                limit = len(sources)
                sources, targets = bucketed(sources, 4), bucketed(targets, 4)
            limit = np.int32(limit)
        else:
            require_array("count", limit)
            require(limit.shape == () and limit.dtype == np.int32, "count", "must be an int or int32 scalar", limit)
        return _copy(self, sources, targets, limit)

    def warmed_up(self, most: int) -> Self:
        """This pool, consumed and given back unchanged, with `copy_states` of up to `most` states compiled."""
        pool = self
        for power in range(most.bit_length() + 1):
            nothing = bucketed(np.zeros(min(1 << power, most), np.int32), 4)
            pool = _copy(pool, nothing, nothing, np.int32(0))
        return pool

    def reset_states(self, states: Int32[Array, " n"]) -> Self:
        """Empties `n` states in all layers: each becomes the state of an empty prefix, zeros.

        Args:
          states: Distinct but for 0, which is padding.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on states outside the pool, or named twice.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: writes `n` states.
        Source: pymllm GDNPool.reset_states.
        """
        self._require_one_shard()
        targets = self.target_loc("states", states)
        return _reset(self, bucketed(targets, 4) if isinstance(targets, np.ndarray) else targets)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) > 0 and all(isinstance(n, int) and n > 0 for n in shape)


def reading_order(src: Int32[ArrayLike, " n"], dst: Int32[ArrayLike, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Orders copies so that, one after the other, none overwrites a state which a later one has to read.

    Args:
      src: States to read.
      dst: States to overwrite, distinct but for 0.

    Returns:
      `(src, dst)` int32, without padding and without copies of a state to itself.

    Raises:
      ArgumentError: if a target is named twice, or copies form a ring (1 to 2 and 2 to 1), which takes a spare state.

    Cost: O(n), on the host.
    """
    pairs = [(int(a), int(b)) for a, b in zip(np.asarray(src), np.asarray(dst), strict=True) if b not in (0, a)]
    source = {target: origin for origin, target in pairs}
    require(len(source) == len(pairs), "dst", "must name each state once (0 is padding)", dst)
    readers = Counter(source.values())
    unread = [target for target in source if not readers[target]]
    ordered = []
    for target in unread:  # grows while it is walked
        origin = source.pop(target)
        ordered.append((origin, target))
        readers[origin] -= 1
        if not readers[origin] and origin in source:
            unread.append(origin)
    require(not source, "dst", "must not close a ring of copies: copy one of its states aside first", sorted(source))
    table = np.array(ordered, np.int32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@reading
def _read(pool: MambaPool, states: jax.Array, layer: jax.Array) -> tuple[jax.Array, ...]:
    rows = zip(pool._gather_stored(states, layer), pool.config.row_dtypes, strict=True)
    return tuple(from_storage(part, dtype) for part, dtype in rows)


@donating
def _write(pool: PoolT, layer: Any, states: Any, *parts: Any) -> PoolT:
    rows = zip(pool.buffers, parts, pool.config.row_dtypes, strict=True)
    return pool.with_buffers(
        *(put_rows(buffer, layer, states, to_storage(part, dtype, buffer.dtype)) for buffer, part, dtype in rows)
    )


@donating
def _copy(pool: PoolT, src: Any, dst: Any, count: Any) -> PoolT:
    return pool.with_buffers(*copy_large_rows(pool.buffers, dst, src, count))


@donating
def _reset(pool: PoolT, states: Any) -> PoolT:
    layers, n = pool.config.layer_num, states.shape[0]
    return pool._scatter_stored(states, *(jnp.zeros((layers, n, *b.shape[2:]), b.dtype) for b in pool.buffers))
