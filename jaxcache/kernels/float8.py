"""How a number becomes float8: one rule for every write, whichever framework or device carries it out.

| what comes | float8_e4m3fn | float8_e5m2 |
|---|---|---|
| a number | the nearest one of the format, ties to even | likewise |
| what is larger than the format's largest number, infinities too | 448 of its sign | 57,344 of its sign |
| NaN | NaN | NaN |

So a KV write never makes an infinity or a NaN of a number: one of them in a page would spoil every later attention over
it. Casts of the frameworks do not agree: XLA's overflows to NaN (e4m3fn) or infinity (e5m2), torch's saturates for one
format and not for the other.

Rows that are float8 already, in the format of the pool, are not converted: their bits are moved as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8

FLOAT8_DTYPES = tuple(map(np.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2)))


def float8_bits(rows: ArrayLike, dtype: DTypeLike) -> UInt8[Array, "*rows"]:
    """`rows` in a float8 format, as the table says, by integer arithmetic: XLA rounds to float8 twice on some devices.

    Args:
      rows: Floats; what is wider than float32 is rounded to it first.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      The bytes. A NaN is 0x7f.
    """
    info = jnp.finfo(dtype)
    mantissa, lowest = info.nmant, int(info.minexp)
    x = jnp.asarray(rows).astype(jnp.float32)
    size = jnp.minimum(jnp.abs(x), jnp.float32(info.max))
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(size, jnp.int32) >> 23, 127 + lowest) - 127
    # Units of the last place as a power of two: the product is exact, and only the rounding to an integer rounds.
    per_unit = jax.lax.bitcast_convert_type((127 + mantissa - exponent) << 23, jnp.float32)
    units = jnp.round(size * per_unit).astype(jnp.int32)
    code = ((exponent - lowest) << mantissa) + units
    sign = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80
    return jnp.where(jnp.isnan(x), 0x7F, code | sign).astype(jnp.uint8)
