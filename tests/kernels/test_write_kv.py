"""write_kv and write_mla_kv: bit for bit, on poisoned pools, with padding on every side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from tests.kernels import oracles

KV_SHAPES = [  # layers, slots, heads, k_dim, v_dim, n
    (1, 8, 1, 1, 1, 1),
    (3, 40, 2, 8, 8, 16),
    (2, 33, 3, 5, 7, 50),
    (2, 96, 4, 24, 16, 90),
]
MLA_SHAPES = [(2, 40, 96, 33, 21), (3, 40, 64, 16, 16), (1, 20, 1, 1, 30), (2, 50, 130, 64, 40)]  # .., rank, rope, n


@pytest.mark.parametrize("dtype", oracles.STORAGE_DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", KV_SHAPES, ids=str)
def test_write_kv(run, shape, dtype):
    layers, slots, heads, k_dim, v_dim, n = shape
    rng = np.random.default_rng(n)
    k_pool = oracles.random_bits(rng, (layers, slots, heads, k_dim), dtype)
    v_pool = oracles.random_bits(rng, (layers, slots, heads, v_dim), dtype)
    k = oracles.random_bits(rng, (n, heads, k_dim), dtype)
    v = oracles.random_bits(rng, (n, heads, v_dim), dtype)
    loc, layer = oracles.random_loc(rng, n, slots), layers - 1
    got_k, got_v = run.write_kv(k_pool, v_pool, layer, loc, k, v)
    np.testing.assert_array_equal(oracles.bits(got_k), oracles.bits(oracles.put_rows(k_pool, layer, loc, k)))
    np.testing.assert_array_equal(oracles.bits(got_v), oracles.bits(oracles.put_rows(v_pool, layer, loc, v)))


@pytest.mark.parametrize("dtype", oracles.STORAGE_DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", MLA_SHAPES, ids=str)
def test_write_mla_kv(run, shape, dtype):
    layers, slots, rank, rope_width, n = shape
    rng = np.random.default_rng(n)
    pool = oracles.random_bits(rng, (layers, slots, rank + rope_width), dtype)
    nope, rope = oracles.random_bits(rng, (n, rank), dtype), oracles.random_bits(rng, (n, rope_width), dtype)
    loc = oracles.random_loc(rng, n, slots)
    got = run.write_mla_kv(pool, 0, loc, nope, rope)
    want = oracles.put_rows(pool, 0, loc, np.concatenate([nope, rope], axis=1))
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(want))


@pytest.mark.parametrize("layer", [-1, 2, 2**31 - 1, -(2**31)])
def test_a_layer_outside_the_stack_writes_nothing(run, layer):
    pool, rows = np.zeros((2, 8, 1, 4), np.float32), np.ones((3, 1, 4), np.float32)
    loc = np.array([1, 2, 3], np.int32)
    got_k, got_v = run.write_kv(pool, pool, layer, loc, rows, rows)
    assert not got_k.any() and not got_v.any()
    assert not run.write_mla_kv(pool[:, :, 0], layer, loc, rows[:, 0, :3], rows[:, 0, :1]).any()


def test_layer_is_an_operand_not_a_constant():
    """One trace and one carry serve all layers of a scan."""
    traces = []

    @jax.jit
    def write_all_layers(k_pool, v_pool, loc, k, v):
        def write_layer(pools, layer):
            traces.append(1)
            return write_kv(pools[0], pools[1], layer, loc, k + layer, v - layer), None

        return jax.lax.scan(write_layer, (k_pool, v_pool), jnp.arange(5, dtype=jnp.int32))[0]

    pool, rows = jnp.zeros((5, 8, 2, 4)), jnp.ones((3, 2, 4))
    k_pool, v_pool = write_all_layers(pool, pool, jnp.array([7, 0, 2], jnp.int32), rows, rows)
    for layer in range(5):
        assert (k_pool[layer, jnp.array([2, 7])] == 1 + layer).all() and (v_pool[layer, 7] == 1 - layer).all()
        assert not k_pool[layer, jnp.array([0, 1, 3, 4, 5, 6])].any()
    assert len(traces) == 1


def test_nothing_to_write(run):
    pool, none = np.ones((1, 4, 1, 2), np.float32), np.zeros((0, 1, 2), np.float32)
    got_k, got_v = run.write_kv(pool, pool, 0, np.zeros(0, np.int32), none, none)
    assert got_k.all() and got_v.all()
    assert run.write_mla_kv(pool[:, :, 0], 0, np.zeros(0, np.int32), none[:, 0, :1], none[:, 0, :1]).all()


GOOD_KV: dict[str, Any] = {
    "k_pool": jnp.zeros((2, 8, 2, 4)),
    "v_pool": jnp.zeros((2, 8, 2, 6)),
    "layer": 0,
    "loc": jnp.zeros(3, jnp.int32),
    "k": jnp.zeros((3, 2, 4)),
    "v": jnp.zeros((3, 2, 6)),
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": jnp.zeros((3, 2, 4), jnp.float16)}, "k must have the pool's storage dtype float32, got float16"),
        ({"v": jnp.zeros((3, 2, 4))}, r"v must have shape \(3, 2, 6\)"),
        ({"k": jnp.zeros((4, 2, 4))}, "k must have shape"),
        ({"loc": np.zeros(3, np.int64)}, "loc must be a one-dimensional int32"),
        ({"loc": jnp.zeros((3, 1), jnp.int32)}, "loc must be a one-dimensional int32"),
        ({"layer": 2}, r"layer must be in \[0, 2\), got 2"),
        ({"layer": -1}, "layer must be in"),
        ({"layer": jnp.zeros(1, jnp.int32)}, "layer must be an int or an int32 scalar"),
        ({"layer": "0"}, "layer must be"),
        ({"v_pool": jnp.zeros((3, 8, 2, 6))}, "same layers and slots"),
        ({"k_pool": jnp.zeros((2, 8, 8))}, "k_pool must have 4 dimensions"),
    ],
)
def test_write_kv_refuses(change, named):
    with pytest.raises(ArgumentError, match=named):
        write_kv(**{**GOOD_KV, **change})


@pytest.mark.parametrize(
    ("nope", "rope", "named"),
    [
        (jnp.zeros((3, 5)), jnp.zeros((3, 2)), "rope must have shape"),
        (jnp.zeros((2, 5)), jnp.zeros((3, 3)), "nope must have shape"),
        (jnp.zeros((3, 5)), jnp.zeros((3, 3), jnp.bfloat16), "rope must have the pool's storage dtype"),
        (jnp.zeros((3, 9)), jnp.zeros((3, 0)), "rope must have shape"),
        (None, jnp.zeros((3, 3)), "nope must be a JAX or NumPy array"),
    ],
)
def test_write_mla_kv_refuses(nope, rope, named):
    with pytest.raises(ArgumentError, match=named):
        write_mla_kv(jnp.zeros((1, 8, 8)), 0, jnp.zeros(3, jnp.int32), nope, rope)
