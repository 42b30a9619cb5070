"""Float8 saturates in every implementation of every write: against NumPy and ml_dtypes, on a CPU and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcache.kernels.dispatch import Implementation
from jaxcache.kernels.float8 import float8_bits
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from jaxcache.kernels.write_quantized import write_kv_fp8
from jaxcache.pools.config import storage_dtype, to_storage
from tests.kernels import oracles

FORMATS = pytest.mark.parametrize("dtype", oracles.FLOAT8_DTYPES, ids=lambda d: d.__name__)
SOURCES = [ml_dtypes.bfloat16, np.float16, np.float32]


def edges(dtype, source) -> np.ndarray:
    """Rows `(4, 2, 16)`, rounded to what the caller has."""
    with np.errstate(over="ignore"):
        return oracles.float8_edges(dtype).astype(source).reshape(4, 2, 16)


@FORMATS
@pytest.mark.parametrize("source", SOURCES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("how", [jax.jit, lambda step: step])
def test_every_number_becomes_the_nearest_one(dtype, source, how):
    rows = edges(dtype, source)
    oracles.assert_same_float8(np.asarray(how(lambda x: float8_bits(x, dtype))(rows)).view(dtype), rows_of(rows, dtype))


def rows_of(rows, dtype) -> np.ndarray:
    """The oracle, which is nowhere infinite."""
    want = oracles.saturated(rows, dtype)
    assert not np.isinf(want.astype(np.float32)).any()
    return want


@FORMATS
@pytest.mark.parametrize("theirs", oracles.FLOAT8_DTYPES, ids=lambda d: d.__name__)
def test_the_bits_of_one_format_are_kept_those_of_the_other_are_numbers(dtype, theirs):
    rows = np.arange(256).astype(np.uint8).view(theirs)
    got = np.asarray(to_storage(rows, dtype, np.uint8)).view(dtype)
    if dtype is theirs:
        np.testing.assert_array_equal(oracles.bits(got), oracles.bits(rows))
    else:
        oracles.assert_same_float8(got, rows_of(rows, dtype))


@FORMATS
def test_every_implementation_writes_what_the_cast_made(run, dtype):
    rows, loc = edges(dtype, np.float32), np.array([3, 0, 7, 1], np.int32)
    stored, pool = np.asarray(to_storage(rows, dtype, np.uint8)), np.zeros((1, 8, 2, 16), np.uint8)
    want = oracles.put_rows(pool, 0, loc, rows_of(rows, dtype).view(np.uint8))
    for got in run.write_kv(pool, pool, 0, loc, stored, stored):
        oracles.assert_same_float8(got.view(dtype), want.view(dtype))
    flat = stored.reshape(4, 32)
    got = run.write_mla_kv(pool.reshape(1, 8, 32), 0, loc, flat[:, :16], flat[:, 16:])
    oracles.assert_same_float8(got.view(dtype), want.reshape(1, 8, 32).view(dtype))


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("source", SOURCES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("implementation", list(Implementation))
def test_on_a_gpu(dtype, source, implementation):
    """Cast, write and quantising write in one jit each, where XLA may fuse them."""
    rows, loc = edges(dtype, source), np.array([3, 0, 7, 1], np.int32)
    storage = storage_dtype(dtype, "gpu")
    pool = np.zeros((1, 8, 2, 16), dtype)
    want = oracles.put_rows(pool, 0, loc, rows_of(rows, dtype))

    @jax.jit
    def write(pool, rows):
        stored = to_storage(rows, dtype, storage)
        return write_kv(pool, pool, 0, loc, stored, stored, implementation=implementation)

    @jax.jit
    def write_latent(pool, rows):
        stored = to_storage(rows, dtype, storage).reshape(4, 32)
        return write_mla_kv(pool, 0, loc, stored[:, :16], stored[:, 16:], implementation=implementation)

    for got in write(jnp.array(pool), rows):
        oracles.assert_same_float8(got, want)
    oracles.assert_same_float8(write_latent(jnp.array(pool.reshape(1, 8, 32)), rows), want.reshape(1, 8, 32))
    if implementation is not Implementation.MOSAIC:  # which has no write that quantises
        quantise = functools.partial(write_kv_fp8, implementation=implementation)
        ones = jnp.ones(()), jnp.ones(2)
        for got in jax.jit(quantise)(jnp.array(pool), jnp.array(pool), 0, loc, rows, rows, *ones):
            oracles.assert_same_float8(got, want)
