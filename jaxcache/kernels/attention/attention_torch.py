"""Attention for PyTorch callers: the kernels of `decode_triton`, `extend_triton` and `mla_triton` on torch tensors.

Contracts are those of the ops, but that nothing is checked: the bridge does. `q`, the arrays of `kv`, `layer` (int32,
one element) and the arrays of the plan are contiguous tensors on one device; results are fresh. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcache.kernels.attention import decode_triton, extend_triton, mla_triton
from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent
from jaxcache.kernels.attention.plan import Plan, Units
from jaxcache.kernels.triton_call import torch_call

if TYPE_CHECKING:
    import torch


def paged_decode(
    q: torch.Tensor, kv: PagedKV, layer: torch.Tensor, plan: Plan, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `decode.paged_decode`."""

    def attend(units: Units) -> list[torch.Tensor]:
        launch = decode_triton.decode_launch(_like(q), kv, layer, plan, units, masking)
        return _launch(decode_triton.decode_kernel, q, launch)

    return _merged(q, plan, attend)


def paged_extend(
    q: torch.Tensor, kv: PagedKV, layer: torch.Tensor, plan: Plan, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `extend.paged_extend`. `q` may lack the rows of padding at the end; results have them."""
    like = jax.ShapeDtypeStruct((plan.tokens, *q.shape[1:]), np.float32)
    out, lse = _launch(
        extend_triton.extend_kernel, q, extend_triton.extend_launch(like, kv, layer, plan, masking, None)
    )
    return out, lse


def mla_decode(
    q: torch.Tensor, kv: PagedLatent, layer: torch.Tensor, plan: Plan, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mla.mla_decode`."""

    def attend(units: Units) -> list[torch.Tensor]:
        launch = mla_triton.decode_launch(_like(q), kv, layer, plan, units, masking)
        return _launch(mla_triton.decode_kernel, q, launch)

    return _merged(q, plan, attend)


def mla_extend(
    q: torch.Tensor, kv: PagedLatent, layer: torch.Tensor, plan: Plan, masking: Masking
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mla.mla_extend`, and `paged_extend`."""
    like = jax.ShapeDtypeStruct((plan.tokens, *q.shape[1:]), np.float32)
    out, lse = _launch(mla_triton.extend_kernel, q, mla_triton.extend_launch(like, kv, layer, plan, masking))
    return out, lse


def _merged(
    q: torch.Tensor, plan: Plan, attend: Callable[[Units], list[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of the parts that `attend` leaves, also of those of shared prefixes."""
    together = None if plan.shared is None else attend(plan.shared.units)
    merge = decode_triton.merge_launch(attend(plan.units), plan.units, together, plan.shared, None, np.float32)
    out, lse = _launch(decode_triton.merge_kernel, q, merge, has_queries=False)
    return out, lse


def _launch(
    kernel: Any, q: torch.Tensor, launch: tuple[tuple, tuple, tuple, dict], *, has_queries: bool = True
) -> list[torch.Tensor]:
    """The outputs of one launch: partial results are float32, final ones of the dtype of `q`."""
    arrays, scalars, shapes, options = launch
    if has_queries:
        arrays = (q, *arrays[1:])
    is_parts = kernel in (decode_triton.decode_kernel, mla_triton.decode_kernel)
    float32 = q.new_empty(0).float().dtype
    dtypes = (float32 if is_parts else q.dtype, float32)
    outputs = [q.new_empty(shape.shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    torch_call(kernel, arrays, scalars, outputs=outputs, **options)
    return outputs


def _like(q: torch.Tensor) -> jax.ShapeDtypeStruct:
    """Its shape, for what makes launches; the dtype does not count."""
    return jax.ShapeDtypeStruct(tuple(q.shape), np.float32)
