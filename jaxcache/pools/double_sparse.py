"""The pool of Double Sparsity: keys, values, and of each key the few channels that choose which tokens are attended to.

Legacy: SGLang keeps it for one attention backend. Which channels are heavy is the caller's to know; for attention that
is sparse in other ways, use an `MHATokenToKVPool`.

Source: SGLang 0.5.2 memory_pool.py, DoubleSparseTokenToKVPool, whose labels have fewer rows than its keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax

from jaxcache.device.donation import donating
from jaxcache.kernels.write_kv import put_rows, write_kv
from jaxcache.pools.base import KVCache
from jaxcache.pools.config import require_positive
from jaxcache.pools.mha import HeadsConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped

    from jaxcache.pools.stack import LayerId

PoolT = TypeVar("PoolT", bound="DoubleSparseTokenToKVPool")


@dataclass(frozen=True, kw_only=True)
class DoubleSparseConfig(HeadsConfig):
    """Sizes of a `DoubleSparseTokenToKVPool`; see `HeadsConfig` for the fields that are not listed here.

    Attributes:
      heavy_channel_num: Width of a label: channels of a key head that are kept once more.
    """

    heavy_channel_num: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "heavy_channel_num")

    @property
    def pool_type(self) -> type[DoubleSparseTokenToKVPool]:
        return DoubleSparseTokenToKVPool

    @property
    def row_shapes(self) -> tuple[tuple[int, int], ...]:
        """A key, a value and a label, `(heads, dim)` each."""
        return *super().row_shapes, (self.head_num, self.heavy_channel_num)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v", "label"), meta_fields=("config",))
@dataclass(frozen=True)
class DoubleSparseTokenToKVPool(KVCache):
    """Keys, values and labels of all layers. Make one with `create`; see `KVCache` for what holds of all pools.

    Attributes:
      config: The sizes.
      k: Keys, as of an `MHATokenToKVPool`.
      v: Values, likewise.
      label: Labels, likewise, of `heavy_channel_num`: a row for each slot that has a key.
    """

    config: DoubleSparseConfig
    k: Shaped[Array, "layers slots heads k_dim"]
    v: Shaped[Array, "layers slots heads v_dim"]
    label: Shaped[Array, "layers slots heads heavy_channels"]

    def set_kv_buffer(
        self,
        layer: LayerId,
        loc: Int32[Array, " n"],
        k: Float[Array, "n heads k_dim"],
        v: Float[Array, "n heads v_dim"],
        label: Float[Array, "n heads heavy_channels"],
    ) -> Self:
        """Writes keys, values and labels of `n` tokens in one layer.

        Args:
          layer: Global layer id; may be traced.
          loc: Slot of each token.
          k: Keys; cast to the pool's dtype, saturated if it is fp8.
          v: Values, likewise.
          label: Labels, likewise.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError, ArgumentError, ShardingError: as `MHATokenToKVPool.set_kv_buffer`.

        Cost: reads and writes `n` rows.
        """
        self._require_one_shard()
        index, loc, rows = self._layer_index(layer), self.target_loc("loc", loc), (k, v, label)
        for name, array, row in zip(("k", "v", "label"), rows, self.config.shard_row_shapes, strict=True):
            self._check_rows(name, array, (loc.shape[0], *row))
        return _write(self, index, loc, *rows)

    def get_key_buffer(self, layer: LayerId) -> Shaped[Array, "slots heads k_dim"]:
        return self._layer_rows(self.k, layer)

    def get_value_buffer(self, layer: LayerId) -> Shaped[Array, "slots heads v_dim"]:
        return self._layer_rows(self.v, layer)

    def get_label_buffer(self, layer: LayerId) -> Shaped[Array, "slots heads heavy_channels"]:
        """Labels of a layer, in the pool's dtype. Copies the layer; attention should read `label`, or `gather`."""
        return self._layer_rows(self.label, layer)

    def get_kv_size_bytes(self) -> tuple[int, int, int]:
        """Bytes of the keys, of the values and of the labels, the sink page included."""
        return self.k.nbytes, self.v.nbytes, self.label.nbytes


@donating
def _write(pool: PoolT, index: Any, loc: Any, *rows: Any) -> PoolT:
    index, loc = pool.config.placement.locate(index, loc)
    k, v, label = map(pool._stored, rows)
    return pool.with_buffers(*write_kv(pool.k, pool.v, index, loc, k, v), put_rows(pool.label, index, loc, label))
