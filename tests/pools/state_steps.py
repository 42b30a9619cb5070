"""The shapes of a hybrid model's step, as functions of a pool of states: what must be in place everywhere.

Each is `step(pool, states, saved, count, parts)`: working states of `BATCH` requests and states for their snapshots,
how many there are, and both parts of a state for each request, in every layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxcache.pools.mamba import MambaPool
from tests.pools.numpy_states import mamba_config

LAYERS, BATCH = 4, 8
SIZES = {"num_states": 511, "layer_num": LAYERS, "start_layer": 2, "conv_shape": (8, 3), "temporal_shape": (8, 4, 4)}
DTYPES = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16), ("float16", "float16")]


def config_of(dtypes=(jnp.bfloat16, jnp.float32), **sizes):
    return mamba_config(conv_dtype=dtypes[0], temporal_dtype=dtypes[1], **SIZES | sizes)


def write(pool, states, saved, count, parts):
    return pool.write(states, 2, *(part[0] for part in parts))


def copy(pool, states, saved, count, parts):
    return pool.copy_states(saved, states, count)


def reset(pool, states, saved, count, parts):
    return pool.reset_states(states)


def scan_over_layers(pool, states, saved, count, parts):
    """What a model does: read, compute, write, in every layer."""

    def layer_step(pool, inputs):
        layer, (conv, temporal) = inputs
        old_conv, old_temporal = pool.read(states, layer)
        pool = pool.write(states, layer, old_conv + conv, old_temporal * temporal)
        return pool, old_temporal.sum(axis=-1)

    return jax.lax.scan(layer_step, pool, (jnp.arange(2, 2 + LAYERS, dtype=jnp.int32), parts))


def whole_step(pool, states, saved, count, parts):
    """Resume, run the layers, take snapshots."""
    pool = pool.copy_states(saved, states, count)
    pool, out = scan_over_layers(pool, states, saved, count, parts)
    return pool.copy_states(states, saved, count), out


def conditional_copy(pool, states, saved, count, parts):
    return jax.lax.cond(count > 0, lambda p: p.copy_states(states, saved, count), lambda p: p, pool)


def conditional_reset(pool, states, saved, count, parts):
    return jax.lax.cond(count > 0, lambda p: p.reset_states(states), lambda p: p, pool)


def copy_in_a_loop(pool, states, saved, count, parts):
    """A decode loop that takes a snapshot now and then."""

    def step(i, pool):
        pool = pool.write(states, 2, *(part[0] for part in parts))
        return jax.lax.cond(i % 4 == 0, lambda p: p.copy_states(states, saved, count), lambda p: p, pool)

    return jax.lax.fori_loop(0, 16, step, pool)


def copy_in_a_while_loop(pool, states, saved, count, parts):
    def body(carry):
        i, pool = carry
        return i + 1, pool.copy_states(states, saved, count)

    return jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), pool))[1]


STEPS = [
    write,
    copy,
    reset,
    scan_over_layers,
    whole_step,
    conditional_copy,
    conditional_reset,
    copy_in_a_loop,
    copy_in_a_while_loop,
]


def abstract_args(config, platform, mesh=None):
    """The arguments of a step without memory, on a mesh if one is given."""

    def shaped(shape, dtype, spec=PartitionSpec()):  # noqa: B008
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    pool = MambaPool.abstract(config, platform=platform, mesh=mesh if config.axis_name else None)
    parts = tuple(
        shaped((config.layer_num, BATCH, *shape), dtype, config.partition_spec)
        for shape, dtype in zip(config.row_shapes, config.row_dtypes, strict=True)
    )
    states = shaped((BATCH,), jnp.int32)
    return pool, states, states, shaped((), jnp.int32), parts


def on_mesh(step, config, mesh, pool_specs):
    """`step` for each shard; whatever it returns beside the pool stays unlooked at, so that every step fits."""

    def shard_step(*args):
        out = step(*args)
        pool, *rest = out if isinstance(out, tuple) else (out,)
        return pool, jax.tree.map(lambda x: x[None], rest)

    everywhere = PartitionSpec()
    in_specs = (pool_specs, everywhere, everywhere, everywhere, config.partition_spec)
    out_specs = (pool_specs, PartitionSpec(config.axis_name))
    return jax.shard_map(shard_step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
