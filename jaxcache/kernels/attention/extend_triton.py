"""Triton kernel of `extend`. Parameter order: see `triton_call`.

A program takes a tile: some tokens of one request, with all query heads of one KV head, so that keys and values are
read once for all of them. Blocks of keys that every row of the tile sees come first, without masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.attention.common_triton import (
    LOG2E,
    add_sinks,
    first_page,
    key_logits,
    load_tile,
    no_softmax,
    queries_to_math,
    rows_of_block,
    scale_of,
    scale_weights,
    weigh_values,
)
from jaxcache.kernels.attention.contract import Masking, PagedKV
from jaxcache.kernels.attention.decode_triton import heads_constants
from jaxcache.kernels.attention.launch import power_of_two
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray


def paged_extend(
    q: AnyArray, kv: PagedKV, layer: int | AnyArray, plan: Plan, masking: Masking, sinks: AnyArray | None
) -> tuple[jax.Array, jax.Array]:
    """See `extend.paged_extend`."""
    arrays, scalars, shapes, options = extend_launch(q, kv, jnp.asarray(layer, jnp.int32), plan, masking, sinks)
    out, lse = triton_call(extend_kernel, arrays, scalars, outputs=shapes, **options)
    return out, lse


def extend_launch(
    q: Any, kv: PagedKV, layer: Any, plan: Plan, masking: Masking, sinks: Any
) -> tuple[tuple, tuple, tuple, dict]:
    """Arrays, scalars, shapes of the outputs, and grid and constexprs of `extend_kernel`. Arrays may be torch's."""
    tokens, q_heads = q.shape[:2]
    v_dim, order, launch, sequences = kv.v.shape[-1], kv.order, plan.launches.extend, plan.sequences
    group = q_heads // kv.heads
    unused = sequences.row
    arrays = (
        q,
        kv.k,
        kv.v,
        unused if kv.k_scale is None else kv.k_scale,
        unused if kv.v_scale is None else kv.v_scale,
        unused if sinks is None else sinks,
        layer,
        sequences.pages,
        sequences.row,
        sequences.prefix_len,
        sequences.seq_len,
        sequences.first_token,
        plan.tiles.request,
        plan.tiles.first,
        plan.tiles.stop,
    )
    shapes = (
        jax.ShapeDtypeStruct((tokens, q_heads, v_dim), q.dtype),
        jax.ShapeDtypeStruct((tokens, q_heads), jnp.float32),
    )
    options = dict(
        grid=(kv.heads, plan.tiles.request.shape[0]),
        num_warps=launch.warps,
        M=max(launch.tokens * power_of_two(group), 16),
        TOKENS=launch.tokens,
        BLOCK=launch.block,
        WINDOW=masking.window or 0,
        HAS_SINKS=sinks is not None,
        STAGES=launch.stages,
        **heads_constants(kv, q_heads, masking),
    )
    return arrays, (order.layers, order.pages, sequences.pages.shape[1], sequences.requests), shapes, options


