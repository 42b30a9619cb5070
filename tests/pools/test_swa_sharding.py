"""The two-sided pool over 2 and 8 devices: the same bits as on one, in the same memory, refused outside shard_map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError, BorrowedError, ShardingError, StalePoolError
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.swa import SWAKVPool
from tests.pools.numpy_pool import bits, mha_config, random_rows
from tests.pools.steps import as_tuple, row_specs
from tests.pools.swa_steps import (
    MAKE_CONFIGS,
    STEPS,
    NumpySWAPool,
    abstract_args,
    large_config,
    on_mesh,
    scan_over_both_sides,
    swa_config,
)
from tests.support.meshes import expect, make_mesh, place, pointers

pytestmark = pytest.mark.usefixtures("on_cpu")

BY_KIND = pytest.mark.parametrize("make_config", MAKE_CONFIGS)
BY_SHARDS = pytest.mark.parametrize("shards", [2, 8])
EVERYWHERE = PartitionSpec()
WINDOWS = {1: 2, 3: 1, 4: 4}


def on(shards, make_config, **sizes):
    return sizes | {"axis_name": "tp", "shards": shards} | ({"head_num": 8} if make_config is mha_config else {})


def sharded_pool(make_config, shards, axis_type=AxisType.Auto):
    """A pool whose map was patched outside any shard_map, and its oracle."""
    config = swa_config(make_config, jnp.bfloat16, {"size": 16}, **on(shards, make_config))
    pool, oracle = SWAKVPool.create(config, mesh=make_mesh(shards, axis_type=axis_type)), NumpySWAPool(config)
    oracle.window_of = dict(WINDOWS)
    index, page = np.array(list(WINDOWS), np.int32), np.array(list(WINDOWS.values()), np.int32)
    return pool.with_window_map(index, page), oracle


def expect_everywhere(pool, oracle):
    expect(pool.full, oracle.full)
    expect(pool.window, oracle.window)
    expected = [oracle.window_of.get(page, 0) for page in range(7)]
    for shard in pool.full_to_window.addressable_shards:
        assert jnp.copy(shard.data).tolist() == expected  # a view would keep the next patch from its memory


def in_shard_map(step, pool, *specs, out=None):
    pool_specs = pool.partition_specs()
    out = pool_specs if out is None else out
    mapped = jax.shard_map(step, mesh=pool.mesh, in_specs=(pool_specs, *specs), out_specs=out, check_vma=False)
    return donating(mapped) if out is pool_specs else jax.jit(mapped)


@BY_KIND
@BY_SHARDS
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_every_op_gives_the_bits_of_one_device(make_config, shards, axis_type):
    pool, oracle = sharded_pool(make_config, shards, axis_type)
    before, (one, _) = pointers(pool), row_specs(oracle.config.full)
    rng = np.random.default_rng(1)
    loc = np.array([5, 0, 27, 13, 8], np.int32)
    for layer in range(5):
        rows = tuple(random_rows(rng, oracle.config.full.dtype, (5, *row)) for row in oracle.config.full.row_shapes)
        write = in_shard_map(lambda p, loc, rows, i=layer: p.set_kv_buffer(i, loc, *rows), pool, EVERYWHERE, one)
        pool = write(pool, loc, place(pool, rows, one))
        oracle.write(layer, loc, rows)
    expect_everywhere(pool, oracle)
    move = in_shard_map(lambda p, tgt, src: p.move_kv_cache(tgt, src), pool, EVERYWHERE, EVERYWHERE)
    pool = move(pool, np.array([4, 5, 8, 0], np.int32), np.array([5, 13, 5, 9], np.int32))
    oracle.move([4, 5, 8, 0], [5, 13, 5, 9])
    pool = pool.load_cpu_copy(pool.get_cpu_copy([4, 8, 13]), [16, 5, 9])
    oracle.reload([4, 8, 13], [16, 5, 9])
    patch = in_shard_map(lambda p, index, page: p.with_window_map(index, page), pool, EVERYWHERE, EVERYWHERE)
    pool = patch(pool, np.array([2, 1, 99], np.int32), np.array([3, 0, 1], np.int32))
    oracle.window_of = {2: 3, 3: 1, 4: 4}
    expect_everywhere(pool, oracle)
    assert pointers(pool) == before

    slots = np.arange(28, dtype=np.int32)
    assert pool.translate_loc_from_full_to_swa(slots).tolist() == oracle.translate(slots.tolist())
    for layer in (2, 3):
        gather = in_shard_map(lambda p, loc, i=layer: as_tuple(p.gather(loc, i)), pool, EVERYWHERE, out=one)
        for mine, theirs in zip(gather(pool, slots), oracle.read(layer, slots), strict=True):
            np.testing.assert_array_equal(bits(mine), bits(theirs))


@BY_KIND
@pytest.mark.parametrize("step", STEPS)
def test_every_shape_of_step_is_in_place_on_every_device(make_config, step):
    config, mesh = large_config(make_config, **on(8, make_config)), make_mesh(8)
    pool, *args = abstract_args(config, "cpu", mesh)
    report = prove_in_place(donating(on_mesh(step, config, mesh, pool.partition_specs())), pool, *args)
    assert report.ok, report.why
    map_bytes = pool.full_to_window.size * 4
    cut = 8 if make_config is mha_config else 1
    assert sum(buffer.size_bytes for buffer in report.buffers) == (pool.size_bytes - map_bytes) // cut + map_bytes


@BY_KIND
def test_patching_the_map_outside_a_shard_map_is_in_place(make_config):
    config, mesh = large_config(make_config, **on(8, make_config)), make_mesh(8)
    pool, _, _, index, page = abstract_args(config, "cpu", mesh)
    report = prove_in_place(donating(lambda pool, index, page: pool.with_window_map(index, page)), pool, index, page)
    assert report.ok, report.why


@BY_KIND
def test_a_sharded_pool_is_refused_outside_its_shard_map_and_nothing_is_lost(make_config):
    pool, oracle = sharded_pool(make_config, 2)
    rows = [np.ones((1, *row), np.float32) for row in oracle.config.full.row_shapes]
    for use in (
        lambda: pool.set_kv_buffer(0, [4], *rows),
        lambda: pool.set_kv_buffer(1, [4], *rows),
        lambda: pool.gather([4], 0),
        lambda: pool.gather([4], 1),
        lambda: pool.move_kv_cache([4], [5]),
    ):
        with pytest.raises(ShardingError, match="call it inside"):
            use()
    pool.window.mark_borrowed()
    with pytest.raises(BorrowedError):
        pool.load_cpu_copy(pool.get_cpu_copy([4]), [5])
    pool.window.unmark_borrowed()
    expect_everywhere(pool, oracle)


def test_a_step_on_a_mesh_consumes_both_sides():
    config, mesh = large_config(mha_config, **on(2, mha_config)), make_mesh(2)
    pool = SWAKVPool.create(config, mesh=mesh)
    shaped = abstract_args(config, "cpu", mesh)[1:]
    args = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shaped)
    donating(on_mesh(scan_over_both_sides, config, mesh, pool.partition_specs()))(pool, *args)
    assert pool.is_stale
    with pytest.raises(StalePoolError):
        pool.translate_loc_from_full_to_swa([4])


def test_a_mesh_that_does_not_fit_is_refused():
    config = swa_config(**on(2, mha_config))
    for arguments, message in (
        ({"mesh": make_mesh(4)}, "mesh must be a mesh with axis 'tp' of size config.shards = 2"),
        ({}, "mesh must be a mesh"),
        ({"mesh": make_mesh(2), "device": jax.devices()[0]}, "device must be None"),
    ):
        with pytest.raises(ArgumentError, match=message):
            SWAKVPool.create(config, **arguments)
