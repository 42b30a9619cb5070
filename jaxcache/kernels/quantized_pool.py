"""What a quantised write needs of a pool: storage dtype, scales, and how they are applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    pass


INT8_STEP = np.float32(1 / 127)


class QuantizedPool(NamedTuple):
    """Payload and scales of one int8 pool. They are written, donated and returned together."""

    payload: jax.Array
    """int8 `(layers, slots, heads, dim)`."""
    scales: jax.Array
    """float32 `(layers, slots, heads)`; an element is worth `payload * scale`."""
