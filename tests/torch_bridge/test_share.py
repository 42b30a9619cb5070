"""share: tensors that stay valid while JAX updates the pool in place, and say so when it moved."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bridge_checks
from jaxcache import (
    DeadViewError,
    HybridConfig,
    HybridKVPool,
    MambaConfig,
    MemoryConfig,
    MHATokenToKVPool,
    Request,
    donating,
    init_memory_pool_and_cache,
)
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import DEAD, ON_GPU, bits
from torch_bridge import borrow, share

on_cpu = pytest.mark.skipif(ON_GPU, reason="what JAX does on a CPU")
ROWS = np.ones((1, 2, 8), np.float32), np.ones((1, 2, 4), np.float32)


def mha_pool(dtype=jnp.bfloat16) -> MHATokenToKVPool:
    return MHATokenToKVPool.create(numpy_pool.mha_config(dtype))


@donating
def write(pool, slot, value):
    rows = [jnp.full((1, 2, dim), value) for dim in (8, 4)]
    return pool.set_kv_buffer(1, slot, *rows)


@pytest.mark.parametrize("dtype", numpy_pool.DTYPES, ids=str)
def test_tensors_follow_the_pool_through_donated_steps(dtype):
    rng, config = np.random.default_rng(0), numpy_pool.mha_config(dtype)
    pool, oracle = numpy_pool.filled_pool(config)
    kv = share(pool)
    k, address = kv.k, kv.k.data_ptr()
    for layer in range(3):
        loc = [4 + layer, 20, 9]
        rows = [numpy_pool.random_rows(rng, dtype, (3, *row)) for row in config.row_shapes]
        pool = pool.set_kv_buffer(layer, loc, *rows)
        oracle.write(layer, loc, rows)
        assert kv.pool is pool
        assert k.data_ptr() == pool.k.unsafe_buffer_pointer() == address
        bridge_bits = numpy_pool.bits(np.asarray(oracle.arrays[0][layer, loc]))
        np.testing.assert_array_equal(bits(k[layer, loc]), bridge_bits.view(np.uint8).reshape(-1))


def test_both_sides_write_in_turns():
    kv = share(mha_pool(np.float32))
    write(kv.pool, np.array([4], np.int32), 1.0)
    kv.k[1, 4, 0] += 2
    write(kv.pool, np.array([5], np.int32), 7.0)
    kv.k[1, 5] -= kv.k[1, 4]
    assert kv.pool.gather([4, 5], 1)[0][:, :, 0].tolist() == [[3, 1], [4, 6]]


def test_a_manager_keeps_a_shared_pool():
    memory = init_memory_pool_and_cache(MemoryConfig(numpy_pool.mha_config(), max_running=2, max_context_len=16))
    kv, request = share(memory.pool), Request("a", [1, 2, 3])
    memory.admit(request)

    def step(pool, batch):
        tokens = batch.tokens[:, None, None].astype(jnp.float32)
        rows = [jnp.broadcast_to(tokens, (*batch.tokens.shape, 2, dim)) for dim in (8, 4)]
        return pool.set_kv_buffer(0, batch.slots, *rows), None

    memory.run(step, memory.extend([(request, 3)]))
    assert kv.pool is memory.pool
    assert sorted(kv.k[0, :, 0, 0].unique().tolist()) == [0, 1, 2, 3]


@on_cpu
def test_a_step_that_moves_the_pool_ends_the_view_and_loses_nothing():
    pool = mha_pool(np.float32)
    kv = share(pool)
    k, piece = kv.k, kv.k[0, :2]
    holder = np.asarray(pool.k)  # on a CPU JAX now copies what is donated
    pool = write(pool, np.array([4], np.int32), 1.0)
    assert holder.sum() == 0
    for use in (lambda: kv.k, lambda: k.sum(), lambda: piece.sum(), lambda: kv.pool, lambda: kv.fence()):
        with pytest.raises(DeadViewError, match="step write returned no MHATokenToKVPool in the memory"):
            use()
    assert pool.gather([4], 1)[0].sum() == 16
    assert share(pool).k.sum() == 16


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_step_that_returns_no_pool_ends_the_view():
    kv = share(mha_pool())
    donating(lambda pool: pool.k.sum())(kv.pool)
    with pytest.raises(DeadViewError, match="or did not return it"):
        kv.k.sum()


def test_a_pool_consumed_behind_its_back_ends_the_view():
    kv = share(mha_pool())
    k = kv.k
    jax.jit(lambda pool: jax.tree.map(lambda values: values + 1, pool), donate_argnums=0)(kv.pool)
    for use in (lambda: kv.k, *([] if ON_GPU else [lambda: k.sum()])):  # on a GPU a kept tensor cannot know
        with pytest.raises(DeadViewError, match="a step which was not made by donating"):
            use()


def test_the_pool_among_others_and_anywhere_in_the_result():
    @donating
    def step(pools, by):
        return {"out": by, "pools": [jax.tree.map(lambda values: values + by, pool) for pool in pools]}

    first, second = mha_pool(np.float32), mha_pool(np.float32)
    views = share(first), share(second)
    pools = step([first, second], np.float32(1))["pools"]
    assert views[0].pool is pools[0] and views[1].pool is pools[1]
    assert all(kv.k.data_ptr() == kv.pool.k.unsafe_buffer_pointer() and kv.k.mean() == 1 for kv in views)


def test_a_pool_may_be_shared_twice_and_borrowed_meanwhile():
    pool = mha_pool(np.float32)
    views = [share(pool), share(pool)]
    pool = write(pool, np.array([4], np.int32), 1.0)
    with borrow(pool) as third:
        third.k[1, 4] += 1
        assert [kv.k[1, 4].sum() for kv in views] == [32, 32]
    views[0].close()
    write(pool, np.array([5], np.int32), 1.0)
    assert views[1].k[1, 4:6].sum() == 48
    with pytest.raises(DeadViewError):
        views[0].k.sum()


def test_closing_ends_it_and_steps_go_on():
    pool = mha_pool()
    with share(pool) as kv:
        k = kv.k
    with pytest.raises(DEAD, match="was closed"):
        k.sum()
    pool = write(pool, np.array([4], np.int32), 1.0)
    assert pool.gather([4], 1)[0].sum() == 16


def test_parts_of_a_pool_are_followed_by_themselves():
    states = MambaConfig(
        num_states=3, layer_num=2, conv_shape=(4, 3), temporal_shape=(2, 4, 4), conv_dtype=np.float32,
        temporal_dtype=np.float32,
    )  # fmt: skip
    pool = HybridKVPool.create(HybridConfig(kv=numpy_pool.mha_config(np.float32), states=states))
    kv, mamba = share(pool).parts.values()
    pool = pool.with_kv(pool.kv.set_kv_buffer(0, [4], *ROWS))
    assert kv.k.sum() == 16
    pool = donating(lambda pool: jax.tree.map(lambda values: values + 1, pool))(pool)
    assert kv.pool is pool.kv and mamba.pool is pool.states
    assert kv.k[0, 4].sum() == 32 and mamba.buffers[1].mean() == 1


def test_order_in_both_directions():
    assert len(bridge_checks.check_order()) == 10


def test_alternating_writes_of_both_sides():
    assert bridge_checks.check_alternating(600) == 600


def test_the_memory_lives_as_long_as_a_tensor():
    pool = mha_pool(np.float32)
    kv = share(pool)
    piece = kv.k[1]
    memory = weakref.ref(kv._memory)
    write(kv.pool, np.array([4], np.int32), 3.0)
    del pool, kv
    gc.collect()
    churn = [jnp.ones((3, 28, 2, 8)) for _ in range(20)]
    assert piece.sum() == 3 * 16
    array = piece if ON_GPU else piece.numpy()  # asks nobody, but keeps the memory too
    del churn, piece
    gc.collect()
    assert memory() is not None and float(array.sum()) == 3 * 16
    del array
    gc.collect()
    assert memory() is None
