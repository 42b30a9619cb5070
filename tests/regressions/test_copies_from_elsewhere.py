"""Rows of one place were loaded into another: layer 0 where layer 8 comes first, full layers into those of windows.

Whatever leaves a pool says what it is of, and is refused, by the names of both, where it does not fit; nothing changes.
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcache
from jaxcache import Layout
from jaxcache.errors import ArgumentError, CacheError, SnapshotError
from jaxcache.index.key import Namespace
from jaxcache.manager.config import MemoryConfig
from jaxcache.pools.copies import CpuCopy
from jaxcache.pools.hybrid import HybridConfig, HybridKVPool
from jaxcache.pools.mamba import MambaPool
from jaxcache.pools.swa import SWAConfig, SWAKVPool
from jaxcache.request import Request
from tests.model.manager_driver import assert_contents, small_manager, write_step
from tests.pools.numpy_pool import (
    double_sparse_config,
    filled_pool,
    make_pool,
    mha_config,
    mla_config,
    page_major,
)
from tests.pools.numpy_states import filled_states, mamba_config
from tests.pools.swa_steps import swa_config

FOREIGN = [  # here, there, what both are called
    (mha_config(start_layer=8), mha_config(), "start_layer is 8 here and 0 there"),
    (mha_config(), mha_config(start_layer=3), "start_layer is 0 here and 3 there"),
    (mha_config(), mha_config(layer_num=2), "layer_num is 3 here and 2 there"),
    (mha_config(), mha_config(head_num=4, head_dim=4, v_head_dim=2), "head_dim is 8 here and 4 there"),
    (mha_config(jnp.float16), mha_config(jnp.bfloat16), "dtype is 'float16' here and 'bfloat16' there"),
    (mha_config(np.int8), mha_config(np.uint8), "dtype is 'int8' here and 'uint8' there"),
    (mha_config(jnp.float8_e5m2), mha_config(jnp.float8_e4m3fn), "dtype is 'float8_e5m2' here"),
    (mla_config(start_layer=8), mla_config(), "start_layer is 8 here and 0 there"),
    (mla_config(), mla_config(kv_lora_rank=10, qk_rope_head_dim=7), "kv_lora_rank is 12 here and 10 there"),
    (mla_config(), mha_config(), "'MLAConfig' here and 'MHAConfig' there"),
    (double_sparse_config(start_layer=8), double_sparse_config(), "start_layer is 8 here and 0 there"),
    (double_sparse_config(), double_sparse_config(heavy_channel_num=4), "heavy_channel_num is 3 here and 4 there"),
    (double_sparse_config(), mha_config(), "'DoubleSparseConfig' here and 'MHAConfig' there"),
    (page_major(mha_config)(start_layer=8), mha_config(), "start_layer is 8 here and 0 there"),
    (page_major(mla_config)(), page_major(mla_config)(start_layer=1), "start_layer is 0 here and 1 there"),
    (mha_config(global_layers=(0, 2, 4)), mha_config(), r"global_layers is \[0, 2, 4\] here and None there"),
]


@pytest.mark.parametrize(("here", "there", "named"), FOREIGN)
def test_rows_of_another_place_are_refused(here, there, named):
    pool, oracle = filled_pool(here)
    copy = make_pool(there).get_cpu_copy([4, 5])
    part = make_pool(there).start_copy(np.array([4, 5], np.int32))
    for load in (
        lambda: pool.load_cpu_copy(copy, [4, 5]),
        lambda: pool.load_cpu_copy(copy.tokens(1, 2), [4]),
        lambda: pool.placed(part),
        lambda: pool.with_rows(np.array([4, 5], np.int32), part),
    ):
        with pytest.raises(
            ArgumentError, match=f"copy must come from a pool of the same layers, rows and dtype.*{named}"
        ):
            load()
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", [mha_config, mla_config, double_sparse_config])
@pytest.mark.parametrize("sizes", [{"size": 48}, {"page_size": 8}, {"layout": Layout.PAGE_MAJOR}])
def test_where_rows_lie_makes_no_difference(make_config, sizes):
    pool, oracle = filled_pool(make_config(start_layer=8))
    there, _ = filled_pool(make_config(start_layer=8, **sizes), seed=1)
    there = there.load_cpu_copy(pool.get_cpu_copy([5, 6]), [9, 10])
    rows, expected = there.gather([9, 10]), [array[:, [5, 6]] for array in oracle.arrays]
    for mine, theirs in zip(rows if isinstance(rows, tuple) else (rows,), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_keys_and_values_are_no_states():
    """Two parts of the same shapes and dtypes are not of the same kind."""
    states = mamba_config(conv_shape=(2, 8), temporal_shape=(2, 4), conv_dtype="float32")
    pool, oracle = filled_states(states)
    with pytest.raises(ArgumentError, match="'MambaConfig' here and 'MHAConfig' there"):
        pool.load_cpu_copy(make_pool(mha_config()).get_cpu_copy([4]), [1])
    with pytest.raises(ArgumentError, match="start_layer is 0 here and 8 there"):
        pool.load_cpu_copy(
            MambaPool.create(dataclasses.replace(states, start_layer=8, end_layer=None)).get_cpu_copy([1]), [1]
        )
    oracle.expect(pool)


def test_a_copy_is_of_what_it_says():
    rows = tuple(np.zeros((3, 2, *row), np.float32) for row in mha_config().row_shapes)
    assert CpuCopy(mha_config(), rows).num_tokens == 2
    for wrong in (rows[:1], (rows[0], rows[1][:2]), (rows[0], rows[1][:, :1]), tuple(r.astype(np.int8) for r in rows)):
        with pytest.raises(ArgumentError, match="buffers must be"):
            CpuCopy(mha_config(), wrong)


# ---- pools of several parts --------------------------------------------------------------------------------------


def with_layers(full, window) -> SWAConfig:
    return SWAConfig(
        full=mha_config(layer_num=2), window=mha_config(layer_num=2), full_layers=full, window_layers=window
    )


def test_windows_of_other_layers_are_refused():
    """Both sides count their layers from 0: only the whole knows which they are."""
    pool = SWAKVPool.create(with_layers((0, 2), (1, 3)))
    pool = pool.with_window_map(jnp.array([1], jnp.int32), jnp.array([1], jnp.int32))
    for other in (with_layers((4, 6), (5, 7)), with_layers((2, 0), (1, 3)), with_layers((1, 3), (0, 2))):
        copy = SWAKVPool.create(other).get_cpu_copy([4, 5])
        with pytest.raises(ArgumentError, match=r"full_layers is \[0, 2\] here and \[\d, \d\] there"):
            pool.load_cpu_copy(copy, [4, 5])
    same = SWAKVPool.create(with_layers((0, 2), (1, 3))).get_cpu_copy([4, 5])
    assert not pool.is_stale
    pool.load_cpu_copy(same, [4, 5])


def test_one_side_is_not_the_other_nor_a_pool_of_its_own():
    pool = SWAKVPool.create(with_layers((0, 2), (1, 3)))
    copy = pool.full.get_cpu_copy([4])
    plain = make_pool(mha_config(layer_num=2))
    for target in (pool.window, plain, SWAKVPool.create(with_layers((4, 6), (5, 7))).full):
        with pytest.raises(ArgumentError, match=r"global_layers is .* here and \[0, 2\] there"):
            target.load_cpu_copy(copy, [4])
    with pytest.raises(ArgumentError, match="got CpuCopy of a MHAConfig, not of a SWAConfig"):
        pool.load_cpu_copy(copy, [4])
    with pytest.raises(ArgumentError, match="got SWACpuCopy of a SWAConfig, not of a MHAConfig"):
        plain.load_cpu_copy(pool.get_cpu_copy([4]), [4])
    SWAKVPool.create(with_layers((0, 2), (1, 3))).full.load_cpu_copy(copy, [5])


def test_a_mask_of_windows_is_that_of_its_rows():
    copy = SWAKVPool.create(swa_config()).get_cpu_copy([4, 5])
    for mask in (np.array([True, False]), np.array([False]), np.array([0, 0])):
        with pytest.raises(ArgumentError, match=r"has_window must be 2 bools|window must hold 1 tokens"):
            dataclasses.replace(copy, has_window=mask)


@pytest.mark.parametrize(
    ("kv", "states"),
    [
        (mha_config(start_layer=8), mamba_config()),
        (mha_config(), mamba_config(start_layer=8)),
        (mla_config(), mamba_config()),
        (swa_config(), mamba_config()),
    ],
)
def test_a_hybrid_copy_of_other_layers_loses_nothing(kv, states):
    pool = HybridKVPool.create(HybridConfig(kv=mha_config(), states=mamba_config()))
    copy = HybridKVPool.create(HybridConfig(kv=kv, states=states)).get_cpu_copy([4, 5], [1])
    with pytest.raises(ArgumentError, match=r"config\.\w+.* is .* here and .* there"):
        pool.load_cpu_copy(copy, [4, 5], [1])
    assert not pool.is_stale and not pool.kv.is_stale and not pool.states.is_stale


# ---- retracted requests ------------------------------------------------------------------------------------------


def manager_of(kv, **options):
    return jaxcache.init_memory_pool_and_cache(MemoryConfig(kv, 2, 64, chunk=32, **options))


def row_step(pool, batch):
    rows = jnp.broadcast_to(batch.tokens[:, None, None], (*batch.tokens.shape, 1, 2)).astype(jnp.float32)
    kv = pool.kv if isinstance(pool, HybridKVPool) else pool
    first = kv.config.full_layers[0] if isinstance(kv, SWAKVPool) else kv.config.start_layer
    kv = kv.set_kv_buffer(first, batch.slots, rows, rows)
    return (pool.with_kv(kv) if isinstance(pool, HybridKVPool) else kv), None


SMALL = {"head_num": 1, "head_dim": 2, "v_head_dim": 2, "layer_num": 1}
STATES = mamba_config(layer_num=1)
PLACES = {
    "layers": (mha_config(**SMALL), {}),
    "later layers": (mha_config(start_layer=8, **SMALL), {}),
    "page major, later layers": (page_major(mha_config)(start_layer=9, **SMALL), {}),
    "half": (mha_config(jnp.float16, **SMALL), {}),
    "windows": (
        SWAConfig(full=mha_config(**SMALL), window=mha_config(**SMALL), full_layers=(0,), window_layers=(1,)),
        {"sliding_window_size": 8},
    ),
    "later windows": (
        SWAConfig(full=mha_config(**SMALL), window=mha_config(**SMALL), full_layers=(4,), window_layers=(5,)),
        {"sliding_window_size": 8},
    ),
    "states": (mha_config(**SMALL), {"states": STATES}),
    "later states": (mha_config(**SMALL), {"states": dataclasses.replace(STATES, start_layer=8, end_layer=None)}),
}


def retracted(place):
    kv, options = PLACES[place]
    manager = manager_of(kv, **options)
    request = Request("r", list(range(9)))
    manager.admit(request)
    manager.run(row_step, manager.extend([(request, 9)]))
    request.output_ids.append(9)
    manager.retract(request, offload=True)
    return manager, request


def test_a_kept_copy_is_admitted_where_it_is_of_and_nowhere_else():
    managers = {place: manager_of(kv, **options) for place, (kv, options) in PLACES.items()}
    for place in PLACES:
        _, request = retracted(place)
        kept = request.cpu_copy
        for other, manager in managers.items():
            if other == place:
                continue
            free = manager.allocator.available_size()
            with pytest.raises(
                ArgumentError, match=r"request r has a host copy from elsewhere: .*set its cpu_copy to None"
            ):
                manager.admit(request)
            assert manager.allocator.available_size() == free and not manager.pool.is_stale
            assert request.cpu_copy is kept and not manager.running
        assert managers[place].admit(request) == 9
        managers[place].abort(request)
        managers[place].check_memory(read_device=True)
    _, request = retracted("layers")
    request.cpu_copy = None
    assert manager_of(PLACES["later layers"][0]).admit(request) == 0


@pytest.mark.parametrize(
    ("tokens", "extra_key"),
    [
        ([*range(8), 99, 9], None),
        (list(range(8)), None),
        (list(range(10)), "tenant"),
        (list(range(10)), Namespace(lora_id="a")),
    ],
)
def test_what_was_kept_of_other_tokens_is_refused_when_it_is_set(tokens, extra_key):
    """Another request's copy was loaded under this one's key, and shared with everybody."""
    manager, request = retracted("layers")
    other = Request("other", tokens, extra_key)
    with pytest.raises(ArgumentError, match="cpu_copy of request other must be of its own tokens in its own namespace"):
        other.cpu_copy = request.cpu_copy
    for wrong in (3, "copy", manager.pool.get_cpu_copy([4]), manager.pool):
        with pytest.raises(ArgumentError, match="cpu_copy of request r must be None, or what a retraction"):
            request.cpu_copy = wrong
    assert other.cpu_copy is None
    assert manager.admit(other) in (0, 4, 8)  # what is cached of it
    assert manager.admit(request) == 9


def test_a_twin_may_have_the_copy():
    manager = small_manager()
    request = Request("r", list(range(9)))
    manager.admit(request)
    manager.run(write_step, manager.extend([(request, 9)]))
    request.output_ids.append(9)
    manager.retract(request, offload=True)
    manager.cache.evict(64)
    twin = Request("twin", np.arange(12))
    twin.cpu_copy = request.cpu_copy
    assert manager.admit(twin) == 9
    assert_contents(manager, [twin])


# ---- pools and whole caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["later layers", "half", "windows", "states"])
def test_a_manager_takes_updates_of_its_own_pool_only(place):
    manager, _ = retracted("layers")
    pool = manager.pool
    for wrong in (manager_of(PLACES[place][0], **PLACES[place][1]).pool, pool.k, None):
        with pytest.raises(ArgumentError, match="pool must be an update of the one that is here"):
            manager.pool = wrong
    assert manager.pool is pool
    manager.pool = pool.move_kv_cache([4], [5])


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        ("layers", {"kv": PLACES["later layers"][0]}, "config.kv.end_layer is 8"),
        ("layers", {"kv": PLACES["half"][0]}, "config.kv.dtype is 'float16'"),
        ("windows", {"kv": PLACES["later windows"][0]}, r"config.kv.full.global_layers is \[4\]"),
        ("states", PLACES["later states"][1], "config.states.end_layer is 8"),
    ],
)
def test_a_snapshot_of_other_layers_is_refused(place, change, named, tmp_path):
    manager, request = retracted(place)
    manager.abort(request)
    jaxcache.save_snapshot(tmp_path / "s", manager, model="m")
    with pytest.raises(SnapshotError, match=f"{named}, but the snapshot in .* was made with"):
        jaxcache.load_snapshot(tmp_path / "s", dataclasses.replace(manager.config, **change), model="m")
    jaxcache.load_snapshot(tmp_path / "s", manager.config, model="m").check_memory(read_device=True)


def test_every_message_is_an_error_of_the_cache_and_short():
    with pytest.raises(CacheError) as error:
        make_pool(mha_config(layer_num=2, start_layer=5)).load_cpu_copy(make_pool(mla_config()).get_cpu_copy([4]), [4])
    assert len(str(error.value)) < 600 and re.search("load it where it comes from", str(error.value))
