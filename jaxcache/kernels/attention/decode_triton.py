"""Triton kernels of `decode`. Parameter order: see `triton_call`.

A program takes an equal run of key blocks of one KV head, across requests (`plan`), and leaves a partial result and its
log-sum-exp for each request that it meets. A second kernel merges the parts in their order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.attention.common_triton import (
    LOG2E,
    add_sinks,
    first_page,
    half,
    key_logits,
    load_pairs,
    load_tile,
    no_softmax,
    queries_to_math,
    rows_of_block,
    scale_of,
    scale_weights,
    weigh_values,
    whole,
)
from jaxcache.kernels.attention.contract import Masking, PagedKV, scale_kind
from jaxcache.kernels.attention.launch import power_of_two, takes_pairs
from jaxcache.kernels.attention.plan import Plan, SharedUnits, Units
from jaxcache.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

MERGE_HEADS = 4
"""Heads that one program of the merge takes."""


def paged_decode(
    q: AnyArray, kv: PagedKV, layer: int | AnyArray, plan: Plan, masking: Masking, sinks: AnyArray | None
) -> tuple[jax.Array, jax.Array]:
    """See `decode.paged_decode`."""
    layer = jnp.asarray(layer, jnp.int32)
    launch_of = partial(decode_launch, q, kv, layer, plan, masking=masking)
    return attend_units(decode_kernel, launch_of, plan, sinks, q.dtype)


def attend_units(
    kernel: Any,
    launch_of: Callable[..., tuple[tuple, tuple, tuple, dict]],
    plan: Plan,
    sinks: AnyArray | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a decode kernel over the plan's units, and over its shared ones if there are any, and merges the parts.

    `launch_of(units=...)` gives what `decode_launch` gives.
    """

    def attend(units: Units) -> tuple[jax.Array, jax.Array]:
        arrays, scalars, shapes, options = launch_of(units=units)
        part_o, part_lse = triton_call(kernel, arrays, scalars, outputs=shapes, **options)
        return part_o, part_lse

    own = attend(plan.units)
    together = None if plan.shared is None else attend(plan.shared.units)
    return merge_parts(own, plan.units, together, plan.shared, sinks, dtype)


def decode_launch(
    q: Any, kv: PagedKV, layer: Any, plan: Plan, units: Units, masking: Masking
) -> tuple[tuple, tuple, tuple, dict]:
    """Arrays, scalars, shapes of the outputs, and grid and constexprs of `decode_kernel`. Arrays may be torch's."""
    q_heads = q.shape[1]
    v_dim = kv.v.shape[-1]
    order = kv.order
    launch = plan.launches.decode if units.member is None else plan.launches.shared
    members = 1 if units.member is None else units.member.shape[1]
    group = q_heads // kv.heads
    unused = units.row
    arrays = (
        q,
        kv.k,
        kv.v,
        unused if kv.k_scale is None else kv.k_scale,
        unused if kv.v_scale is None else kv.v_scale,
        layer,
        plan.sequences.pages,
        units.row,
        units.start,
        units.stop,
        units.first_block,
        units.first_unit,
        unused if units.member is None else units.member,
    )
    shapes = (
        jax.ShapeDtypeStruct((units.parts, members * q_heads, v_dim), jnp.float32),
        jax.ShapeDtypeStruct((units.parts, members * q_heads), jnp.float32),
    )
    options = dict(
        grid=(kv.heads, units.programs),
        num_warps=launch.warps,
        M=max(power_of_two(group) * members, 16),
        MEMBERS=members,
        BLOCK=launch.block,
        HAS_START=plan.window is not None or plan.shared is not None,
        PAIRS=takes_pairs(kv.dtype, max(power_of_two(group) * members, 16), v_dim),
        STAGES=launch.stages,
        **heads_constants(kv, q_heads, masking),
    )
    return arrays, (order.layers, order.pages, plan.sequences.pages.shape[1], units.count), shapes, options


def heads_constants(kv: PagedKV, q_heads: int, masking: Masking) -> dict[str, Any]:
    """The constexprs of keys and values by heads that decode and extend have alike."""
    group, dim, v_dim, page_size = q_heads // kv.heads, kv.k.shape[-1], kv.v.shape[-1], kv.order.page_size
    return dict(
        HKV=kv.heads,
        G=group,
        GP=power_of_two(group),
        D=dim,
        DP=max(power_of_two(dim), 16),
        DV=v_dim,
        DVP=max(power_of_two(v_dim), 16),
        PAGE=page_size,
        PAGE_POWER=power_of_two(page_size) == page_size,
        PAGE_MAJOR=kv.order.page_major,
        SCALE=float(masking.scale),
        CAP=float(masking.soft_cap or 0.0),
        K_KIND=scale_kind("k_scale", kv.k_scale, kv.k.shape[:3]).value,
        V_KIND=scale_kind("v_scale", kv.v_scale, kv.k.shape[:3]).value,
        NARROW=kv.dtype.itemsize == 1,
        PRECISE=kv.dtype.itemsize == 4,
    )


