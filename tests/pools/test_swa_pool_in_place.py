"""Every shape of a step of a model with windows updates both sides and the map in place, for every dtype.

Compiled, never run. On a GPU the same tests prove the GPU's program; marked `h200`, they compile for 1, 2 and 8 H200s.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.device.donation import donating
from jaxcache.kernels.in_place import inspect_compiled, prove_in_place
from jaxcache.pools.swa import SWAKVPool
from tests.kernels import h200
from tests.pools.numpy_pool import DTYPES, mha_config
from tests.pools.swa_steps import MAKE_CONFIGS, STEPS, abstract_args, large_config, on_mesh, patch_and_write_every_layer

BY_KIND = pytest.mark.parametrize("make_config", MAKE_CONFIGS)
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")


def prove(config, step):
    pool, *args = abstract_args(config, jax.default_backend())
    report = prove_in_place(donating(step), pool, *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


@BY_KIND
@pytest.mark.parametrize("step", STEPS)
def test_every_shape_of_step_is_in_place(make_config, step):
    prove(large_config(make_config), step)


@BY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_in_place(make_config, dtype):
    prove(large_config(make_config, dtype), patch_and_write_every_layer)


def test_a_large_map_is_in_place_too():
    """With small rows and pages of one token, the map is as large as a side of the pool."""
    sizes = {"size": 65536, "page_size": 1, "layer_num": 4, "head_num": 1, "head_dim": 1, "v_head_dim": 1}
    for step in STEPS:
        prove(large_config(mha_config, jnp.float32, **sizes), step)


@BY_KIND
def test_methods_called_outside_a_jit_keep_the_memory(make_config):
    pool = SWAKVPool.create(large_config(make_config))
    pointers = [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]
    rows = [np.ones((16, *row), np.float32) for row in pool.config.full.row_shapes]
    loc = np.arange(16, 32)
    for update in (
        lambda p: p.with_window_map(np.array([1, 2], np.int32), np.array([5, 6], np.int32)),
        lambda p: p.set_kv_buffer(2, loc, *rows),
        lambda p: p.set_kv_buffer(3, loc, *rows),
        lambda p: p.move_kv_cache(loc, loc + 16),
        lambda p: p.load_cpu_copy(p.get_cpu_copy(loc), loc + 1),
        lambda p: p.with_window(p.window.set_kv_buffer(1, loc, *rows)),
        lambda p: p.with_full(p.full.set_kv_buffer(1, loc, *rows)),
    ):
        consumed, pool = pool, update(pool)
        assert consumed.is_stale
        assert [buffer.unsafe_buffer_pointer() for buffer in pool.buffers] == pointers


def check_compiled(compiled, pool_bytes):
    report = inspect_compiled(compiled)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool_bytes
    assert not COLLECTIVE.search(compiled.as_text() or "")


@pytest.mark.h200
@BY_KIND
@pytest.mark.parametrize("step", STEPS)
def test_every_shape_of_step_is_in_place_on_an_h200(make_config, step):
    pool, *args = abstract_args(large_config(make_config), "gpu")
    check_compiled(h200.compile_for_h200(step, pool, *args, donate=(0,)), pool.size_bytes)


@pytest.mark.h200
@BY_KIND
@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("step", STEPS)
def test_every_shard_is_in_place_and_stays_where_it_is(make_config, shards, step):
    sizes = {"axis_name": "tp", "shards": shards} | ({"head_num": 8} if make_config is mha_config else {})
    config, mesh = large_config(make_config, **sizes), h200.h200_mesh(shards, "tp")
    pool, *args = abstract_args(config, "gpu", mesh)
    sharded_step = on_mesh(step, config, mesh, pool.partition_specs())
    compiled = h200.compile_for_h200(sharded_step, pool, *args, donate=(0,), mesh=mesh)
    map_bytes = pool.full_to_window.size * 4
    sides_bytes = (pool.size_bytes - map_bytes) // (shards if make_config is mha_config else 1)
    check_compiled(compiled, sides_bytes + map_bytes)
