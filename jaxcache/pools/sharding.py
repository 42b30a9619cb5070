"""Pools over a mesh axis: where their arrays lie, and the check that an op sees one shard of them and not the whole.

    mesh = jax.make_mesh((8,), ("tp",))
    pool = MHATokenToKVPool.create(MHAConfig(..., head_num=8, axis_name="tp", shards=8), mesh=mesh)
    specs = pool.partition_specs()

    def step(pool, loc, k, v):                    # sees one shard: (layers, slots, 1, dim), rows (n, 1, dim)
        return pool.set_kv_buffer(0, loc, k, v)

    heads = PartitionSpec(None, "tp")
    step = donating(jax.shard_map(
        step, mesh=mesh, in_specs=(specs, PartitionSpec(), heads, heads), out_specs=specs, check_vma=False
    ))
    pool = step(pool, loc, k, v)

Under a plain jit XLA would gather a sharded pool whole on every device, silently. So every op on a sharded pool first
checks, while it is traced, that it stands inside a `jax.shard_map` over the pool's axis and was given one shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxcache.errors import ShardingError
from jaxcache.pools.config import PoolConfig, require

F = TypeVar("F", bound=Callable[..., Any])


def sharding_on(mesh: Mesh | AbstractMesh | None, config: PoolConfig) -> NamedSharding:
    """How each array of a pool lies on `mesh`.

    Raises:
      ArgumentError: unless the mesh has the configured axis at the configured size.
    """
    axis = config.axis_name
    require(axis is not None, "mesh", "must be None for a pool whose config.axis_name is None", mesh)
    rule = f"must be a mesh with axis {axis!r} of size config.shards = {config.shards}"
    require(mesh is not None and mesh.shape.get(axis) == config.shards, "mesh", rule, mesh)
    return NamedSharding(mesh, config.partition_spec)  # pyright: ignore[reportArgumentType]


def zeros_on(mesh: Mesh | None, config: PoolConfig) -> tuple[jax.Array, ...]:
    """The arrays of an empty pool; every device writes its own shard."""
    sharding = sharding_on(mesh, config)
    shapes = config.abstract_buffers(next(iter(sharding.device_set)).platform)
    return jax.jit(lambda: tuple(jnp.zeros(b.shape, b.dtype) for b in shapes), out_shardings=sharding)()


def mesh_of(config: PoolConfig, array: jax.Array) -> Mesh | None:
    """The mesh that an array of a pool lies on; None for a pool that is not sharded.

    Raises:
      ShardingError: if a sharded pool's array lies anywhere else than its config says, or is traced.
    """
    if config.axis_name is None:
        return None
    sharding = None if isinstance(array, Tracer) else array.sharding
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape.get(config.axis_name) == config.shards:
        return sharding.mesh  # pyright: ignore[reportReturnType]
    raise ShardingError(
        f"the pool must lie on a mesh with axis {config.axis_name!r} of size {config.shards}, but its arrays have "
        f"{sharding or 'no place, being traced'}: make it with create(config, mesh=mesh), and call this outside jit"
    )


def require_one_shard(config: PoolConfig, arrays: tuple[jax.Array, ...]) -> None:
    """Refuses an op on a sharded pool that does not stand inside a `jax.shard_map` over the pool's axis.

    Raises:
      ShardingError: says how to call the op.
    """
    if config.axis_name is None:
        return
    remedy = (
        "call it inside jax.shard_map(step, mesh=mesh, in_specs=(pool.partition_specs(), ...), out_specs=..., "
        "check_vma=False)"
    )
    mesh = jax.sharding.get_abstract_mesh()
    if config.axis_name not in mesh.manual_axes:
        raise ShardingError(
            f"the pool is sharded over mesh axis {config.axis_name!r}, which is not bound here, and XLA would "
            f"gather it whole on every device: {remedy}"
        )
    size = mesh.shape[config.axis_name]
    if size != config.shards:
        raise ShardingError(
            f"the pool has {config.shards} shards, but mesh axis {config.axis_name!r} has size {size} here: {remedy} "
            "with the mesh that the pool was created on"
        )
    for array, row in zip(arrays, config.shard_row_shapes, strict=True):
        shape = (*config.placement.dims, *row)
        if array.shape != shape:
            raise ShardingError(f"a shard of the pool must have shape {shape}, got {array.shape}: {remedy}")


def on_every_shard(step: F, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> F:
    """`step` as each device of `mesh` carries it out on its own shard; itself, if there is no mesh."""
    if mesh is None:
        return step
    return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
