"""Every op of the two-sided pool against its NumPy twin, for keys and values and for latent rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError, BorrowedError, CacheError, StalePoolError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pools.base import COPY_BUCKET_TOKENS
from jaxcache.pools.swa import SWAConfig, SWAKVPool
from tests.pools.numpy_pool import bits, mha_config, mla_config, random_rows
from tests.pools.swa_steps import MAKE_CONFIGS, NumpySWAPool, swa_config

TO_TREE = PageState.PRIVATE, PageState.TREE
BY_KIND = pytest.mark.parametrize("make_config", MAKE_CONFIGS)
PAGES, WINDOWS, LAYER_IDS = 6, 4, range(5)
SLOTS_BY_PAGE_SIZE = {1: 7, 4: 28, 16: 112}


def layer_rows(rng, config, n):
    return [random_rows(rng, config.full.dtype, (n, *row)) for row in config.full.row_shapes]


def patch(pool, oracle, changes):
    """The map, on both, for a dict from full page to window page, 0 = none."""
    oracle.window_of = {p: w for p, w in (oracle.window_of | changes).items() if w}
    return pool.with_window_map(np.array(list(changes), np.int32), np.array(list(changes.values()), np.int32))


def filled(make_config, page_size=4, dtype=np.float32, seed=0):
    """Both with the same random rows: pages 1, 3 and 6 have windows 2, 1 and 4, the others are tombstones."""
    window = {"size": WINDOWS * page_size}
    config = swa_config(make_config, dtype, window, size=PAGES * page_size, page_size=page_size)
    pool, oracle = SWAKVPool.create(config), NumpySWAPool(config)
    pool = patch(pool, oracle, {1: 2, 3: 1, 6: 4})
    rng = np.random.default_rng(seed)
    slots = np.arange(page_size, (PAGES + 1) * page_size, dtype=np.int32)
    for layer in LAYER_IDS:
        rows = layer_rows(rng, config, len(slots))
        pool = pool.set_kv_buffer(layer, slots, *rows)
        oracle.write(layer, slots, rows)
    return pool, oracle


@BY_KIND
@pytest.mark.parametrize(
    ("page_size", "dtype"), [(1, np.float32), (4, jnp.bfloat16), (4, jnp.float8_e4m3fn), (16, np.int8)]
)
def test_a_write_lands_in_its_layer_and_slots_and_nowhere_else(make_config, page_size, dtype):
    pool, oracle = filled(make_config, page_size, dtype)
    oracle.expect(pool)
    rng = np.random.default_rng(1)
    last = SLOTS_BY_PAGE_SIZE[page_size] - 1
    for layer in LAYER_IDS:
        loc = [page_size * 3, 0, last, page_size, 0, page_size * 2]  # a window, padding, tombstones
        rows = layer_rows(rng, oracle.config, len(loc))
        pool = pool.set_kv_buffer(layer, np.array(loc), *rows)
        oracle.write(layer, loc, rows)
    oracle.expect(pool)


@BY_KIND
@pytest.mark.parametrize("page_size", SLOTS_BY_PAGE_SIZE)
def test_every_slot_reads_as_the_twin_says(make_config, page_size):
    pool, oracle = filled(make_config, page_size)
    slots = np.arange(SLOTS_BY_PAGE_SIZE[page_size], dtype=np.int32)[::-1]
    assert pool.translate_loc_from_full_to_swa(slots).tolist() == oracle.translate(slots.tolist())
    assert pool.translate_loc_from_full_to_swa(jnp.asarray(slots)).tolist() == oracle.translate(slots.tolist())
    for layer in LAYER_IDS:
        for mine, theirs in zip(jax.tree.leaves(pool.gather(slots, layer)), oracle.read(layer, slots), strict=True):
            np.testing.assert_array_equal(bits(mine), bits(theirs))


page = st.integers(1, PAGES)
operation = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 4), st.lists(st.integers(0, 111), min_size=4, max_size=4)),
    st.tuples(st.just("move"), st.lists(st.integers(0, 111), max_size=5), st.lists(st.integers(0, 111), min_size=5)),
    st.tuples(st.just("reload"), st.lists(st.integers(0, 111), max_size=5), st.permutations(range(1, 112))),
    st.tuples(st.just("patch"), st.permutations(range(1, PAGES + 1)), st.permutations([0, 0, 0, 1, 2, 3, 4])),
)


@BY_KIND
@pytest.mark.parametrize("page_size", SLOTS_BY_PAGE_SIZE)
@settings(max_examples=20, deadline=None)
@given(operations=st.lists(operation, max_size=8), seed=st.integers(0, 2**16))
def test_any_sequence_of_operations_agrees_with_numpy(make_config, page_size, operations, seed):
    pool, oracle = filled(make_config, page_size, jnp.bfloat16, seed)
    rng = np.random.default_rng(seed)
    num_slots = SLOTS_BY_PAGE_SIZE[page_size]
    for kind, first, second in operations:
        if kind == "patch":
            pool = patch(pool, oracle, dict(zip(first, second, strict=False)))
            continue
        second = list(dict.fromkeys(slot % num_slots for slot in second))  # distinct
        if kind == "write":
            rows = layer_rows(rng, oracle.config, len(second))
            pool = pool.set_kv_buffer(first, np.array(second), *rows)
            oracle.write(first, second, rows)
            continue
        first = list(dict.fromkeys(slot % num_slots for slot in first))[: len(second)]
        second = second[: len(first)]
        if kind == "move":
            pool = pool.move_kv_cache(first, second)
            oracle.move(first, second)
        else:
            pool = pool.load_cpu_copy(pool.get_cpu_copy(first), second)
            oracle.reload(first, second)
    oracle.expect(pool)


@BY_KIND
def test_a_step_of_scans_agrees_with_numpy(make_config):
    pool, oracle = filled(make_config, 4)
    rng = np.random.default_rng(5)
    loc = np.array([12, 13, 0, 8, 27], np.int32)
    rows = {layer: layer_rows(rng, oracle.config, len(loc)) for layer in LAYER_IDS}
    index, windows = np.array([6, 3, 0, 99, -1], np.int32), np.array([3, 0, 4, 4, 4], np.int32)

    def scanned(side, loc, rows):
        def write(side, xs):
            layer, rows = xs
            return side.set_kv_buffer(layer, loc, *rows), None

        return jax.lax.scan(write, side, (jnp.arange(len(rows[0]), dtype=jnp.int32), rows))[0]

    @donating
    def step(pool, loc, index, windows, full_rows, window_rows):
        pool = pool.with_window_map(index, windows)
        pool = pool.with_full(scanned(pool.full, loc, full_rows))
        return pool.with_window(scanned(pool.window, pool.translate_loc_from_full_to_swa(loc), window_rows))

    stacked = [
        [np.stack(arrays) for arrays in zip(*(rows[layer] for layer in layers), strict=True)]
        for layers in (oracle.config.full_layers, oracle.config.window_layers)
    ]
    pool = step(pool, loc, index, windows, *stacked)
    oracle.window_of = {1: 2, 6: 3}
    for layer in LAYER_IDS:
        oracle.write(layer, loc, rows[layer])
    oracle.expect(pool)


@BY_KIND
def test_device_slots_outside_the_pool_are_neither_written_nor_read(make_config):
    pool, oracle = filled(make_config)
    loc = jnp.array([-1, 28, 2**31 - 1, -(2**31), -28, 0], jnp.int32)
    rows = layer_rows(np.random.default_rng(3), oracle.config, 6)
    assert not pool.translate_loc_from_full_to_swa(loc).any()
    for layer in LAYER_IDS:
        pool = pool.set_kv_buffer(layer, loc, *rows)
        assert not any(np.any(array) for array in jax.tree.leaves(pool.gather(loc, layer)))
    oracle.expect(pool)


def test_the_map_is_patched_in_range_only_and_never_for_the_sink():
    pool, oracle = filled(mha_config)
    pool = pool.with_window_map(jnp.array([0, 7, -1, 2**31 - 1, 2], jnp.int32), jnp.array([1, 1, 1, 1, 3], jnp.int32))
    oracle.window_of[2] = 3
    oracle.expect(pool)


def test_the_device_follows_the_allocator():
    """Requests, the tree, tombstones, healing: after each, slots mean the same on the host and on the device."""
    config = swa_config(size=64, page_size=4, window={"size": 32})
    pool, allocator = SWAKVPool.create(config), SWATokenToKVPoolAllocator(64, 32, 4)
    rng, held = np.random.default_rng(0), []
    for _ in range(60):
        choice = rng.integers(4)
        if choice == 0 and (pages := allocator.alloc_pages(int(rng.integers(1, 4)), 0)) is not None:
            held += pages.tolist()
        elif choice == 1 and held:
            allocator.free([4 * held.pop(rng.integers(len(held)))])
        elif choice == 2 and held:
            allocator.free_swa([4 * held[rng.integers(len(held))]])
        elif choice == 3 and held:
            bare, full = held.pop(rng.integers(len(held))), allocator.alloc_pages(1)
            allocator.free_swa([4 * bare])
            allocator.transfer([bare], *TO_TREE)
            if full is not None:
                allocator.move_windows(full, [bare])
                allocator.free(4 * full)
            allocator.release([bare], TO_TREE[1])
        changes = allocator.take_changes(99)
        pool = pool.with_window_map(changes.index, changes.page)
        assert pool.full_to_window.tolist() == allocator.full_to_window.tolist()
        slots = np.arange(68)
        on_host = allocator.translate_loc_from_full_to_swa(slots)
        assert pool.translate_loc_from_full_to_swa(slots).tolist() == on_host.tolist()


@BY_KIND
def test_a_copy_of_many_tokens_goes_to_other_slots_and_pages(make_config):
    """As for a retracted request: the old tokens have no window page any more, the new slots all have one."""
    page_size, n = 16, COPY_BUCKET_TOKENS + 40
    pages = -(-n // page_size)
    config = swa_config(make_config, size=2 * pages * page_size, page_size=page_size)
    allocator = SWATokenToKVPoolAllocator(config.size, config.size_swa, page_size)
    pool, rng = SWAKVPool.create(config), np.random.default_rng(0)
    slots = allocator.alloc_extend([0], [n], [-1], n)
    pool = send(pool, allocator)
    written = {layer: layer_rows(rng, config, n) for layer in LAYER_IDS}
    for layer, rows in written.items():
        pool = pool.set_kv_buffer(layer, slots, *rows)
    allocator.free_swa(slots[: 100 * page_size])
    pool = send(pool, allocator)
    copy = pool.get_cpu_copy(slots)
    assert (copy.num_tokens, copy.window.num_tokens) == (n, n - 100 * page_size)
    allocator.free(slots)
    part = copy.tokens(90 * page_size, n)
    target = allocator.alloc_extend([0], [part.num_tokens], [-1], part.num_tokens)
    assert not np.array_equal(target, slots[90 * page_size :])
    pool = send(pool, allocator).load_cpu_copy(part, target)
    for layer in LAYER_IDS:
        live = slice(90 * page_size, n) if layer in config.full_layers else slice(100 * page_size, n)
        behind = target[live.start - 90 * page_size :]
        for mine, theirs in zip(jax.tree.leaves(pool.gather(behind, layer)), written[layer], strict=True):
            np.testing.assert_array_equal(bits(mine), bits(theirs[live]))


def send(pool, allocator):
    changes = allocator.take_changes(10**6)
    return pool.with_window_map(changes.index, changes.page)


@BY_KIND
@pytest.mark.parametrize("start", [0, 1, 5, 8])
@pytest.mark.parametrize("stop", [8, 9, 12])
def test_a_part_of_a_copy_is_the_copy_of_a_part(make_config, start, stop):
    pool, _ = filled(make_config)
    slots = np.array([8, 12, 13, 24, 4, 5, 20, 27, 16, 9, 10, 18])
    whole, part = pool.get_cpu_copy(slots).tokens(start, stop), pool.get_cpu_copy(slots[start:stop])
    assert whole.num_tokens == part.num_tokens == len(part.has_window)
    assert whole.has_window.tolist() == part.has_window.tolist()
    for side in ("full", "window"):
        for mine, theirs in zip(getattr(whole, side).buffers, getattr(part, side).buffers, strict=True):
            np.testing.assert_array_equal(bits(mine), bits(theirs))


@BY_KIND
def test_sizes_and_places_are_those_of_both_sides(make_config):
    pool, oracle = filled(make_config, 4, jnp.bfloat16)
    config = oracle.config
    whole = [array.nbytes for side in (oracle.full, oracle.window) for array in side.arrays]
    assert pool.size_bytes == sum(whole) + 4 * (PAGES + 1)
    sizes = pool.get_kv_size_bytes()
    assert sum(sizes if isinstance(sizes, tuple) else (sizes,)) == sum(whole)
    infos = pool.get_contiguous_buf_infos()
    assert [info.layer_ids for info in infos] == [
        (layer,)
        for layers in (config.full_layers, config.window_layers)
        for _ in config.full.row_shapes
        for layer in layers
    ]
    arrays = {
        f"{side}.{name}": array for side in ("full", "window") for name, array in vars(getattr(pool, side)).items()
    }
    for info in infos:
        side, index = oracle.side_of(info.layer_ids[0])
        array = arrays[info.name]
        assert info.shape == array.shape[1:]
        assert info.offset_bytes == index * info.size_bytes == index * array[0].nbytes
        assert info.page_bytes == 4 * array[0, 0].nbytes
        assert info.name.startswith("full." if side is oracle.full else "window.")


@BY_KIND
def test_getters_give_the_layer_of_its_side(make_config):
    pool, oracle = filled(make_config)
    for layer in LAYER_IDS:
        side, index = oracle.side_of(layer)
        np.testing.assert_array_equal(pool.get_key_buffer(layer), side.arrays[0][index])
        value = side.arrays[-1][index][..., : 12 if make_config is mla_config else None]
        np.testing.assert_array_equal(pool.get_value_buffer(layer), value)
        assert len(pool.get_kv_buffer(layer)) == 2


def test_a_scaled_write_goes_through():
    pool, oracle = filled(mha_config, dtype=jnp.float8_e4m3fn)
    rows = [np.full((2, *row), 8, np.float32) for row in oracle.config.full.row_shapes]
    for layer in (0, 1):
        pool = pool.set_kv_buffer(layer, [4, 12], *rows, k_scale=2.0, v_scale=np.float32(4))
        k, v = pool.gather([4, 12], layer)
        assert (np.asarray(k, np.float32) == 4).all()
        assert (np.asarray(v, np.float32) == 2).all()
    moved = pool.set_kv_buffer(0, [4], *(row[:1] for row in rows), layer_id_override=3)
    assert (np.asarray(moved.gather([4], 3)[0], np.float32) == 8).all()


def test_under_disable_jit_everything_is_the_same():
    pool, oracle = filled(mha_config)
    rows = layer_rows(np.random.default_rng(4), oracle.config, 3)
    with jax.disable_jit():
        for layer in (0, 1):
            pool = pool.set_kv_buffer(layer, jnp.array([4, 24, 0], jnp.int32), *rows)
            oracle.write(layer, [4, 24, 0], rows)
        with pytest.raises(ArgumentError, match="repeats slot"):
            pool.set_kv_buffer(2, jnp.array([4, 4, 0], jnp.int32), *rows)
    oracle.expect(pool)


# What is refused.


WRONG_CALLS = {
    "no such layer": ("layer must be one of", lambda p, r: p.set_kv_buffer(5, [4, 5], *r)),
    "a negative layer": ("layer must be one of", lambda p, r: p.gather([4], -1)),
    "a traced layer": ("layer must be a Python int: scan over", lambda p, r: p.gather([4], jnp.int32(1))),
    "a slot beyond": (r"loc\[1\] must be a slot in \[0, 28\), got 28", lambda p, r: p.set_kv_buffer(0, [4, 28], *r)),
    "a slot of the full side beyond": (r"loc\[1\] must be a slot", lambda p, r: p.set_kv_buffer(1, [4, 28], *r)),
    "a slot twice": ("repeats slot", lambda p, r: p.set_kv_buffer(0, [4, 4], *r)),
    "a tombstone's slot twice": ("repeats slot", lambda p, r: p.set_kv_buffer(0, [8, 8], *r)),
    "rows of another shape": ("k must have shape", lambda p, r: p.set_kv_buffer(0, [4, 5, 6], *r)),
    "translate beyond": ("kv_indices", lambda p, r: p.translate_loc_from_full_to_swa([28])),
    "translate floats": ("kv_indices", lambda p, r: p.translate_loc_from_full_to_swa([1.5])),
    "gather beyond": ("must be a slot", lambda p, r: p.gather([28], 0)),
    "move unequal lists": ("tgt_loc must be as many as src_loc, 1", lambda p, r: p.move_kv_cache([4, 5], [6])),
    "move to one slot twice": ("tgt_loc must name each slot once", lambda p, r: p.move_kv_cache([4, 4], [6, 7])),
    "move from beyond": ("src_loc", lambda p, r: p.move_kv_cache([4], [28])),
    "copy beyond": ("indices", lambda p, r: p.get_cpu_copy([28])),
    "load something else": ("copy must be what get_cpu_copy returned", lambda p, r: p.load_cpu_copy(r, [4])),
    "load a copy of one side": ("copy must be", lambda p, r: p.load_cpu_copy(p.full.get_cpu_copy([4]), [4])),
    "load too few": ("must name 2 slots", lambda p, r: p.load_cpu_copy(p.get_cpu_copy([4, 5]), [4])),
    "load to one slot twice": ("repeats slot", lambda p, r: p.load_cpu_copy(p.get_cpu_copy([4, 5]), [4, 4])),
    "a map of two lengths": ("page must be as many as index, 2", lambda p, r: p.with_window_map(I32([1, 2]), I32([1]))),
    "a map of lists": ("index must be a one-dimensional int32", lambda p, r: p.with_window_map([1], [1])),
    "a map of int64": ("page must be a one-dimensional", lambda p, r: p.with_window_map(I32([1]), np.array([1]))),
    "a map to no window page": (r"page must be in \[0, 4\]", lambda p, r: p.with_window_map(I32([1]), I32([5]))),
    "a map below": (r"page must be in \[0, 4\]", lambda p, r: p.with_window_map(I32([1]), I32([-1]))),
}


def I32(values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_says_why_and_loses_nothing(case):
    message, call = WRONG_CALLS[case]
    pool, oracle = filled(mha_config)
    rows = layer_rows(np.random.default_rng(0), oracle.config, 2)
    with pytest.raises(ArgumentError, match=message):
        call(pool, rows)
    oracle.expect(pool)


def test_a_copy_that_does_not_fit_the_window_side_loses_nothing():
    """The full side would take it: both are asked first."""
    pool, oracle = filled(mha_config)
    other = SWAKVPool.create(swa_config(size=24, page_size=4, window={"head_dim": 4}))
    with pytest.raises(ArgumentError, match="copy must come from a pool of the same layers"):
        pool.load_cpu_copy(other.get_cpu_copy([4, 5]), [4, 5])
    oracle.expect(pool)


def test_a_borrowed_side_is_not_donated():
    pool, oracle = filled(mha_config)
    copy = pool.get_cpu_copy([4, 5])
    rows = layer_rows(np.random.default_rng(0), oracle.config, 1)
    for borrowed in (pool, pool.full, pool.window):
        borrowed.mark_borrowed()
        for update in (
            lambda: pool.set_kv_buffer(1, [4], *rows),
            lambda: pool.with_window_map(I32([1]), I32([0])),
            lambda: pool.load_cpu_copy(copy, [8, 9]),
            lambda: pool.move_kv_cache([4], [5]),
        ):
            with pytest.raises(BorrowedError):
                update()
        borrowed.unmark_borrowed()
    oracle.expect(pool)


def test_a_consumed_pool_says_so():
    pool, oracle = filled(mha_config)
    rows = layer_rows(np.random.default_rng(0), oracle.config, 1)
    copy = pool.get_cpu_copy([4])
    new = pool.with_window(pool.window.set_kv_buffer(0, [8], *rows))  # consumes a side, and with it the whole
    for use in (
        lambda: pool.set_kv_buffer(1, [4], *rows),
        lambda: pool.gather([4], 0),
        lambda: pool.translate_loc_from_full_to_swa([4]),
        lambda: pool.get_cpu_copy([4]),
        lambda: pool.load_cpu_copy(copy, [4]),
    ):
        with pytest.raises(StalePoolError):
            use()
    assert new.gather([4], 1)[0].shape == (1, 2, 8)


GOOD = {"full": mha_config(), "window": mha_config(layer_num=2), "full_layers": (1, 3, 4), "window_layers": (0, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": None}, "full must be a KVCacheConfig"),
        ({"window": mla_config(layer_num=2)}, "window must be a MHAConfig like full"),
        ({"window": mha_config(layer_num=2, page_size=8)}, "window.page_size must be that of full, 4; got 8"),
        ({"window": mha_config(layer_num=2, axis_name="tp")}, "window.axis_name must be that of full"),
        ({"window": mha_config(layer_num=2, start_layer=3)}, "window.start_layer must be 0"),
        ({"full": mha_config(start_layer=1)}, "full.start_layer must be 0"),
        ({"full_layers": (1, 3)}, "full_layers must name 3 layers, each once"),
        ({"full_layers": (1, 3, 3)}, "full_layers must name 3 layers, each once"),
        ({"window_layers": (0, 2, 5)}, "window_layers must name 2 layers"),
        ({"window_layers": (0, 3)}, r"window_layers must not name a layer of full_layers; got \[3\]"),
        ({"window_layers": (0, -2)}, "window_layers must be a tuple of layer ids"),
        ({"window_layers": [0, 2]}, "window_layers must be a tuple"),
        ({"full_layers": "134"}, "full_layers must be a tuple"),
    ],
)
def test_sides_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(CacheError, match=message):
        SWAConfig(**GOOD | changes)


def test_a_config_says_what_both_sides_have():
    config = SWAConfig(**GOOD | {"window": mha_config(size=8, layer_num=2)})
    assert (config.size, config.size_swa, config.page_size, config.layer_num, config.num_pages) == (24, 8, 4, 5, 6)
    assert (config.axis_name, config.shards, config.pool_type) == (None, 1, SWAKVPool)
    assert [config.locate(layer) for layer in LAYER_IDS] == [(0, True), (0, False), (1, True), (1, False), (2, False)]
    assert hash(config) == hash(SWAConfig(**GOOD | {"window": mha_config(size=8, layer_num=2)}))
