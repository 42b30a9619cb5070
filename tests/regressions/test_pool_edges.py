"""Sharp edges of the systems before us, S-24 to S-30: each stays fixed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.compat.ascend import AscendMLAPagedTokenToKVPool, AscendTokenToKVPool
from jaxcache.errors import ArgumentError
from jaxcache.pools.double_sparse import DoubleSparseTokenToKVPool
from jaxcache.pools.layout import Layout
from jaxcache.pools.mla import MLATokenToKVPool
from tests.pools.numpy_pool import (
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

KINDS = [
    (mha_config, None),
    (mla_config, None),
    (mha_config, AscendTokenToKVPool),
    (mla_config, AscendMLAPagedTokenToKVPool),
]
BY_KIND = pytest.mark.parametrize(("make_config", "kind"), KINDS)


def filled_pool_of(kind, config):
    """A filled pool of the config's own kind, or of an Ascend one, with its oracle."""
    if kind is None:
        return filled_pool(config)
    rows = NumpyPool(config)
    everything = np.arange(config.page_size, config.rows)
    values = [random_rows(np.random.default_rng(3), a.dtype, (3, len(everything), *a.shape[2:])) for a in rows.arrays]
    for layer in range(3):
        rows.write(layer, everything, [value[layer] for value in values])
    pool = kind.create(config).set_all_layers(everything, *values)
    assert type(pool) is kind and pool.config.layout is Layout.PAGE_MAJOR
    abstract = kind.abstract(config, platform="cpu")
    assert [buffer.shape for buffer in abstract.buffers] == [buffer.shape for buffer in pool.buffers]
    return pool, rows


def test_s24_an_explicit_end_layer_of_zero_is_honoured():
    assert mha_config(layer_num=1, start_layer=0, end_layer=0).end_layer == 0
    with pytest.raises(ArgumentError, match="end_layer must be 2, for 3 layers from layer 0 on, or None; got 0"):
        mha_config(layer_num=3, end_layer=0)
    assert mha_config(layer_num=3, start_layer=4).end_layer == 6


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("as_array", [np.array, jnp.array])
def test_s25_scales_divide_out_of_place_whatever_the_dtypes(dtype, as_array):
    config = mha_config(dtype)
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, np.dtype(dtype), (2, *row)) for row in config.row_shapes]
    k, v = map(as_array, rows)
    pool = make_pool(config).set_kv_buffer(1, [4, 5], k, v, k_scale=2.0, v_scale=np.float32([[0.25], [8.0]]))
    np.testing.assert_array_equal(bits(k), bits(rows[0]))
    np.testing.assert_array_equal(bits(v), bits(rows[1]))
    oracle = NumpyPool(config)
    scaled = [rows[0].astype(np.float32) / 2, rows[1].astype(np.float32) / np.float32([[0.25], [8.0]])]
    oracle.write(1, [4, 5], scaled)
    oracle.expect(pool)


@pytest.mark.parametrize(("rank", "rope"), [(96, 64), (512, 64), (130, 2), (1, 1), (127, 129)])
def test_s26_latent_rows_of_any_widths(rank, rope):
    config = mla_config(jnp.bfloat16, kv_lora_rank=rank, qk_rope_head_dim=rope)
    rows = random_rows(np.random.default_rng(1), config.dtype, (3, rank + rope))
    oracle = NumpyPool(config)
    oracle.write(2, [9, 4, 27], [rows])
    oracle.expect(MLATokenToKVPool.create(config).set_mla_kv_buffer(2, [9, 4, 27], rows[:, :rank], rows[:, rank:]))


