"""Every pool op, alone and in the shapes of a model's step, updates the pool in place, for every dtype.

The pools have no memory: a step is compiled, never run. On a GPU the same tests prove the GPU's program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.donation import donating
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.base import KVCache
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from tests.pools.numpy_pool import DTYPES, mha_config, mla_config

LAYERS, TOKENS = 4, 16
SIZES = {"size": 4096, "page_size": 16, "layer_num": LAYERS, "start_layer": 2}
LOC = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
POOLS = [(MHATokenToKVPool, mha_config), (MLATokenToKVPool, mla_config)]


def set_layer(pool, layer, loc, rows):
    if isinstance(pool, MHATokenToKVPool):
        return pool.set_kv_buffer(layer, loc, *rows)
    return pool.set_kv_buffer(layer, loc, rows[0])


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


def conditional(pool, loc, rows, all_rows):
    return jax.lax.cond(loc[0] > 0, lambda p: set_layer(p, 2, loc, rows), lambda p: p, pool)


def all_layers(pool, loc, rows, all_rows):
    return pool.set_all_layers(loc, *all_rows)


def move(pool, loc, rows, all_rows):
    return pool.move_kv_cache(loc, loc[::-1])


def prove(kind, config, step):
    pool = kind.abstract(config, platform=jax.default_backend())
    rows = tuple(jax.ShapeDtypeStruct((TOKENS, *row), config.dtype) for row in config.row_shapes)
    all_rows = tuple(jax.ShapeDtypeStruct((LAYERS, *row.shape), config.dtype) for row in rows)
    report = prove_in_place(donating(step), pool, LOC, rows, all_rows)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


@pytest.mark.parametrize("step", [one_layer, all_layers, move])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "make_config"), POOLS, ids=["mha", "mla"])
def test_every_op_is_in_place_for_every_dtype(kind, make_config, dtype, step):
    prove(kind, make_config(dtype, **SIZES), step)


@pytest.mark.parametrize("step", [python_loop, traced_loop, scan, write_then_gather, conditional])
@pytest.mark.parametrize(("kind", "make_config"), POOLS, ids=["mha", "mla"])
def test_every_shape_of_step_is_in_place(kind, make_config, step):
    prove(kind, make_config(jnp.bfloat16, **SIZES), step)


def test_a_scaled_write_is_in_place():
    pool = MHATokenToKVPool.abstract(mha_config(jnp.float8_e4m3fn, **SIZES), platform=jax.default_backend())
    k, v = (jax.ShapeDtypeStruct((TOKENS, *row), jnp.bfloat16) for row in pool.config.row_shapes)
    report = prove_in_place(donating(lambda pool, *args: pool.set_kv_buffer(2, *args)), pool, LOC, k, v, 2.0, 0.5)
    assert report.ok, report.why


@pytest.mark.parametrize(("kind", "make_config"), POOLS, ids=["mha", "mla"])
def test_methods_called_outside_a_jit_keep_the_memory(kind, make_config):
    pool: KVCache = kind.create(make_config(jnp.bfloat16, **SIZES))
    pointers = [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]
    rows = [np.ones((TOKENS, *row), np.float32) for row in pool.config.row_shapes]
    loc = np.arange(16, 16 + TOKENS)
    for update in (
        lambda p: set_layer(p, 2, loc, rows),
        lambda p: p.set_all_layers(loc, *(np.stack([array] * LAYERS) for array in rows)),
        lambda p: p.move_kv_cache(loc, loc + TOKENS),
        lambda p: p.load_cpu_copy(p.get_cpu_copy(loc), loc + 1),
    ):
        consumed, pool = pool, update(pool)
        assert consumed.is_stale
        assert [buffer.unsafe_buffer_pointer() for buffer in pool.buffers] == pointers
