"""Rows into a pool's tensors, in place: jaxcache's Triton kernels on a GPU, torch on a CPU. Arguments are checked.

Bits are moved as they are, so that every dtype goes, and NaNs keep theirs.
"""

from __future__ import annotations

import torch


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    index: int,
    layer: torch.Tensor,
    loc: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Keys and values of `n` tokens into layer `index`, which `layer` holds on the device."""
    if k_pool.is_cuda:
        from jaxcache.kernels import write_kv_torch

        write_kv_torch.write_kv(k_pool, v_pool, layer, loc, k, v)
    else:
        _put_rows(k_pool[index], loc, k)
        _put_rows(v_pool[index], loc, v)


def write_mla_kv(
    pool: torch.Tensor, index: int, layer: torch.Tensor, loc: torch.Tensor, nope: torch.Tensor, rope: torch.Tensor
) -> None:
    """Both parts of `n` rows into layer `index`, which `layer` holds on the device."""
    if pool.is_cuda:
        from jaxcache.kernels import write_kv_torch

        write_kv_torch.write_mla_kv(pool, layer, loc, nope, rope)
    else:
        _put_rows(pool[index], loc, torch.cat([nope, rope], dim=1))


def move_rows(pool: torch.Tensor, tgt: torch.Tensor, src: torch.Tensor) -> None:
    """Slot `src[i]` to slot `tgt[i]` in every layer; all are read before one is written."""
    from jaxcache.kernels.copy_kv import MAX_MOVE

    if pool.is_cuda and len(tgt) <= MAX_MOVE:
        from jaxcache.kernels import copy_pages_torch

        copy_pages_torch.move_rows(pool, tgt, src)
        return
    bits = _bits(pool)
    inside = (src >= 0) & (src < bits.shape[1])
    rows = bits[:, torch.where(inside, src, 0).long()]  # the sink's, which is zero, for what is outside
    for layer, moved in zip(bits, rows, strict=True):
        _put_rows(layer, tgt, moved)


def _put_rows(layer: torch.Tensor, loc: torch.Tensor, rows: torch.Tensor) -> None:
    keep = (loc > 0) & (loc < layer.shape[0])
    _bits(layer).index_copy_(0, loc[keep].long(), _bits(rows)[keep])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
