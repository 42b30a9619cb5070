"""Every shape of a hybrid model's step, compiled for 1, 2 and 8 H200s: in place, and nothing gathered."""

from __future__ import annotations

import jax
import pytest

from tests.kernels import h200
from tests.pools import steps
from tests.pools.numpy_pool import mha_config, mla_config
from tests.pools.state_steps import DTYPES, STEPS, abstract_args, config_of, copy, on_mesh
from tests.pools.test_pools_compiled_for_h200 import check
from tests.support.hybrid_steps import abstract_hybrid, hybrid_step

pytestmark = pytest.mark.h200


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_step_is_in_place_for_every_dtype(dtypes, step):
    pool, *args = abstract_args(config_of(dtypes), "gpu")
    check(h200.compile_for_h200(step, pool, *args, donate=(0,)), pool.size_bytes)


def test_copying_takes_memory_for_one_state_however_many_there_are():
    config = config_of()
    pool, *args = abstract_args(config, "gpu")
    memory = h200.compile_for_h200(copy, pool, *args, donate=(0,)).memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * config.state_bytes


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_every_shard_is_in_place_and_stays_where_it_is(shards, step):
    config, mesh = config_of(axis_name="tp", shards=shards), h200.h200_mesh(shards, "tp")
    pool, *args = abstract_args(config, "gpu", mesh)
    sharded_step = on_mesh(step, config, mesh, pool.partition_specs())
    check(h200.compile_for_h200(sharded_step, pool, *args, donate=(0,), mesh=mesh), pool.size_bytes // shards)


@pytest.mark.parametrize("make_config", [mha_config, mla_config])
def test_a_hybrid_pool_is_in_place_as_a_whole(make_config):
    pool, *args = abstract_hybrid(make_config(jax.numpy.bfloat16, **steps.SIZES), "gpu")
    check(h200.compile_for_h200(hybrid_step, pool, *args, donate=(0,)), pool.size_bytes)
