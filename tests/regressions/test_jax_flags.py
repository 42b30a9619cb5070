"""JAX's own checks of a user's program: implicit transfers and implicit broadcasts are forbidden, ours included.

Decode loops broke under `jax_numpy_rank_promotion="raise"`; copies to the host, gather, moves and whatever was given
NumPy arrays under `jax.transfer_guard("disallow")`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.device.placing import on_device
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pages.graph import state_of
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pools.mamba import MambaConfig, MambaPool
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLATokenToKVPool
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from jaxcache.snapshot.load import load_snapshot, verify_snapshot
from jaxcache.snapshot.save import save_snapshot
from tests.pools.numpy_pool import CONFIGS, NumpyPool, random_rows
from tests.snapshot.caches import assert_same
from tests.support.loop_managers import make_manager
from tests.support.meshes import make_mesh


@pytest.fixture(autouse=True)
def strict():
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("make_config", CONFIGS, ids=lambda make: make.__name__)
def test_every_op_of_a_pool_on_numpy_arrays(make_config):
    config, rng = make_config(), np.random.default_rng(0)
    pool, oracle = config.pool_type.create(config), NumpyPool(config)
    loc = np.array([5, 27, 4])
    rows = [random_rows(rng, config.dtype, (3, *row)) for row in config.row_shapes]
    if isinstance(pool, MLATokenToKVPool):
        rank = config.kv_lora_rank
        pool = pool.set_mla_kv_buffer(1, loc, rows[0][..., :rank], rows[0][..., rank:])
    else:
        pool = pool.set_kv_buffer(1, loc, *rows)
    oracle.write(1, loc, rows)
    pool = pool.move_kv_cache(np.array([8, 9]), [27, 5])
    oracle.arrays = tuple(_moved(array, [8, 9], [27, 5]) for array in oracle.arrays)
    everything = [random_rows(rng, config.dtype, (3, 2, *row)) for row in config.row_shapes]
    pool = pool.set_all_layers([10, 11], *everything)
    for layer in range(3):
        oracle.write(layer, [10, 11], [array[layer] for array in everything])
    pool = pool.load_cpu_copy(pool.get_cpu_copy([4, 5]), [20, 21])
    oracle.arrays = tuple(_moved(array, [20, 21], [4, 5]) for array in oracle.arrays)
    gathered = pool.gather(np.array([8, 9, 20]))
    gathered = gathered if isinstance(gathered, tuple) else (gathered,)
    for got, expected in zip(gathered, oracle.arrays, strict=True):
        np.testing.assert_array_equal(jax.device_get(got), np.asarray(expected)[:, [8, 9, 20]])
    oracle.expect(pool)
    pool.gather([1], 2)


def _moved(array, to, source):
    array = np.array(array)
    array[:, to] = array[:, source]
    return array


def test_every_op_of_a_pool_of_states():
    config = MambaConfig(
        num_states=6,
        layer_num=2,
        conv_shape=(3, 2),
        temporal_shape=(2, 4),
        conv_dtype="float32",
        temporal_dtype="float32",
    )
    pool = MambaPool.create(config)
    parts = np.ones((2, 3, 2), np.float32), np.full((2, 2, 4), 2, np.float32)
    pool = pool.write([1, 2], 1, *parts)
    pool = pool.copy_states([1], [4])
    pool = pool.reset_states([2])
    conv, temporal = pool.read([1, 2, 4], 1)
    assert jax.device_get(conv).sum(axis=(1, 2)).tolist() == [6, 0, 6]
    assert jax.device_get(temporal).sum(axis=(1, 2)).tolist() == [16, 0, 16]
    pool.load_cpu_copy(pool.get_cpu_copy([1]), [3])


def loop_of_three(pool, loop):
    def one(carry, _):
        pool, loop = carry
        loop, slots = loop.grow()
        return (pool, loop.accept().stop(jnp.zeros(loop.shape.requests, bool))), slots

    (pool, loop), slots = jax.lax.scan(one, (pool, loop), None, length=3)
    return pool, loop, slots


@pytest.mark.parametrize("flavour", [(False, False), (True, False), (False, True), (True, True)])
def test_the_life_of_a_request(flavour, tmp_path):
    memory = make_manager(4, *flavour)
    memory.warm_up(write_step)
    memory.warm_up_offload()
    memory.warm_up_loop(loop_of_three, 3)
    requests = [Request("r", list(range(30)), tag=1), Request("q", list(range(100, 120)), tag=2)]
    for request in requests:
        assert memory.admit(request) == 0
        _compute(memory, request)
        request.output_ids.append(7)
    memory.run(write_step, memory.decode(requests))
    for request in requests:
        request.output_ids.append(8)
    plan = memory.decode_loop(requests, 3)
    memory.run_loop(loop_of_three, plan)
    replay = plan.replay(jax.device_put(np.ones((3, 2), np.int32)))
    for request in requests:
        request.output_ids.extend([9, 9, 9])
    memory.absorb(replay, read_device=True)
    memory.check_memory(read_device=True)
    memory.retract(requests[0], offload=True)
    assert memory.admit(requests[0])
    _compute(memory, requests[0])
    memory.release_memory(keep=True)
    memory.resume_memory()
    memory.check_memory(read_device=True)
    for request in requests:
        memory.finish(request)
    save_snapshot(tmp_path, memory, model="m")
    verify_snapshot(tmp_path)
    assert_same(load_snapshot(tmp_path, memory.config, model="m"), memory)


def _compute(memory, request):
    while request.kv_len < request.num_tokens:
        memory.run(write_step, memory.extend([(request, memory.next_chunk(request, 32))]))


def test_a_sharded_pool(tmp_path):
    kv = MHAConfig(
        size=64, page_size=4, dtype=jnp.float32, layer_num=2, head_num=4, head_dim=4, axis_name="tp", shards=2
    )
    mesh = make_mesh(2)
    memory = init_memory_pool_and_cache(MemoryConfig(kv, max_running=2, max_context_len=32, chunk=16), mesh=mesh)
    memory.warm_up_offload()
    pool = memory.pool
    pool = pool.load_cpu_copy(pool.get_cpu_copy([4, 5]), [6, 7])
    memory.pool = pool
    save_snapshot(tmp_path, memory, model="m")
    load_snapshot(tmp_path, memory.config, model="m", mesh=mesh)


def test_allocating_in_the_graph():
    allocator = PagedTokenToKVPoolAllocator(64, 4)
    state = jax.jit(lambda state: state.alloc_pages(jnp.int32(2), most=4))(state_of(allocator))[0]
    assert int(jax.device_get(state.count)) == 14


def test_the_torch_bridge():
    torch = pytest.importorskip("torch")
    from torch_bridge import share

    kv = MHAConfig(size=64, page_size=4, dtype=jnp.float32, layer_num=2, head_num=1, head_dim=4)
    pool = kv.pool_type.create(kv)
    shared = share(pool)
    shared.k[0, 5] = 3.0
    pool = shared.pool.set_kv_buffer(1, [6], *np.ones((2, 1, 1, 4), np.float32))
    assert torch.equal(shared.k[1, 6], torch.ones(1, 4))
    rows = pool.gather(torch.tensor([5]).numpy(), 0)[0]
    assert jax.device_get(rows).sum() == 12.0


def test_a_device_never_keeps_the_callers_memory():
    """A CPU device keeps a NumPy array that it is given explicitly: what is written there later would be KV."""
    memory = np.zeros(64 * 100 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    mine = memory[start : start + 6400].view(np.int32)
    array = on_device(mine)
    mine[:] = 7
    assert not jax.device_get(array).any()
