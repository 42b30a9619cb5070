"""Readers of what callers hand over on the host: counts, lists of ids, rows of a batch. NumPy only.

A reader returns the value in the one form that the package works with, or raises an ArgumentError that names the
argument. They run on every call, so each is a few vectorised operations. Operands of device ops are checked by
`kernels/arguments.py`, where shapes and dtypes are static.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.errors import ArgumentError, shown

if TYPE_CHECKING:
    from jaxtyping import Int32, Integer

MAX_SLOTS = 2**31
"""Slots and lengths are int32."""
_INT32 = np.iinfo(np.int32)
_INT32_DTYPE = np.dtype(np.int32)


def as_count(name: str, value: int) -> int:
    """`value` as a Python int.

    Raises:
      ArgumentError: if it is not an integer, or is negative.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ArgumentError(f"{name} must be an integer, got {type(value).__name__}: convert it with int()")
    if value < 0:
        raise ArgumentError(f"{name} must not be negative, got {value}")
    return int(value)


def as_flag(name: str, value: Any) -> bool:
    """`value`, which must be a bool: an array or a number is more likely a mistake.

    Raises:
      ArgumentError: if it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name} must be a bool, got {type(value).__name__}: pass True or False")
    return bool(value)


def as_sequence(name: str, value: Any) -> Sequence[Any]:
    """`value`, which must be a list, a tuple or another sequence: a generator is read only once.

    Raises:
      ArgumentError: if it is something else, or text.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray, memoryview)):
        raise ArgumentError(f"{name} must be a list or tuple, got {type(value).__name__}: convert it with list()")
    return value


def require_kind(name: str, value: Any, kind: type) -> None:
    """Raises ArgumentError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def require_callable(name: str, value: Any) -> None:
    """Raises ArgumentError unless `value` can be called."""
    if not callable(value):
        raise ArgumentError(f"{name} must be a function, got {type(value).__name__}")


def require_counts(**values: int) -> None:
    """Raises ArgumentError unless each is an integer that is not negative."""
    for name, value in values.items():
        as_count(name, value)


def as_integer(name: str, value: Any, bits: int) -> int:
    """`value` as a Python int. Raises ArgumentError unless it is an integer that fits so many bits, with its sign."""
    if not isinstance(value, (int, np.integer)):
        raise ArgumentError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ArgumentError(f"{name} must fit int{bits}, got {number}")
    return number


def as_int32(name: str, values: ArrayLike) -> Int32[np.ndarray, " n"]:
    """`values` as a one-dimensional int32 array; the caller's own array where it is one already.

    Any integer dtype, a list or a device array (which is waited for) will do, as long as every value fits.

    Raises:
      ArgumentError: if `values` is not one-dimensional, not of integers, or out of the range of int32.
    """
    if isinstance(values, np.ndarray) and values.dtype is _INT32_DTYPE and values.ndim == 1:
        return values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # Ragged lists; tracers; deleted arrays.
        raise ArgumentError(
            f"{name} must be a one-dimensional integer array, got {type(values).__name__}: {error}"
        ) from error
    if array.ndim != 1:
        raise ArgumentError(f"{name} must be one-dimensional, got shape {array.shape}: ravel it")
    if array.dtype == _INT32_DTYPE:
        return array
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"{name} must hold integers, got {array.dtype}: convert it with .astype(np.int32)")
    low, high = array.min(), array.max()
    if low < _INT32.min or high > _INT32.max:
        raise ArgumentError(f"{name} must fit int32, got values in [{low}, {high}]: slots and lengths are int32")
    return array.astype(np.int32)


def as_integers(name: str, values: ArrayLike) -> Integer[np.ndarray, " n"]:
    """`values` as a one-dimensional integer array: of NumPy of whatever width as it is, anything else as `as_int32`.

    Raises:
      ArgumentError: as `as_int32`.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind == "i" and values.ndim == 1:
        return values
    return as_int32(name, values)


def require_same_length(**arrays: np.ndarray) -> None:
    """Raises ArgumentError unless all arrays have one length."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"{', '.join(lengths)} must have one entry a request, got lengths {lengths}")


def require_rows(holds: np.ndarray, rule: str, **arrays: np.ndarray) -> None:
    """Raises ArgumentError naming `rule` and the values of the first row for which it does not hold."""
    if holds.all():
        return
    row = int(holds.argmin())
    values = ", ".join(f"{name} = {array[row]}" for name, array in arrays.items())
    raise ArgumentError(f"{rule}; row {row} has {values}")
