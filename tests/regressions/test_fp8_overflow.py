"""A number beyond the range of float8 was NaN where JAX wrote it, and one NaN spoils every later attention over it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels.write_quantized import quantize_int8
from tests.pools.numpy_pool import make_pool, mha_config, mla_config


def attended(k: jax.Array, v: jax.Array) -> np.ndarray:
    """What a query of ones reads of `(tokens, heads, dim)` keys and values."""
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    return np.asarray(jnp.einsum("ht,thd->hd", jax.nn.softmax(jnp.einsum("thd->ht", k)), v))


@pytest.mark.parametrize(("dtype", "largest"), [(jnp.float8_e4m3fn, 448), (jnp.float8_e5m2, 57344)])
@pytest.mark.parametrize("outlier", [500.0, 1e6, -1e30, np.inf, -np.inf])
def test_an_outlier_saturates_and_the_attention_stays_finite(dtype, largest, outlier):
    config = mha_config(dtype, v_head_dim=8)
    rows = np.ones((4, 2, 8), np.float32)
    rows[2, 0, 3] = outlier
    k, v = make_pool(config).set_kv_buffer(0, [4, 5, 6, 7], rows, rows).gather([4, 5, 6, 7], layer=0)
    stored = float(k[2, 0, 3])
    assert stored == (np.sign(outlier) * largest if abs(outlier) > largest else 512.0)  # 500 rounds to 512 in e5m2
    assert np.isfinite(attended(k, v)).all()
    latent = rows.reshape(4, 16)[:, :12], rows.reshape(4, 16)[:, :5]
    rows_of = make_pool(mla_config(dtype)).set_mla_kv_buffer(0, [4, 5, 6, 7], *latent).gather([4, 5, 6, 7], layer=0)
    assert float(rows_of[2, 3]) == stored


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_a_nan_stays_one(dtype):
    rows = np.full((1, 2, 8), np.nan, np.float32)
    k, v = make_pool(mha_config(dtype, v_head_dim=8)).set_kv_buffer(0, [4], rows, -rows).gather([4], layer=0)
    assert np.isnan(np.asarray(k).astype(np.float32)).all() and np.isnan(np.asarray(v).astype(np.float32)).all()


def test_an_infinity_does_not_make_nans_of_an_int8_head():
    rows = np.array([[[1.0, np.inf, -3.0], [np.nan, 1.0, np.inf], [1.0, 2.0, 127.0]]], np.float32)
    payload, scales = quantize_int8(rows)
    assert payload.tolist() == [[[0, 127, 0], [0, 0, 0], [1, 2, 127]]]
    assert scales[0, 0] == np.float32(np.finfo(np.float32).max) * np.float32(1 / 127)
    assert np.isnan(scales[0, 1]) and scales[0, 2] == 1.0
