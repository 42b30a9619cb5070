"""Meshes of simulated devices, and what is asked of a pool on one."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from tests.pools.numpy_pool import NumpyPool, bits


def make_mesh(shards: int, *more: tuple[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """CPU devices, simulated beyond the first (tests/conftest.py)."""
    names, sizes = zip(*more, ("tp", shards), strict=True)
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(axis_type,) * len(names))


def pointers(pool) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for buffer in pool.buffers for shard in buffer.addressable_shards]


def expect(pool, oracle: NumpyPool) -> None:
    """The oracle's bits in every slot of every layer on every device."""
    for buffer, array in zip(pool.buffers, oracle.as_they_lie(), strict=True):
        for shard in buffer.addressable_shards:
            np.testing.assert_array_equal(bits(shard.data), bits(array)[shard.index])


def place(pool, rows, spec):
    """Rows cut like the pool, which a mesh of explicit axes asks for."""
    return tuple(jax.device_put(row, NamedSharding(pool.mesh, spec)) for row in rows)
