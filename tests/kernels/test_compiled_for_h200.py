"""Every kernel compiles for an H200, and the writes touch the pool in place: no copy, no temporary. No GPU needed."""

import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxcache.errors import UnsupportedError
from jaxcache.kernels import triton_call
from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.copy_kv import move_rows, scatter_rows
from jaxcache.kernels.copy_pages import gather_pages, scatter_pages
from jaxcache.kernels.dispatch import Implementation
from jaxcache.kernels.in_place import inspect_compiled
from jaxcache.kernels.quantized_pool import QuantizedPool
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from jaxcache.kernels.write_quantized import write_kv_fp8, write_kv_int8
from tests.kernels import h200

pytestmark = pytest.mark.h200

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", Implementation)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32, jnp.uint8],
    ids=lambda d: d.__name__,
)


def shape(*dims: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def is_triton(compiled: jax.stages.Compiled) -> bool:
    return "triton_kernel_call" in (compiled.as_text() or "")


def check_in_place(compiled: jax.stages.Compiled, implementation: Implementation) -> None:
    report = inspect_compiled(compiled)
    assert report.ok, report.why
    assert is_triton(compiled) == (implementation is Implementation.TRITON)


@IMPLEMENTATIONS
@DTYPES
def test_write_kv(implementation, dtype):
    pools = shape(4, 4096, 8, 128, dtype=dtype), shape(4, 4096, 8, 96, dtype=dtype)
    rows = shape(512, 8, 128, dtype=dtype), shape(512, 8, 96, dtype=dtype)
    step = partial(write_kv, implementation=implementation)
    check_in_place(h200.compile_for_h200(step, *pools, shape(), shape(512), *rows, donate=(0, 1)), implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (1000, 8), (96, 33)])
def test_write_mla_kv(implementation, rank, rope):
    pool = shape(4, 4096, rank + rope, dtype=jnp.bfloat16)
    rows = shape(7, rank, dtype=jnp.bfloat16), shape(7, rope, dtype=jnp.bfloat16)
    step = partial(write_mla_kv, implementation=implementation)
    if implementation is Implementation.MOSAIC and rope == 33:
        with pytest.raises(UnsupportedError, match="bulk copies move multiples of 16 bytes"):
            h200.compile_for_h200(step, pool, shape(), shape(7), *rows, donate=(0,))
        return
    check_in_place(h200.compile_for_h200(step, pool, shape(), shape(7), *rows, donate=(0,)), implementation)


@IMPLEMENTATIONS
def test_a_scan_over_layers_carries_the_stack(implementation):
    def step(k_pool, v_pool, loc, k, v):
        def write_layer(pools, layer):
            return write_kv(pools[0], pools[1], layer, loc, k, v, implementation=implementation), None

        return jax.lax.scan(write_layer, (k_pool, v_pool), jnp.arange(4, dtype=jnp.int32))[0]

    pool, rows = shape(4, 4096, 8, 128, dtype=jnp.bfloat16), shape(512, 8, 128, dtype=jnp.bfloat16)
    check_in_place(h200.compile_for_h200(step, pool, pool, shape(512), rows, rows, donate=(0, 1)), implementation)


def test_a_forgotten_donation_is_noticed():
    pool, rows = shape(4, 4096, 64, dtype=jnp.bfloat16), shape(8, 32, dtype=jnp.bfloat16)
    compiled = h200.compile_for_h200(write_mla_kv, pool, shape(), shape(8), rows, rows)
    assert not inspect_compiled(compiled).ok


@IMPLEMENTATIONS
@pytest.mark.parametrize("bs", [1, 64])
def test_alloc(implementation, bs):
    rows, pages = [shape(bs)] * 3, shape(4096)
    extend = partial(alloc_extend, page_size=16, num_tokens=4096, implementation=implementation)
    decode = partial(alloc_decode, page_size=16, implementation=implementation)
    assert is_triton(h200.compile_for_h200(extend, *rows, pages)) == (implementation is Implementation.TRITON)
    assert is_triton(h200.compile_for_h200(decode, *rows[:2], pages)) == (implementation is Implementation.TRITON)


def test_triton_is_the_choice_on_a_gpu():
    compiled = h200.compile_for_h200(partial(alloc_decode, page_size=16), shape(8), shape(8), shape(8))
    assert is_triton(compiled)


