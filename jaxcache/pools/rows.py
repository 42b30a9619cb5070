"""Rows and the lists that name them: what is refused, and how a list is padded so that few shapes compile.

Source: jaxcache's own.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcache.device.placing import on_host
from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import require_array
from jaxcache.pools.config import require


def check_rows(name: str, rows: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuses rows of another shape, or of a dtype that a cast to the pool's `dtype` would spoil."""
    require_array(name, rows)
    require(rows.shape == shape, name, f"must have shape {shape}", rows.shape)
    if jnp.issubdtype(dtype, jnp.floating):
        require(jnp.issubdtype(rows.dtype, jnp.floating), name, f"must be floats, for a {dtype} pool", rows.dtype)
    else:
        require(rows.dtype == dtype, name, f"must be quantised to the pool's {dtype} by the caller", rows.dtype)


def read_back(name: str, values: Any) -> np.ndarray:
    """A list as a NumPy array, from the device if it is there. Raises ArgumentError if it is ragged or deleted."""
    try:
        return on_host(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged lists; deleted arrays
        raise ArgumentError(f"{name} must be a one-dimensional list of integers: {error}") from error


def pad_to(array: np.ndarray, length: int, axis: int = 0) -> np.ndarray:
    """`array` padded with zeros to `length`. As slots, zeros name row 0, the sink; rows of zeros go there."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(array, widths)


def bucketed(slots: np.ndarray, smallest: int) -> np.ndarray:
    """A list on the host, padded to a power of two of at least `smallest`: few shapes compile."""
    return pad_to(slots, max(smallest, 1 << (len(slots) - 1).bit_length()))


def require_distinct(name: str, slots: np.ndarray) -> None:
    """Raises ArgumentError if a slot other than 0 is named twice."""
    used = np.sort(slots[slots != 0])
    repeated = used[1:][used[1:] == used[:-1]]
    require(not len(repeated), name, "must name each slot once (0 is padding), but repeats slot", repeated[:1])
