"""Every pool op against the NumPy pool, for keys and values and for latent rows."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache.errors import ArgumentError, StalePoolError
from jaxcache.kernels.copy_pages import gather_pages
from jaxcache.pools.base import COPY_BUCKET_TOKENS, from_storage, storage_dtype, to_storage
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import HeadsConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from tests.pools.numpy_pool import (
    CONFIGS,
    DTYPES,
    FLOATS,
    NumpyPool,
    bits,
    double_sparse_config,
    filled_pool,
    make_pool,
    mha_config,
    mla_config,
    page_major,
    random_rows,
)


def set_layer(pool, layer, loc, rows):
    """One write, through whatever the pool's setter is called."""
    if not isinstance(pool, MLATokenToKVPool):
        return pool.set_kv_buffer(layer, loc, *rows)
    rank = pool.config.kv_lora_rank
    return pool.set_mla_kv_buffer(layer, loc, rows[0][..., :rank], rows[0][..., rank:])


def layer_rows(rng, config, n):
    return [random_rows(rng, config.dtype, (n, *row)) for row in config.row_shapes]


@pytest.mark.parametrize(
    ("make_config", "dtype"),
    [*product(CONFIGS, DTYPES[:2]), *product((mha_config, page_major(mla_config)), DTYPES[2:])],
    ids=lambda part: part.__name__ if callable(part) else str(part),
)
def test_a_write_lands_in_its_layer_and_slots_and_nowhere_else(make_config, dtype):
    config = make_config(dtype)
    pool, oracle = filled_pool(config)
    rng = np.random.default_rng(1)
    for layer, loc in ((1, [5, 27, 4]), (0, [9, 0, 0]), (2, [27, 8, 10])):
        rows = layer_rows(rng, config, 3)
        pool = set_layer(pool, layer, np.array(loc), rows)
        oracle.write(layer, loc, rows)
    oracle.expect(pool)


slot = st.integers(0, 27)
operation = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 2), st.lists(slot, min_size=4, max_size=4, unique=True)),
    st.tuples(st.just("move"), st.lists(slot, max_size=6, unique=True), st.lists(slot, min_size=6, max_size=6)),
    st.tuples(st.just("reload"), st.lists(slot, max_size=5, unique=True), st.permutations(range(1, 28))),
)