@pytest.mark.parametrize("chosen", [None, "/somewhere"])
def test_the_triton_cache_of_the_process_stays_where_it_was(monkeypatch, chosen):
    """jax-triton changes the variable when it is imported; PyTorch needs it as the user left it."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if chosen:
        monkeypatch.setenv("TRITON_CACHE_DIR", chosen)
    for name in [name for name in sys.modules if name.startswith("jax_triton")]:
        monkeypatch.delitem(sys.modules, name)
    triton_call._import_jax_triton()
    assert os.environ.get("TRITON_CACHE_DIR") == chosen


@pytest.mark.parametrize("implementation", [Implementation.REFERENCE, Implementation.TRITON])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_write_kv_fp8(implementation, dtype):
    pool, rows = shape(4, 4096, 8, 128, dtype=dtype), shape(64, 8, 128, dtype=jnp.bfloat16)
    scales = shape(8, dtype=jnp.float32), shape(dtype=jnp.float32)
    step = partial(write_kv_fp8, implementation=implementation)
    compiled = h200.compile_for_h200(step, pool, pool, shape(), shape(64), rows, rows, *scales, donate=(0, 1))
    check_in_place(compiled, implementation)


@pytest.mark.parametrize("implementation", [Implementation.REFERENCE, Implementation.TRITON])
def test_write_kv_int8(implementation):
    pool = QuantizedPool(shape(4, 4096, 8, 128, dtype=jnp.int8), shape(4, 4096, 8, dtype=jnp.float32))

    def step(k, k_scales, v, v_scales, layer, loc, rows):
        pools = QuantizedPool(k, k_scales), QuantizedPool(v, v_scales)
        return write_kv_int8(*pools, layer, loc, rows, rows, implementation=implementation)

    rows = shape(64, 8, 128, dtype=jnp.bfloat16)
    compiled = h200.compile_for_h200(step, *pool, *pool, shape(), shape(64), rows, donate=(0, 1, 2, 3))
    assert all(buffer.aliased for buffer in inspect_compiled(compiled).buffers)
    assert is_triton(compiled) == (implementation is Implementation.TRITON)


def test_page_copies_and_moves():
    pool, blocks = shape(4, 4096, 8, 128, dtype=jnp.bfloat16), shape(5, 4, 16, 8, 128, dtype=jnp.bfloat16)
    options = {"implementation": Implementation.TRITON}
    scatter = partial(scatter_pages, page_size=16, **options)
    check_in_place(h200.compile_for_h200(scatter, pool, shape(5), blocks, donate=(0,)), Implementation.TRITON)
    move = partial(move_rows, **options)
    check_in_place(h200.compile_for_h200(move, pool, shape(9), shape(9), donate=(0,)), Implementation.TRITON)
    assert is_triton(h200.compile_for_h200(partial(gather_pages, page_size=16, **options), pool, shape(5)))


@DTYPES
def test_row_copies_compute_nothing(dtype):
    """XLA moves 8- and 16-bit floats as they are; a detour through float32 would change the bits of NaNs."""
    pool, rows = shape(4, 4096, 2, 64, dtype=dtype), shape(4, 64, 2, 64, dtype=dtype)
    for compiled in (
        h200.compile_for_h200(scatter_rows, pool, shape(64), rows, donate=(0,)),
        h200.compile_for_h200(
            partial(move_rows, implementation=Implementation.REFERENCE), pool, shape(64), shape(64), donate=(0,)
        ),
    ):
        assert dtype is jnp.float32 or " f32[" not in (compiled.as_text() or "")
        assert all(buffer.aliased for buffer in inspect_compiled(compiled).buffers)


def test_only_arrays_of_rows_of_whole_16_bytes_are_taken_for_aligned(monkeypatch):
    """XLA hands over what it cuts out of an array where it lies: the slots of a loop of one request, 4 bytes apart."""
    from jaxlib import gpu_triton

    alignments = []
    create = gpu_triton.create_array_parameter

    def note(zeroed, alignment):
        alignments.append(alignment)
        return create(zeroed, alignment)

    monkeypatch.setattr(gpu_triton, "create_array_parameter", note)
    pools = shape(4, 4096, 8, 128, dtype=jnp.bfloat16), shape(4, 4096, 8, 97, dtype=jnp.bfloat16)
    rows = shape(8, 8, 128, dtype=jnp.bfloat16), shape(8, 8, 97, dtype=jnp.bfloat16)
    step = partial(write_kv, implementation=Implementation.TRITON)
    h200.compile_for_h200(step, *pools, shape(), shape(8), *rows, donate=(0, 1))
    wide, narrow, numbers = 16, 0, 0
    assert sorted(alignments) == sorted([wide, narrow, numbers, numbers, wide, narrow, wide, narrow])

    alignments.clear()
    step = partial(alloc_decode, page_size=4, implementation=Implementation.TRITON)
    h200.compile_for_h200(step, shape(8), shape(8), shape(64))
    assert alignments and not any(alignments)
