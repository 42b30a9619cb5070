"""The pool of multi-head and grouped-query attention: keys and values, `(layers, slots, heads, dim)` each.

`pool.k.reshape(layers * pages, page_size, heads, dim)` is free: attention reads the stack with page ids offset by
`layer * pages`, the NHD layout of FlashInfer and the BTNH layout of cuDNN. Slicing a layer out of the stack copies it.
Page-major (`jaxcache.pools.layout`), page `p` of a layer is `p * layers + layer` there.

Source: SGLang 0.5.2 memory_pool.py, MHATokenToKVPool.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcache.device.donation import donating
from jaxcache.kernels.write_kv import write_kv
from jaxcache.pools.base import KVCache
from jaxcache.pools.config import KVCacheConfig, require, require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped

    from jaxcache.pools.stack import LayerId

PoolT = TypeVar("PoolT", bound="MHATokenToKVPool")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(KVCacheConfig):
    """Sizes of a pool of keys and values; see `KVCacheConfig` for the fields that are not listed here.

    Attributes:
      head_num: KV heads, over all shards: a multiple of `shards`. Each device holds as many consecutive ones.
      head_dim: Width of a key head.
      v_head_dim: Width of a value head; None means `head_dim`.
    """

    cuts_rows = True

    head_num: int
    head_dim: int
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        require_positive(self, "head_num", "head_dim", "v_head_dim")
        rule = f"must be a multiple of shards = {self.shards}: repeat the heads if the model has fewer"
        require(self.head_num % self.shards == 0, "head_num", rule, self.head_num)

    @property
    def row_shapes(self) -> tuple[tuple[int, int], ...]:
        """A key and a value, `(heads, dim)` each."""
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        return (self.head_num, self.head_dim), (self.head_num, v_head_dim)


@dataclass(frozen=True, kw_only=True)
class MHAConfig(HeadsConfig):
    """Sizes of an `MHATokenToKVPool`; see `HeadsConfig` for the fields."""

    @property
    def pool_type(self) -> type[MHATokenToKVPool]:
        return MHATokenToKVPool


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("config",))
@dataclass(frozen=True)
class MHATokenToKVPool(KVCache):
    """Keys and values of all layers. Make one with `create`; see `KVCache` for what holds of all pools.

    Attributes:
      config: The sizes.
      k: Keys `(layers, size + page_size, head_num, head_dim)` in storage dtype.
      v: Values `(layers, size + page_size, head_num, v_head_dim)` in storage dtype.
    """

    config: MHAConfig
    k: Shaped[Array, "layers slots heads k_dim"]
    v: Shaped[Array, "layers slots heads v_dim"]

    def set_kv_buffer(
        self,
        layer: LayerId,
        loc: Int32[Array, " n"],
        k: Float[Array, "n heads k_dim"],
        v: Float[Array, "n heads v_dim"],
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        layer_id_override: LayerId | None = None,
    ) -> Self:
        """Writes keys and values of `n` tokens in one layer.

        Args:
          layer: Global layer id; may be traced.
          loc: Slot of each token.
          k: Keys; cast to the pool's dtype. What is beyond the range of an fp8 dtype saturates
            (`jaxcache.kernels.float8`): scale it.
          v: Values, likewise.
          k_scale: Divides the keys, in float32 and before the cast, also if the dtypes agree. A number, or an array
            that broadcasts to `k`, such as `(heads, 1)`. The caller's arrays are untouched. XLA may multiply by the
            reciprocal, which is within one unit in the last place of float32.
          v_scale: The same for the values.
          layer_id_override: Takes the place of `layer` if given.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on a layer or slot outside the pool, a slot named twice, wrong shapes, rows that are not floats
            for a pool of floats, or a scale for a pool of integers.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: reads and writes `n` rows.
        """
        self._require_one_shard()
        index = self._layer_index(layer if layer_id_override is None else layer_id_override)
        loc = self.target_loc("loc", loc)
        for name, rows, scale, row_shape in zip(
            "kv", (k, v), (k_scale, v_scale), self.config.shard_row_shapes, strict=True
        ):
            self._check_rows(name, rows, (loc.shape[0], *row_shape))
            if scale is not None:
                self._check_scale(f"{name}_scale", scale, rows.shape)
        return _write(self, index, loc, k, v, k_scale, v_scale)

    def get_key_buffer(self, layer: LayerId) -> Shaped[Array, "slots heads k_dim"]:
        """Keys of a layer, in the pool's dtype. Copies the layer; attention should read `k`, or `gather`."""
        return self._layer_rows(self.k, layer)

    def get_value_buffer(self, layer: LayerId) -> Shaped[Array, "slots heads v_dim"]:
        """Values of a layer, in the pool's dtype. Copies the layer; attention should read `v`, or `gather`."""
        return self._layer_rows(self.v, layer)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values, the sink page included."""
        return self.k.nbytes, self.v.nbytes

    def _check_scale(self, name: str, scale: Any, shape: tuple[int, ...]) -> None:
        is_float = jnp.issubdtype(self.config.dtype, jnp.floating)
        require(is_float, name, f"must be None: rows of a {self.config.dtype} pool are quantised by the caller", scale)
        lengths = zip(reversed(jnp.shape(scale)), reversed(shape), strict=False)
        fits = jnp.ndim(scale) <= len(shape) and all(mine in (1, theirs) for mine, theirs in lengths)
        require(fits, name, f"must broadcast to {shape}", jnp.shape(scale))


@donating
def _write(pool: PoolT, index: Any, loc: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> PoolT:
    rows = pool._stored(k, k_scale), pool._stored(v, v_scale)
    index, loc = pool.config.placement.locate(index, loc)
    return pool.with_buffers(*write_kv(pool.k, pool.v, index, loc, *rows))
