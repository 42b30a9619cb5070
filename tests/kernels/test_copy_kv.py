"""gather_rows, scatter_rows and move_rows against NumPy."""

import jax
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.kernels.copy_kv import copy_large_rows, gather_rows, move_rows, scatter_rows
from tests.kernels import oracles

SHAPES = [(3, 20, 2, 4), (2, 33, 9), (1, 9, 5)]


@pytest.fixture(params=[(shape, dtype) for shape in SHAPES for dtype in oracles.STORAGE_DTYPES], ids=str)
def pool(request):
    shape, dtype = request.param
    return oracles.random_bits(np.random.default_rng(shape[1]), shape, dtype)


copy_large = jax.jit(copy_large_rows, donate_argnums=0)


def test_gather_reads_rows_and_zeros_outside(pool):
    loc = oracles.random_loc(np.random.default_rng(1), 40, pool.shape[1])
    got = jax.jit(gather_rows)(pool_on_device(pool), loc)
    want = np.zeros((pool.shape[0], 40, *pool.shape[2:]), pool.dtype)
    for i, slot in enumerate(loc):
        if 0 <= slot < pool.shape[1]:
            want[:, i] = pool[:, slot]
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(want))


def test_scatter_puts_rows_in_every_layer(pool):
    rng = np.random.default_rng(2)
    loc = oracles.random_loc(rng, 30, pool.shape[1])
    rows = oracles.random_bits(rng, (pool.shape[0], 30, *pool.shape[2:]), pool.dtype)
    got = jax.jit(scatter_rows, donate_argnums=0)(pool_on_device(pool), loc, rows)
    for layer in range(pool.shape[0]):
        want = oracles.put_rows(pool, layer, loc, rows[layer])[layer]
        np.testing.assert_array_equal(oracles.bits(got[layer]), oracles.bits(want))


def test_a_round_trip_restores_the_pool(pool):
    loc = (1 + np.random.default_rng(3).permutation(pool.shape[1] - 1)).astype(np.int32)
    rows = gather_rows(pool_on_device(pool), loc)
    empty = pool_on_device(np.zeros_like(pool))
    np.testing.assert_array_equal(oracles.bits(scatter_rows(empty, loc, rows)[:, 1:]), oracles.bits(pool[:, 1:]))


def test_move_is_simultaneous(pool):
    """A rotation: every source is also a target."""
    src = np.array([1, 2, 3, 4, 0, 0], np.int32)
    tgt = np.array([2, 3, 4, 1, 0, 0], np.int32)
    got = jax.jit(move_rows, donate_argnums=0)(pool_on_device(pool), tgt, src)
    want = pool.copy()
    want[:, tgt[:4]] = pool[:, src[:4]]
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(want))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 8, 99])
def test_large_rows_are_copied_in_every_pool_up_to_the_count(pool, count):
    """Slot 1 is read by two copies and then overwritten, slot 0 is padding, and slots outside are empty."""
    other = oracles.random_bits(np.random.default_rng(4), (2, pool.shape[1], 3), np.float32)
    src = np.array([1, 1, 7, 4, 6, -1, 8], np.int32)
    tgt = np.array([2, 3, 1, 0, 5, 4, 6], np.int32)
    got = copy_large((pool_on_device(pool), pool_on_device(other)), tgt, src, jax.numpy.int32(count))
    for array, want in zip(got, (pool.copy(), other.copy()), strict=True):
        for s, t in zip(src[:count], tgt[:count], strict=True):
            if t:
                want[:, t] = want[:, s] if s >= 0 else np.zeros_like(want[:, 0])
        np.testing.assert_array_equal(oracles.bits(array), oracles.bits(want))


def test_refusals():
    pool, loc = jax.numpy.zeros((2, 8, 4)), np.zeros(3, np.int32)
    with pytest.raises(ArgumentError, match="rows must have shape"):
        scatter_rows(pool, loc, np.zeros((2, 4, 4), np.float32))
    with pytest.raises(ArgumentError, match="storage dtype"):
        scatter_rows(pool, loc, np.zeros((2, 3, 4), np.float64))
    with pytest.raises(ArgumentError, match="tgt, src must have one length"):
        move_rows(pool, loc, loc[:2])
    with pytest.raises(ArgumentError, match="tgt, src must have one length"):
        copy_large_rows([pool], loc, loc[:2], 2)
    with pytest.raises(ArgumentError, match="loc must be a JAX or NumPy array"):
        gather_rows(pool, [1, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="pool must have at least 2 dimensions"):
        gather_rows(pool[0, 0], loc)


def pool_on_device(pool: np.ndarray) -> jax.Array:
    return jax.numpy.array(pool)
