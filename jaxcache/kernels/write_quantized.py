"""KV writes that quantise: rows come as the model made them, and the pool keeps one byte an element.

| op | an element is stored as | scales |
|---|---|---|
| `write_kv_fp8` | `x * (1 / scale)` as float8 e4m3fn or e5m2 | the caller's: one for all, or one a head |
| `write_kv_int8` | `x * (1 / scale)` as int8, where `scale = max(abs(x)) / 127` of a head | made here, kept beside |

All arithmetic is float32, and each step is rounded correctly: the same bits on every device. Rounding is to nearest,
ties to even. What is too large for float8 saturates, and a NaN stays one, 0x7f: see `jaxcache.kernels.float8`. int8 has
no NaN: a head with one gets it as its scale, and the payload 0, and an infinity counts as the largest float32. Rows are
only read: the caller's arrays stay as they are.

Slots and layers are treated as in `write_kv`.

Source: SGLang 0.5.2 memory_pool.py (set_kv_buffer: `cache_k.div_(k_scale)`, which scales the caller's array).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray, require_array, require_int32, require_layer, require_pool
from jaxcache.kernels.dispatch import Implementation, Op, choose
from jaxcache.kernels.float8 import FLOAT8_DTYPES, float8_bits
from jaxcache.kernels.quantized_pool import INT8_STEP, QuantizedPool
from jaxcache.kernels.write_kv import put_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Shaped

_LARGEST = np.finfo(np.float32).max
_ROW_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def write_kv_fp8(
    k_pool: Shaped[Array, "layers slots heads k_dim"],
    v_pool: Shaped[Array, "layers slots heads v_dim"],
    layer: int | Int32[AnyArray, ""],
    loc: Int32[AnyArray, " n"],
    k: Float[AnyArray, "n heads k_dim"],
    v: Float[AnyArray, "n heads v_dim"],
    k_scale: Float32[AnyArray, "*heads"],
    v_scale: Float32[AnyArray, "*heads"],
    *,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "layers slots heads k_dim"], Shaped[Array, "layers slots heads v_dim"]]:
    """Divides rows by their scales, as `x * (1 / scale)`, and writes them as float8, saturated.

    Args:
      k_pool: Keys of all layers, in a float8 dtype or uint8. Consumed: use the returned pool from here on.
      v_pool: Values of all layers. Consumed.
      layer: Index into the stack. An int is checked; an array out of range writes nothing.
      loc: Slot of each token. Slot 0 and slots outside the pool are dropped.
      k: Keys as bfloat16, float16 or float32.
      v: Values, likewise.
      k_scale: float32, a scalar for the tensor or one for each head; positive, in [2^-120, 2^120].
      v_scale: Likewise.
      dtype: What the bytes of a uint8 pool mean: float8_e4m3fn or float8_e5m2. By default the pool's own dtype.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The pools with the rows written.

    Raises:
      ArgumentError: on a wrong dtype, shape or layer, before anything is written.

    Cost: reads the rows once and writes one byte an element.
    """
    _check_pools({"k_pool": k_pool, "v_pool": v_pool}, layer, loc)
    dtype = _float8_of("k_pool", k_pool, dtype)
    _float8_of("v_pool", v_pool, dtype)
    for name, rows, pool in (("k", k, k_pool), ("v", v, v_pool)):
        _require_float_rows(name, rows, (loc.shape[0], *pool.shape[2:]))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_array(name, scale)
        if scale.dtype != np.float32 or scale.shape not in ((), (k_pool.shape[2],)):
            raise ArgumentError(
                f"{name} must be float32, a scalar or one for each of {k_pool.shape[2]} heads, "
                f"got {scale.dtype}{list(scale.shape)}"
            )
    if loc.shape[0] and choose(Op.WRITE_KV_FP8, implementation=implementation).implementation is Implementation.TRITON:
        from jaxcache.kernels import write_quantized_triton

        return write_quantized_triton.write_kv_fp8(k_pool, v_pool, layer, loc, k, v, k_scale, v_scale, dtype)
    k_bits, v_bits = quantize_fp8(k, k_scale, dtype), quantize_fp8(v, v_scale, dtype)
    return (
        put_rows(k_pool, layer, loc, jax.lax.bitcast_convert_type(k_bits, k_pool.dtype)),
        put_rows(v_pool, layer, loc, jax.lax.bitcast_convert_type(v_bits, v_pool.dtype)),
    )


def write_kv_int8(
    k_pool: QuantizedPool,
    v_pool: QuantizedPool,
    layer: int | Int32[AnyArray, ""],
    loc: Int32[AnyArray, " n"],
    k: Float[AnyArray, "n heads k_dim"],
    v: Float[AnyArray, "n heads v_dim"],
    *,
    implementation: Implementation | None = None,
) -> tuple[QuantizedPool, QuantizedPool]:
    """Writes rows as int8 with a scale for each token and head.

    Args:
      k_pool: Keys of all layers with their scales. Consumed: use the returned pool from here on.
      v_pool: Values of all layers with their scales. Consumed.
      layer: Index into the stack. An int is checked; an array out of range writes nothing.
      loc: Slot of each token. Slot 0 and slots outside the pool are dropped.
      k: Keys as bfloat16, float16 or float32.
      v: Values, likewise.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The pools with payload and scales written. A head of zeros has scale 0 and payload 0, one with a NaN scale NaN
      and payload 0; an infinity is worth the largest float32.

    Raises:
      ArgumentError: on a wrong dtype, shape or layer, before anything is written.

    Cost: reads the rows once; writes one byte an element and four a head.
    """
    _check_pools({"k_pool": k_pool.payload, "v_pool": v_pool.payload}, layer, loc)
    for name, pool, rows in (("k", k_pool, k), ("v", v_pool, v)):
        if pool.payload.dtype != np.int8 or pool.scales.dtype != np.float32:
            raise ArgumentError(
                f"{name}_pool must be int8 with float32 scales, got {pool.payload.dtype} and {pool.scales.dtype}"
            )
        if pool.scales.shape != pool.payload.shape[:3]:
            raise ArgumentError(
                f"{name}_pool.scales must have shape {pool.payload.shape[:3]}, one a head, got {pool.scales.shape}"
            )
        _require_float_rows(name, rows, (loc.shape[0], *pool.payload.shape[2:]))
    if loc.shape[0] and choose(Op.WRITE_KV_INT8, implementation=implementation).implementation is Implementation.TRITON:
        from jaxcache.kernels import write_quantized_triton

        return write_quantized_triton.write_kv_int8(k_pool, v_pool, layer, loc, k, v)

    def put(pool: QuantizedPool, rows: AnyArray) -> QuantizedPool:
        quantized = quantize_int8(rows)
        return QuantizedPool(*(put_rows(pool[i], layer, loc, quantized[i]) for i in range(2)))

    return put(k_pool, k), put(v_pool, v)


def quantize_fp8(rows: AnyArray, scale: AnyArray, dtype: Any) -> jax.Array:
    """Bytes of `rows * (1 / scale)` in a float8 format; see `jaxcache.kernels.float8`.

    Args:
      rows: `(n, heads, dim)`.
      scale: float32 scalar, or one a head.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      uint8, of the shape of `rows`.
    """
    factor = reciprocal(jnp.asarray(scale))
    return float8_bits(jnp.asarray(rows).astype(jnp.float32) * (factor[..., None] if factor.ndim else factor), dtype)


def quantize_int8(rows: AnyArray) -> tuple[jax.Array, jax.Array]:
    """int8 payload of the shape of `rows`, and float32 scales without its last dimension."""
    x = jnp.clip(jnp.asarray(rows).astype(jnp.float32), -_LARGEST, _LARGEST)
    has_nan = jnp.isnan(x).any(axis=-1)
    scales = jnp.max(jnp.where(jnp.isnan(x), 0, jnp.abs(x)), axis=-1, initial=0) * INT8_STEP
    units = jnp.clip(jnp.round(x * reciprocal(jnp.where(scales > 0, scales, 1))[..., None]), -127, 127)
    payload = jnp.where(has_nan[..., None], 0, units).astype(jnp.int8)
    return payload, jnp.where(has_nan, jnp.float32(jnp.nan), scales)


def reciprocal(x: jax.Array) -> jax.Array:
    """`1 / x` of positive float32 numbers, correctly rounded. XLA's division on a GPU can be off by two last places.

    With both mantissas as 24-bit integers, `1 - x * y` is a power of two less their product, and small: int32
    arithmetic that wraps around gives it exactly, and so the last places by which `y` is off.
    """
    mantissa = (jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF) | 0x800000
    bits = jax.lax.bitcast_convert_type(1 / x, jnp.int32)
    for _ in range(3):
        rest = -mantissa * ((bits & 0x7FFFFF) | 0x800000)
        bits = bits + (2 * rest > mantissa).astype(jnp.int32) - (2 * rest < -mantissa).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _check_pools(pools: dict[str, AnyArray], layer: int | AnyArray, loc: AnyArray) -> None:
    for name, pool in pools.items():
        require_pool(name, pool, 4)
    shapes = [pool.shape for pool in pools.values()]
    if shapes[0][:3] != shapes[1][:3]:
        raise ArgumentError(f"{' and '.join(pools)} must have the same layers, slots and heads, got {shapes}")
    require_int32(loc=loc)
    require_layer(layer, shapes[0][0])


def _require_float_rows(name: str, rows: AnyArray, shape: tuple[int, ...]) -> None:
    require_array(name, rows)
    if rows.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape}, one row a slot of loc, got {rows.shape}: reshape it")
    if rows.dtype not in _ROW_DTYPES:
        raise ArgumentError(f"{name} must be bfloat16, float16 or float32, got {rows.dtype}: pass the model's rows")


def _float8_of(name: str, pool: AnyArray, dtype: Any) -> Any:
    """The float8 format of a pool's bytes."""
    wanted = np.dtype(pool.dtype if dtype is None else dtype)
    if wanted not in FLOAT8_DTYPES or pool.dtype not in (wanted, np.uint8):
        raise ArgumentError(
            f"{name} must be float8_e4m3fn or float8_e5m2, or uint8 with dtype= one of them, "
            f"got {pool.dtype} with dtype={dtype}"
        )
    return wanted
