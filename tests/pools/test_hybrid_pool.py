"""A KV pool and a pool of states as one: donated together, copied to the host together, refused together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError, BorrowedError, ShardingError, StalePoolError
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.hybrid import HybridConfig, HybridKVPool
from jaxcache.pools.mamba import MambaPool
from tests.pools import steps
from tests.pools.numpy_pool import bits, filled_pool, mha_config, mla_config, random_rows
from tests.pools.numpy_states import filled_states, mamba_config, random_parts
from tests.pools.swa_steps import swa_config
from tests.support.hybrid_steps import abstract_hybrid, hybrid_step
from tests.support.meshes import make_mesh

BY_KIND = pytest.mark.parametrize("make_config", [mha_config, mla_config])


def filled(make_config=mha_config):
    kv, kv_oracle = filled_pool(make_config())
    states, state_oracle = filled_states(mamba_config())
    return HybridKVPool(kv, states), kv_oracle, state_oracle


@BY_KIND
def test_both_parts_are_donated_and_updated_in_place(make_config):
    pool, *args = abstract_hybrid(make_config(jnp.bfloat16, **steps.SIZES), jax.default_backend())
    report = prove_in_place(donating(hybrid_step), pool, *args)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


@BY_KIND
def test_a_step_updates_both_parts_and_consumes_the_pool(make_config):
    pool, kv_oracle, state_oracle = filled(make_config)
    rows = [random_rows(np.random.default_rng(1), kv_oracle.config.dtype, (1, *r)) for r in pool.kv.config.row_shapes]
    parts = random_parts(np.random.default_rng(2), pool.states.config, 1)

    @donating
    def step(pool):
        pool = pool.with_kv(steps.set_layer(pool.kv, 1, jnp.array([9], jnp.int32), rows))
        return pool.with_states(pool.states.write(jnp.array([4], jnp.int32), 2, *parts))

    new = step(pool)
    assert pool.is_stale
    assert pool.kv.is_stale
    assert pool.states.is_stale
    kv_oracle.write(1, [9], rows)
    state_oracle.write([4], 2, parts)
    kv_oracle.expect(new.kv)
    state_oracle.expect(new.states)


def test_it_is_made_and_described_as_a_whole():
    config = HybridConfig(kv=mla_config(jnp.bfloat16), states=mamba_config())
    pool = config.pool_type.create(config)
    assert pool.config == config
    assert pool.mesh is None
    assert pool.buffers == (*pool.kv.buffers, *pool.states.buffers)
    assert pool.size_bytes == pool.kv.size_bytes + pool.states.size_bytes
    assert jax.tree.structure(pool.partition_specs()) == jax.tree.structure(pool)
    assert type(pool.kv) is config.kv.pool_type
    on_second = HybridKVPool.create(config, device=jax.devices("cpu")[1])
    assert {b.devices().pop() for b in on_second.buffers} == {jax.devices("cpu")[1]}


def test_buffer_infos_are_those_of_both_parts():
    pool, *_ = filled()
    infos = pool.get_contiguous_buf_infos()
    assert {info.name for info in infos} == {"kv.k", "kv.v", "states.conv", "states.temporal"}
    assert sum(info.size_bytes for info in infos) == pool.size_bytes
    assert pool.get_kv_size_bytes() == pool.kv.get_kv_size_bytes() == (pool.kv.k.nbytes, pool.kv.v.nbytes)


def test_updating_a_part_outside_a_jit_consumes_the_whole():
    pool, _, state_oracle = filled()
    new = pool.with_states(pool.states.reset_states([3]))
    state_oracle.copy([0], [3])
    state_oracle.expect(new.states)
    with pytest.raises(StalePoolError, match="HybridKVPool was consumed"):
        pool.require_live()


def test_a_host_copy_holds_tokens_and_states():
    pool, kv_oracle, state_oracle = filled()
    copy = pool.get_cpu_copy([5, 6, 7], states=[2])
    assert copy.num_tokens == 3
    assert copy.states.num_tokens == 1
    pool = pool.load_cpu_copy(copy, [9, 10, 11], states=[4])
    kv_oracle.move([9, 10, 11], [5, 6, 7])
    state_oracle.copy([2], [4])
    only_tokens = pool.load_cpu_copy(pool.get_cpu_copy([5]), [6])
    kv_oracle.move([6], [5])
    kv_oracle.expect(only_tokens.kv)
    state_oracle.expect(only_tokens.states)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda p, c: p.load_cpu_copy(c, [9], states=[4]), "indices must name 2 slots"),
        (lambda p, c: p.load_cpu_copy(c, [9, 10]), "indices must name 1 slots"),
        (lambda p, c: p.load_cpu_copy(c, [9, 10], states=[99]), r"indices\[0\] must be a slot in \[0, 10\)"),
        (lambda p, c: p.load_cpu_copy(c.kv, [9, 10]), "copy must be what get_cpu_copy returned; got CpuCopy"),
    ],
)
def test_a_refused_load_changes_neither_part(load, message):
    pool, kv_oracle, state_oracle = filled()
    copy = pool.get_cpu_copy([5, 6], states=[2])
    with pytest.raises(ArgumentError, match=message):
        load(pool, copy)
    kv_oracle.expect(pool.kv)
    state_oracle.expect(pool.states)


@pytest.mark.parametrize("borrowed", [lambda p: p, lambda p: p.kv, lambda p: p.states])
def test_a_borrow_of_the_whole_or_of_a_part_forbids_donating_the_whole(borrowed):
    pool, kv_oracle, state_oracle = filled()
    copy = pool.get_cpu_copy([5], states=[2])
    borrowed(pool).mark_borrowed()
    with pytest.raises(BorrowedError):
        donating(lambda pool: pool)(pool)
    with pytest.raises(BorrowedError):
        pool.load_cpu_copy(copy, [5], states=[2])
    kv_oracle.expect(pool.kv)
    state_oracle.expect(pool.states)
    borrowed(pool).unmark_borrowed()
    assert donating(lambda pool: pool)(pool).borrow_count == 0


def test_a_borrow_of_the_whole_forbids_donating_a_part():
    pool, _, _ = filled()
    pool.mark_borrowed()
    with pytest.raises(BorrowedError, match="MambaPool is borrowed"):
        pool.states.reset_states([1])
    pool.states.unmark_borrowed()
    with pytest.raises(BorrowedError, match="not borrowed"):
        pool.unmark_borrowed()
    assert (pool.borrow_count, pool.kv.borrow_count) == (1, 1)


@pytest.mark.parametrize("shards", [1, 2])
def test_on_a_mesh_both_parts_are_cut_and_give_the_bits_of_one_device(shards):
    kv = mha_config(axis_name="tp", shards=shards)
    states = mamba_config(axis_name="tp", shards=shards)
    mesh = make_mesh(shards)
    pool = HybridKVPool.create(HybridConfig(kv=kv, states=states), mesh=mesh)
    assert pool.mesh == mesh
    parts = random_parts(np.random.default_rng(2), states, 2)
    specs = pool.partition_specs()
    cut = PartitionSpec(None, "tp")

    def write(pool, states, parts):
        pool = pool.with_states(pool.states.write(states, 1, *parts).copy_states([3], [4]))
        return pool.with_states(pool.states.copy_states(states, jnp.array([5, 6], jnp.int32), 2).reset_states([7]))

    step = donating(
        jax.shard_map(write, mesh=mesh, in_specs=(specs, PartitionSpec(), cut), out_specs=specs, check_vma=False)
    )
    pool = step(pool, jnp.array([3, 9], jnp.int32), tuple(jax.device_put(p) for p in parts))
    one = MambaPool.create(mamba_config()).write([3, 9], 1, *parts).copy_states([3, 3, 9], [4, 5, 6])
    for mine, theirs in zip(pool.states.buffers, one.buffers, strict=True):
        np.testing.assert_array_equal(bits(mine), bits(theirs))
    pool = pool.load_cpu_copy(pool.get_cpu_copy([4], states=[3]), [5], states=[8])
    np.testing.assert_array_equal(bits(pool.states.temporal), bits(one.copy_states([3], [8]).temporal))
    for call in (lambda p: p.states.reset_states([1]), lambda p: p.states.read([1], 0)):
        with pytest.raises(ShardingError, match="call it inside"):
            call(pool)


TP = {"axis_name": "tp", "shards": 2}


@pytest.mark.parametrize(
    ("kv", "states", "message"),
    [
        (
            mha_config(**TP),
            mamba_config(),
            r"axis_name and shards of kv, \('tp', 2\); got \(None, 1",
        ),
        (mha_config(), mamba_config(**TP), r"states must have the axis_name and shards of kv"),
        (mamba_config(), mamba_config(), "kv must be a KVCacheConfig or SWAConfig; got MambaConfig"),
        (mha_config(), mha_config(), "states must be a MambaConfig; got MHAConfig"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(kv, states, message):
    with pytest.raises(ArgumentError, match=message):
        HybridConfig(kv=kv, states=states)


def test_a_part_of_a_host_copy_keeps_the_states_only_with_the_end():
    pool, kv_oracle, state_oracle = filled()
    copy = pool.get_cpu_copy([5, 6, 7], states=[2])
    with pytest.raises(ArgumentError, match="stop must be 3, where the copied states stand; got 2"):
        copy.tokens(0, 2)
    pool = pool.load_cpu_copy(copy.tokens(1, 3), [9, 10], states=[4])
    kv_oracle.move([9, 10], [6, 7])
    state_oracle.copy([2], [4])
    kv_oracle.expect(pool.kv)
    state_oracle.expect(pool.states)
    assert pool.get_cpu_copy([5, 6, 7]).tokens(0, 2).num_tokens == 2


def test_full_window_and_state_layers_make_one_pool():
    """The window's map goes with the pool; a refused load leaves all three parts as they were."""
    kv = swa_config()
    pool = HybridKVPool.create(HybridConfig(kv=kv, states=mamba_config()))
    pool = pool.with_kv(pool.kv.with_window_map(jnp.array([2, 3], jnp.int32), jnp.array([1, 2], jnp.int32)))
    k, v = (np.ones((2, *row), np.float32) for row in kv.window.row_shapes)
    pool = pool.with_kv(pool.kv.set_kv_buffer(0, np.array([8, 9]), k, v))
    pool = pool.with_states(pool.states.write([2], 0, *random_parts(np.random.default_rng(0), mamba_config(), 1)))
    copy = pool.get_cpu_copy([8, 9], states=[2])
    for wrong in ({"indices": [12, 13], "states": [2, 3]}, {"indices": [12], "states": [3]}):
        with pytest.raises(ArgumentError):
            pool.load_cpu_copy(copy, **wrong)
    pool = pool.load_cpu_copy(copy, [12, 13], states=[3])
    np.testing.assert_array_equal(pool.kv.gather(np.array([12, 13]), 0)[0], k)
    np.testing.assert_array_equal(pool.states.read([3], 0)[1], pool.states.read([2], 0)[1])
    assert pool.size_bytes == pool.kv.size_bytes + pool.states.size_bytes
    assert donating(lambda pool: pool)(pool).config == HybridConfig(kv=kv, states=mamba_config())
