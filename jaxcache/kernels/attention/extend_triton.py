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
    cap_logits,
    first_page,
    load_tile,
    multiply,
    queries_to_math,
    rows_of_block,
    scale_of,
    to_math,
    weigh_values,
)
from jaxcache.kernels.attention.contract import Masking, PagedKV, scale_kind
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
    tokens, q_heads, dim = q.shape
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
        HKV=kv.heads,
        G=group,
        GP=power_of_two(group),
        M=max(launch.tokens * power_of_two(group), 16),
        TOKENS=launch.tokens,
        D=dim,
        DP=max(power_of_two(dim), 16),
        DV=v_dim,
        DVP=max(power_of_two(v_dim), 16),
        PAGE=order.page_size,
        PAGE_POWER=power_of_two(order.page_size) == order.page_size,
        PAGE_MAJOR=order.page_major,
        BLOCK=launch.block,
        SCALE=float(masking.scale),
        CAP=float(masking.soft_cap or 0.0),
        WINDOW=masking.window or 0,
        K_KIND=scale_kind("k_scale", kv.k_scale, kv.k.shape[:3]).value,
        V_KIND=scale_kind("v_scale", kv.v_scale, kv.k.shape[:3]).value,
        HAS_SINKS=sinks is not None,
        NARROW=kv.dtype.itemsize == 1,
        PRECISE=kv.dtype.itemsize == 4,
        STAGES=launch.stages,
    )
    return arrays, (order.layers, order.pages, sequences.pages.shape[1], sequences.requests), shapes, options


@triton.jit
def _fold_block(
    qt, q_mul, top, den, acc, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
    HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    PAGE_POWER: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, K_KIND: tl.constexpr,
    V_KIND: tl.constexpr, MATH: tl.constexpr, PRECISE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Folds one block of keys into the running softmax. WHOLE: every row sees all of it."""
    n = i * BLOCK + tl.arange(0, BLOCK)
    inside = n < total
    rows = rows_of_block(pages_of, i, total, page0, stride, PAGE, BLOCK, PAGE_POWER, WHOLE)
    kt = load_tile(k + h * D, rows, inside, HKV * D, D, DP, False)
    vt = load_tile(v + h * DV, rows, inside, HKV * DV, DV, DVP, not WHOLE)
    s = multiply(qt, to_math(kt, MATH).T, tl.zeros([qt.shape[0], BLOCK], tl.float32), PRECISE)
    if K_KIND == 3:
        s = s * tl.load(k_scale + rows * HKV + h)[None, :]
    s = cap_logits(s * q_mul[:, None], CAP)
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
    acc = weigh_values(w, vt, acc, fade, v_scale + h, rows * HKV, inside, MATH, V_KIND, PRECISE)
    return new, den, acc


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
    top = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    if prefix + t0 < total:
        last = tl.minimum(prefix + t0 + TOKENS, total)
        begin = 0
        whole = (prefix + t0 + 1) // BLOCK
        if WINDOW > 0:
            begin = tl.maximum(prefix + t0 - WINDOW + 1, 0) // BLOCK
            whole = begin
        for i in tl.range(begin, whole, num_stages=STAGES):
            top, den, acc = _fold_block(
                qt, q_mul, top, den, acc, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
                HKV, D, DP, DV, DVP, PAGE, PAGE_POWER, BLOCK, CAP, WINDOW, K_KIND, V_KIND, MATH, PRECISE, True,
            )  # fmt: skip
        for i in tl.range(whole, tl.cdiv(last, BLOCK), num_stages=STAGES):
            top, den, acc = _fold_block(
                qt, q_mul, top, den, acc, i, position, total, pages_of, page0, stride, k, v, k_scale, v_scale, h,
                HKV, D, DP, DV, DVP, PAGE, PAGE_POWER, BLOCK, CAP, WINDOW, K_KIND, V_KIND, MATH, PRECISE, False,
            )  # fmt: skip
        acc = acc * scale_of(v_scale, h, V_KIND)
    den = tl.where(live, den, 0.0)
    if HAS_SINKS:
        sink = tl.load(sinks + h * G + g, mask=g < G, other=0.0) * LOG2E
        top = tl.where(live, top, float("-inf"))
        new = tl.maximum(top, sink)
        fade = tl.exp2(top - new)
        acc = acc * fade[:, None]
        den = den * fade + tl.exp2(sink - new)
        top = new
    o = tl.where(live[:, None], acc / tl.where(den > 0, den, 1.0)[:, None], 0.0)
    dv = tl.arange(0, DVP)
    tl.store(
        out + at[:, None] * DV + dv[None, :], o.to(out.dtype.element_ty), mask=exists[:, None] & (dv < DV)[None, :]
    )
    tl.store(out_lse + at, tl.where(den > 0, (top + tl.log2(den)) / LOG2E, float("-inf")), mask=exists)
