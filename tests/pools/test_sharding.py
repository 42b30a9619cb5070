"""Pools over 1, 2 and 8 devices: the same bits as on one, in the same memory, and refused outside their shard_map."""

from __future__ import annotations

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError, BorrowedError, ShardingError, StalePoolError
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pools.mha import HeadsConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from tests.pools.numpy_pool import NumpyPool, bits, make_pool, mha_config, mla_config, page_major, random_rows
from tests.pools.steps import BY_KIND, KINDS, OPS, SHAPES, SIZES, abstract_args, as_tuple, on_mesh, row_specs, set_layer
from tests.support.meshes import expect, make_mesh, place, pointers

BY_SHARDS = pytest.mark.parametrize("shards", [1, 2, 8])
BY_KIND_AND_SHARDS = pytest.mark.parametrize(
    ("kind", "make_config", "shards"),
    [
        pytest.param(*kind.values, shards, id=f"{kind.id}-{shards}")
        for kind, shards in [*product(KINDS[:2], (1, 2, 8)), *product(KINDS[2:], (8,))]  # 8: one head a device
    ],
)
EVERYWHERE = PartitionSpec()


def sharded(make_config, dtype, shards, **sizes):
    sizes = {"head_num": 8} | sizes if isinstance(make_config(), HeadsConfig) else sizes
    return make_config(dtype, axis_name="tp", shards=shards, **sizes)


def shard_map(step, pool, *specs, out=None):
    """`step` over the mesh of a pool, jitted with the pool donated."""
    pool_specs = pool.partition_specs()
    out = pool_specs if out is None else out
    return donating(jax.shard_map(step, mesh=pool.mesh, in_specs=(pool_specs, *specs), out_specs=out, check_vma=False))


def filled(config, mesh, seed=0):
    """A sharded pool and its oracle with the same random rows in every usable slot."""
    pool, oracle, rng = config.pool_type.create(config, mesh=mesh), NumpyPool(config), np.random.default_rng(seed)
    slots = np.arange(1, config.rows, dtype=np.int32)
    rows = [random_rows(rng, config.dtype, (config.layer_num, len(slots), *row)) for row in config.row_shapes]
    for layer in range(config.layer_num):
        oracle.write(layer, slots, [array[layer] for array in rows])
    every = row_specs(config)[1]
    fill = shard_map(lambda p, loc, rows: p.set_all_layers(loc, *rows), pool, EVERYWHERE, every)
    return fill(pool, slots, place(pool, rows, every)), oracle


def config_of_one(config):
    return dataclasses.replace(config, axis_name=None, shards=1)


@BY_KIND_AND_SHARDS
@pytest.mark.parametrize(
    ("axis_type", "dtype"),
    [(AxisType.Auto, jnp.bfloat16), (AxisType.Explicit, jnp.float8_e4m3fn)],
    ids=["auto-bfloat16", "explicit-float8"],
)
def test_every_op_gives_the_bits_of_one_device(kind, make_config, shards, axis_type, dtype):
    config = sharded(make_config, dtype, shards, start_layer=3)
    pool, oracle = filled(config, make_mesh(shards, axis_type=axis_type))
    expect(pool, oracle)
    before, (one, every) = pointers(pool), row_specs(config)
    rng = np.random.default_rng(1)
    for layer, loc in ((4, [5, 0, 27, 4]), (jnp.int32(3), [9, 10, 28, -1])):
        loc = np.array(loc, np.int32)
        rows = tuple(random_rows(rng, config.dtype, (4, *row)) for row in config.row_shapes)
        write = shard_map(lambda p, layer, loc, rows: set_layer(p, layer, loc, rows), pool, EVERYWHERE, EVERYWHERE, one)
        pool = write(pool, layer, loc, place(pool, rows, one))
        oracle.write(int(layer) - 3, loc, rows)
    move = shard_map(lambda p, tgt, src: p.move_kv_cache(tgt, src), pool, EVERYWHERE, EVERYWHERE)
    pool = move(pool, np.array([4, 5, 6, 0], np.int32), np.array([5, 6, 4, 9], np.int32))
    oracle.move([4, 5, 6, 0], [5, 6, 4, 9])
    pool = pool.load_cpu_copy(pool.get_cpu_copy([7, 8, 9]), [8, 20, 7])
    oracle.move([8, 20, 7], [7, 8, 9])
    expect(pool, oracle)
    assert pointers(pool) == before

    loc = np.array([27, 4, 4, 0], np.int32)
    gather = jax.shard_map(
        lambda p, loc: (as_tuple(p.gather(loc)), as_tuple(p.gather(loc, layer=4)), p.get_kv_buffer(5)),
        mesh=pool.mesh,
        in_specs=(pool.partition_specs(), EVERYWHERE),
        out_specs=(every, one, one),
        check_vma=False,
    )
    everything, layer, (k, v) = jax.jit(gather)(pool, loc)
    for mine, rows, row in zip(oracle.arrays, everything, layer, strict=True):
        np.testing.assert_array_equal(bits(rows), bits(mine[:, loc]))
        np.testing.assert_array_equal(bits(row), bits(mine[1, loc]))
    np.testing.assert_array_equal(bits(k), bits(oracle.arrays[0][2]))
    expected_v = oracle.arrays[0][2][:, :12] if kind is MLATokenToKVPool else oracle.arrays[1][2]
    np.testing.assert_array_equal(bits(v), bits(expected_v))


