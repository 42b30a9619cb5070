"""Explicit transfers between host and device: the one place that puts host arrays on a device, or reads them back.

A NumPy array handed to a jitted function, `jnp.asarray` of one, even `jnp.zeros(...)` are implicit transfers to JAX.
Users who forbid those (`jax.transfer_guard("disallow")`) find the hidden ones of their own programs; ours are explicit.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped

_HOST_TYPES = (np.ndarray, np.generic, bool, int, float)


def on_device(value: Any, where: Any = None) -> Any:
    """A copy of a host array or number on a device or sharding, by default the default device; others as they are.

    The transfer may still be under way, and a CPU device may keep what it is given: so it is given a copy.
    """
    if isinstance(value, np.ndarray):
        value = value.copy()
    return jax.device_put(value, where) if isinstance(value, _HOST_TYPES) else value


def on_host(value: Any) -> np.ndarray:
    """An array of the device, waited for, as a NumPy array; one of the host as it is."""
    return (
        jax.device_get(value) if isinstance(value, jax.Array) and not isinstance(value, Tracer) else np.asarray(value)
    )


def host_arrays_placed(
    args: tuple[Any, ...], kwargs: dict[str, Any], array: Any, static: Container[int | str] = ()
) -> Any:
    """Arguments of a jitted step with those that are host arrays or numbers beside `array`; containers are left alone.

    Args:
      args, kwargs: The arguments.
      array: One of the step's other arrays.
      static: Positions and names of arguments that are compiled in.

    Cost: one comparison of a type each.
    """
    if not any(isinstance(value, _HOST_TYPES) for value in (*args, *kwargs.values())):
        return args, kwargs
    where = beside(array)
    placed = {name: value if name in static else on_device(value, where) for name, value in kwargs.items()}
    return tuple(value if i in static else on_device(value, where) for i, value in enumerate(args)), placed


def beside(array: Any) -> Sharding | None:
    """Where small arrays belong that a step takes together with `array`: on its device, or on each one of its mesh."""
    if not isinstance(array, jax.Array) or not array.committed:
        return None
    if isinstance(array.sharding, NamedSharding):
        return NamedSharding(array.sharding.mesh, PartitionSpec())
    return SingleDeviceSharding(next(iter(array.devices()))) if len(array.devices()) == 1 else None


def zeros(shape: tuple[int, ...], dtype: Any, where: Any = None) -> Shaped[Array, "..."]:
    """An array of zeros, which the device fills itself: one number travels. Compiles once a shape."""
    with jax.transfer_guard_host_to_device("allow"):
        return jnp.zeros(shape, dtype, device=where)