def merge_parts(
    own: tuple[jax.Array, jax.Array],
    units: Units,
    together: tuple[jax.Array, jax.Array] | None,
    shared: SharedUnits | None,
    sinks: AnyArray | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """The results of all requests, and their log-sum-exp, from the parts that the programs left."""
    arrays, scalars, shapes, launch = merge_launch(own, units, together, shared, sinks, dtype)
    out, lse = triton_call(merge_kernel, arrays, scalars, outputs=shapes, **launch)
    return out, lse


def merge_launch(
    own: Any, units: Units, together: Any, shared: SharedUnits | None, sinks: Any, dtype: Any
) -> tuple[tuple, tuple, tuple, dict]:
    """Arrays, scalars, shapes of the outputs, and grid and constexprs of `merge_kernel`."""
    n, (_, heads, dim) = units.count, own[0].shape
    unused = units.row
    if shared is None:
        shared_arrays = (*own, unused, unused, unused)
        programs = 1
    else:
        shared_arrays = (*together, shared.units.first_block, shared.unit, shared.place)
        programs = shared.units.programs
    block = min(MERGE_HEADS, power_of_two(heads))
    arrays = (*own, units.first_block, *shared_arrays, unused if sinks is None else sinks)
    shapes = jax.ShapeDtypeStruct((n, heads, dim), dtype), jax.ShapeDtypeStruct((n, heads), jnp.float32)
    options = dict(
        grid=(n, triton.cdiv(heads, block)),
        num_warps=4,
        HQ=heads,
        HB=block,
        DV=dim,
        DVP=power_of_two(dim),
        SHARED=shared is not None,
        MEMBERS=1 if shared is None else shared.units.member.shape[1],
        HAS_SINKS=sinks is not None,
    )
    return arrays, (n, units.programs, n if shared is None else shared.units.count, programs), shapes, options


@triton.jit(do_not_specialize=["layers", "pages", "max_pages", "units"])
def decode_kernel(
    q,  # (requests, HKV * G, D)
    k,  # rows (HKV, D)
    v,  # rows (HKV, DV)
    k_scale,  # by K_KIND: unused, (), (HKV,), rows (HKV,)
    v_scale,
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
    part_o,  # out (programs + units, MEMBERS * HKV * G, DV) float32
    part_lse,  # out (programs + units, MEMBERS * HKV * G) float32, to base 2
    HKV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr,  # G, rounded up to a power of two
    M: tl.constexpr,  # rows of queries: MEMBERS * GP, at least 16
    MEMBERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    PAGE_POWER: tl.constexpr, PAGE_MAJOR: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    HAS_START: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    NARROW: tl.constexpr,  # 8-bit rows
    PAIRS: tl.constexpr,  # 8-bit values of an even width: see `half`
    PRECISE: tl.constexpr,  # float32 rows
    STAGES: tl.constexpr,
):  # fmt: skip
    """The part of one program for one KV head: see the module."""
    h = tl.program_id(0)
    p = tl.program_id(1)
    total = tl.load(first_block + units)
    share = tl.cdiv(total, tl.num_programs(1))
    begin = p * share
    end = tl.minimum(begin + share, total)
    u = tl.load(first_unit + p)
    page0 = first_page(layer, layers, pages, PAGE_MAJOR)
    stride = layers if PAGE_MAJOR else 1
    MATH: tl.constexpr = tl.float16 if NARROW else k.dtype.element_ty
    BASE: tl.constexpr = SCALE if CAP > 0 else SCALE * LOG2E
    sm = scale_of(k_scale, h, K_KIND) * BASE
    v_mul = scale_of(v_scale, h, V_KIND)
    m = tl.arange(0, M)
    g = m % GP
    j = tl.arange(0, BLOCK)
    while begin < end:
        lo = tl.load(first_block + u)
        unit_end = tl.minimum(end, tl.load(first_block + u + 1))
        if unit_end > begin:
            last = tl.load(stop + u)
            first = 0
            if HAS_START:
                first = tl.load(start + u)
            if MEMBERS > 1:
                who = tl.load(member + u * MEMBERS + m // GP, mask=m // GP < MEMBERS, other=-1)
            else:
                who = tl.where(m < GP, u, -1)
            live = (who >= 0) & (g < G)
            pages_of = table + tl.load(row + u).to(tl.int64) * max_pages
            q_rows = tl.where(live, who, 0).to(tl.int64) * (HKV * G) + h * G + g
            raw = load_tile(q, q_rows, live, D, D, DP, True)
            qt, q_mul = queries_to_math(raw, MATH, NARROW)
            q_mul = q_mul * sm
            top, den, acc = no_softmax(M, DVP // 2 if PAIRS else DVP)
            odd = acc  # if PAIRS: `acc` has the even columns
            most = 1.0
            shift = first // BLOCK - lo
            for i in tl.range(begin + shift, unit_end + shift, num_stages=STAGES):
                n = i * BLOCK + j
                keep = n < last
                if HAS_START:
                    keep = keep & (n >= first)
                rows = rows_of_block(pages_of, i, last, page0, stride, PAGE, BLOCK, PAGE_POWER, False)
                s = key_logits(qt, q_mul, k, rows, keep, k_scale, h, HKV, D, DP, CAP, K_KIND, MATH, PRECISE)
                s = tl.where(keep[None, :], s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                w = tl.exp2(s - new[:, None])
                fade = tl.exp2(top - new)
                den = den * fade + tl.sum(w, 1)
                top = new
                if V_KIND == 3:
                    w, fade, most = scale_weights(w, fade, most, v_scale + h, rows * HKV, keep)
                if PAIRS:
                    vt = load_pairs(v + h * DV, rows, keep, HKV * DV, DV, DVP)
                    acc = weigh_values(w, half(vt, v.dtype.element_ty, False), acc, fade, MATH, PRECISE)
                    odd = weigh_values(w, half(vt, v.dtype.element_ty, True), odd, fade, MATH, PRECISE)
                else:
                    vt = load_tile(v + h * DV, rows, keep, HKV * DV, DV, DVP, True)
                    acc = weigh_values(w, vt, acc, fade, MATH, PRECISE)
            at = ((p + u).to(tl.int64) * MEMBERS + m // GP) * (HKV * G) + h * G + g
            dv = tl.arange(0, DVP)
            if PAIRS:
                acc = whole(acc, odd)
            o = acc * (v_mul * most / den)[:, None]
            tl.store(part_o + at[:, None] * DV + dv[None, :], o, mask=live[:, None] & (dv < DV)[None, :])
            tl.store(part_lse + at, top + tl.log2(den), mask=live)
        begin = unit_end
        u += 1


@triton.jit
def _fold_parts(
    top, den, acc, part_o, part_lse, first, last, share, unit, step, offset, inside, DV: tl.constexpr, DVP: tl.constexpr
):
    """Folds the parts of one unit into a running softmax. `step` rows a part; those of this program at `offset`."""
    dv = tl.arange(0, DVP)
    columns = inside[:, None] & (dv < DV)[None, :]
    for p in tl.range(first // share, (last - 1) // share + 1, num_stages=4):
        at = (p + unit).to(tl.int64) * step + offset
        lse = tl.load(part_lse + at, mask=inside, other=0.0)
        o = tl.load(part_o + at[:, None] * DV + dv[None, :], mask=columns, other=0.0)
        new = tl.maximum(top, lse)
        fade = tl.exp2(top - new)
        w = tl.exp2(lse - new)
        acc = acc * fade[:, None] + w[:, None] * o
        den = den * fade + w
        top = new
    return top, den, acc


@triton.jit(do_not_specialize=["units", "programs", "shared_units", "shared_programs"])
def merge_kernel(
    part_o,  # (programs + units, HQ, DV) float32
    part_lse,  # (programs + units, HQ) float32, to base 2
    first_block,  # (units + 1,) int32
    shared_o,  # (shared programs + units, MEMBERS * HQ, DV) float32, unused unless SHARED
    shared_lse,
    shared_first_block,
    shared_unit,  # (units,) int32, -1 for none
    shared_place,  # (units,) int32
    sinks,  # (HQ,) float32, unused unless HAS_SINKS
    units,
    programs,
    shared_units,
    shared_programs,
    out,  # (units, HQ, DV)
    out_lse,  # (units, HQ) float32, natural
    HQ: tl.constexpr,
    HB: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The result of one request, for some heads: its parts in their order, then the sinks."""
    b = tl.program_id(0)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    inside = h < HQ
    top, den, acc = no_softmax(HB, DVP)
    if SHARED:
        u = tl.load(shared_unit + b)
        if u >= 0:
            share = tl.maximum(tl.cdiv(tl.load(shared_first_block + shared_units), shared_programs), 1)
            lo = tl.load(shared_first_block + u)
            hi = tl.load(shared_first_block + u + 1)
            offset = tl.load(shared_place + b) * HQ + h
            top, den, acc = _fold_parts(
                top, den, acc, shared_o, shared_lse, lo, hi, share, u, MEMBERS * HQ, offset, inside, DV, DVP
            )
    share = tl.maximum(tl.cdiv(tl.load(first_block + units), programs), 1)
    lo = tl.load(first_block + b)
    hi = tl.load(first_block + b + 1)
    if hi > lo:
        top, den, acc = _fold_parts(top, den, acc, part_o, part_lse, lo, hi, share, b, HQ, h, inside, DV, DVP)
    if HAS_SINKS:
        top, den, acc = add_sinks(top, den, acc, sinks, h, inside)
    acc = acc / tl.where(den > 0, den, 1.0)[:, None]
    dv = tl.arange(0, DVP)
    at = (b * HQ + h)[:, None] * DV + dv[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])
    tl.store(out_lse + b * HQ + h, (top + tl.log2(den)) / LOG2E, mask=inside)
