"""The pool of multi-head latent attention: one row a token, its latent part and its rope part side by side.

Source: SGLang 0.5.2 memory_pool.py, MLATokenToKVPool.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax

from jaxcache.device.donation import donating
from jaxcache.kernels.arguments import require_array
from jaxcache.kernels.write_kv import write_mla_kv
from jaxcache.pools.base import KVCache
from jaxcache.pools.config import KVCacheConfig, require, require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped

    from jaxcache.pools.stack import LayerId

PoolT = TypeVar("PoolT", bound="MLATokenToKVPool")


@dataclass(frozen=True, kw_only=True)
class MLAConfig(KVCacheConfig):
    """Sizes of an `MLATokenToKVPool`; see `KVCacheConfig` for the fields that are not listed here.

    A sharded one has a copy of all rows on every device: its rows have no heads to cut.

    Attributes:
      kv_lora_rank: Width of the latent part, which serves as the value.
      qk_rope_head_dim: Width of the rope part.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "kv_lora_rank", "qk_rope_head_dim")

    @property
    def pool_type(self) -> type[MLATokenToKVPool]:
        return MLATokenToKVPool

    @property
    def row_shapes(self) -> tuple[tuple[int]]:
        """One row, both parts side by side."""
        return ((self.kv_lora_rank + self.qk_rope_head_dim,),)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kv",), meta_fields=("config",))
@dataclass(frozen=True)
class MLATokenToKVPool(KVCache):
    """Latent rows of all layers. Make one with `create`; see `KVCache` for what holds of all pools.

    Rows are accepted as `(n, width)` or, as SGLang passes them, `(n, 1, width)`; they are returned as `(n, width)`.

    Attributes:
      config: The sizes.
      kv: Rows `(layers, size + page_size, kv_lora_rank + qk_rope_head_dim)` in storage dtype.
    """

    config: MLAConfig
    kv: Shaped[Array, "layers slots rank+rope"]

    def set_mla_kv_buffer(
        self,
        layer: LayerId,
        loc: Int32[Array, " n"],
        k_nope: Float[Array, "n rank"],
        k_rope: Float[Array, "n rope"],
    ) -> Self:
        """Writes the two parts of `n` tokens' rows in one layer.

        Args:
          layer: Global layer id; may be traced.
          loc: Slot of each token.
          k_nope: Latent parts; cast to the pool's dtype, saturated if it is fp8. Any width.
          k_rope: Rope parts, likewise.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on a layer or slot outside the pool, a slot named twice, wrong shapes, or rows that are not
            floats for a pool of floats.
          ShardingError: if this pool is sharded and this is not inside a `jax.shard_map` over its axis.

        Cost: reads and writes `n` rows.
        """
        self._require_one_shard()
        index, loc = self._layer_index(layer), self.target_loc("loc", loc)
        nope = self._flat_rows("k_nope", k_nope, loc.shape[0], self.config.kv_lora_rank)
        rope = self._flat_rows("k_rope", k_rope, loc.shape[0], self.config.qk_rope_head_dim)
        return _write(self, index, loc, nope, rope)

    def set_kv_buffer(
        self, layer: LayerId, loc: Int32[Array, " n"], cache_k: Float[Array, "n rank+rope"], cache_v: Any = None
    ) -> Self:
        """`set_mla_kv_buffer` of rows whose parts stand side by side already. `cache_v` is ignored, as in SGLang."""
        del cache_v
        rank, rope = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        require_array("cache_k", cache_k)
        require(cache_k.shape[-1:] == (rank + rope,), "cache_k", f"must have rows of {rank} + {rope}", cache_k.shape)
        return self.set_mla_kv_buffer(layer, loc, cache_k[..., :rank], cache_k[..., rank:])

    def get_key_buffer(self, layer: LayerId) -> Shaped[Array, "slots rank+rope"]:
        """Whole rows of a layer, in the pool's dtype. Copies the layer; attention should read `kv`, or `gather`."""
        return self._layer_rows(self.kv, layer)

    def get_value_buffer(self, layer: LayerId) -> Shaped[Array, "slots rank"]:
        """Latent parts of a layer, in the pool's dtype. Copies the layer; attention should read `kv`, or `gather`."""
        return self.get_key_buffer(layer)[:, : self.config.kv_lora_rank]

    def get_kv_size_bytes(self) -> int:
        """Bytes of the rows, the sink page included."""
        return self.kv.nbytes

    def _flat_rows(self, name: str, rows: Any, tokens: int, width: int) -> Any:
        """Rows as `(tokens, width)`."""
        require_array(name, rows)
        flat = rows[:, 0] if rows.ndim == 3 and rows.shape[1] == 1 else rows
        self._check_rows(name, flat, (tokens, width))
        return flat


@donating
def _write(pool: PoolT, index: Any, loc: Any, nope: Any, rope: Any) -> PoolT:
    index, loc = pool.config.placement.locate(index, loc)
    return pool.with_buffers(write_mla_kv(pool.kv, index, loc, pool._stored(nope), pool._stored(rope)))