@pytest.mark.parametrize("make_config", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(operations=st.lists(operation, max_size=8), seed=st.integers(0, 2**16))
def test_any_sequence_of_operations_agrees_with_numpy(make_config, operations, seed):
    config = make_config(jnp.bfloat16)
    pool, oracle = filled_pool(config, seed)
    rng = np.random.default_rng(seed)
    for kind, first, second in operations:
        if kind == "set":
            rows = layer_rows(rng, config, len(second))
            pool = set_layer(pool, first, np.array(second), rows)
            oracle.write(first, second, rows)
        else:
            second = second[: len(first)]
            if kind == "move":
                pool = pool.move_kv_cache(first, second)
                oracle.move(first, second)
            else:
                pool = pool.load_cpu_copy(pool.get_cpu_copy(first), second)
                oracle.move(second, first)
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", CONFIGS)
def test_a_traced_layer_writes_as_a_static_one_does(make_config):
    config = make_config(jnp.float16, start_layer=5)
    pool, oracle = filled_pool(config)
    rng = np.random.default_rng(2)
    rows = [np.stack(arrays) for arrays in zip(*(layer_rows(rng, config, 4) for _ in range(3)), strict=True)]
    loc = jnp.array([6, 0, 27, 9], jnp.int32)

    @jax.jit
    def scanned(pool, loc, rows):
        def write(pool, layer_and_rows):
            layer, rows = layer_and_rows
            return set_layer(pool, layer, loc, rows), None

        return jax.lax.scan(write, pool, (jnp.arange(5, 8, dtype=jnp.int32), rows))[0]

    pool = scanned(pool, loc, rows)
    for layer in range(3):
        oracle.write(layer, loc, [array[layer] for array in rows])
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", CONFIGS)
def test_device_slots_outside_the_pool_are_neither_written_nor_read(make_config):
    config = make_config()
    pool, oracle = filled_pool(config)
    wraps = 4 * 357_913_942  # times three layers it is 8, in int32
    loc = jnp.array([-1, 28, 2**31 - 1, -(2**31), wraps], jnp.int32)
    rows = layer_rows(np.random.default_rng(3), config, 5)
    pool = set_layer(pool, 1, loc, rows)
    oracle.expect(pool)
    assert not any(np.any(array) for array in jax.tree.leaves((pool.gather(loc), pool.gather(loc, layer=1))))


@pytest.mark.parametrize("make_config", CONFIGS)
def test_a_traced_layer_outside_the_pool_writes_nothing(make_config):
    config = make_config(start_layer=2)
    pool, oracle = filled_pool(config)
    rows = layer_rows(np.random.default_rng(3), config, 2)
    for layer in (-1, 0, 1, 5):
        pool = set_layer(pool, jnp.int32(layer), np.array([4, 5]), rows)
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", [mha_config, page_major(mha_config)])
@pytest.mark.parametrize("layer", [jnp.zeros(2, jnp.int32), jnp.float32(0), np.zeros((), np.int8)])
def test_a_traced_layer_of_another_shape_or_dtype_is_refused(make_config, layer):
    pool, oracle = filled_pool(make_config())
    rows = layer_rows(np.random.default_rng(3), pool.config, 2)
    for call in (lambda: pool.set_kv_buffer(layer, [4, 5], *rows), lambda: pool.gather([4, 5], layer)):
        with pytest.raises(ArgumentError, match="layer must be an int or an int32 scalar; got"):
            call()
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", CONFIGS)
def test_gather_reads_slots_in_the_order_asked_and_repeats_them(make_config):
    config = make_config(jnp.float8_e5m2, start_layer=3)
    pool, oracle = filled_pool(config)
    loc = [7, 4, 7, 0]
    for rows, expected in zip(jax.tree.leaves(pool.gather(loc)), oracle.arrays, strict=True):
        np.testing.assert_array_equal(bits(rows), bits(expected[:, loc]))
    for rows, expected in zip(jax.tree.leaves(pool.gather(loc, layer=4)), oracle.arrays, strict=True):
        np.testing.assert_array_equal(bits(rows), bits(expected[1, loc]))


@pytest.mark.parametrize("make_config", [mha_config, page_major(mha_config)])
def test_mha_getters_return_one_layer_in_the_logical_dtype(make_config):
    pool, oracle = filled_pool(make_config(jnp.bfloat16, start_layer=1))
    k, v = pool.get_kv_buffer(2)
    np.testing.assert_array_equal(bits(k), bits(oracle.arrays[0][1]))
    np.testing.assert_array_equal(bits(v), bits(oracle.arrays[1][1]))
    assert k.dtype == v.dtype == jnp.bfloat16
    assert pool.get_key_buffer(2).shape == (28, 2, 8)
    assert pool.get_value_buffer(2).shape == (28, 2, 4)


@pytest.mark.parametrize("make_config", [mla_config, page_major(mla_config)])
def test_the_mla_value_is_the_latent_part_of_the_key(make_config):
    pool, oracle = filled_pool(make_config(jnp.bfloat16))
    k, v = pool.get_kv_buffer(2)
    np.testing.assert_array_equal(bits(k), bits(oracle.arrays[0][2]))
    np.testing.assert_array_equal(bits(v), bits(oracle.arrays[0][2][:, :12]))


def test_mla_accepts_whole_rows_and_the_unit_head_of_sglang():
    config = mla_config(jnp.bfloat16)
    rows = layer_rows(np.random.default_rng(4), config, 2)[0]
    for write in (
        lambda pool: pool.set_kv_buffer(1, [4, 9], rows),
        lambda pool: pool.set_kv_buffer(1, [4, 9], rows[:, None], cache_v="ignored"),
        lambda pool: pool.set_mla_kv_buffer(1, [4, 9], rows[:, None, :12], rows[:, 12:]),
    ):
        oracle = NumpyPool(config)
        oracle.write(1, [4, 9], [rows])
        oracle.expect(write(MLATokenToKVPool.create(config)))


def test_layer_id_override_takes_the_place_of_the_layer():
    config = mha_config()
    rows = layer_rows(np.random.default_rng(5), config, 1)
    oracle = NumpyPool(config)
    oracle.write(2, [5], rows)
    oracle.expect(make_pool(config).set_kv_buffer(99, [5], *rows, layer_id_override=2))


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d.itemsize < 4], ids=str)
def test_every_bit_pattern_survives_the_pool(dtype):
    """NaN payloads included: a pool moves bits, it does not interpret them."""
    patterns = np.arange(1 << 8 * dtype.itemsize).astype(f"u{dtype.itemsize}").view(dtype).reshape(-1, 16, 16)
    n = len(patterns)
    config = mha_config(dtype, size=n, page_size=1, layer_num=1, head_num=16, head_dim=16, v_head_dim=16)
    loc = np.arange(1, n + 1)
    pool = make_pool(config).set_kv_buffer(0, loc, patterns, patterns[::-1])
    pool = pool.load_cpu_copy(pool.get_cpu_copy(loc), loc)
    k, v = pool.gather(loc, layer=0)
    np.testing.assert_array_equal(bits(k), bits(patterns))
    np.testing.assert_array_equal(bits(v), bits(patterns[::-1]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_another_float_are_rounded_to_nearest_even(dtype):
    rng = np.random.default_rng(6)
    rows = np.concatenate([rng.standard_normal(4000), np.arange(-448, 448, 0.5)]).astype(np.float32)
    stored = to_storage(rows, dtype, storage_dtype(dtype, "cpu"))
    np.testing.assert_array_equal(bits(from_storage(stored, dtype)), bits(rows.astype(dtype)))


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        (jnp.bfloat16, "cpu", np.uint16),
        (np.float16, "cpu", np.uint16),
        (jnp.float8_e4m3fn, "cpu", np.uint8),
        (jnp.float8_e5m2, "cpu", np.uint8),
        (np.float32, "cpu", np.float32),
        (np.int8, "cpu", np.int8),
        (jnp.bfloat16, "gpu", jnp.bfloat16),
        (jnp.float8_e4m3fn, "gpu", jnp.float8_e4m3fn),
    ],
)
def test_only_the_cpu_stores_narrow_floats_as_integers(dtype, platform, expected):
    assert storage_dtype(dtype, platform) == np.dtype(expected)
    pool = MHATokenToKVPool.abstract(mha_config(dtype), platform=platform)
    assert pool.k.dtype == pool.v.dtype == np.dtype(expected)


