"""The Mosaic GPU kernels under Pallas's interpreter: control flow, offsets and masks, on a machine with no GPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import oracles

pytestmark = pytest.mark.mosaic


@pytest.fixture
def interpret():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


@pytest.mark.parametrize("layer", [1, -1, 2])
@pytest.mark.parametrize("n", [12, 7])
def test_write_parts(interpret, n, layer, monkeypatch):
    from jaxcache.kernels import write_kv_mosaic as mosaic

    monkeypatch.setattr(mosaic, "FULL_GRID", 2)  # several rows a block also on small inputs
    rng = np.random.default_rng()
    pool = oracles.random_bits(rng, (2, 40, 24), np.uint16)
    rows, loc = oracles.random_bits(rng, (n, 24), np.uint16), oracles.random_loc(rng, n, 40)
    targets = (mosaic.Target(0, 0), mosaic.Target(0, 16))
    parts = rows[:, :16], rows[:, 16:]
    (got,) = mosaic.write_parts((jnp.array(pool),), jnp.int32(layer), loc, parts, targets=targets, interpret=interpret)
    np.testing.assert_array_equal(got, oracles.put_rows(pool, layer, loc, rows))


def test_write_two_pools(interpret):
    from jaxcache.kernels import write_kv_mosaic as mosaic

    rng = np.random.default_rng()
    pools = [oracles.random_bits(rng, (1, 20, 2, dim), np.uint16) for dim in (8, 12)]
    rows = [oracles.random_bits(rng, (8, 2, dim), np.uint16) for dim in (8, 12)]
    loc, targets = oracles.random_loc(rng, 8, 20), (mosaic.Target(0, 0), mosaic.Target(1, 0))
    got = mosaic.write_parts(
        tuple(map(jnp.array, pools)), jnp.int32(0), loc, tuple(rows), targets=targets, interpret=interpret
    )
    for result, pool, row in zip(got, pools, rows, strict=True):
        np.testing.assert_array_equal(result, oracles.put_rows(pool, 0, loc, row))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_alloc_extend(interpret, page_size):
    from jaxcache.kernels import alloc_pages_mosaic as mosaic

    prefix, seq, last, pages = oracles.random_batch(np.random.default_rng(), 7, page_size, max_len=200)
    num_tokens = int((seq - prefix).sum()) + 9
    for given in (pages, pages[: len(pages) // 2 + 1]):
        options = {"page_size": page_size, "num_tokens": num_tokens}
        got = mosaic.alloc_extend(*map(jnp.asarray, (prefix, seq, last, given)), **options, interpret=interpret)
        np.testing.assert_array_equal(got, oracles.extend(prefix, seq, last, given, page_size, num_tokens))


@pytest.mark.parametrize("page_size", [1, 4])
def test_alloc_decode(interpret, page_size):
    from jaxcache.kernels import alloc_pages_mosaic as mosaic

    rng = np.random.default_rng()
    _, seq, last, pages = oracles.random_batch(rng, 9, page_size, max_len=40, decode=True)
    seq = np.where(rng.random(9) < 0.3, 0, seq).astype(np.int32)
    for given in (np.append(pages, np.int32(7)), np.append(pages[:1], np.int32(3))):
        got = mosaic.alloc_decode(*map(jnp.asarray, (seq, last, given)), page_size=page_size, interpret=interpret)
        np.testing.assert_array_equal(got, oracles.decode(seq, last, given, page_size))
