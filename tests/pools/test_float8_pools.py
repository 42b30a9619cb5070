"""Every write of every pool saturates in float8, by one oracle; copies move bits."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcache import Layout, SWAConfig, SWAKVPool
from jaxcache.pools.mamba import MambaPool
from tests.kernels import oracles
from tests.pools.numpy_pool import double_sparse_config, make_pool, mha_config, mla_config
from tests.pools.numpy_states import mamba_config

FORMATS = pytest.mark.parametrize("dtype", oracles.FLOAT8_DTYPES, ids=lambda d: d.__name__)
SOURCES = pytest.mark.parametrize(
    "source", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda d: np.dtype(d).name
)
KINDS = pytest.mark.parametrize("make_config", [mha_config, mla_config, double_sparse_config])
LOC = np.array([5, 9, 4, 27], np.int32)


def edges(dtype, source, *shape: int) -> np.ndarray:
    """Rows of this shape."""
    with np.errstate(over="ignore"):
        return np.resize(oracles.float8_edges(dtype), shape).astype(source)


def expect(got, rows, dtype) -> None:
    """Each array that was read is what came of its rows."""
    for mine, theirs in zip(got if isinstance(got, tuple) else (got,), rows, strict=True):
        want = oracles.saturated(theirs, dtype)
        assert not np.isinf(want.astype(np.float32)).any()
        oracles.assert_same_float8(mine, want)


@FORMATS
@SOURCES
@KINDS
@pytest.mark.parametrize("layout", Layout)
def test_layers_and_all_layers(make_config, layout, dtype, source):
    config = make_config(dtype, layout=layout)
    rows = [edges(dtype, source, len(LOC), *row) for row in config.row_shapes]
    pool = make_pool(config).set_kv_buffer(1, LOC, *rows)
    expect(pool.gather(LOC, layer=1), rows, dtype)
    everywhere = [np.stack([array[::-1]] * 3) for array in rows]
    pool = pool.set_all_layers(LOC, *everywhere)
    expect(pool.gather(LOC), everywhere, dtype)
    pool = pool.move_kv_cache([6, 7, 8, 10], LOC)
    pool = pool.load_cpu_copy(pool.get_cpu_copy([6, 7, 8, 10]), [11, 12, 13, 14])
    expect(pool.gather([11, 12, 13, 14]), everywhere, dtype)


@FORMATS
def test_scaled_rows_saturate_behind_the_scale(dtype):
    config = mha_config(dtype)
    k, v = (edges(dtype, np.float32, len(LOC), *row) for row in config.row_shapes)
    pool = make_pool(config).set_kv_buffer(0, LOC, k, v, k_scale=0.25, v_scale=np.float32([[4.0], [0.5]]))
    with np.errstate(over="ignore"):
        expect(pool.gather(LOC, layer=0), [k / np.float32(0.25), v / np.float32([[4.0], [0.5]])], dtype)


@FORMATS
@SOURCES
def test_both_sides_of_a_windowed_pool(dtype, source):
    full, window = mha_config(dtype, layer_num=1), mha_config(dtype, layer_num=1, size=16)
    pool = SWAKVPool.create(SWAConfig(full=full, window=window, full_layers=(0,), window_layers=(1,)))
    pages = jnp.array([1, 2, 6], jnp.int32)
    pool = pool.with_window_map(pages, jnp.array([1, 2, 3], jnp.int32))
    rows = [edges(dtype, source, len(LOC), *row) for row in full.row_shapes]
    for layer in (0, 1):
        pool = pool.set_kv_buffer(layer, LOC, *rows)
        expect(pool.gather(LOC, layer), rows, dtype)


@FORMATS
@SOURCES
def test_states(dtype, source):
    pool = MambaPool.create(mamba_config(conv_dtype=dtype, temporal_dtype=dtype))
    parts = [edges(dtype, source, 4, *shape) for shape in pool.config.row_shapes]
    pool = pool.write([3, 1, 9, 4], 2, *parts)
    expect(pool.read([3, 1, 9, 4], 2), parts, dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_wider_floats_overflow_as_their_casts_do(dtype):
    rows = np.float32([1e5, -1e5, 3.4028235e38, np.inf, -np.inf, np.nan, 65504, 1]).reshape(1, 1, 8)
    config = mha_config(dtype, head_num=1, v_head_dim=8)
    k, v = make_pool(config).set_kv_buffer(0, [5], rows, rows).gather([5], layer=0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.asarray(k).astype(np.float32), rows.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(v).astype(np.float32), np.asarray(k).astype(np.float32))
