"""Every op on states, alone and in the shapes of a hybrid model's step, updates the pool in place.

The pools have no memory: a step is compiled, never run. On a GPU the same tests prove the GPU's program.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcache.device.donation import donating
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.mamba import MambaPool
from tests.pools.state_steps import BATCH, DTYPES, STEPS, abstract_args, config_of, copy, on_mesh
from tests.support.meshes import make_mesh


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_step_is_in_place_for_every_dtype(dtypes, step):
    pool, *args = abstract_args(config_of(dtypes), jax.default_backend())
    report = prove_in_place(donating(step), pool, *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


def test_copying_takes_memory_for_one_state_however_many_there_are():
    config = config_of()
    pool, *args = abstract_args(config, jax.default_backend())
    report = prove_in_place(donating(copy), pool, *args)
    assert report.temp_bytes < 1.5 * config.state_bytes
    assert BATCH > 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shards", [1, 8])
def test_every_step_is_in_place_on_every_device(shards, step):
    config, mesh = config_of(axis_name="tp", shards=shards), make_mesh(shards)
    pool, *args = abstract_args(config, "cpu", mesh)
    report = prove_in_place(donating(on_mesh(step, config, mesh, pool.partition_specs())), pool, *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes // shards


def test_methods_called_outside_a_jit_keep_the_memory():
    pool = MambaPool.create(config_of())
    pointers = [buffer.unsafe_buffer_pointer() for buffer in pool.buffers]
    parts = [np.ones((2, *shape), np.float32) for shape in pool.config.row_shapes]
    for update in (
        lambda p: p.write([1, 2], 3, *parts),
        lambda p: p.copy_states([1, 2], [2, 3]),
        lambda p: p.reset_states([1, 2]),
        lambda p: p.load_cpu_copy(p.get_cpu_copy([1, 2]), [4, 5]),
    ):
        consumed, pool = pool, update(pool)
        assert consumed.is_stale
        assert [buffer.unsafe_buffer_pointer() for buffer in pool.buffers] == pointers
