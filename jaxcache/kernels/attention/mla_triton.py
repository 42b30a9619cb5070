"""Triton kernels of `mla`: absorbed attention over latent rows. Parameter order: see `triton_call`.

A row of the pool is key and value of all heads at once: its latent part is read once and multiplied twice. A program
takes a block of query heads, and rows of queries of several tokens where there are few heads. Decode divides the keys
among programs as `decode_triton` does, and its parts are merged by the same kernel; extend takes tiles of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.attention.common_triton import (
    LOG2E,
    cap_logits,
    first_page,
    half,
    halves,
    load_pairs,
    load_tile,
    multiply,
    no_softmax,
    queries_to_math,
    rows_of_block,
    to_math,
    weigh_values,
    whole,
)
from jaxcache.kernels.attention.contract import Masking, PagedLatent
from jaxcache.kernels.attention.decode_triton import attend_units
from jaxcache.kernels.attention.launch import power_of_two, takes_pairs
from jaxcache.kernels.attention.plan import Plan, Units
from jaxcache.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray


def mla_decode(
    q: AnyArray, kv: PagedLatent, layer: int | AnyArray, plan: Plan, masking: Masking
) -> tuple[jax.Array, jax.Array]:
    """See `mla.mla_decode`."""
    layer = jnp.asarray(layer, jnp.int32)
    launch_of = partial(decode_launch, q, kv, layer, plan, masking=masking)
    return attend_units(decode_kernel, launch_of, plan, None, q.dtype)


def mla_extend(
    q: AnyArray, kv: PagedLatent, layer: int | AnyArray, plan: Plan, masking: Masking
) -> tuple[jax.Array, jax.Array]:
    """See `mla.mla_extend`."""
    arrays, scalars, shapes, options = extend_launch(q, kv, jnp.asarray(layer, jnp.int32), plan, masking)
    out, lse = triton_call(extend_kernel, arrays, scalars, outputs=shapes, **options)
    return out, lse


def decode_launch(
    q: Any, kv: PagedLatent, layer: Any, plan: Plan, units: Units, masking: Masking
) -> tuple[tuple, tuple, tuple, dict]:
    """Arrays, scalars, shapes of the outputs, and grid and constexprs of `decode_kernel`. Arrays may be torch's."""
    heads = q.shape[1]
    launch = plan.launches.decode if units.member is None else plan.launches.shared
    members = 1 if units.member is None else units.member.shape[1]
    arrays = (
        q,
        kv.rows,
        units.row if kv.scale is None else kv.scale,
        layer,
        plan.sequences.pages,
        units.row,
        units.start,
        units.stop,
        units.first_block,
        units.first_unit,
        units.row if units.member is None else units.member,
    )
    shapes = (
        jax.ShapeDtypeStruct((units.parts, members * heads, kv.rank), jnp.float32),
        jax.ShapeDtypeStruct((units.parts, members * heads), jnp.float32),
    )
    options = dict(
        grid=(triton.cdiv(heads, launch.heads), units.programs),
        num_warps=launch.warps,
        MEMBERS=members,
        BLOCK=launch.block,
        HAS_START=plan.window is not None or plan.shared is not None,
        STAGES=launch.stages,
        **_constants(heads, launch.heads, launch.heads * members, kv, masking),
    )
    scalars = kv.order.layers, kv.order.pages, plan.sequences.pages.shape[1], units.count
    return arrays, scalars, shapes, options


def extend_launch(
    q: Any, kv: PagedLatent, layer: Any, plan: Plan, masking: Masking
) -> tuple[tuple, tuple, tuple, dict]:
    """Arrays, scalars, shapes of the outputs, and grid and constexprs of `extend_kernel`. Arrays may be torch's."""
    tokens, heads = q.shape[:2]
    launch, sequences = plan.launches.extend, plan.sequences
    arrays = (
        q,
        kv.rows,
        sequences.row if kv.scale is None else kv.scale,
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
        jax.ShapeDtypeStruct((tokens, heads, kv.rank), q.dtype),
        jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
    )
    options = dict(
        grid=(triton.cdiv(heads, launch.heads), plan.tiles.request.shape[0]),
        num_warps=launch.warps,
        TOKENS=launch.tokens,
        BLOCK=launch.block,
        WINDOW=masking.window or 0,
        STAGES=launch.stages,
        **_constants(heads, launch.heads, launch.heads * launch.tokens, kv, masking),
    )
    scalars = kv.order.layers, kv.order.pages, sequences.pages.shape[1], sequences.requests
    return arrays, scalars, shapes, options


