"""Every pool op, alone and in the shapes of a model's step, updates the pool in place, for every dtype.

The pools have no memory: a step is compiled, never run. On a GPU the same tests prove the GPU's program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.device.donation import donating
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.base import KVCache
from jaxcache.pools.mha import MHATokenToKVPool
from tests.pools.numpy_pool import DTYPES, mha_config
from tests.pools.steps import BY_KIND, LAYERS, OPS, SHAPES, SIZES, TOKENS, abstract_args, pool_a_layer, set_layer

LOC = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)


def prove(kind, config, step):
    pool, *args = abstract_args(kind, config, jax.default_backend())
    report = prove_in_place(donating(step), pool, *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


@BY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_is_in_place_for_every_dtype(kind, make_config, dtype):
    for step in OPS if dtype == jnp.bfloat16 or make_config is mha_config else OPS[:1]:
        prove(kind, make_config(dtype, **SIZES), step)


@pytest.mark.parametrize("step", SHAPES)
@BY_KIND
def test_every_shape_of_step_is_in_place(kind, make_config, step):
    prove(kind, make_config(jnp.bfloat16, **SIZES), step)


def test_a_scaled_write_is_in_place():
    pool = MHATokenToKVPool.abstract(mha_config(jnp.float8_e4m3fn, **SIZES), platform=jax.default_backend())
    k, v = (jax.ShapeDtypeStruct((TOKENS, *row), jnp.bfloat16) for row in pool.config.row_shapes)
    report = prove_in_place(donating(lambda pool, *args: pool.set_kv_buffer(2, *args)), pool, LOC, k, v, 2.0, 0.5)
    assert report.ok, report.why


@BY_KIND
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


@BY_KIND
@pytest.mark.parametrize("container", [list, tuple, lambda pools: dict(enumerate(pools))])
def test_a_container_of_pools_is_in_place(kind, make_config, container):
    pool, *args = abstract_args(kind, make_config(jnp.bfloat16, **SIZES | {"layer_num": 1}), jax.default_backend())

    def step(pools, *args):
        return pool_a_layer(list(pools.values()) if isinstance(pools, dict) else pools, *args)

    report = prove_in_place(donating(step), container([pool] * 3), *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == 3 * pool.size_bytes