@triton.jit
def _fold_block(
    qt, q_mul, top, den, acc, most, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
    HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    PAGE_POWER: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, K_KIND: tl.constexpr,
    V_KIND: tl.constexpr, MATH: tl.constexpr, PRECISE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Folds one block of keys into the running softmax. WHOLE: every row sees all of it."""
    n = i * BLOCK + tl.arange(0, BLOCK)
    inside = n < total
    rows = rows_of_block(pages_of, i, total, page0, stride, PAGE, BLOCK, PAGE_POWER, WHOLE)
    vt = load_tile(v + h * DV, rows, inside, HKV * DV, DV, DVP, not WHOLE)
    s = key_logits(qt, q_mul, k, rows, inside, k_scale, h, HKV, D, DP, CAP, K_KIND, MATH, PRECISE)
    if WHOLE:
        new = tl.maximum(top, tl.max(s, 1))
    else:
        seen = (n[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(tl.maximum(top, tl.max(s, 1)), -1e30)  # a row may see none of the block
    w = tl.exp2(s - new[:, None])
    fade = tl.exp2(top - new)
    den = den * fade + tl.sum(w, 1)
    if V_KIND == 3:
        w, fade, most = scale_weights(w, fade, most, v_scale + h, rows * HKV, inside)
    return new, den, weigh_values(w, vt, acc, fade, MATH, PRECISE), most


@triton.jit(do_not_specialize=["layers", "pages", "max_pages", "requests"])
def extend_kernel(
    q,  # (tokens, HKV * G, D)
    k,  # rows (HKV, D)
    v,  # rows (HKV, DV)
    k_scale,  # by K_KIND: unused, (), (HKV,), rows (HKV,)
    v_scale,
    sinks,  # (HKV * G,) float32, unused unless HAS_SINKS
    layer,  # () int32
    table,  # (rows, max_pages) int32
    row,  # (requests,) int32
    prefix_len,  # (requests,) int32
    seq_len,  # (requests,) int32
    first_token,  # (requests,) int32
    tile_request,  # (tiles,) int32, `requests` for none
    tile_first,  # (tiles,) int32
    stop_token,  # (requests,) int32
    layers,
    pages,
    max_pages,
    requests,
    out,  # (tokens, HKV * G, DV)
    out_lse,  # (tokens, HKV * G) float32, natural
    HKV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,  # G, rounded up to a power of two
    M: tl.constexpr,  # rows of the tile: TOKENS * GP, at least 16
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_POWER: tl.constexpr,
    PAGE_MAJOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NARROW: tl.constexpr,  # 8-bit rows
    PRECISE: tl.constexpr,  # float32 rows
    STAGES: tl.constexpr,
):
    """One tile for one KV head: see the module."""
    h = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    b = tl.load(tile_request + tile)
    if b >= requests:
        return
    MATH: tl.constexpr = tl.float16 if NARROW else k.dtype.element_ty
    BASE: tl.constexpr = SCALE if CAP > 0 else SCALE * LOG2E
    m = tl.arange(0, M)
    g = m % GP
    t0 = tl.load(tile_first + tile)
    t = t0 + m // GP
    prefix = tl.load(prefix_len + b)
    total = tl.load(seq_len + b)
    token = tl.load(first_token + b) + t
    exists = (m // GP < TOKENS) & (g < G) & (token < tl.load(stop_token + b))
    position = prefix + t
    live = exists & (position < total)
    page0 = first_page(layer, layers, pages, PAGE_MAJOR)
    stride = layers if PAGE_MAJOR else 1
    pages_of = table + tl.load(row + b).to(tl.int64) * max_pages
    at = token.to(tl.int64) * (HKV * G) + h * G + g
    qt, q_mul = queries_to_math(load_tile(q, at, live, D, D, DP, True), MATH, NARROW)
    q_mul = q_mul * (scale_of(k_scale, h, K_KIND) * BASE)
    top, den, acc = no_softmax(M, DVP)
    most = 1.0
    if prefix + t0 < total:
        last = tl.minimum(prefix + t0 + TOKENS, total)
        begin = 0
        whole = (prefix + t0 + 1) // BLOCK
        if WINDOW > 0:
            begin = tl.maximum(prefix + t0 - WINDOW + 1, 0) // BLOCK
            whole = begin
        for i in tl.range(begin, whole, num_stages=STAGES):
            top, den, acc, most = _fold_block(
                qt, q_mul, top, den, acc, most, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
                HKV, D, DP, DV, DVP, PAGE, PAGE_POWER, BLOCK, CAP, WINDOW, K_KIND, V_KIND, MATH, PRECISE, True,
            )  # fmt: skip
        for i in tl.range(whole, tl.cdiv(last, BLOCK), num_stages=STAGES):
            top, den, acc, most = _fold_block(
                qt, q_mul, top, den, acc, most, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
                HKV, D, DP, DV, DVP, PAGE, PAGE_POWER, BLOCK, CAP, WINDOW, K_KIND, V_KIND, MATH, PRECISE, False,
            )  # fmt: skip
        acc = acc * (most * scale_of(v_scale, h, V_KIND))
    den = tl.where(live, den, 0.0)
    if HAS_SINKS:
        top, den, acc = add_sinks(tl.where(live, top, float("-inf")), den, acc, sinks, h * G + g, g < G)
    o = tl.where(live[:, None], acc / tl.where(den > 0, den, 1.0)[:, None], 0.0)
    dv = tl.arange(0, DVP)
    tl.store(
        out + at[:, None] * DV + dv[None, :], o.to(out.dtype.element_ty), mask=exists[:, None] & (dv < DV)[None, :]
    )
    tl.store(out_lse + at, tl.where(den > 0, (top + tl.log2(den)) / LOG2E, float("-inf")), mask=exists)
