"""The pool of multi-head and grouped-query attention for torch.

Source: SGLang 0.5.2 memory_pool.py, MHATokenToKVPool.
"""

from __future__ import annotations

import torch

from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from torch_bridge.pool import Layer, TorchKVPool, torch_pool
from torch_bridge.writes import write_kv


@torch_pool.register(MHATokenToKVPool)
class TorchMHAPool(TorchKVPool):
    """Keys and values, `(layers, slots, heads, dim)` each, or page-major."""

    config: MHAConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def k(self) -> torch.Tensor:
        """Keys of all layers."""
        return self._lent(self._tensors[0])

    @property
    def v(self) -> torch.Tensor:
        """Values of all layers."""
        return self._lent(self._tensors[1])

    def set_kv_buffer(
        self,
        layer: Layer,
        loc: torch.Tensor,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Writes keys and values of `n` tokens in one layer.

        Args:
          layer: Global layer id, or the layer itself.
          loc: `(n,)` slots; padding and what is outside the pool is dropped.
          cache_k: `(n, heads, dim)`; cast to the pool's dtype, saturated if it is fp8.
          cache_v: `(n, heads, v_dim)`, likewise.
          k_scale: Divides the keys, in float32 and before the cast, also if the dtypes agree.
          v_scale: The same for the values.
          layer_id_override: Takes the place of `layer` if given.

        Raises:
          DeadViewError: if this view has ended.
          ArgumentError: on a layer outside the pool, or a wrong shape, dtype or device. Nothing is written.

        Cost: on a GPU one kernel, and one for each cast; on a CPU reads and writes `n` rows twice.
        """
        self._memory.require_alive()
        self.check_loc("loc", loc)
        index, where = self._locate(layer if layer_id_override is None else layer_id_override, loc)
        k_shape, v_shape = ((len(loc), *row) for row in self.config.row_shapes)
        k = self._stored("k", cache_k, k_shape, k_scale)
        v = self._stored("v", cache_v, v_shape, v_scale)
        k_pool, v_pool = self._tensors
        write_kv(k_pool, v_pool, index, self._on_device(index), where, k, v)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values, the sink page included."""
        return self._tensors[0].nbytes, self._tensors[1].nbytes
