"""The manager with a pool over two and eight devices: the same life, the same bits, nothing compiled after warm-up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxcache.errors import ShardingError
from jaxcache.kernels.in_place import inspect_compiled
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.request import Request
from jaxcache.steps.batch import unpack
from jaxcache.steps.buckets import Buckets, StepKind
from jaxcache.tables.device_table import RequestTable
from tests.kernels import h200

pytestmark = pytest.mark.usefixtures("on_cpu")

MHA = MHAConfig(size=64, page_size=4, dtype=jnp.bfloat16, layer_num=2, head_num=8, head_dim=4)
BY_PAGE = dataclasses.replace(MHA, layout=Layout.PAGE_MAJOR)
MLA = MLAConfig(size=64, page_size=4, dtype=jnp.bfloat16, layer_num=2, kv_lora_rank=12, qk_rope_head_dim=4)


def step(pool, batch):
    """Rows that tell layer, token, position and head apart; gives back what the last token of each request reads."""
    config = pool.config
    first_head = 0
    if isinstance(config, MHAConfig) and config.axis_name is not None:
        first_head = jax.lax.axis_index(config.axis_name) * (config.head_num // config.shards)
    number = (batch.tokens % 13 + batch.positions).astype(jnp.float32)
    rows = []
    for shape in config.shard_row_shapes:
        within = (jnp.arange(np.prod(shape)).reshape(shape) + first_head * shape[-1]).astype(jnp.float32)
        rows.append(number.reshape(-1, *[1] * len(shape)) + within)
    for layer in range(config.layer_num):
        pool = pool.set_kv_buffer(layer, batch.slots, *(row + 100 * layer for row in rows))
    last = batch.table.slots(batch.row, jnp.maximum(batch.seq_len - 1, 0), config.page_size)
    return pool, pool.gather(last)


def manager_on(kv, shards: int, axis_type: AxisType = AxisType.Auto) -> tuple[MemoryManager, object]:
    """A manager, and the step for its pool."""
    if not shards:
        return init_memory_pool_and_cache(MemoryConfig(kv, max_running=4, max_context_len=32, chunk=16)), step
    mesh = Mesh(np.array(jax.devices("cpu")[:shards]), ("tp",), axis_types=(axis_type,))
    kv = dataclasses.replace(kv, axis_name="tp", shards=shards)
    manager = init_memory_pool_and_cache(MemoryConfig(kv, max_running=4, max_context_len=32, chunk=16), mesh=mesh)
    specs = manager.pool.partition_specs()
    sharded_step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=(specs, kv.partition_spec),
        check_vma=False,
    )
    return manager, sharded_step


def live(manager: MemoryManager, step) -> list:
    """Two requests that share a prefix, one retracted to the host and back; everything the steps returned."""
    first = Request(rid="a", origin_input_ids=list(range(1, 12)))
    second = Request(rid="b", origin_input_ids=[*range(1, 9), 40, 41])
    read = []
    for request in (first, second):
        assert manager.admit(request) is not None
        plan = manager.extend([(request, request.num_tokens - request.kv_len)])
        assert plan is not None
        read.append(manager.run(step, plan))
    manager.retract(first, offload=True)
    for other in range(3):
        second.output_ids.append(50 + other)
        plan = manager.decode([second])
        assert plan is not None
        read.append(manager.run(step, plan))
    manager.cache.evict(64)  # of what the first has not in common with the second, only the copy on the host is left
    assert manager.admit(first) == 10  # two pages shared, two tokens loaded back, one to compute
    plan = manager.extend([(first, first.num_tokens - first.kv_len)])
    assert plan is not None
    read.append(manager.run(step, plan))
    manager.finish(first)
    manager.finish(second)
    manager.check_memory(read_device=True)
    return [np.asarray(rows) for rows in jax.tree.leaves(read)]


@pytest.mark.parametrize(
    ("kv", "shards", "axis_type"),
    [(MHA, 8, AxisType.Auto), (MHA, 2, AxisType.Explicit), (MLA, 2, AxisType.Auto), (BY_PAGE, 8, AxisType.Auto)],
    ids=["mha-8", "mha-2-explicit", "mla-2", "page-major"],
)
def test_a_sharded_manager_lives_as_a_single_one_and_compiles_nothing_late(kv, shards, axis_type):
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    single, single_step = manager_on(kv, 0)
    expected = live(single, single_step)
    manager, sharded_step = manager_on(kv, shards, axis_type)
    manager.warm_up(sharded_step)
    manager.pool = manager.pool.load_cpu_copy(manager.pool.get_cpu_copy([0]), [0])
    memory = [shard.data.unsafe_buffer_pointer() for b in manager.pool.buffers for shard in b.addressable_shards]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        read = live(manager, sharded_step)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert [s.data.unsafe_buffer_pointer() for b in manager.pool.buffers for s in b.addressable_shards] == memory
    for mine, theirs in zip(read, expected, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint16), theirs.view(np.uint16))
    for mine, theirs in zip(manager.pool.buffers, single.pool.buffers, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_a_step_that_forgot_its_shard_map_is_refused_and_nothing_is_lost():
    manager, sharded_step = manager_on(MHA, 2)
    request = Request(rid="a", origin_input_ids=list(range(1, 12)))
    manager.admit(request)
    plan = manager.extend([(request, 11)])
    with pytest.raises(ShardingError, match="call it inside jax"):
        manager.run(lambda pool, batch: (pool, pool.gather(batch.slots)), plan)
    manager.run(sharded_step, plan)
    manager.finish(request)
    manager.check_memory(read_device=True)


@pytest.mark.h200
@pytest.mark.parametrize(("kind", "kv"), [(MHATokenToKVPool, MHA), (MLATokenToKVPool, MLA)], ids=["mha", "mla"])
@pytest.mark.parametrize("step_kind", StepKind)
def test_a_whole_step_compiled_for_two_h200s_is_in_place_and_gathers_nothing(kind, kv, step_kind):
    """The plan is unpacked outside the shard_map, on both devices alike."""
    mesh = h200.h200_mesh(2, "tp")
    kv = dataclasses.replace(kv, size=65_536, axis_name="tp", shards=2)
    pool = kind.abstract(kv, platform="gpu", mesh=mesh)
    table = RequestTable(jax.ShapeDtypeStruct((4, 8), jnp.int32))
    bucket = next(bucket for bucket in reversed(Buckets.default(4, 16, 4).shapes(4)) if bucket.kind is step_kind)
    packed = jax.ShapeDtypeStruct((bucket.packing.size,), jnp.int32)
    specs = pool.partition_specs(), PartitionSpec()
    sharded_step = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(specs[0], kv.partition_spec), check_vma=False
    )

    def whole_step(pool, table, packed):
        batch = unpack(packed, bucket, table, kv.page_size)
        pool, out = sharded_step(pool, batch)
        return pool, batch.table, out

    compiled = h200.compile_for_h200(whole_step, pool, table, packed, donate=(0, 1), mesh=mesh)
    report = inspect_compiled(compiled)
    assert report.ok, report.why
    text = compiled.as_text() or ""
    assert "triton_kernel_call" in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
