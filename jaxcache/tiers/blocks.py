"""Blocks: values of one component gathered from the device's pool, in the order of the host's layout, and back.

A block has an array for each array of the component's stacks: `(ids, layers, rows, *row)`, or `(ids, rows, layers,
*row)` for hosts that keep pages token by token. It is cut over a mesh as the pool is.

Source: jaxcache's own.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.device.donation import donating, reading
from jaxcache.device.placing import beside
from jaxcache.kernels.copy_kv import gather_rows, scatter_rows
from jaxcache.kernels.copy_pages import gather_pages, scatter_pages
from jaxcache.pools.sharding import on_every_shard
from jaxcache.pools.stack import LayerStack, MemoryPool
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import rows_per_id
from jaxcache.tiers.host_pool import HostPool

PoolT = TypeVar("PoolT", bound=MemoryPool)


@functools.partial(reading, static_argnames=("names", "layout", "mesh"))
def gathered(
    pool: MemoryPool, ids: Any, *, names: tuple[str, ...], layout: HostLayout, mesh: Mesh | None
) -> tuple[jax.Array, ...]:
    """Pages of each array of these stacks, one behind the other, in the order of the host's layout."""

    def gather(pool: MemoryPool, ids: Any) -> tuple[jax.Array, ...]:
        stacks = pool.stacks()
        return tuple(
            _turned(_read(stacks[name], buffer, ids), layout) for name in names for buffer in stacks[name].buffers
        )

    return on_every_shard(gather, mesh, (pool.partition_specs(), PartitionSpec()), _specs(pool, names))(pool, ids)


@functools.partial(donating, static_argnames=("names", "layout", "mesh"))
def scattered(
    pool: PoolT, ids: Any, *blocks: jax.Array, names: tuple[str, ...], layout: HostLayout, mesh: Mesh | None
) -> PoolT:
    """The inverse of `gathered`."""

    def scatter(pool: PoolT, ids: Any, *blocks: jax.Array) -> PoolT:
        stacks: dict[str, Any] = pool.stacks()
        rest = iter(blocks)
        for name in names:
            stack = stacks[name]
            written = (_written(stack, buffer, ids, _turned(next(rest), layout)) for buffer in stack.buffers)
            stacks[name] = stack.with_buffers(*written)
        return pool.with_stacks(stacks)

    specs = pool.partition_specs()
    in_specs = specs, PartitionSpec(), *_specs(pool, names)
    return on_every_shard(scatter, mesh, in_specs, specs)(pool, ids, *blocks)


def _read(stack: LayerStack, buffer: Any, ids: Any) -> jax.Array:
    """`(ids, layers, rows, *row)` of an array of a stack."""
    unit = _unit(stack, buffer)
    pages = jnp.swapaxes(gather_rows(buffer, ids), 0, 1) if unit == 1 else gather_pages(buffer, ids, page_size=unit)
    return pages.reshape(len(ids), stack.config.layer_num, rows_per_id(stack.config), *buffer.shape[2:])


def _written(stack: LayerStack, buffer: Any, ids: Any, block: jax.Array) -> jax.Array:
    """The inverse of `_read`. Rows that are pages go by themselves: XLA copies an array for a dimension of 1 more."""
    unit = _unit(stack, buffer)
    if unit == 1:
        return scatter_rows(buffer, ids, jnp.swapaxes(block.reshape(len(ids), -1, *buffer.shape[2:]), 0, 1))
    pages = block.reshape(len(ids), buffer.shape[0], unit, *buffer.shape[2:])
    return scatter_pages(buffer, ids, pages, page_size=unit)


def _unit(stack: LayerStack, buffer: Any) -> int:
    """Rows of the array that are one piece of an id: those of a layer, or page-major of all layers."""
    return rows_per_id(stack.config) * stack.config.layer_num // buffer.shape[0]


def _turned(blocks: jax.Array, layout: HostLayout) -> jax.Array:
    """From layers of rows to the order of the layout, or back."""
    return jnp.swapaxes(blocks, 1, 2) if layout is HostLayout.PAGE_FIRST else blocks


def stack_names(pool: HostPool) -> tuple[str, ...]:
    """The stacks of the device's pool that a host pool is for."""
    return tuple(dict.fromkeys(array.shape.stack for array in pool.arrays))


def _specs(pool: MemoryPool, names: tuple[str, ...]) -> tuple[PartitionSpec, ...]:
    """How a block lies on the pool's mesh: cut as the rows are."""
    stacks = pool.stacks()
    return tuple(
        PartitionSpec(None, *stacks[name].config.partition_spec) for name in names for _ in stacks[name].buffers
    )


def blocks_like(pool: MemoryPool, host: HostPool, count: int) -> tuple[list[jax.ShapeDtypeStruct], list[Any]]:
    """Shape, dtype and place of each array of a block of `count` ids, over all shards."""
    stacks, names, mesh = pool.stacks(), stack_names(host), pool.mesh
    first = {(array.shape.stack, array.shape.index): array.shape for array in host.arrays}
    shapes, where = [], []
    for name in names:
        stack = stacks[name]
        for index, (buffer, row) in enumerate(zip(stack.buffers, stack.config.row_shapes, strict=True)):
            dims = first[name, index].block_shape(host.layout, count)[:3]
            shapes.append(jax.ShapeDtypeStruct((*dims, *row), buffer.dtype))
            where.append(beside(buffer) if mesh is None else None)
    if mesh is not None:
        where = [NamedSharding(mesh, spec) for spec in _specs(pool, names)]
    return shapes, where
