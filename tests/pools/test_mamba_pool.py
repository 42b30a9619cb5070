"""Every op on states against the NumPy twin, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError, BorrowedError, StalePoolError
from jaxcache.pools.mamba import MambaPool, reading_order
from tests.pools.numpy_pool import bits, make_pool, mha_config
from tests.pools.numpy_states import NumpyStates, filled_states, mamba_config, random_parts

BY_DTYPE = pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, "float32")], ids=str
)


def config_of(dtypes, **sizes):
    return mamba_config(conv_dtype=dtypes[0], temporal_dtype=dtypes[1], **sizes)


@BY_DTYPE
def test_a_write_lands_in_its_layer_and_states_and_nowhere_else(dtypes):
    config = config_of(dtypes)
    pool, oracle = filled_states(config)
    rng = np.random.default_rng(1)
    for layer, states in ((1, [5, 9, 4]), (0, [7, 0, 0]), (2, [9, 1, 2])):
        parts = random_parts(rng, config, 3)
        pool = pool.write(states, layer, *parts)
        oracle.write(states, layer, parts)
    oracle.expect(pool)


state = st.integers(0, 9)
some_states = st.lists(state, max_size=6, unique_by=lambda s: s or object())  # distinct, but for padding
operation = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 2), some_states),
    st.tuples(st.just("copy"), some_states, st.lists(state, min_size=6, max_size=6)),
    st.tuples(st.just("reset"), some_states, st.none()),
    st.tuples(st.just("reload"), st.lists(state, max_size=4), st.permutations(range(1, 10))),
)


def forms_a_ring(sources, targets):
    """Whether following targets back to their sources ever comes round."""
    source_of = {t: s for s, t in zip(sources, targets, strict=True) if t not in (0, s)}
    for start in source_of:
        at = source_of[start]
        for _ in source_of:
            if at == start:
                return True
            at = source_of.get(at)
    return False


@BY_DTYPE
@settings(max_examples=40)
@given(operations=st.lists(operation, max_size=8), seed=st.integers(0, 2**16))
def test_any_sequence_of_operations_agrees_with_numpy(dtypes, operations, seed):
    config = config_of(dtypes, start_layer=4)
    pool, oracle = filled_states(config, seed)
    rng = np.random.default_rng(seed)
    for kind, first, second in operations:
        if kind == "write":
            parts = random_parts(rng, config, len(second))
            pool = pool.write(second, first + 4, *parts)
            oracle.write(second, first, parts)
        elif kind == "reset":
            pool = pool.reset_states(first)
            oracle.copy([0] * len(first), first)
        elif kind == "reload":
            second = second[: len(first)]
            pool = pool.load_cpu_copy(pool.get_cpu_copy(first), second)
            oracle.copy(first, second)
        elif forms_a_ring(sources := second[: len(first)], first):
            with pytest.raises(ArgumentError, match="ring of copies"):
                pool.copy_states(sources, first)
        else:
            pool = pool.copy_states(sources, first)
            oracle.copy(sources, first)
    oracle.expect(pool)


@given(pairs=st.lists(st.tuples(state, state), max_size=10, unique_by=lambda pair: pair[1] or object()))
def test_reading_order_makes_one_after_the_other_the_same_as_all_at_once(pairs):
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    if forms_a_ring(sources, targets):
        with pytest.raises(ArgumentError, match="ring of copies: copy one of its states aside"):
            reading_order(sources, targets)
        return
    old, new = list(range(10)), list(range(10))
    for s, t in zip(sources, targets, strict=True):
        if t:
            new[t] = s
    src, dst = reading_order(sources, targets)
    assert src.dtype == dst.dtype == np.int32
    for s, t in zip(src.tolist(), dst.tolist(), strict=True):
        assert t not in (0, s)
        old[t] = old[s]
    assert old == new


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 99])
def test_device_lists_in_reading_order_are_copied_up_to_the_count(count):
    pool, oracle = filled_states(mamba_config())
    src, dst = [2, 1, 5, 9, 9, 4, 6], [3, 2, 0, 8, 7, 9, 4]
    lists = (jnp.array(states, jnp.int32) for states in (src, dst))
    pool = donating(lambda pool, *args: pool.copy_states(*args))(pool, *lists, jnp.int32(count))
    oracle.copy(src[:count], dst[:count])
    oracle.expect(pool)


@pytest.mark.parametrize("count", [0, 1, 2, None])
def test_a_count_on_the_host_cuts_the_lists(count):
    pool, oracle = filled_states(mamba_config())
    pool = pool.copy_states([1, 0], [2, 1], count)
    oracle.copy([1, 0][:count], [2, 1][:count])
    oracle.expect(pool)


def test_a_copy_from_the_sink_empties_a_state():
    pool, oracle = filled_states(mamba_config())
    oracle.copy([0, 0], [3, 4])
    pool = pool.copy_states([0], [3]).reset_states(jnp.array([4, 0], jnp.int32))
    oracle.expect(pool)
    assert not any(np.any(part) for layer in range(3) for part in pool.read([3, 4], layer))


def test_a_traced_layer_writes_and_reads_as_a_static_one_does():
    config = mamba_config(start_layer=5)
    pool, oracle = filled_states(config)
    parts = random_parts(np.random.default_rng(2), config, 3, 4)
    states = jnp.array([6, 0, 9, 2], jnp.int32)

    def layer_step(pool, inputs):
        layer, parts = inputs
        pool = pool.write(states, layer, *parts)
        return pool, pool.read(states, layer)

    layers = jnp.arange(5, 8, dtype=jnp.int32)
    pool, read = jax.jit(lambda pool, parts: jax.lax.scan(layer_step, pool, (layers, parts)))(pool, parts)
    for layer in range(3):
        oracle.write(states, layer, [part[layer] for part in parts])
    oracle.expect(pool)
    for part, mine in zip(read, oracle.arrays, strict=True):
        np.testing.assert_array_equal(bits(part), bits(mine[:, states]))


def test_device_states_and_layers_outside_the_pool_are_neither_written_nor_read():
    config = mamba_config(start_layer=2)
    pool, oracle = filled_states(config)
    states = jnp.array([-1, 10, 2**31 - 1, -(2**31)], jnp.int32)
    parts = random_parts(np.random.default_rng(3), config, 4)
    pool = pool.write(states, 3, *parts).reset_states(states).copy_states(states, states)
    pool = pool.copy_states(jnp.arange(1, 5, dtype=jnp.int32), states)
    for layer in (-1, 0, 1, 5):
        pool = pool.write(np.array([1, 2, 3, 4]), jnp.int32(layer), *parts)
        assert not any(np.any(part) for part in pool.read([1, 2], jnp.int32(layer)))
    oracle.expect(pool)
    assert not any(np.any(part) for part in pool.read(states, 3))


def test_a_state_named_twice_on_the_device_keeps_elements_of_both_rows_alone_and_is_refused_when_debugging():
    pool, oracle = filled_states(mamba_config())
    parts = random_parts(np.random.default_rng(5), pool.config, 2)
    twice = jnp.array([4, 4], jnp.int32)
    with jax.disable_jit(), pytest.raises(ArgumentError, match="states must name each slot once"):
        pool.write(twice, 1, *parts)
    pool = pool.write(twice, 1, *parts).reset_states(jnp.array([5, 5], jnp.int32))
    for array, written, rows in zip(oracle.arrays, pool.read([4], 1), parts, strict=True):
        # On a GPU two programs write at once: an element is one row's or the other's.
        assert np.any([bits(written[0]) == bits(row) for row in rows], axis=0).all()
        array[1, 4], array[:, 5] = written[0], 0
    oracle.expect(pool)


def test_a_copy_from_outside_the_pool_empties_the_target():
    pool, oracle = filled_states(mamba_config())
    pool = pool.copy_states(jnp.array([-1, 10], jnp.int32), jnp.array([1, 2], jnp.int32))
    oracle.copy([0, 0], [1, 2])
    oracle.expect(pool)


def test_rows_are_cast_to_the_dtype_of_their_part():
    config = mamba_config(conv_dtype="float16", temporal_dtype=jnp.bfloat16)
    parts = random_parts(np.random.default_rng(4), mamba_config(conv_dtype="float32"), 2)
    oracle = NumpyStates(config)
    oracle.write([3, 4], 1, parts)
    oracle.expect(MambaPool.create(config).write([3, 4], 1, *parts))


@pytest.mark.parametrize(("platform", "stored"), [("cpu", np.uint16), ("gpu", jnp.bfloat16)])
def test_only_the_cpu_stores_narrow_floats_as_integers(platform, stored):
    pool = MambaPool.abstract(mamba_config(), platform=platform)
    assert (pool.conv.dtype, pool.temporal.dtype) == (np.dtype(stored), np.float32)
    assert pool.conv.shape == (3, 10, 8, 3)
    assert pool.temporal.shape == (3, 10, 4, 2, 5)


def test_sizes_count_the_sink():
    config = mamba_config()
    assert config.state_bytes == 3 * (8 * 3 * 2 + 4 * 2 * 5 * 4)
    assert config.pool_type is MambaPool
    assert MambaPool.create(config).size_bytes == MambaPool.abstract(config, platform="gpu").size_bytes
    assert MambaPool.create(config).size_bytes == 10 * config.state_bytes


def test_buffer_infos_say_where_each_state_lies():
    pool, oracle = filled_states(mamba_config(start_layer=4))
    infos = pool.get_contiguous_buf_infos()
    assert [(info.name, info.layer_ids) for info in infos] == [
        (name, (layer,)) for name in ("conv", "temporal") for layer in (4, 5, 6)
    ]
    for info in infos:
        memory = np.asarray(getattr(pool, info.name)).tobytes()
        state = memory[info.offset_bytes + 2 * info.page_bytes :][: info.page_bytes]
        rows = oracle.arrays[info.name == "temporal"][info.layer_ids[0] - 4]
        assert state == rows[2].tobytes()
        assert (info.shape, info.strides_bytes, info.size_bytes) == (rows.shape, rows.strides, rows.nbytes)
    assert pool.get_kv_size_bytes() == tuple(array.nbytes for array in oracle.arrays)


def test_a_cpu_copy_outlives_its_pool_and_fits_a_like_one():
    pool, oracle = filled_states(mamba_config())
    copy = pool.get_cpu_copy([5, 6])
    assert copy.num_tokens == 2
    wiped = pool.reset_states([5, 6])
    oracle.expect(wiped.load_cpu_copy(copy, [5, 6]))
    other = MambaPool.create(mamba_config(num_states=2)).load_cpu_copy(copy, [2, 1])
    for part, mine in zip(other.read([2, 1], 2), oracle.arrays, strict=True):
        np.testing.assert_array_equal(bits(part), bits(mine[2, [5, 6]]))


def test_lists_of_different_lengths_compile_once():
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    pool = MambaPool.create(mamba_config(num_states=11))  # no other test has these shapes
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pool = pool.copy_states([1], [2]).reset_states([3])
        first = len(compiled)
        pool.copy_states([1, 1, 2, 5], [3, 4, 6, 7]).copy_states([], []).reset_states([1, 2])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first > 0
    assert len(compiled) == first


WRONG = [
    (lambda p, c, t: p.write([1], 3, c, t), r"layer must be in \[0, 3\); got 3"),
    (lambda p, c, t: p.write([10], 0, c, t), r"states\[0\] must be a slot in \[0, 10\), got 10"),
    (lambda p, c, t: p.write([-1], 0, c, t), r"states\[0\]"),
    (lambda p, c, t: p.write([1, 2], 0, c, t), r"conv must have shape \(2, 8, 3\)"),
    (lambda p, c, t: p.write([1], 0, c, c), r"temporal must have shape \(1, 4, 2, 5\)"),
    (lambda p, c, t: p.write([1], 0, c.astype(np.int32), t), "conv must be floats"),
    (lambda p, c, t: p.write([1], 0, c, t.tolist()), "temporal must be a JAX or NumPy array"),
    (lambda p, c, t: p.write([1, 1], 0, np.concatenate([c, c]), np.concatenate([t, t])), "states must name each slot"),
    (lambda p, c, t: p.write([[1]], 0, c, t), "one-dimensional"),
    (lambda p, c, t: p.write([1.0], 0, c, t), "integers"),
    (lambda p, c, t: p.write(jnp.array([1], jnp.int8), 0, c, t), "int32"),
    (lambda p, c, t: p.read([10], 0), r"states\[0\]"),
    (lambda p, c, t: p.read([1], -1), "layer must be in"),
    (lambda p, c, t: p.read([1], "0"), "layer must be a JAX or NumPy array"),
    (lambda p, c, t: p.copy_states([1, 2], [3]), "dst must be as many as src, 2; got 1"),
    (lambda p, c, t: p.copy_states([1, 2], [3, 3]), "dst must name each state once"),
    (
        lambda p, c, t: p.copy_states([1, 2], [2, 1]),
        r"ring of copies: copy one .* aside first; got \[1, 2\]",
    ),
    (lambda p, c, t: p.copy_states([10], [1]), r"src\[0\]"),
    (lambda p, c, t: p.copy_states([1], [10]), r"dst\[0\]"),
    (lambda p, c, t: p.copy_states([1], [2], 2), r"count must be in \[0, 1\]"),
    (lambda p, c, t: p.copy_states([1], [2], -1), "count must be in"),
    (lambda p, c, t: p.copy_states([1], [2], 0.5), "count must be a JAX or NumPy array"),
    (lambda p, c, t: p.copy_states([1], [2], jnp.float32(1)), "count must be an int or int32"),
    (lambda p, c, t: p.copy_states([1], [2], jnp.array([1])), "count must be an int or int32"),
    (lambda p, c, t: p.reset_states([1, 1]), "states must name each slot once"),
    (lambda p, c, t: p.reset_states([10]), r"states\[0\]"),
    (lambda p, c, t: p.get_cpu_copy([10]), r"indices\[0\]"),
    (lambda p, c, t: p.load_cpu_copy(p.get_cpu_copy([1, 2]), [3]), "indices must name 2 slots"),
    (lambda p, c, t: p.load_cpu_copy(p.get_cpu_copy([1, 2]), [3, 3]), "indices must name each slot once"),
    (lambda p, c, t: p.load_cpu_copy("copy", [1]), "copy must be what get_cpu_copy returned; got str"),
    (lambda p, c, t: p.load_cpu_copy(make_pool(mha_config()).get_cpu_copy([4]), [6]), "copy must come from a pool"),
    (
        lambda p, c, t: p.load_cpu_copy(MambaPool.create(mamba_config(conv_dtype="float16")).get_cpu_copy([1]), [1]),
        "copy must come from a pool of the same layers, rows and dtype",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_refused_and_the_pool_lives_on(call, message):
    pool, oracle = filled_states(mamba_config())
    parts = random_parts(np.random.default_rng(8), pool.config, 1)
    with pytest.raises(ArgumentError, match=message):
        call(pool, *parts)
    oracle.expect(pool)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.read([1], 0),
        lambda p: p.get_cpu_copy([1]),
        lambda p: p.write([1], 0, *random_parts(np.random.default_rng(0), p.config, 1)),
        lambda p: p.copy_states([1], [2]),
        lambda p: p.reset_states([1]),
    ],
)
def test_a_consumed_pool_is_refused(call):
    pool, _ = filled_states(mamba_config())
    pool.reset_states([4])
    with pytest.raises(StalePoolError, match="use the pool which that step returned"):
        call(pool)


def test_a_borrowed_pool_is_read_but_not_written():
    pool, oracle = filled_states(mamba_config())
    pool.mark_borrowed()
    copy = pool.get_cpu_copy([3])
    with pytest.raises(BorrowedError):
        pool.reset_states([4])
    with pytest.raises(BorrowedError):
        pool.copy_states([1], [2])
    with pytest.raises(BorrowedError):
        pool.load_cpu_copy(copy, [1])
    oracle.expect(pool)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_states": 0}, "num_states must be positive"),
        ({"num_states": 2**31 - 1}, "num_states must leave int32 ids, below 2\\*\\*31 with the sink"),
        ({"num_states": 2**30, "temporal_shape": (2**20, 2**10, 2**10)}, r"below 2\*\*63 bytes; got \d+ bytes"),
        ({"num_states": 2.0}, "num_states must be positive, and an integer"),
        ({"layer_num": 0}, "layer_num must be positive"),
        ({"conv_shape": ()}, "conv_shape must be a tuple of positive integers"),
        ({"conv_shape": [8, 3]}, "conv_shape must be a tuple"),
        ({"temporal_shape": (4, 0, 5)}, "temporal_shape must be a tuple of positive integers"),
        ({"temporal_shape": 4}, "temporal_shape must be a tuple"),
        ({"conv_dtype": "float64"}, "conv_dtype must be one of"),
        ({"temporal_dtype": "no such"}, "temporal_dtype must be one of"),
        ({"shards": 2}, "shards must be 1 without an axis_name"),
        ({"axis_name": "tp", "shards": 3}, "conv_shape must begin with a multiple of shards = 3"),
        ({"axis_name": "tp", "shards": 8}, "temporal_shape must begin with a multiple of shards = 8: repeat the heads"),
        ({"end_layer": 7}, "end_layer must be 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ArgumentError, match=message):
        mamba_config(**sizes)
