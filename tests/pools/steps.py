"""The shapes of a model's step, as functions of a pool: what must be in place everywhere, on one device and on many.

Each is `step(pool, loc, rows, all_rows)`: slots of `TOKENS` tokens, their rows for one layer as a tuple with one array
for each of the pool's, and the same for all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcache.pools.double_sparse import DoubleSparseTokenToKVPool
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from tests.pools.numpy_pool import double_sparse_config, mha_config, mla_config, page_major

LAYERS, TOKENS = 4, 16
SIZES = {"size": 4096, "page_size": 16, "layer_num": LAYERS, "start_layer": 2}
KINDS = [
    pytest.param(MHATokenToKVPool, mha_config, id="mha"),
    pytest.param(MLATokenToKVPool, mla_config, id="mla"),
    pytest.param(MHATokenToKVPool, page_major(mha_config), id="page-major-mha"),
    pytest.param(MLATokenToKVPool, page_major(mla_config), id="page-major-mla"),
    pytest.param(DoubleSparseTokenToKVPool, double_sparse_config, id="double-sparse"),
]
BY_KIND = pytest.mark.parametrize(("kind", "make_config"), KINDS)


def set_layer(pool, layer, loc, rows):
    return pool.set_kv_buffer(layer, loc, *rows)


def one_layer(pool, loc, rows, all_rows):
    return set_layer(pool, 3, loc, rows)


def python_loop(pool, loc, rows, all_rows):
    for layer in range(2, 2 + LAYERS):
        pool = set_layer(pool, layer, loc, rows)
    return pool


def traced_loop(pool, loc, rows, all_rows):
    return jax.lax.fori_loop(2, 2 + LAYERS, lambda layer, p: set_layer(p, layer, loc, rows), pool)


def scan(pool, loc, rows, all_rows):
    def layer_step(pool, layer_and_rows):
        layer, rows = layer_and_rows
        pool = set_layer(pool, layer, loc, rows)
        return pool, pool.gather(loc, layer=layer)

    return jax.lax.scan(layer_step, pool, (jnp.arange(2, 2 + LAYERS, dtype=jnp.int32), all_rows))


def write_then_gather(pool, loc, rows, all_rows):
    pool = set_layer(pool, 2, loc, rows)
    return pool, pool.gather(loc), pool.gather(loc, layer=3)


def while_loop(pool, loc, rows, all_rows):
    def body(carry):
        layer, pool = carry
        return layer + 1, set_layer(pool, layer, loc, rows)

    return jax.lax.while_loop(lambda carry: carry[0] < 2 + loc[0], body, (jnp.int32(2), pool))[1]


def write_loop_read_write(pool, loc, rows, all_rows):
    """openxla/xla#45912: a loop reads the pool between two writes."""
    pool = set_layer(pool, 2, loc, rows)

    def read(i, total):
        return jax.tree.map(lambda t, row: t + row.astype(jnp.float32), total, as_tuple(pool.gather(loc + i, layer=2)))

    total = jax.lax.fori_loop(0, 3, read, jax.tree.map(lambda row: jnp.zeros(row.shape, jnp.float32), rows))
    return set_layer(pool, 3, loc, jax.tree.map(lambda t, row: t.astype(row.dtype), total, rows))


def read_then_write(pool, loc, rows, all_rows):
    return set_layer(pool, 2, loc, as_tuple(pool.gather(loc[::-1], layer=3)))


def as_tuple(rows):
    return rows if isinstance(rows, tuple) else (rows,)


def conditional(pool, loc, rows, all_rows):
    return jax.lax.cond(loc[0] > 0, lambda p: set_layer(p, 2, loc, rows), lambda p: p, pool)


def all_layers(pool, loc, rows, all_rows):
    return pool.set_all_layers(loc, *all_rows)


def move(pool, loc, rows, all_rows):
    return pool.move_kv_cache(loc, loc[::-1])


def pool_a_layer(pools, loc, rows, all_rows):
    """A list with a pool for each layer, or kind of layer, is as good as one stack."""
    return [set_layer(pool, 2, loc, rows) for pool in pools]


OPS = [one_layer, all_layers, move]
SHAPES = [
    python_loop,
    traced_loop,
    while_loop,
    scan,
    write_then_gather,
    read_then_write,
    write_loop_read_write,
    conditional,
]


def abstract_args(kind, config, platform, mesh=None):
    """The arguments of a step without memory, on a mesh if one is given."""

    def shaped(shape, dtype, spec):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    pool = kind.abstract(config, platform=platform, mesh=mesh if config.axis_name else None)
    one, every = row_specs(config)
    rows = tuple(shaped((TOKENS, *row), config.dtype, one) for row in config.row_shapes)
    all_rows = tuple(shaped((config.layer_num, TOKENS, *row), config.dtype, every) for row in config.row_shapes)
    return pool, shaped((TOKENS,), jnp.int32, PartitionSpec()), rows, all_rows


def row_specs(config):
    """How rows of one layer, and of all layers, lie on the mesh of a pool."""
    every = config.partition_spec
    return PartitionSpec(*every[1:]), every


def on_mesh(step, config, mesh, pool_specs):
    """`step` for each shard; whatever it returns beside the pool stays unlooked at, so that every step fits."""

    def shard_step(*args):
        out = step(*args)
        pool, *rest = out if isinstance(out, tuple) else (out,)
        return pool, jax.tree.map(lambda x: x[None], rest)

    one, every = row_specs(config)
    in_specs = (pool_specs, PartitionSpec(), one, every)
    out_specs = (pool_specs, PartitionSpec(config.axis_name))
    return jax.shard_map(shard_step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
