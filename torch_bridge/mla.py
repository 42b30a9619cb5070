"""The pool of multi-head latent attention for torch.

Source: SGLang 0.5.2 memory_pool.py, MLATokenToKVPool.
"""

from __future__ import annotations

from typing import Any

import torch

from jaxcache.pools.config import require
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from torch_bridge.pool import Layer, TorchKVPool, torch_pool
from torch_bridge.writes import write_mla_kv


@torch_pool.register(MLATokenToKVPool)
class TorchMLAPool(TorchKVPool):
    """Latent rows, `(layers, slots, rank + rope)`, or page-major. Getters give them a head each, as SGLang does."""

    config: MLAConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def kv(self) -> torch.Tensor:
        """Rows of all layers."""
        return self._lent(self._tensors[0])

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Whole rows of a layer, `(slots, 1, rank + rope)`: a view."""
        return self._layer(0, layer_id).unsqueeze(1)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Latent parts of a layer, `(slots, 1, rank)`: a view."""
        return self.get_key_buffer(layer_id)[..., : self.config.kv_lora_rank]

    def set_mla_kv_buffer(
        self, layer: Layer, loc: torch.Tensor, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor
    ) -> None:
        """Writes the two parts of `n` tokens' rows in one layer.

        Args:
          layer: Global layer id, or the layer itself.
          loc: `(n,)` slots; padding and what is outside the pool is dropped.
          cache_k_nope: Latent parts, `(n, rank)` or `(n, 1, rank)`; cast to the pool's dtype, saturated if it is fp8.
          cache_k_rope: Rope parts, `(n, rope)` or `(n, 1, rope)`, likewise.

        Raises:
          DeadViewError: if this view has ended.
          ArgumentError: on a layer outside the pool, or a wrong shape, dtype or device. Nothing is written.

        Cost: on a GPU one kernel, and one for each cast; on a CPU reads and writes `n` rows twice.
        """
        self._memory.require_alive()
        self.check_loc("loc", loc)
        index, where = self._locate(layer, loc)
        nope = self._stored("cache_k_nope", _flat(cache_k_nope), (len(loc), self.config.kv_lora_rank))
        rope = self._stored("cache_k_rope", _flat(cache_k_rope), (len(loc), self.config.qk_rope_head_dim))
        write_mla_kv(self._tensors[0], index, self._on_device(index), where, nope, rope)

    def set_kv_buffer(
        self, layer: Layer, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor | None = None
    ) -> None:
        """`set_mla_kv_buffer` of rows whose parts stand side by side already. `cache_v` is ignored, as in SGLang."""
        del cache_v
        rank, rope = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        self._check_tensor("cache_k", cache_k)
        require(cache_k.shape[-1:] == (rank + rope,), "cache_k", f"must have rows of {rank} + {rope}", cache_k.shape)
        self.set_mla_kv_buffer(layer, loc, cache_k[..., :rank], cache_k[..., rank:])

    def get_kv_size_bytes(self) -> int:
        """Bytes of the rows, the sink page included."""
        return self._tensors[0].nbytes


def _flat(rows: Any) -> Any:
    """Rows without the head of their own that SGLang gives them."""
    return rows[:, 0] if isinstance(rows, torch.Tensor) and rows.ndim == 3 and rows.shape[1] == 1 else rows