@BY_SHARDS
def test_scales_per_head_are_cut_like_the_heads(shards):
    config = sharded(mha_config, jnp.float8_e4m3fn, shards)
    pool, rng = MHATokenToKVPool.create(config, mesh=make_mesh(shards)), np.random.default_rng(2)
    k, v = (rng.standard_normal((2, *row), np.float32) for row in config.row_shapes)
    scale = rng.integers(1, 9, (8, 1)).astype(np.float32)
    heads = PartitionSpec(None, "tp")
    step = shard_map(
        lambda p, k, v, scale: p.set_kv_buffer(1, [4, 5], k, v, scale, 0.5), pool, heads, heads, PartitionSpec("tp")
    )
    single = make_pool(config_of_one(config)).set_kv_buffer(1, [4, 5], k, v, scale, 0.5)
    for many, one in zip(step(pool, k, v, scale).buffers, single.buffers, strict=True):
        np.testing.assert_array_equal(bits(many), bits(one))


@BY_KIND_AND_SHARDS
@pytest.mark.parametrize("step", [*OPS, *SHAPES])
def test_every_shape_of_step_is_in_place_on_every_device(kind, make_config, shards, step):
    config = sharded(make_config, jnp.bfloat16, shards, **SIZES)
    mesh = make_mesh(shards)
    pool, *args = abstract_args(kind, config, "cpu", mesh)
    report = prove_in_place(donating(on_mesh(step, config, mesh, pool.partition_specs())), pool, *args)
    assert report.ok, report.why
    cut = 1 if kind is MLATokenToKVPool else shards
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes // cut


@BY_KIND
def test_the_axis_may_be_one_of_several(kind, make_config):
    config = sharded(make_config, jnp.bfloat16, 4)
    pool, oracle = filled(config, make_mesh(4, ("dp", 2)))
    assert len(pool.buffers[0].addressable_shards) == 8
    expect(pool, oracle)
    pool = pool.load_cpu_copy(pool.get_cpu_copy([7, 8]), [8, 9])
    oracle.move([8, 9], [7, 8])
    expect(pool, oracle)


@BY_KIND
def test_host_copies_pass_between_pools_sharded_differently(kind, make_config):
    pools = {n: filled(sharded(make_config, jnp.bfloat16, n), make_mesh(n), seed=n) for n in (2, 8)}
    copies = {n: pool.get_cpu_copy([5, 6]) for n, (pool, _) in pools.items()}
    for mine, theirs in ((2, 8), (8, 2)):
        pool, oracle = pools[mine]
        for array, other in zip(oracle.arrays, pools[theirs][1].arrays, strict=True):
            array[:, [9, 4]] = other[:, [5, 6]]
        expect(pool.load_cpu_copy(copies[theirs], [9, 4]), oracle)
    single = make_pool(config_of_one(sharded(make_config, jnp.bfloat16, 8)))
    single = single.load_cpu_copy(copies[8], [5, 6])
    for stored, copied in zip(single.get_cpu_copy([5, 6]).buffers, copies[8].buffers, strict=True):
        np.testing.assert_array_equal(bits(stored), bits(copied))


