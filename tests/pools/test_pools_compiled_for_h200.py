"""Every shape of a model's step, compiled for 1, 2 and 8 H200s where there is none: in place, and nothing gathered."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jaxcache.kernels.in_place import inspect_compiled
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from tests.kernels import h200
from tests.pools.numpy_pool import DTYPES, mha_config
from tests.pools.steps import BY_KIND, OPS, SHAPES, SIZES, abstract_args, on_mesh, pool_a_layer

pytestmark = pytest.mark.h200
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")


def check(compiled: jax.stages.Compiled, pool_bytes: int) -> None:
    report = inspect_compiled(compiled)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool_bytes
    assert not COLLECTIVE.search(compiled.as_text() or "")


@BY_KIND
@pytest.mark.parametrize("step", [*OPS, *SHAPES])
def test_every_shape_of_step_is_in_place(kind, make_config, step):
    pool, *args = abstract_args(kind, make_config(jnp.bfloat16, **SIZES), "gpu")
    check(h200.compile_for_h200(step, pool, *args, donate=(0,)), pool.size_bytes)


@BY_KIND
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != jnp.bfloat16], ids=str)
def test_every_dtype_is_in_place(kind, make_config, dtype):
    pool, *args = abstract_args(kind, make_config(dtype, **SIZES), "gpu")

    def every_op(pool, *args):
        for op in OPS:
            pool = op(pool, *args)
        return pool

    check(h200.compile_for_h200(every_op, pool, *args, donate=(0,)), pool.size_bytes)


@BY_KIND
def test_a_list_of_pools_is_in_place(kind, make_config):
    pool, *args = abstract_args(kind, make_config(jnp.bfloat16, **SIZES | {"layer_num": 1}), "gpu")
    check(h200.compile_for_h200(pool_a_layer, [pool] * 3, *args, donate=(0,)), 3 * pool.size_bytes)


@BY_KIND
@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("step", [*OPS, *SHAPES])
def test_every_shard_is_in_place_and_stays_where_it_is(kind, make_config, shards, step):
    sizes = SIZES | {"axis_name": "tp", "shards": shards} | ({} if kind is MLATokenToKVPool else {"head_num": 8})
    config, mesh = make_config(jnp.bfloat16, **sizes), h200.h200_mesh(shards, "tp")
    pool, *args = abstract_args(kind, config, "gpu", mesh)
    sharded_step = on_mesh(step, config, mesh, pool.partition_specs())
    compiled = h200.compile_for_h200(sharded_step, pool, *args, donate=(0,), mesh=mesh)
    check(compiled, pool.size_bytes // (1 if kind is MLATokenToKVPool else shards))


def test_a_sharded_pool_under_a_plain_jit_would_be_gathered_whole():
    """What the ops refuse, done behind their back: it must be seen here, or the test above sees nothing."""
    sizes = SIZES | {"axis_name": "tp", "shards": 8, "head_num": 8}
    mesh = h200.h200_mesh(8, "tp")
    pool, loc, rows, _ = abstract_args(MHATokenToKVPool, mha_config(jnp.bfloat16, **sizes), "gpu", mesh)

    def step(k_pool, v_pool, loc, k, v):
        from jaxcache.kernels.write_kv import write_kv

        return write_kv(k_pool, v_pool, 0, loc, k, v)

    compiled = h200.compile_for_h200(step, *pool.buffers, loc, *rows, donate=(0, 1), mesh=mesh)
    assert COLLECTIVE.search(compiled.as_text() or "")
