"""The KV write for PyTorch callers: the kernels of `write_kv_triton`, launched on torch tensors, in place.

Contracts are those of `write_kv`, but that the tensors are contiguous and on one device, nothing is checked (the bridge
checks once, when it makes the view) and the layer is an int32 tensor of one element on that device: reading it there
keeps the launch free of a host round trip, and lets a captured graph serve every layer. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.kernels import write_kv_triton
from jaxcache.kernels.triton_call import torch_call

if TYPE_CHECKING:
    import torch


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    layer: torch.Tensor,
    loc: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Writes the keys and values of `n` tokens into one layer, in place. See `write_kv.write_kv`."""
    if not loc.shape[0]:
        return
    layers, slots, heads, k_dim = k_pool.shape
    torch_call(
        write_kv_triton.write_kv_kernel,
        (k_pool, v_pool, layer, loc, k, v),
        (loc.shape[0], layers, slots),
        num_updates=2,
        **write_kv_triton.write_kv_launch(loc.shape[0], heads * k_dim, heads * v_pool.shape[3], k_pool.element_size()),
    )


def write_mla_kv(
    pool: torch.Tensor, layer: torch.Tensor, loc: torch.Tensor, nope: torch.Tensor, rope: torch.Tensor
) -> None:
    """Writes the latent and rope parts of `n` tokens into one layer, in place. See `write_kv.write_mla_kv`."""
    if not loc.shape[0]:
        return
    layers, slots, _ = pool.shape
    torch_call(
        write_kv_triton.write_mla_kv_kernel,
        (pool, layer, loc, nope, rope),
        (loc.shape[0], layers, slots),
        num_updates=1,
        **write_kv_triton.write_mla_kv_launch(loc.shape[0], nope.shape[1], rope.shape[1], pool.element_size()),
    )