@pytest.mark.parametrize("make_config", [mha_config, page_major(mha_config)])
def test_buffer_infos_locate_every_page_of_a_shard(make_config):
    config = sharded(make_config, jnp.bfloat16, 4, start_layer=2)
    pool, oracle = filled(config, make_mesh(4))
    for info in pool.get_contiguous_buf_infos():
        layers = [layer - 2 for layer in info.layer_ids]
        array = oracle.arrays["kv".index(info.name)][layers, 4:8]
        for device, shard in enumerate(getattr(pool, info.name).addressable_shards):
            page = np.asarray(shard.data).tobytes()[info.offset_bytes + info.page_bytes :][: info.page_bytes]
            assert page == array[:, :, 2 * device : 2 * device + 2].tobytes()
            assert info.size_bytes == shard.data.nbytes // (3 // len(layers))


def rows_of(config, n=1):
    rng = np.random.default_rng(3)
    return [random_rows(rng, config.dtype, (n, *row)) for row in config.row_shapes]


OUTSIDE = [
    lambda p, k, loc: set_layer(p, 0, loc, k),
    lambda p, k, loc: p.set_all_layers(loc, *(jnp.stack([row] * 3) for row in k)),
    lambda p, k, loc: p.move_kv_cache(loc, loc),
    lambda p, k, loc: p.gather(loc),
    lambda p, k, loc: p.gather(loc, layer=0),
    lambda p, k, loc: p.get_key_buffer(0),
    lambda p, k, loc: p.get_value_buffer(0),
]


@pytest.mark.parametrize(("kind", "make_config"), KINDS[1:3])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("call", OUTSIDE)
@pytest.mark.parametrize(
    "context",
    [
        lambda step: step,
        lambda step: jax.jit(step),
        lambda step: donating(step),
        lambda step: jax.jit(lambda p, k, loc: jax.lax.scan(lambda c, _: (c, step(p, k, loc)), 0, None, length=1)),
        lambda step: jax.vmap(step, in_axes=None, out_axes=None, axis_name="tp", axis_size=2),
    ],
    ids=["eager", "jit", "donating", "scan", "vmap"],
)
def test_outside_shard_map_every_op_is_refused_and_the_pool_lives_on(kind, make_config, shards, call, context):
    config = sharded(make_config, np.float32, shards)
    pool, loc = kind.create(config, mesh=make_mesh(shards)), jnp.array([4], jnp.int32)
    for _ in range(2):  # a refusal is not cached away
        with pytest.raises(ShardingError, match=r"axis 'tp', which is not bound here.*call it inside jax\.shard_map"):
            context(call)(pool, rows_of(config), loc)
    assert not pool.is_stale
    expect(pool, NumpyPool(config))


@BY_KIND
def test_another_axis_another_mesh_and_other_specs_are_refused(kind, make_config):
    config = sharded(make_config, np.float32, 2)
    pool, rows = kind.create(config, mesh=make_mesh(2)), rows_of(config)

    def step_on(mesh, specs):
        step = lambda p, rows: set_layer(p, 0, [4], rows)  # noqa: E731
        return jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(specs, EVERYWHERE), out_specs=specs, check_vma=False)
        ).trace

    other_name = Mesh(np.array(jax.devices("cpu")[:2]), ("model",))
    abstract = jax.eval_shape(lambda: pool)
    with pytest.raises(ShardingError, match="axis 'tp', which is not bound"):
        step_on(other_name, EVERYWHERE)(abstract, rows)
    with pytest.raises(ShardingError, match=r"has 2 shards, but mesh axis 'tp' has size 4 here"):
        step_on(make_mesh(4), pool.partition_specs())(abstract, rows)
    wrong = PartitionSpec(None, "tp") if kind is MLATokenToKVPool else EVERYWHERE
    with pytest.raises(ShardingError, match=r"a shard of the pool must have shape \((3, 28|1, 84),"):
        step_on(make_mesh(2), wrong)(abstract, rows)