@BY_KIND
def test_s27_every_method_takes_global_layer_ids(make_config, kind):
    config = make_config(start_layer=10)
    pool, oracle = filled_pool_of(kind, config)
    rows = [random_rows(np.random.default_rng(2), config.dtype, (1, *row)) for row in config.row_shapes]
    pool = pool.set_kv_buffer(11, [5], *rows)
    oracle.write(1, [5], rows)
    oracle.expect(pool)
    np.testing.assert_array_equal(pool.get_key_buffer(11), oracle.arrays[0][1])
    np.testing.assert_array_equal(pool.get_value_buffer(12)[5], pool.get_kv_buffer(12)[1][5])
    first = pool.gather([5], layer=11)
    np.testing.assert_array_equal(first[0] if make_config is mha_config else first, rows[0])
    for layer in (0, 9, 13):
        for read in (pool.get_key_buffer, pool.get_value_buffer, pool.get_kv_buffer):
            with pytest.raises(ArgumentError, match=r"layer must be in \[10, 13\)"):
                read(layer)
        with pytest.raises(ArgumentError, match=r"layer must be in \[10, 13\)"):
            pool.set_kv_buffer(layer, [5], *rows)
    oracle.expect(pool)


@BY_KIND
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=str)
def test_s28_copies_moves_and_getters_work_for_every_kind_of_pool(make_config, kind, dtype):
    config = make_config(dtype)
    pool, oracle = filled_pool_of(kind, config)
    for array in (*pool.get_kv_buffer(0), pool.get_key_buffer(0), pool.get_value_buffer(0)):
        assert array.dtype == np.dtype(dtype)
    pool = pool.load_cpu_copy(pool.get_cpu_copy([5, 6, 7]), [7, 12, 5])
    oracle.move([7, 12, 5], [5, 6, 7])
    pool = pool.move_kv_cache([4, 5, 6], [5, 6, 4])
    oracle.move([4, 5, 6], [5, 6, 4])
    oracle.expect(pool)


def test_s28_a_write_may_override_the_layer_and_latent_parts_are_written_by_themselves():
    rows = [random_rows(np.random.default_rng(4), np.dtype(np.float32), (2, *row)) for row in ((2, 8), (2, 4), (17,))]
    pool, oracle = filled_pool_of(AscendTokenToKVPool, mha_config())
    oracle.write(2, [5, 6], rows[:2])
    oracle.expect(pool.set_kv_buffer(99, [5, 6], *rows[:2], layer_id_override=2))
    pool, oracle = filled_pool_of(AscendMLAPagedTokenToKVPool, mla_config())
    oracle.write(1, [5, 6], rows[2:])
    oracle.expect(pool.set_mla_kv_buffer(1, [5, 6], rows[2][:, None, :12], rows[2][:, None, 12:]))
    assert pool.is_stale


@pytest.mark.parametrize("make_config", [double_sparse_config, page_major(double_sparse_config)])
def test_s29_every_slot_that_has_a_key_has_a_label(make_config):
    config = make_config(jnp.bfloat16)
    pool, oracle = filled_pool(config)
    assert pool.label.shape[:2] == pool.k.shape[:2]
    rows = [random_rows(np.random.default_rng(5), config.dtype, (4, *row)) for row in config.row_shapes]
    beyond_size = [24, 25, 26, 27]  # of a pool of 24 slots and the sink page
    pool = pool.set_kv_buffer(2, beyond_size, *rows)
    oracle.write(2, beyond_size, rows)
    for read, array in zip(
        (pool.get_key_buffer, pool.get_value_buffer, pool.get_label_buffer), oracle.arrays, strict=True
    ):
        np.testing.assert_array_equal(bits(read(2)), bits(array[2]))
    pool = pool.move_kv_cache([5], [27])
    oracle.move([5], [27])
    pool = pool.load_cpu_copy(pool.get_cpu_copy([26]), [6])
    oracle.move([6], [26])
    oracle.expect(pool)
    with pytest.raises(ArgumentError, match=r"label must have shape \(4, 2, 3\)"):
        pool.set_kv_buffer(2, beyond_size, *rows[:2], rows[2][:, :, :2])
    oracle.expect(pool)
    assert DoubleSparseTokenToKVPool is type(pool)


@pytest.mark.parametrize("n", [1, 17, 5000])
def test_s30_move_lists_of_any_length_are_simultaneous(n):
    config = mha_config(jnp.bfloat16, size=5000, page_size=1, layer_num=2)
    pool, oracle = filled_pool(config)
    targets = np.arange(1, n + 1)
    sources = np.roll(targets, 1)
    oracle.move(targets, sources)
    oracle.expect(pool.move_kv_cache(targets, sources))
