"""Which implementations can take which arrays, and why others cannot: one place for the plan and the ops.

A plan is made for one implementation, whose blocks and tiles it is cut into. The reference takes any plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.attention.contract import PagedKV, PagedLatent, PageOrder, ScaleKind, scale_kind
from jaxcache.kernels.attention.launch import WGMMA_KEYS, WGMMA_LATENTS, WGMMA_ROWS, power_of_two
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.dispatch import Implementation, current_target

MAX_DIM = 512
MAX_GROUP = 64
MAX_RANK = 1024

Unfit = Mapping[Implementation, str]


def unfit_for_decode(q: Any, kv: PagedKV) -> Unfit:
    """Why kernels of `paged_decode` cannot take these arrays."""
    why = _triton(q, kv.k, kv.dtype) or _triton_heads(q, kv)
    return {} if why is None else {Implementation.TRITON: why}


def unfit_for_extend(q: Any, kv: PagedKV, plan: Plan) -> Unfit:
    """Why kernels of `paged_extend` cannot take these arrays."""
    mosaic = wgmma_extend(kv.k.shape[-1], kv.v.shape[-1], q.shape[1], kv.heads, kv.dtype, kv.order, len(q))
    kinds = {scale_kind("scale", scale, kv.k.shape[:3]) for scale in (kv.k_scale, kv.v_scale)}
    if ScaleKind.ROW in kinds:
        mosaic = mosaic or "it has no scales of rows"
    planned = plan.launches.extend.implementation
    return _reasons(_triton(q, kv.k, kv.dtype) or _triton_heads(q, kv), mosaic or _stored(q, kv.k, kv.dtype), planned)


def unfit_for_latent_decode(q: Any, kv: PagedLatent, plan: Plan) -> Unfit:
    """Why kernels of `mla_decode` cannot take these arrays."""
    mosaic = wgmma_latents(kv.rank, kv.rope, q.shape[1], kv.dtype, kv.order, plan.window)
    planned = plan.launches.decode.implementation
    return _reasons(_triton_latents(q, kv, plan), mosaic or _stored(q, kv.rows, kv.dtype), planned)


def unfit_for_latent_extend(q: Any, kv: PagedLatent, plan: Plan) -> Unfit:
    """Why kernels of `mla_extend` cannot take these arrays."""
    why = _triton_latents(q, kv, plan)
    return {} if why is None else {Implementation.TRITON: why}


def wgmma_latents(
    rank: int, rope: int, heads: int, dtype: np.dtype, order: PageOrder, window: int | None
) -> str | None:
    """Why the Mosaic kernel of `mla_decode` cannot take latent rows like these, or None."""
    if heads % WGMMA_ROWS:
        return f"it takes {WGMMA_ROWS} query heads a program, and there are {heads}"
    if rope != WGMMA_ROWS or rank % (2 * WGMMA_ROWS) or rank > MAX_DIM:
        return (
            f"it takes {WGMMA_ROWS} columns of rope and 128, 256, 384 or 512 of latents, and these are {rope}, {rank}"
        )
    if window is not None:
        return "it has no window"
    return _wgmma_rows(dtype, order, WGMMA_LATENTS // 2)


def wgmma_extend(
    dim: int, v_dim: int, heads: int, kv_heads: int, dtype: np.dtype, order: PageOrder, tokens: int
) -> str | None:
    """Why the Mosaic kernel of `paged_extend` cannot take keys and values like these, or None."""
    if dim != v_dim or dim not in (64, 128):
        return f"its keys and values are both 64 or both 128 wide, and these are {dim} and {v_dim}"
    if (heads // kv_heads) % 2:
        return f"it takes two query heads of a KV head, and there are {heads // kv_heads}"
    if tokens < WGMMA_ROWS:
        return f"it takes at least {WGMMA_ROWS} tokens, and there are {tokens}"
    return _wgmma_rows(dtype, order, WGMMA_KEYS)


def unfit_dtype(dtype: np.dtype) -> str | None:
    """Why Triton has no numbers like these on the present GPU, or None."""
    capability = current_target().compute_capability()
    if dtype == jnp.float8_e4m3fn and capability is not None and capability < 89:
        return f"Triton has float8_e4m3fn from compute capability 8.9 on, and this is {capability / 10}"
    return None


def _reasons(triton: str | None, mosaic: str | None, planned: Implementation) -> Unfit:
    """The reasons of those that have one; first of all, that the plan is not theirs."""
    found = {Implementation.TRITON: triton, Implementation.MOSAIC: mosaic}
    for implementation in found:
        if implementation is not planned:
            found[implementation] = (
                f"the plan is cut for {planned.name}: make it with implementation=Implementation.{implementation.name}"
            )
    return {implementation: why for implementation, why in found.items() if why is not None}


def _triton(q: Any, rows: Any, dtype: np.dtype) -> str | None:
    """What Triton kernels ask of rows of any kind."""
    return _stored(q, rows, dtype) or unfit_dtype(dtype)


def _stored(q: Any, rows: Any, dtype: np.dtype) -> str | None:
    if rows.dtype != dtype:
        return f"its rows must be stored as {dtype}, and are as {rows.dtype}"
    if dtype.itemsize > 1 and q.dtype != dtype:
        return f"its queries must be of the pool's {dtype}, and are {q.dtype}"
    return None


def _triton_heads(q: Any, kv: PagedKV) -> str | None:
    if max(kv.k.shape[-1], kv.v.shape[-1]) > MAX_DIM:
        return f"its heads are at most {MAX_DIM} wide, and these are {kv.k.shape[-1]} and {kv.v.shape[-1]}"
    if power_of_two(q.shape[1] // kv.heads) > MAX_GROUP:
        return f"it takes at most {MAX_GROUP} query heads a KV head, and there are {q.shape[1] // kv.heads}"
    return None


def _triton_latents(q: Any, kv: PagedLatent, plan: Plan) -> str | None:
    if not plan.launches.decode.heads:
        return "its plan must be made for latent rows, and is for keys and values"
    if kv.rank > MAX_RANK:
        return f"its latent parts are at most {MAX_RANK} wide, and these are {kv.rank}"
    return _triton(q, kv.rows, kv.dtype)


def _wgmma_rows(dtype: np.dtype, order: PageOrder, tokens: int) -> str | None:
    """What the Mosaic kernels, whose buffers hold so many tokens, ask of rows."""
    page = order.page_size
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its rows are bfloat16 or float16, and these are {dtype}"
    if page % 8 or (tokens % page and page % tokens):
        return f"its pages are of 8 to {tokens} tokens, a power of two, or a multiple of {tokens}, and these of {page}"
    if order.rows >= 2**31:
        return f"its row ids are int32, and there are {order.rows} rows"
    return None