@pytest.mark.parametrize("make_config", CONFIGS)
@pytest.mark.parametrize("n", [0, 1, COPY_BUCKET_TOKENS, COPY_BUCKET_TOKENS + 3])
def test_a_cpu_copy_of_any_length_comes_back_to_other_slots(make_config, n):
    config = make_config(jnp.bfloat16, size=3 * COPY_BUCKET_TOKENS, layer_num=2)
    pool, oracle = filled_pool(config)
    slots = np.random.default_rng(7).permutation(np.arange(4, config.rows))
    source, target = slots[:n], slots[n : 2 * n]
    copy = pool.get_cpu_copy(source)
    assert copy.num_tokens == n
    pool = pool.load_cpu_copy(copy, target)
    oracle.move(target, source)
    oracle.expect(pool)


def test_a_cpu_copy_outlives_its_pool():
    pool, oracle = filled_pool(mha_config(jnp.bfloat16))
    copy = pool.get_cpu_copy([5, 6])
    wiped = pool.set_all_layers([5, 6], np.zeros((3, 2, 2, 8), np.float32), np.zeros((3, 2, 2, 4), np.float32))
    oracle.expect(wiped.load_cpu_copy(copy, [5, 6]))


@pytest.mark.parametrize("make_config", [mha_config, mla_config])
def test_cpu_copies_pass_between_layouts(make_config):
    layers_first, oracle = filled_pool(make_config(jnp.bfloat16))
    pages_first = make_pool(page_major(make_config)(jnp.bfloat16))
    everything = np.arange(28)
    pages_first = pages_first.load_cpu_copy(layers_first.get_cpu_copy(everything), everything)
    oracle.expect(pages_first)
    oracle.expect(make_pool(oracle.config).load_cpu_copy(pages_first.get_cpu_copy(everything), everything))