@BY_KIND
def test_host_copies_are_refused_inside_shard_map(kind, make_config):
    config = sharded(make_config, np.float32, 2)
    pool = kind.create(config, mesh=make_mesh(2))
    copy = pool.get_cpu_copy([4])
    for step in (lambda p: p.load_cpu_copy(copy, [5]), lambda p: p.get_cpu_copy([4])):
        with pytest.raises(ShardingError, match=r"being traced.*call this outside jit"):
            shard_map(step, pool)(pool)


@BY_KIND
def test_a_pool_off_its_mesh_is_refused(kind, make_config):
    config = sharded(make_config, np.float32, 2)
    pool = jax.device_put(kind.create(config, mesh=make_mesh(2)), jax.devices("cpu")[0])
    with pytest.raises(ShardingError, match="must lie on a mesh with axis 'tp' of size 2"):
        pool.get_cpu_copy([4])


@BY_KIND
def test_stale_and_borrowed_pools_are_refused_on_a_mesh_too(kind, make_config):
    config = sharded(make_config, np.float32, 2)
    pool = kind.create(config, mesh=make_mesh(2))
    move = shard_map(lambda p: p.move_kv_cache([4], [5]), pool)
    new = move(pool)
    with pytest.raises(StalePoolError):
        move(pool)
    new.mark_borrowed()
    for call in (move, lambda p: p.load_cpu_copy(p.get_cpu_copy([4]), [5])):
        with pytest.raises(BorrowedError):
            call(new)
    assert not new.is_stale


def test_partition_specs_have_the_structure_of_the_pool():
    for kind, make_config in (param.values for param in KINDS):
        pool = kind.create(sharded(make_config, np.float32, 2), mesh=make_mesh(2))
        assert jax.tree.structure(pool.partition_specs()) == jax.tree.structure(pool)
        for spec, buffer in zip(pool.partition_specs().buffers, pool.buffers, strict=True):
            assert buffer.sharding == NamedSharding(pool.mesh, spec)
    assert make_pool(mha_config()).mesh is None
    assert set(jax.tree.leaves(make_pool(mla_config()).partition_specs())) == {EVERYWHERE}


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        (
            {},
            {"axis_name": "tp", "shards": 2},
            "mesh must be a mesh with axis 'tp' of size config.shards = 2; got None",
        ),
        ({"mesh": 4}, {"axis_name": "tp", "shards": 2}, "mesh must be a mesh with axis 'tp' of size config.shards = 2"),
        ({"mesh": 2}, {"axis_name": "dp", "shards": 2}, "mesh must be a mesh with axis 'dp'"),
        ({"mesh": 2}, {}, "mesh must be None for a pool whose config.axis_name is None"),
        ({"device": 2}, {}, "device must be one device; for several, pass mesh"),
        ({"device": 2, "mesh": 2}, {"axis_name": "tp", "shards": 2}, "device must be None for a pool on a mesh"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(arguments, sizes, message):
    arguments = {name: make_mesh(n) for name, n in arguments.items()}
    if "device" in arguments:
        arguments["device"] = NamedSharding(arguments["device"], EVERYWHERE)
    with pytest.raises(ArgumentError, match=message):
        MHATokenToKVPool.create(mha_config(**sizes), **arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shards": 2}, "shards must be 1 without an axis_name"),
        ({"axis_name": "tp", "shards": 0}, "shards must be positive"),
        ({"axis_name": "tp", "shards": 4}, "head_num must be a multiple of shards = 4: repeat the heads"),
    ],
)
def test_shards_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ArgumentError, match=message):
        mha_config(**sizes)