def _constants(heads: int, block: int, rows: int, kv: PagedLatent, masking: Masking) -> dict:
    """What both kernels are compiled for: `block` heads a program, `rows` rows of queries."""
    return dict(
        M=rows,
        HQ=heads,
        HB=block,
        RANK=kv.rank,
        RANKP=max(power_of_two(kv.rank), 16),
        ROPE=kv.rope,
        ROPEP=max(power_of_two(max(kv.rope, 1)), 16),
        PAGE=kv.order.page_size,
        PAGE_POWER=power_of_two(kv.order.page_size) == kv.order.page_size,
        PAGE_MAJOR=kv.order.page_major,
        SCALE=float(masking.scale),
        CAP=float(masking.soft_cap or 0.0),
        HAS_SCALE=kv.scale is not None,
        NARROW=kv.dtype.itemsize == 1,
        PAIRS=takes_pairs(kv.dtype, rows, kv.rank, kv.rope),
        PRECISE=kv.dtype.itemsize == 4,
    )


@triton.jit
def _load_queries(
    q, at, live, worth, RANK: tl.constexpr, RANKP: tl.constexpr, ROPE: tl.constexpr, ROPEP: tl.constexpr,
    MATH: tl.constexpr, NARROW: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Both parts of the queries in rows `at`, and what to multiply logits by for either; columns apart if PAIRS."""
    q1, mul1 = queries_to_math(load_tile(q, at, live, RANK + ROPE, RANK, RANKP, True), MATH, NARROW)
    q2, mul2 = queries_to_math(load_tile(q + RANK, at, live, RANK + ROPE, ROPE, ROPEP, True), MATH, NARROW)
    if PAIRS:
        return halves(q1), mul1 * worth, halves(q2), mul2 * worth
    else:
        return q1, mul1 * worth, q2, mul2 * worth


@triton.jit
def _logits(
    queries, rows, keep, pool, RANK: tl.constexpr, RANKP: tl.constexpr, ROPE: tl.constexpr, ROPEP: tl.constexpr,
    CAP: tl.constexpr, MATH: tl.constexpr, NARROW: tl.constexpr, PAIRS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of a block of rows, and their latent parts. Rows that are not kept are zeros."""
    q1, mul1, q2, mul2 = queries
    WIDTH: tl.constexpr = RANK + ROPE
    zeros = tl.zeros([mul1.shape[0], rows.shape[0]], tl.float32)
    if PAIRS:
        T: tl.constexpr = pool.dtype.element_ty
        c = load_pairs(pool, rows, keep, WIDTH, RANK, RANKP)
        s = multiply(q1[0], half(c, T, False).T, zeros, PRECISE)
        s = multiply(q1[1], half(c, T, True).T, s, PRECISE) * mul1[:, None]
        if ROPE > 0:  # the parts of a query have a range each
            e = load_pairs(pool + RANK, rows, keep, WIDTH, ROPE, ROPEP)
            t = multiply(q2[0], half(e, T, False).T, zeros, PRECISE)
            s += multiply(q2[1], half(e, T, True).T, t, PRECISE) * mul2[:, None]
        return cap_logits(s, CAP), c
    else:
        c = to_math(load_tile(pool, rows, keep, WIDTH, RANK, RANKP, True), MATH)
        s = multiply(q1, c.T, zeros, PRECISE)
        if ROPE > 0:
            e = to_math(load_tile(pool + RANK, rows, keep, WIDTH, ROPE, ROPEP, True), MATH)
            if NARROW:
                s = s * mul1[:, None] + multiply(q2, e.T, zeros, PRECISE) * mul2[:, None]
            else:
                s = multiply(q2, e.T, s, PRECISE) * mul1[:, None]
        else:
            s = s * mul1[:, None]
        return cap_logits(s, CAP), c


@triton.jit
def _weigh_latents(
    w, c, acc, odd, fade, T: tl.constexpr, MATH: tl.constexpr, PAIRS: tl.constexpr, PRECISE: tl.constexpr
):
    """Folds latent parts into their sum, whose odd columns are `odd` if PAIRS."""
    if PAIRS:
        acc = weigh_values(w, half(c, T, False), acc, fade, MATH, PRECISE)
        odd = weigh_values(w, half(c, T, True), odd, fade, MATH, PRECISE)
        return acc, odd
    else:
        acc = weigh_values(w, c, acc, fade, MATH, PRECISE)
        return acc, acc


@triton.jit(do_not_specialize=["layers", "pages", "max_pages", "units"])
def decode_kernel(
    q,  # (requests, HQ, RANK + ROPE), absorbed
    pool,  # rows (RANK + ROPE)
    scale,  # () float32, unused unless HAS_SCALE
    layer,  # () int32
    table,  # (rows, max_pages) int32
    row,  # (units,) int32
    start,  # (units,) int32
    stop,  # (units,) int32
    first_block,  # (units + 1,) int32
    first_unit,  # (programs,) int32
    member,  # (units, MEMBERS) int32, unused if MEMBERS is 1
    layers,
    pages,
    max_pages,
    units,
    part_o,  # out (programs + units, MEMBERS * HQ, RANK) float32
    part_lse,  # out (programs + units, MEMBERS * HQ) float32, to base 2
    M: tl.constexpr,  # rows of queries: MEMBERS * HB
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_START: tl.constexpr,
    STAGES: tl.constexpr,
    HQ: tl.constexpr,
    HB: tl.constexpr,  # query heads of a program, a power of two
    RANK: tl.constexpr, RANKP: tl.constexpr, ROPE: tl.constexpr, ROPEP: tl.constexpr, PAGE: tl.constexpr,
    PAGE_POWER: tl.constexpr, PAGE_MAJOR: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NARROW: tl.constexpr,  # 8-bit rows
    PAIRS: tl.constexpr,  # 8-bit rows whose parts are of an even width: see `half`
    PRECISE: tl.constexpr,  # float32 rows
):  # fmt: skip
    """The part of one program for one block of query heads: see the module."""
    p = tl.program_id(1)
    total = tl.load(first_block + units)
    share = tl.cdiv(total, tl.num_programs(1))
    begin = p * share
    end = tl.minimum(begin + share, total)
    u = tl.load(first_unit + p)
    page0 = first_page(layer, layers, pages, PAGE_MAJOR)
    stride = layers if PAGE_MAJOR else 1
    MATH: tl.constexpr = tl.float16 if NARROW else pool.dtype.element_ty
    BASE: tl.constexpr = SCALE if CAP > 0 else SCALE * LOG2E
    worth = 1.0
    if HAS_SCALE:
        worth = tl.load(scale)
    m = tl.arange(0, M)
    h = tl.program_id(0) * HB + m % HB
    j = tl.arange(0, BLOCK)
    while begin < end:
        lo = tl.load(first_block + u)
        unit_end = tl.minimum(end, tl.load(first_block + u + 1))
        if unit_end > begin:
            last = tl.load(stop + u)
            first = 0
            if HAS_START:
                first = tl.load(start + u)
            who = tl.load(member + u * MEMBERS + m // HB) if MEMBERS > 1 else m // HB + u
            live = (who >= 0) & (h < HQ)
            pages_of = table + tl.load(row + u).to(tl.int64) * max_pages
            at = tl.where(live, who, 0).to(tl.int64) * HQ + h
            queries = _load_queries(q, at, live, worth * BASE, RANK, RANKP, ROPE, ROPEP, MATH, NARROW, PAIRS)
            top, den, acc = no_softmax(M, RANKP // 2 if PAIRS else RANKP)
            odd = acc
            shift = first // BLOCK - lo
            for i in tl.range(begin + shift, unit_end + shift, num_stages=STAGES):
                n = i * BLOCK + j
                keep = n < last
                if HAS_START:
                    keep = keep & (n >= first)
                rows = rows_of_block(pages_of, i, last, page0, stride, PAGE, BLOCK, PAGE_POWER, False)
                s, c = _logits(queries, rows, keep, pool, RANK, RANKP, ROPE, ROPEP, CAP, MATH, NARROW, PAIRS, PRECISE)
                s = tl.where(keep[None, :], s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                w = tl.exp2(s - new[:, None])
                fade = tl.exp2(top - new)
                den = den * fade + tl.sum(w, 1)
                acc, odd = _weigh_latents(w, c, acc, odd, fade, pool.dtype.element_ty, MATH, PAIRS, PRECISE)
                top = new
            to = ((p + u).to(tl.int64) * MEMBERS + m // HB) * HQ + h
            r = tl.arange(0, RANKP)
            if PAIRS:
                acc = whole(acc, odd)
            o = acc * (worth / den)[:, None]
            tl.store(part_o + to[:, None] * RANK + r[None, :], o, mask=live[:, None] & (r < RANK)[None, :])
            tl.store(part_lse + to, top + tl.log2(den), mask=live)
        begin = unit_end
        u += 1


@triton.jit(do_not_specialize=["layers", "pages", "max_pages", "requests"])
def extend_kernel(
    q,  # (tokens, HQ, RANK + ROPE), absorbed
    pool,  # rows (RANK + ROPE)
    scale,  # () float32, unused unless HAS_SCALE
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
    out,  # (tokens, HQ, RANK)
    out_lse,  # (tokens, HQ) float32, natural
    M: tl.constexpr,  # rows of the tile: TOKENS * HB
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    STAGES: tl.constexpr,
    HQ: tl.constexpr, HB: tl.constexpr, RANK: tl.constexpr, RANKP: tl.constexpr, ROPE: tl.constexpr,
    ROPEP: tl.constexpr, PAGE: tl.constexpr, PAGE_POWER: tl.constexpr, PAGE_MAJOR: tl.constexpr, SCALE: tl.constexpr,
    CAP: tl.constexpr, HAS_SCALE: tl.constexpr, NARROW: tl.constexpr, PAIRS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One tile for one block of query heads: see the module."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    b = tl.load(tile_request + tile)
    if b >= requests:
        return
    MATH: tl.constexpr = tl.float16 if NARROW else pool.dtype.element_ty
    BASE: tl.constexpr = SCALE if CAP > 0 else SCALE * LOG2E
    worth = 1.0
    if HAS_SCALE:
        worth = tl.load(scale)
    m = tl.arange(0, M)
    h = tl.program_id(0) * HB + m % HB
    t0 = tl.load(tile_first + tile)
    t = t0 + m // HB
    prefix = tl.load(prefix_len + b)
    total = tl.load(seq_len + b)
    token = tl.load(first_token + b) + t
    exists = (h < HQ) & (token < tl.load(stop_token + b))
    position = prefix + t
    live = exists & (position < total)
    page0 = first_page(layer, layers, pages, PAGE_MAJOR)
    stride = layers if PAGE_MAJOR else 1
    pages_of = table + tl.load(row + b).to(tl.int64) * max_pages
    at = token.to(tl.int64) * HQ + h
    queries = _load_queries(q, at, live, worth * BASE, RANK, RANKP, ROPE, ROPEP, MATH, NARROW, PAIRS)
    top, den, acc = no_softmax(M, RANKP // 2 if PAIRS else RANKP)
    odd = acc
    if prefix + t0 < total:
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(prefix + t0 - WINDOW + 1, 0) // BLOCK
        last = tl.minimum(prefix + t0 + TOKENS, total)
        for i in tl.range(begin, tl.cdiv(last, BLOCK), num_stages=STAGES):
            n = i * BLOCK + tl.arange(0, BLOCK)
            inside = n < last
            rows = rows_of_block(pages_of, i, total, page0, stride, PAGE, BLOCK, PAGE_POWER, False)
            s, c = _logits(queries, rows, inside, pool, RANK, RANKP, ROPE, ROPEP, CAP, MATH, NARROW, PAIRS, PRECISE)
            seen = (n[None, :] <= position[:, None]) & inside[None, :]
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
            new = tl.maximum(tl.maximum(top, tl.max(s, 1)), -1e30)  # a row may see none of the block
            w = tl.exp2(s - new[:, None])
            fade = tl.exp2(top - new)
            den = den * fade + tl.sum(w, 1)
            acc, odd = _weigh_latents(w, c, acc, odd, fade, pool.dtype.element_ty, MATH, PAIRS, PRECISE)
            top = new
    if PAIRS:
        acc = whole(acc, odd)
    den = tl.where(live, den, 0.0)
    o = tl.where(live[:, None], acc * worth / tl.where(den > 0, den, 1.0)[:, None], 0.0)
    r = tl.arange(0, RANKP)
    tl.store(
        out + at[:, None] * RANK + r[None, :], o.to(out.dtype.element_ty), mask=exists[:, None] & (r < RANK)[None, :]
    )
    tl.store(out_lse + at, tl.where(den > 0, (top + tl.log2(den)) / LOG2E, float("-inf")), mask=exists)