def test_copies_of_different_lengths_compile_once():
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    pool = make_pool(mha_config(size=100, page_size=1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pool = pool.load_cpu_copy(pool.get_cpu_copy([1]), [2])
        first = len(compiled)
        pool.load_cpu_copy(pool.get_cpu_copy([3, 4, 5]), [6, 7, 8])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first > 0
    assert len(compiled) == first


@pytest.mark.parametrize("make_config", CONFIGS)
def test_buffer_infos_locate_every_page_of_the_stack(make_config):
    config = make_config(jnp.bfloat16, start_layer=4)
    pool, oracle = filled_pool(config)
    infos = pool.get_contiguous_buf_infos()
    names = ["k", "v", "label"][: len(pool.buffers)] if isinstance(config, HeadsConfig) else ["kv"]
    layers = [(4,), (5,), (6,)] if config.layout is Layout.LAYER_MAJOR else [(4, 5, 6)]
    assert [(i.name, i.layer_ids) for i in infos] == [(name, ids) for name in names for ids in layers]
    for info in infos:
        memory = np.asarray(getattr(pool, info.name)).tobytes()
        page = memory[info.offset_bytes + 2 * info.page_bytes :][: info.page_bytes]
        rows = oracle.arrays[names.index(info.name)][[layer - 4 for layer in info.layer_ids], 8:12]
        assert page == rows.tobytes()
        assert info.shape[:1] == ((28,) if len(info.layer_ids) == 1 else (7,))
        assert info.strides_bytes == np.empty(info.shape, rows.dtype).strides
        assert info.size_bytes == np.empty(info.shape, rows.dtype).nbytes == 7 * info.page_bytes


@pytest.mark.parametrize("make_config", CONFIGS)
def test_arrays_lie_in_the_order_of_the_layout(make_config):
    """Page-major, the bytes of a page of all layers follow on each other."""
    pool, oracle = filled_pool(make_config(jnp.bfloat16))
    for buffer, array, lying in zip(pool.buffers, oracle.arrays, oracle.as_they_lie(), strict=True):
        np.testing.assert_array_equal(bits(buffer), bits(lying))
        page = array[:, 8:12].tobytes()  # of all three layers
        found = np.asarray(buffer).tobytes().find(page)
        assert found == (2 * len(page) if pool.config.layout is Layout.PAGE_MAJOR else -1)


@pytest.mark.parametrize("make_config", CONFIGS)
def test_pages_are_found_in_the_stack_as_attention_and_transfers_want_them(make_config):
    pool, oracle = filled_pool(make_config(jnp.bfloat16))
    is_page_major = pool.config.layout is Layout.PAGE_MAJOR
    for buffer, array in zip(pool.buffers, oracle.arrays, strict=True):
        stack = buffer.reshape(-1, 4, *array.shape[2:])
        for layer, page in ((0, 5), (2, 3), (1, 6)):
            found = stack[page * 3 + layer if is_page_major else layer * 7 + page]
            np.testing.assert_array_equal(from_storage(found, jnp.bfloat16), array[layer, 4 * page : 4 * page + 4])
        if is_page_major:
            blocks = gather_pages(buffer, np.array([5, 2, 0], np.int32), page_size=3 * 4)
            assert np.asarray(blocks[0]).tobytes() == array[:, 20:24].tobytes()
            assert np.asarray(blocks[1]).tobytes() == array[:, 8:12].tobytes()
            assert not np.any(blocks[2])


def test_sizes_count_the_sink_page():
    sparse = make_pool(double_sparse_config(jnp.bfloat16))
    assert sparse.get_kv_size_bytes() == (3 * 28 * 2 * 8 * 2, 3 * 28 * 2 * 4 * 2, 3 * 28 * 2 * 3 * 2)
    page_major_mha = make_pool(page_major(mha_config)(jnp.bfloat16))
    assert page_major_mha.get_kv_size_bytes() == (3 * 28 * 2 * 8 * 2, 3 * 28 * 2 * 4 * 2)
    mha, mla = make_pool(mha_config(jnp.bfloat16)), make_pool(mla_config(jnp.bfloat16))
    assert mha.get_kv_size_bytes() == (3 * 28 * 2 * 8 * 2, 3 * 28 * 2 * 4 * 2)
    assert mla.get_kv_size_bytes() == 3 * 28 * 17 * 2
    assert mha.size_bytes == sum(mha.get_kv_size_bytes())
    assert mha.maybe_get_custom_mem_pool() is None


WRONG_SLOTS = [
    ([-1], r"loc\[0\]"),
    ([4, 28], r"loc\[1\].*28"),
    ([4.0], "integers"),
    ([[4]], "one-dimensional"),
    (4, "one"),
]


@pytest.mark.parametrize(("loc", "message"), WRONG_SLOTS)
def test_wrong_slots_are_refused_and_the_pool_lives_on(loc, message):
    pool, oracle = filled_pool(mha_config())
    rows = layer_rows(np.random.default_rng(8), pool.config, np.size(loc))
    with pytest.raises(ArgumentError, match=message):
        pool.set_kv_buffer(0, loc, *rows)
    with pytest.raises(ArgumentError, match=message):
        pool.gather(loc)
    oracle.expect(pool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, k, v: p.set_kv_buffer(3, [4], k, v), r"layer must be in \[0, 3\); got 3"),
        (lambda p, k, v: p.set_kv_buffer(0, [4, 5], k, v), r"k must have shape \(2, 2, 8\)"),
        (lambda p, k, v: p.set_kv_buffer(0, [4], k, k), r"v must have shape \(1, 2, 4\)"),
        (lambda p, k, v: p.set_kv_buffer(0, [4], k.astype(np.int32), v), "k must be floats"),
        (lambda p, k, v: p.set_kv_buffer(0, [4], k, v, k_scale=np.ones(3)), "k_scale must broadcast"),
        (lambda p, k, v: p.set_kv_buffer(0, jnp.array([4], jnp.int16), k, v), "int32"),
        (lambda p, k, v: p.set_all_layers([4], k), "rows must be 2 arrays"),
        (lambda p, k, v: p.set_all_layers([4], k, v), r"rows\[0\] must have shape \(3, 1, 2, 8\)"),
        (lambda p, k, v: p.move_kv_cache([4, 5], [6]), "as many as src_loc"),
        (lambda p, k, v: p.move_kv_cache([4, 4], [6, 7]), "tgt_loc must name each slot once"),
        (lambda p, k, v: p.load_cpu_copy(p.get_cpu_copy([4, 5]), [6]), "indices must name 2 slots"),
        (lambda p, k, v: p.load_cpu_copy(p.get_cpu_copy([4, 5]), [6, 6]), "indices must name each slot once"),
        (lambda p, k, v: p.load_cpu_copy(make_pool(mla_config()).get_cpu_copy([4]), [6]), "copy must come from"),
        (lambda p, k, v: p.load_cpu_copy(make_pool(mha_config("float16")).get_cpu_copy([4]), [6]), "copy must come"),
    ],
)
def test_wrong_arguments_are_refused_and_the_pool_lives_on(call, message):
    pool, oracle = filled_pool(mha_config())
    k, v = layer_rows(np.random.default_rng(8), pool.config, 1)
    with pytest.raises(ArgumentError, match=message):
        call(pool, k, v)
    oracle.expect(pool)


