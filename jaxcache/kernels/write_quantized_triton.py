"""Triton kernels of `write_quantized`. Parameter order: see `triton_call`.

Tiles are those of `write_kv_triton`: all loads of a program are in flight before it divides, rounds and stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.dispatch import Target, current_target
from jaxcache.kernels.quantized_pool import INT8_STEP, QuantizedPool
from jaxcache.kernels.triton_call import triton_call
from jaxcache.kernels.write_kv_triton import _columns_of_program, _rows_of_program, tile

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

FP8_BYTES = 32 * 1024
"""Bytes of rows that one program of the float8 write has in flight; large, since it loads the scales of all heads."""
HEADS_BYTES = 8 * 1024
"""Bytes of a part that one program of the int8 write has in flight."""


def write_kv_fp8(
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int | AnyArray,
    loc: AnyArray,
    k: AnyArray,
    v: AnyArray,
    k_scale: AnyArray,
    v_scale: AnyArray,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `write_quantized.write_kv_fp8`; there are rows."""
    layers, slots, heads, k_dim = k_pool.shape
    k_pool, v_pool = triton_call(
        write_kv_fp8_kernel,
        (k_pool, v_pool, jnp.asarray(layer, jnp.int32), loc, k, v, k_scale, v_scale),
        (loc.shape[0], layers, slots),
        updates={0: "k_alias", 1: "v_alias"},
        **fp8_launch(
            loc.shape[0], heads, k_dim, v_pool.shape[3], k.dtype.itemsize, dtype, converts_fp8(current_target())
        ),
        K_PER_HEAD=len(k_scale.shape) > 0,
        V_PER_HEAD=len(v_scale.shape) > 0,
    )
    return k_pool, v_pool


def write_kv_int8(
    k_pool: QuantizedPool, v_pool: QuantizedPool, layer: int | AnyArray, loc: AnyArray, k: AnyArray, v: AnyArray
) -> tuple[QuantizedPool, QuantizedPool]:
    """See `write_quantized.write_kv_int8`; there are rows."""
    layers, slots, heads, k_dim = k_pool.payload.shape
    updated = triton_call(
        write_kv_int8_kernel,
        (*k_pool, *v_pool, jnp.asarray(layer, jnp.int32), loc, k, v),
        (loc.shape[0], layers, slots),
        updates={0: "k_alias", 1: "k_scales_alias", 2: "v_alias", 3: "v_scales_alias"},
        **int8_launch(loc.shape[0], heads, k_dim, v_pool.payload.shape[3], k.dtype.itemsize),
    )
    return QuantizedPool(*updated[:2]), QuantizedPool(*updated[2:])


def fp8_launch(n: int, heads: int, k_dim: int, v_dim: int, itemsize: int, dtype: Any, hardware: bool) -> dict:
    """Grid and constexprs of `write_kv_fp8_kernel`, but for the PER_HEAD ones; `itemsize` is that of the rows.

    `hardware` says whether the GPU has an instruction that makes float8; the result is the same.
    """
    k_block, v_block, rows, grid = tile(n, heads * k_dim, heads * v_dim, itemsize, FP8_BYTES)
    blocks = dict(K_BLOCK=k_block, V_BLOCK=v_block, ROWS=rows)
    return dict(
        grid=grid,
        num_warps=4,
        HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        E4M3=dtype == jnp.float8_e4m3fn,
        HARDWARE=hardware,
        **blocks,
    )


