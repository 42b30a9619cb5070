"""Checks shared by the ops. Shapes and dtypes are static, so a check costs nothing inside a jitted step."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np

from jaxcache.errors import ArgumentError

AnyArray: TypeAlias = jax.Array | np.ndarray


def require_int32(**arrays: AnyArray) -> None:
    """Raises ArgumentError unless every array is one-dimensional int32."""
    for name, array in arrays.items():
        require_array(name, array)
        if array.dtype != np.int32 or array.ndim != 1:
            raise ArgumentError(f"{name} must be a one-dimensional int32 array, got {array.dtype}{list(array.shape)}")


def require_same_length(**arrays: AnyArray) -> None:
    """Raises ArgumentError unless all arrays have the same leading length."""
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"{', '.join(lengths)} must have one length, got {lengths}: pad them to the same bucket")


def require_rows(name: str, rows: AnyArray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ArgumentError unless `rows` has this shape and dtype."""
    require_array(name, rows)
    if rows.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape}, one row a slot of loc, got {rows.shape}: reshape it")
    if rows.dtype != dtype:
        raise ArgumentError(
            f"{name} must have the pool's storage dtype {dtype}, got {rows.dtype}: cast or bitcast the rows"
        )


def require_pool(name: str, pool: AnyArray, ndim: int | None = None) -> None:
    """Raises ArgumentError unless `pool` is an array `(layers, slots, ...)`, of `ndim` dimensions if given."""
    require_array(name, pool)
    if pool.ndim < 2 or ndim not in (None, pool.ndim):
        raise ArgumentError(
            f"{name} must have {ndim or 'at least 2'} dimensions (layers, slots, ...), got {pool.shape}"
        )


def require_layer(layer: int | AnyArray, num_layers: int) -> None:
    """Raises ArgumentError unless `layer` is an int32 scalar array or an int in [0, num_layers)."""
    if isinstance(layer, (int, np.integer)):
        if not 0 <= layer < num_layers:
            raise ArgumentError(f"layer must be in [0, {num_layers}), got {layer}: subtract the pool's start_layer")
        return
    require_array("layer", layer)
    if layer.shape != () or layer.dtype != np.int32:
        raise ArgumentError(f"layer must be an int or an int32 scalar, got {layer.dtype}{list(layer.shape)}")


def require_array(name: str, value: Any) -> None:
    """Raises ArgumentError unless `value` is a JAX array, a tracer or a NumPy array."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise ArgumentError(
            f"{name} must be a JAX or NumPy array, got {type(value).__name__}: convert it with np.asarray"
        )
