"""Triton kernels of `copy_pages` and of `copy_kv.move_rows`. Parameter order: see `triton_call`.

A page of one layer is contiguous on both sides: a program moves a stretch of it, and all its loads are in flight before
the first store. Pages are moved once, so their lines are the first to leave the L2 cache. Element offsets are int64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import triton
import triton.language as tl

from jaxcache.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

STRETCH_BYTES = 4 * 1024
"""Bytes of a page that one program of one warp moves: 128 a thread."""
MOVE_BYTES = 16 * 1024
"""Bytes that one program of a move holds in registers."""


def gather_pages(pool: jax.Array, pages: jax.Array, page_size: int) -> jax.Array:
    """See `copy_pages.gather_pages`; nothing is empty."""
    shape = (pages.shape[0], pool.shape[0], page_size, *pool.shape[2:])
    (blocks,) = triton_call(
        gather_pages_kernel,
        (pool, pages),
        (pool.shape[0], pool.shape[1] // page_size),
        outputs=[jax.ShapeDtypeStruct(shape, pool.dtype)],
        **pages_launch(pages.shape[0], pool.shape[0], page_size * math.prod(pool.shape[2:]), pool.dtype.itemsize),
    )
    return blocks


def scatter_pages(pool: jax.Array, pages: jax.Array, blocks: AnyArray, page_size: int) -> jax.Array:
    """See `copy_pages.scatter_pages`; nothing is empty."""
    (pool,) = triton_call(
        scatter_pages_kernel,
        (pool, pages, blocks),
        (pool.shape[0], pool.shape[1] // page_size),
        updates={0: "pool_alias"},
        **pages_launch(pages.shape[0], pool.shape[0], page_size * math.prod(pool.shape[2:]), pool.dtype.itemsize),
    )
    return pool


def move_rows(pool: jax.Array, tgt: AnyArray, src: AnyArray) -> jax.Array:
    """See `copy_kv.move_rows`; at most `copy_kv.MAX_MOVE` slots, and nothing is empty."""
    (pool,) = triton_call(
        move_rows_kernel,
        (pool, tgt, src),
        (tgt.shape[0], pool.shape[1]),
        updates={0: "pool_alias"},
        **move_launch(tgt.shape[0], pool.shape[0], math.prod(pool.shape[2:]), pool.dtype.itemsize),
    )
    return pool


def pages_launch(n: int, layers: int, width: int, itemsize: int) -> dict:
    """Grid and constexprs of both page kernels, for pages of `width` elements a layer."""
    block = min(triton.next_power_of_2(width), STRETCH_BYTES // itemsize)
    return dict(grid=(n * layers, triton.cdiv(width, block)), num_warps=1, WIDTH=width, BLOCK=block)


def move_launch(n: int, layers: int, width: int, itemsize: int) -> dict:
    """Grid and constexprs of `move_rows_kernel`: a program a layer and column stretch."""
    rows = triton.next_power_of_2(n)
    block = max(32 // itemsize, min(triton.next_power_of_2(width), MOVE_BYTES // (rows * itemsize)))
    return dict(grid=(layers, triton.cdiv(width, block)), num_warps=4, WIDTH=width, ROWS=rows, BLOCK=block)


@triton.jit
def _stretch_of_program(pages, layers, pool_pages, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Where this program's stretch begins in the pool and in the blocks, its columns, and whether the page is real."""
    item = tl.program_id(0)
    page = tl.load(pages + item // layers).to(tl.int64) + tl.zeros([1], tl.int64)  # the interpreter splats no booleans
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_pool = ((item % layers).to(tl.int64) * pool_pages + page) * WIDTH
    real = (page > 0) & (page < pool_pages)
    return in_pool, item.to(tl.int64) * WIDTH, column, real


@triton.jit
def gather_pages_kernel(
    pool,  # (layers, pool_pages, WIDTH)
    pages,  # (n,) int32
    layers,
    pool_pages,
    blocks,  # (n, layers, WIDTH) output
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    in_pool, in_blocks, column, real = _stretch_of_program(pages, layers, pool_pages, WIDTH, BLOCK)
    inside = column < WIDTH
    # a float nought: Triton casts it to every dtype, an integer one not to float8
    stretch = tl.load(pool + in_pool + column, mask=inside & real, other=0.0, eviction_policy="evict_first")
    tl.store(blocks + in_blocks + column, stretch, mask=inside, eviction_policy="evict_first")


@triton.jit
def scatter_pages_kernel(
    pool,  # (layers, pool_pages, WIDTH) updated
    pages,  # (n,) int32
    blocks,  # (n, layers, WIDTH)
    layers,
    pool_pages,
    pool_alias,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    in_pool, in_blocks, column, real = _stretch_of_program(pages, layers, pool_pages, WIDTH, BLOCK)
    inside = (column < WIDTH) & real
    stretch = tl.load(blocks + in_blocks + column, mask=inside, eviction_policy="evict_first")
    tl.store(pool + in_pool + column, stretch, mask=inside, eviction_policy="evict_first")


@triton.jit
def move_rows_kernel(
    pool,  # (layers, slots, WIDTH) updated
    tgt,  # (n,) int32
    src,  # (n,) int32
    n,
    slots,
    pool_alias,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # at least n
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, ROWS)
    source = tl.load(src + i, mask=i < n, other=0).to(tl.int64)
    target = tl.load(tgt + i, mask=i < n, other=0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    written = ((target > 0) & (target < slots))[:, None] & (column < WIDTH)
    read = ((source >= 0) & (source < slots))[:, None] & written
    layer = pool + tl.program_id(0).to(tl.int64) * slots * WIDTH
    rows = tl.load(layer + source[:, None] * WIDTH + column, mask=read, other=0.0)
    tl.debug_barrier()  # all of the column is read before any of it is written
    tl.store(layer + target[:, None] * WIDTH + column, rows, mask=written)