def int8_launch(n: int, heads: int, k_dim: int, v_dim: int, itemsize: int) -> dict:
    """Grid and constexprs of `write_kv_int8_kernel`: a program takes some (token, head) pairs, whole."""
    k_block, v_block = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    pairs = max(1, HEADS_BYTES // (max(k_block, v_block) * itemsize))
    while pairs > 1 and n * heads // pairs < 1024:
        pairs //= 2
    return dict(
        grid=(triton.cdiv(n * heads, pairs),),
        num_warps=4,
        HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_BLOCK=k_block,
        V_BLOCK=v_block,
        PAIRS=pairs,
        STEP=float(INT8_STEP),
    )


def converts_fp8(target: Target) -> bool:
    """Whether this GPU is known to have an instruction that rounds float32 to float8."""
    return (target.compute_capability() or 0) >= 89


@triton.jit
def _to_fp8(x, scale, E4M3: tl.constexpr, HARDWARE: tl.constexpr):
    """Bytes of `x / scale`, to nearest even; numbers below the smallest normal one by an addition."""
    MANTISSA: tl.constexpr = 3 if E4M3 else 2  # pyright: ignore[reportAssignmentType]
    LOWEST: tl.constexpr = -6 if E4M3 else -14  # pyright: ignore[reportAssignmentType]
    LARGEST: tl.constexpr = 448.0 if E4M3 else 57344.0  # pyright: ignore[reportAssignmentType]
    quotient = x.to(tl.float32) * tl.div_rn(1.0, scale)
    if HARDWARE:
        clamped = tl.clamp(quotient, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if E4M3:
            return clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return clamped.to(tl.float8e5).to(tl.uint8, bitcast=True)
    size = tl.minimum(tl.abs(quotient), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    DROPPED: tl.constexpr = 23 - MANTISSA
    rounded = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)  # pyright: ignore[reportOperatorIssue]
    normal = (rounded >> DROPPED) - ((127 + LOWEST - 1) << MANTISSA)
    UNIT: tl.constexpr = 2.0 ** (LOWEST + DROPPED)  # its last place is the format's smallest number
    UNIT_BITS: tl.constexpr = (127 + LOWEST + DROPPED) << 23
    tiny = (size + UNIT).to(tl.int32, bitcast=True) - UNIT_BITS
    code = tl.where(size < 2.0**LOWEST, tiny, normal)
    sign = (quotient.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(quotient == quotient, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def _scale_of_columns(scale, column, inside, DIM: tl.constexpr, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        return tl.load(scale + column // DIM, mask=inside, other=1.0)
    else:
        return tl.load(scale) + tl.zeros(column.shape, tl.float32)


@triton.jit
def write_kv_fp8_kernel(
    k_pool,  # (layers, slots, HEADS, K_DIM) updated
    v_pool,  # (layers, slots, HEADS, V_DIM) updated
    layer,  # () int32
    loc,  # (n,) int32
    k,  # (n, HEADS, K_DIM)
    v,  # (n, HEADS, V_DIM)
    k_scale,  # () or (HEADS,) float32
    v_scale,  # likewise
    n,
    layers,
    slots,
    k_alias,
    v_alias,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    E4M3: tl.constexpr,
    HARDWARE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    K_PER_HEAD: tl.constexpr,
    V_PER_HEAD: tl.constexpr,
):
    token, row, keep = _rows_of_program(layer, loc, n, layers, slots, ROWS)
    k_column, k_inside = _columns_of_program(HEADS * K_DIM, K_BLOCK)
    v_column, v_inside = _columns_of_program(HEADS * V_DIM, V_BLOCK)
    k_mask = keep[:, None] & k_inside
    v_mask = keep[:, None] & v_inside
    k_tile = tl.load(k + token[:, None] * (HEADS * K_DIM) + k_column, mask=k_mask, other=0)
    v_tile = tl.load(v + token[:, None] * (HEADS * V_DIM) + v_column, mask=v_mask, other=0)
    k_bits = _to_fp8(k_tile, _scale_of_columns(k_scale, k_column, k_inside, K_DIM, K_PER_HEAD), E4M3, HARDWARE)
    v_bits = _to_fp8(v_tile, _scale_of_columns(v_scale, v_column, v_inside, V_DIM, V_PER_HEAD), E4M3, HARDWARE)
    k_target = k_pool + row[:, None] * (HEADS * K_DIM) + k_column
    v_target = v_pool + row[:, None] * (HEADS * V_DIM) + v_column
    tl.store(k_target, k_bits.to(k_pool.dtype.element_ty, bitcast=True), mask=k_mask)
    tl.store(v_target, v_bits.to(v_pool.dtype.element_ty, bitcast=True), mask=v_mask)


@triton.jit
def _to_int8(x, STEP: tl.constexpr):
    """int8 of each row of `x`, and the scale of the row."""
    LARGEST: tl.constexpr = 3.4028234663852886e38  # pyright: ignore[reportAssignmentType]
    x = tl.clamp(x.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.max(tl.where(x == x, 0.0, 1.0), 1) > 0
    scale = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1) * STEP
    units = x * tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0))[:, None]  # pyright: ignore[reportOperatorIssue]
    # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even. The clamp stands between, so that
    # the product is rounded by itself.
    units = (tl.clamp(units, -127.0, 127.0) + 12582912.0) - 12582912.0
    payload = tl.where(has_nan[:, None], 0.0, units).to(tl.int8)
    return payload, tl.where(has_nan, float("nan"), scale)


@triton.jit
def write_kv_int8_kernel(
    k_pool,  # (layers, slots, HEADS, K_DIM) int8 updated
    k_scales,  # (layers, slots, HEADS) float32 updated
    v_pool,  # (layers, slots, HEADS, V_DIM) int8 updated
    v_scales,  # (layers, slots, HEADS) float32 updated
    layer,  # () int32
    loc,  # (n,) int32
    k,  # (n, HEADS, K_DIM)
    v,  # (n, HEADS, V_DIM)
    n,
    layers,
    slots,
    k_alias,
    k_scales_alias,
    v_alias,
    v_scales_alias,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)  # token * HEADS + head
    token = pair // HEADS
    slot = tl.load(loc + token, mask=token < n, other=0).to(tl.int64)
    which = tl.load(layer).to(tl.int64) + tl.zeros([PAIRS], tl.int64)
    keep = (slot > 0) & (slot < slots) & (which >= 0) & (which < layers)
    target = (which * slots + slot) * HEADS + pair % HEADS
    k_column = tl.arange(0, K_BLOCK)[None, :]
    v_column = tl.arange(0, V_BLOCK)[None, :]
    k_mask = keep[:, None] & (k_column < K_DIM)
    v_mask = keep[:, None] & (v_column < V_DIM)
    k_tile = tl.load(k + pair[:, None] * K_DIM + k_column, mask=k_mask, other=0)
    v_tile = tl.load(v + pair[:, None] * V_DIM + v_column, mask=v_mask, other=0)
    k_units, k_scale = _to_int8(k_tile, STEP)
    v_units, v_scale = _to_int8(v_tile, STEP)
    tl.store(k_pool + target[:, None] * K_DIM + k_column, k_units, mask=k_mask)
    tl.store(k_scales + target, k_scale, mask=keep)
    tl.store(v_pool + target[:, None] * V_DIM + v_column, v_units, mask=v_mask)
    tl.store(v_scales + target, v_scale, mask=keep)
