"""What the KV pools have in common: rows are tokens, and everything that treats the rows of all layers alike.

The arrays are `(layers, size + page_size, *row)`; the page beyond `size` is page 0, the sink of padding. In the other
order (`jaxcache.pools.layout`) a page of all layers is one piece. What holds of every pool stands in
`jaxcache.pools.stack`.

Source: SGLang 0.5.2 memory_pool.py, KVCache.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxcache.device.donation import donating, reading
from jaxcache.device.pool import DevicePool
from jaxcache.kernels.copy_kv import move_rows
from jaxcache.pools.buffers import BufferInfo, buffer_infos
from jaxcache.pools.config import KVCacheConfig, from_storage, require, storage_dtype, to_storage
from jaxcache.pools.layer_pages import LayerPages
from jaxcache.pools.rows import bucketed, check_rows
from jaxcache.pools.stack import CpuCopy, LayerStack

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

    from jaxcache.pools.stack import LayerId

__all__ = [
    "BufferInfo",
    "CpuCopy",
    "DevicePool",
    "KVCache",
    "KVCacheConfig",
    "from_storage",
    "storage_dtype",
    "to_storage",
]

COPY_BUCKET_TOKENS = 2048
"""Tokens that one step of `get_cpu_copy` and `load_cpu_copy` moves: one compilation serves every length."""

PoolT = TypeVar("PoolT", bound="KVCache")


@dataclass(frozen=True)
class KVCache(LayerStack):
    """Base of the KV pools. A row is a token's, and `loc` arguments name slots; see `LayerStack` for the rules."""

    rows_per_copy = COPY_BUCKET_TOKENS

    config: KVCacheConfig

    @abc.abstractmethod
    def get_key_buffer(self, layer: LayerId) -> Shaped[Array, " slots *row"]:
        """Keys of a layer, in the pool's dtype. Copies the layer; attention should read `buffers`, or `gather`."""

    @abc.abstractmethod
    def get_value_buffer(self, layer: LayerId) -> Shaped[Array, " slots *row"]:
        """Values of a layer, in the pool's dtype. Copies the layer; attention should read `buffers`, or `gather`."""

    @abc.abstractmethod
    def set_kv_buffer(self, layer: LayerId, loc: Int32[Array, " n"], *args: Any, **kwargs: Any) -> Self:
        """Writes the rows of `n` tokens in one layer; what a row is given as is the kind of pool's to say."""

    @abc.abstractmethod
    def get_kv_size_bytes(self) -> Any:
        """Bytes of the arrays, the sink page included: of keys and of values, or of latent rows."""

    def get_kv_buffer(self, layer: LayerId) -> tuple[Shaped[Array, " slots *row"], Shaped[Array, " slots *row"]]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer), self.get_value_buffer(layer)

    def pages(self, layer: LayerId) -> LayerPages:
        """The pages of a layer, to be read in place by attention. Inside a jitted step, where it costs nothing.

        Args:
          layer: Global layer id; may be traced. A traced one that names no layer gives some other layer's pages.

        Raises:
          ArgumentError: on a layer outside the pool, or outside a jitted step, where a view would be a copy of the
            pool.
          ShardingError: if this pool is sharded and this is not one shard of it.
        """
        self._require_one_shard()
        is_debugging = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        is_inside = is_debugging or any(isinstance(buffer, Tracer) for buffer in self.buffers)
        require(is_inside, "pages", "must be called inside a jitted step: outside, it would copy", "a pool with memory")
        config = self.config
        index = jnp.clip(jnp.asarray(self._layer_index(layer), jnp.int32), 0, config.layer_num - 1)
        first, stride = config.placement.first_page(index, config.page_size)
        arrays = tuple(buffer.reshape(-1, config.page_size, *buffer.shape[2:]) for buffer in self.buffers)
        return LayerPages(arrays, (), first, None, stride, np.dtype(config.dtype))

    def token_rows(self, loc: Int32[ArrayLike, " n"]) -> dict[str, Any]:
        """The slots themselves, in the one stack that there is."""
        return {"kv": loc}

    def gather(self, loc: Int32[Array, " n"], layer: LayerId | None = None) -> Any:
        """Reads the rows of `n` slots.

        Args:
          loc: Slots, in any order, with repeats. On the device or traced, slots outside the pool read as zeros.
          layer: Global id of one layer, or None for all of them.

        Returns:
          `(n, *row)`, or `(layers, n, *row)` for all layers, in the pool's dtype: `(k, v)` for a pool of keys and
          values, one array for an MLA pool.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on a layer or slot outside the pool.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: reads and writes `n` rows, a layer.
        """
        self.require_live()
        self._require_one_shard()
        loc = self.checked_loc("loc", loc)
        rows: Any = _gather(self, loc, None if layer is None else self._layer_index(layer))
        return rows if len(rows) > 1 else rows[0]

    def set_all_layers(self, loc: Int32[Array, " n"], *rows: Shaped[Array, "layers n *row"]) -> Self:
        """Writes the rows of `n` tokens in every layer: the inverse of `gather(loc)`.

        Args:
          loc: Slot of each token.
          *rows: `(layers, n, *row)` for each array of the pool: k and v, or the latent rows. Cast to the pool's dtype,
            saturated if it is fp8.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on wrong shapes or dtypes, slots outside the pool, or a slot named twice.
          ShardingError: if this pool is sharded and this is not one shard of it.
        """
        self._require_one_shard()
        loc = self.target_loc("loc", loc)
        require(len(rows) == len(self.buffers), "rows", f"must be {len(self.buffers)} arrays", len(rows))
        for i, (array, row) in enumerate(zip(rows, self.config.shard_row_shapes, strict=True)):
            self._check_rows(f"rows[{i}]", array, (self.config.layer_num, loc.shape[0], *row))
        return _set_all_layers(self, loc, *rows)

    def copy_tokens(self, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> Self:
        """See `MemoryPool.copy_tokens`."""
        if self.mesh is not None:
            return super().copy_tokens(source, target)
        return self.move_kv_cache(target, source)  # pyright: ignore[reportArgumentType]

    def move_kv_cache(self, tgt_loc: Int32[Array, " n"], src_loc: Int32[Array, " n"]) -> Self:
        """Copies slot `src_loc[i]` to slot `tgt_loc[i]` in every layer, all at the same instant: the lists may overlap.

        Args:
          tgt_loc: Slots to write, distinct but for 0. Lists on the host are padded to a power of two, so that few
            shapes compile.
          src_loc: Slots to read, as many.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on lists of different lengths, slots outside the pool, or a target named twice.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: `n` rows of every layer are read and written once by a kernel, if it can hold them, else twice, through a
        temporary of that size; see `jaxcache.kernels.copy_kv.move_rows`. Page-major, the rows of all layers count.
        Source: SGLang 0.5.2 memory_pool.py, MHATokenToKVPool.move_kv_cache and copy_all_layer_kv_cache.
        """
        self._require_one_shard()
        tgt_loc, src_loc = self.target_loc("tgt_loc", tgt_loc), self.checked_loc("src_loc", src_loc)
        rule = f"must be as many as src_loc, {src_loc.shape[0]}"
        require(tgt_loc.shape == src_loc.shape, "tgt_loc", rule, tgt_loc.shape[0])
        if isinstance(tgt_loc, np.ndarray) and isinstance(src_loc, np.ndarray):
            return _move(self, bucketed(tgt_loc, 16), bucketed(src_loc, 16))
        return _move(self, tgt_loc, src_loc)

    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where each layer of each array lies: all layers of the first array, then of the second.

        Page-major, where each array lies. Of a sharded pool this is one device's share, and the same on all of them.

        Source: SGLang 0.5.2 memory_pool.py, get_contiguous_buf_infos, which returns pointers, sizes and bytes per page.
        """
        paths = jax.tree_util.tree_flatten_with_path(self)[0]
        return tuple(
            info
            for (path, buffer), row in zip(paths, self.config.shard_row_shapes, strict=True)
            for info in buffer_infos(self.config, path[0].name, row, buffer.dtype.itemsize)
        )

    def maybe_get_custom_mem_pool(self) -> None:
        """None: XLA allocates the pool. Kept for callers of SGLang's name."""

    def _check_rows(self, name: str, rows: Any, shape: tuple[int, ...]) -> None:
        check_rows(name, rows, shape, np.dtype(self.config.dtype))

    def _stored(self, rows: ArrayLike, scale: ArrayLike | None = None) -> jax.Array:
        """Rows as this pool stores them, divided by `scale` in float32 before the cast."""
        if scale is not None:
            rows = jnp.asarray(rows, jnp.float32) / jnp.asarray(scale, jnp.float32)
        return to_storage(rows, self.config.dtype, self.buffers[0].dtype)

    def _layer_rows(self, buffer: jax.Array, layer: LayerId) -> jax.Array:
        """One layer of a stacked array, in the pool's dtype. A copy."""
        self.require_live()
        self._require_one_shard()
        return _layer(self, buffer, self._layer_index(layer))


@reading
def _layer(pool: KVCache, buffer: jax.Array, layer: Any) -> jax.Array:
    return from_storage(pool.config.placement.whole_layer(buffer, layer), pool.config.dtype)


@reading
def _gather(pool: KVCache, loc: jax.Array, layer: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(from_storage(rows, pool.config.dtype) for rows in pool._gather_stored(loc, layer))


@donating
def _set_all_layers(pool: PoolT, loc: jax.Array, *rows: ArrayLike) -> PoolT:
    return pool._scatter_stored(loc, *map(pool._stored, rows))


@donating
def _move(pool: PoolT, tgt_loc: Any, src_loc: Any) -> PoolT:
    targets, sources = map(pool.config.placement.locate_all, (tgt_loc, src_loc))
    return pool.with_buffers(*(move_rows(buffer, targets, sources) for buffer in pool.buffers))
