"""gather_pages, scatter_pages and move_rows: against NumPy, in jnp and as interpreted Triton source."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.kernels.copy_kv import move_rows
from jaxcache.kernels.copy_pages import gather_pages, scatter_pages
from jaxcache.kernels.dispatch import Implementation
from tests.kernels import conftest, oracles

SHAPES = [(3, 4, (2, 8), 11, 9), (1, 1, (33,), 20, 15), (2, 3, (5,), 5, 12)]  # layers, page size, row, pages, n


def make(shape, dtype):
    layers, page_size, row, num_pages, n = shape
    rng = np.random.default_rng()
    pool = oracles.random_bits(rng, (layers, num_pages * page_size, *row), dtype)
    blocks = oracles.random_bits(rng, (n, layers, page_size, *row), dtype)
    return pool, oracles.random_loc(rng, n, num_pages), blocks, page_size


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_against_numpy(shape, dtype):
    pool, pages, blocks, page_size = make(shape, dtype)
    got = gather_pages(jnp.array(pool), pages, page_size=page_size)
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(oracles.gather_pages(pool, pages, page_size)))
    got = scatter_pages(jnp.array(pool), pages, blocks, page_size=page_size)
    want = oracles.scatter_pages(pool, pages, blocks, page_size)
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(want))


@pytest.mark.skipif(not conftest.INTERPRETS, reason="this process compiles Triton source")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_source(shape, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from jaxcache.kernels import copy_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    monkeypatch.setattr(kernels, "STRETCH_BYTES", 16)  # several stretches a page
    monkeypatch.setattr(kernels, "MOVE_BYTES", 64)
    pool, pages, blocks, page_size = make(shape, np.uint8)
    sizes = pool.shape[0], pool.shape[1] // page_size
    width = page_size * int(np.prod(pool.shape[2:]))
    launch = kernels.pages_launch(len(pages), pool.shape[0], width, 1)
    poisoned = torch.full(blocks.shape, 77, dtype=torch.uint8)
    ids = torch.from_numpy(pages)
    torch_call(kernels.gather_pages_kernel, (torch.from_numpy(pool), ids), sizes, outputs=[poisoned], **launch)
    np.testing.assert_array_equal(poisoned.numpy(), oracles.gather_pages(pool, pages, page_size))
    written = torch.from_numpy(pool.copy())
    arrays = written, ids, torch.from_numpy(blocks)
    torch_call(kernels.scatter_pages_kernel, arrays, sizes, num_updates=1, **launch)
    np.testing.assert_array_equal(written.numpy(), oracles.scatter_pages(pool, pages, blocks, page_size))

    order = (1 + np.random.default_rng().permutation(pool.shape[1] - 1)).astype(np.int32)
    tgt, src = order[: len(order) // 2], order[len(order) // 4 :][: len(order) // 2]
    moved = torch.from_numpy(pool.copy())
    launch = kernels.move_launch(len(tgt), pool.shape[0], int(np.prod(pool.shape[2:])), 1)
    arrays = moved, torch.from_numpy(tgt), torch.from_numpy(src)
    torch_call(kernels.move_rows_kernel, arrays, (len(tgt), pool.shape[1]), num_updates=1, **launch)
    np.testing.assert_array_equal(moved.numpy(), oracles.move_rows(pool, tgt, src))


def test_bad_arguments():
    pool, pages = jnp.zeros((2, 12, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ArgumentError, match="page_size must divide the pool's 12 slots, got 5"):
        gather_pages(pool, pages, page_size=5)
    with pytest.raises(ArgumentError, match="blocks must have shape"):
        scatter_pages(pool, pages, jnp.zeros((2, 2, 3, 3)), page_size=4)
    with pytest.raises(ArgumentError, match="storage dtype float32"):
        scatter_pages(pool, pages, jnp.zeros((2, 2, 4, 3), jnp.int32), page_size=4)
    with pytest.raises(UnsupportedError, match="gather_pages has no Mosaic kernel"):
        gather_pages(pool, pages, page_size=4, implementation=Implementation.MOSAIC)
    with pytest.raises(ArgumentError, match="pool must be a JAX or NumPy array"):
        move_rows([], pages, pages)  # pyright: ignore[reportArgumentType]
    assert gather_pages(pool, jnp.zeros(0, jnp.int32), page_size=4).shape == (0, 2, 4, 3)