def test_quantised_rows_are_neither_cast_nor_scaled():
    pool = make_pool(mha_config(np.int8))
    k, v = layer_rows(np.random.default_rng(8), pool.config, 1)
    with pytest.raises(ArgumentError, match="quantised"):
        pool.set_kv_buffer(0, [4], k.astype(np.float32), v)
    with pytest.raises(ArgumentError, match="k_scale must be None"):
        pool.set_kv_buffer(0, [4], k, v, k_scale=2.0)


@pytest.mark.parametrize("call", [lambda p: p.gather([4]), lambda p: p.get_kv_buffer(0), lambda p: p.get_cpu_copy([4])])
def test_a_consumed_pool_cannot_be_read(call):
    pool, _ = filled_pool(mha_config())
    pool.move_kv_cache([4], [5])
    with pytest.raises(StalePoolError, match="use the pool which that step returned"):
        call(pool)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": 0}, "size must be positive"),
        ({"size": 25}, "size must be a multiple of page_size 4"),
        ({"page_size": 0}, "page_size must be positive"),
        ({"layer_num": 0}, "layer_num must be positive"),
        ({"head_num": 0}, "head_num must be positive"),
        ({"v_head_dim": 0}, "v_head_dim must be positive"),
        ({"start_layer": -1}, "start_layer"),
        ({"size": 2**31 - 4}, "int32"),
        ({"dtype": np.float64}, "dtype must be one of"),
        ({"dtype": np.int32}, "dtype must be one of"),
        ({"layout": "page_major"}, r"layout must be a jaxcache\.Layout; got 'page_major'"),
        (
            {"layout": Layout.PAGE_MAJOR, "size": 2**30, "layer_num": 2},
            r"size must leave int32 rows in all 2 layers together, or take Layout\.LAYER_MAJOR",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ArgumentError, match=message):
        mha_config(**sizes)
