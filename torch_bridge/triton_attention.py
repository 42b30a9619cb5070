"""The Triton kernels of `jaxcache.attention`, launched from torch over a pool's tensors: a plan once a step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import numpy as np
import torch

from jaxcache.attention.plan import page_order
from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent, Sequences
from jaxcache.kernels.attention.launch import Launches, heads_launches, latent_launches, power_of_two
from jaxcache.kernels.attention.plan import Plan, make_plan
from jaxcache.pools.mla import MLAConfig
from torch_bridge.dtypes import TORCH_DTYPES
from torch_bridge.page_table import PageTable
from torch_bridge.pool import TorchKVPool


def triton_obstacle(kv: TorchKVPool) -> str | None:
    """Why the Triton kernels cannot attend over a pool, or None."""
    dtype = np.dtype(kv.config.dtype)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if kv.buffers[0].dtype != TORCH_DTYPES.get(dtype):
        return f"its rows must be stored as {dtype}, and are as {kv.buffers[0].dtype}"
    from jaxcache.kernels.attention.common_triton import COMPILES

    if COMPILES.value and kv.device.type != "cuda":
        return f"they need a GPU, and the pool is on {kv.device}"
    return None


@dataclass(frozen=True)
class PlannedTriton:
    """A batch, planned for the layers of a pool.

    Attributes:
      kv: The view of the pool.
      plan: Of this step, its arrays tensors on the pool's device. Requests and tokens are padded to powers of two, so
        that few shapes are traced.
      masking: Scale and window.
      is_decode: Whether each sequence has one query.
    """

    kv: TorchKVPool
    plan: Plan
    masking: Masking
    is_decode: bool

    @classmethod
    def of(
        cls,
        kv: TorchKVPool,
        pages: PageTable,
        query_lens: np.ndarray,
        num_heads: int,
        scale: float,
        window: int | None,
        is_decode: bool,
    ) -> Self:
        """Plans a batch. Cost: the plan by JAX, and its arrays, a few integers a request, once from host to device."""
        tokens = int(query_lens.sum())
        padded = power_of_two(max(tokens, 1))
        launches = _launches(kv, power_of_two(max(len(query_lens), 1)), num_heads)
        sequences = _sequences(pages, query_lens)
        plan = _plan(sequences, padded, pages.page_size, launches, window)
        leaves, structure = jax.tree.flatten(plan)
        tensors = [torch.from_numpy(np.array(leaf)).to(kv.device) for leaf in leaves]
        return cls(kv, jax.tree.unflatten(structure, tensors), Masking(scale, window), is_decode)

    def run(self, q: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Attends in one layer: `(queries, heads, dim)` to `(queries, heads, width of values)`."""
        from jaxcache.kernels.attention import attention_torch as ops

        config = self.kv.config
        order, dtype = page_order(config), np.dtype(config.dtype)
        layer = torch.full((1,), int(config.layer_index(layer_id)), dtype=torch.int32, device=q.device)
        buffers: Any = self.kv.buffers
        kv: Any
        if isinstance(config, MLAConfig):
            kv = PagedLatent(buffers[0], None, order, dtype, config.kv_lora_rank)
            op = ops.mla_decode if self.is_decode else ops.mla_extend
        else:
            kv = PagedKV(buffers[0], buffers[1], None, None, order, dtype)
            op = ops.paged_decode if self.is_decode else ops.paged_extend
        out, _ = op(q.contiguous(), kv, layer, self.plan, self.masking)
        return out[: len(q)]


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _plan(sequences: Sequences, tokens: int, page_size: int, launches: Launches, window: int | None) -> Plan:
    return make_plan(sequences, tokens, page_size, launches, window=window)


def _sequences(pages: PageTable, query_lens: np.ndarray) -> Sequences:
    """The batch, padded to powers of two."""
    count, held = len(query_lens), np.diff(pages.indptr)
    rows = power_of_two(max(count, 1))
    table = np.zeros((rows, power_of_two(max(int(held.max(initial=1)), 1))), np.int32)
    table[:count][np.arange(table.shape[1]) < held[:, None]] = pages.indices
    seq_len, prefix_len, first = (np.zeros(rows, np.int32) for _ in range(3))
    seq_len[:count] = pages.kv_lens
    prefix_len[:count] = pages.kv_lens - query_lens
    first[:] = query_lens.sum()
    first[:count] = np.cumsum(query_lens) - query_lens
    return Sequences(table, np.arange(rows, dtype=np.int32), prefix_len, seq_len, first)


def _launches(kv: TorchKVPool, requests: int, num_heads: int) -> Launches:
    """The launches for the pool's device."""
    config = kv.config
    itemsize, capability = np.dtype(config.dtype).itemsize, None
    if kv.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(kv.device)
        capability = 10 * major + minor
    if isinstance(config, MLAConfig):
        return latent_launches(requests, num_heads, config.row_shapes[0][0], itemsize, capability)
    (heads, dim), (_, v_dim) = config.row_shapes
    return heads_launches(requests, heads, num_heads // heads, dim + v_dim, itemsize, capability)
