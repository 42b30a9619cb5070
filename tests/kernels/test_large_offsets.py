"""Pools of more than 2^31 elements: no element offset is computed in 32 bits.

A pool of one-byte elements gets there at 2 GiB, and between 2 and 4 GiB a compiler that looks at bytes may still think
that 32 bits suffice. Nothing of that size is touched here but in the tests marked slow: memory that nobody reads or
writes costs nothing, and compiling needs none.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels import write_kv as ops
from jaxcache.kernels.copy_kv import gather_rows, move_rows, scatter_rows
from jaxcache.kernels.dispatch import Implementation
from jaxcache.kernels.in_place import inspect_compiled
from tests.kernels import h200
from tests.kernels.conftest import HAS_GPU, INTERPRETS

SLOTS, HEADS, DIM = 2**20, 8, 128
WIDTH = HEADS * DIM  # a layer of bytes is 1 GiB
LAYERS = 5
LAST = SLOTS - 1
# Layer and slot; element offsets just below 2^31, past it, below 2^32, and past that.
PLACES = [(1, LAST), (2, 0x123), (2, LAST), (3, 77), (3, LAST), (4, 0x456), (4, LAST)]


@pytest.mark.skipif(not INTERPRETS, reason="this process does not interpret Triton source")
@pytest.mark.parametrize("is_mla", [False, True], ids=["kv", "mla_kv"])
@pytest.mark.parametrize(("layer", "slot"), PLACES)
def test_triton_source_writes_past_32_bits(layer, slot, is_mla):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from jaxcache.kernels import triton_call, write_kv_triton

    # Room below the pool: an offset that wraps to a negative number lands there and is seen.
    below = 2**31
    memory = np.zeros(below + LAYERS * SLOTS * WIDTH, np.uint8)  # never touched as a whole
    pool = torch.from_numpy(memory[below : below + 1])  # the kernel takes the address; the interpreter copies one byte
    row = torch.from_numpy(np.random.default_rng(layer).integers(1, 256, (1, WIDTH)).astype(np.uint8))
    where, loc = (torch.tensor([value], dtype=torch.int32) for value in (layer, slot))
    small = torch.zeros(1, dtype=torch.uint8), torch.zeros((1, 1), dtype=torch.uint8)
    if is_mla:
        kernel, arrays = write_kv_triton.write_mla_kv_kernel, (pool, where, loc, row[:, :1000], row[:, 1000:])
        arrays = tuple(array.contiguous() for array in arrays)
        launch = write_kv_triton.write_mla_kv_launch(1, 1000, WIDTH - 1000, 1)
    else:
        # The other array of the pool is one element wide: whatever it gets lies in room of its own.
        small = torch.from_numpy(np.zeros(LAYERS * SLOTS, np.uint8)[:1]), small[1]
        kernel, arrays = write_kv_triton.write_kv_kernel, (pool, small[0], where, loc, row, small[1])
        launch = write_kv_triton.write_kv_launch(1, WIDTH, 1, 1)
    triton_call.torch_call(kernel, arrays, (1, LAYERS, SLOTS), num_updates=1 if is_mla else 2, **launch)
    offset = (layer * SLOTS + slot) * WIDTH
    np.testing.assert_array_equal(memory[below + offset :][:WIDTH], row.numpy()[0])
    for wrapped in {offset % 2**32, (offset + 2**31) % 2**32 - 2**31, offset % 2**31} - {offset}:
        assert not memory[below + wrapped :][:WIDTH].any()


def scatter(pool, loc, rows):
    return scatter_rows(pool, loc, jnp.broadcast_to(rows, (pool.shape[0], *rows.shape)))


def write(pool, loc, rows, implementation):
    v_dim = 2  # a row of 16 bytes: Mosaic's bulk copies move no less
    v_pool = jnp.zeros((pool.shape[0], SLOTS, HEADS, v_dim), pool.dtype)
    v = jnp.ones((*rows.shape[:2], v_dim), pool.dtype)
    return ops.write_kv(pool, v_pool, jnp.int32(pool.shape[0] - 1), loc, rows, v, implementation=implementation)[0]


def write_mla(pool, loc, rows, implementation):
    flat = pool.reshape(*pool.shape[:2], WIDTH), rows.reshape(-1, WIDTH)
    layer = jnp.int32(pool.shape[0] - 1)
    new = ops.write_mla_kv(flat[0], layer, loc, flat[1][:, :96], flat[1][:, 96:], implementation=implementation)
    return new.reshape(pool.shape)


STEPS = [
    scatter,
    lambda pool, loc, rows: move_rows(pool, loc, loc[::-1]),
    *(partial(step, implementation=choice) for step in (write, write_mla) for choice in Implementation),
]


@pytest.mark.h200
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("layers", "dtype"), [(3, jnp.uint8), (3, jnp.float8_e4m3fn), (5, jnp.int8), (3, jnp.bfloat16)]
)
def test_large_pools_are_in_place_on_an_h200(step, layers, dtype):
    pool = jax.ShapeDtypeStruct((layers, SLOTS, HEADS, DIM), dtype)
    rows, loc = jax.ShapeDtypeStruct((64, HEADS, DIM), dtype), jax.ShapeDtypeStruct((64,), jnp.int32)
    report = inspect_compiled(h200.compile_for_h200(step, pool, loc, rows, donate=(0,)))
    assert report.ok, report.why


@pytest.mark.slow
@pytest.mark.parametrize("implementation", Implementation if HAS_GPU else [Implementation.REFERENCE])
def test_rows_past_32_bits_are_written_moved_and_read(implementation):
    """For real: three GiB of bytes."""
    rng = np.random.default_rng(0)
    targets = np.array([[LAST, 1, 0], [LAST - 1, SLOTS // 2, 0], [LAST - 2, 0x345, 0], [LAST - 3, 2, 0]], np.int32)
    rows = rng.integers(1, 256, (3, 3, HEADS, DIM)).astype(np.uint8)
    everywhere, one_layer, latent, moved = targets
    pool = jax.device_put(np.zeros((3, SLOTS, HEADS, DIM), np.uint8))
    pool = jax.jit(scatter, donate_argnums=0)(pool, everywhere, rows[0])
    pool = jax.jit(partial(write, implementation=implementation), donate_argnums=0)(pool, one_layer, rows[1])
    pool = jax.jit(partial(write_mla, implementation=implementation), donate_argnums=0)(pool, latent, rows[2])
    pool = jax.jit(move_rows, donate_argnums=0)(pool, moved, everywhere)

    read = np.asarray(jax.jit(gather_rows)(pool, targets.reshape(-1))).reshape(3, 4, 3, HEADS, DIM)
    for layer in range(3):
        for i, expected in enumerate((rows[0], rows[1], rows[2], rows[0])):
            is_there = layer == 2 or i in (0, 3)
            np.testing.assert_array_equal(read[layer, i, :2], expected[:2] if is_there else 0 * expected[:2])
    assert jax.jit(rows_used)(pool).tolist() == [4, 4, 8]


def rows_used(pool):
    """Rows of each layer that are not zero; four bytes at a time."""
    words = jax.lax.bitcast_convert_type(pool.reshape(*pool.shape[:2], -1, 4), jnp.uint32)
    return (words != 0).any(2).sum(1, dtype=jnp.int32)
