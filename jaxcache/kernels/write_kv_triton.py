"""Triton kernels of `write_kv`. Parameter order: see `triton_call`.

A program moves a tile of rows: it loads all parts of the tile and their slots, then stores them, so that all loads are
in flight at once. So rows of padding are read in vain, but never written: a padded batch costs at most what a full one
does. A large write marks its lines as the first to leave the L2 cache, which cannot hold them. Rows are copied bit for
bit in the dtype they have. Element offsets are int64: a stacked pool has more than 2^31 elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

MAX_BLOCK = 2048
"""Widest piece of a row that one tile covers, elements."""
TILE_BYTES = 5 * 1024
"""Bytes that one program has in flight. More, smaller programs are the faster: 2% from 16 KB to this on an H200."""
LARGE_BYTES = 8 * 2**20
"""From so many bytes of rows on, a write is large."""
FULL_GRID = 1024
"""Programs that keep every GPU busy; below it a program takes fewer rows."""


def write_kv(
    k_pool: jax.Array, v_pool: jax.Array, layer: int | AnyArray, loc: AnyArray, k: AnyArray, v: AnyArray
) -> tuple[jax.Array, jax.Array]:
    """See `write_kv.write_kv`."""
    if loc.shape[0] == 0:
        return k_pool, v_pool
    layers, slots, heads, k_dim = k_pool.shape
    k_pool, v_pool = triton_call(
        write_kv_kernel,
        (k_pool, v_pool, jnp.asarray(layer, jnp.int32), loc, k, v),
        (loc.shape[0], layers, slots),
        updates={0: "k_alias", 1: "v_alias"},
        **write_kv_launch(loc.shape[0], heads * k_dim, heads * v_pool.shape[3], k_pool.dtype.itemsize),
    )
    return k_pool, v_pool


def write_mla_kv(pool: jax.Array, layer: int | AnyArray, loc: AnyArray, nope: AnyArray, rope: AnyArray) -> jax.Array:
    """See `write_kv.write_mla_kv`."""
    if loc.shape[0] == 0:
        return pool
    layers, slots, _ = pool.shape
    (pool,) = triton_call(
        write_mla_kv_kernel,
        (pool, jnp.asarray(layer, jnp.int32), loc, nope, rope),
        (loc.shape[0], layers, slots),
        updates={0: "pool_alias"},
        **write_mla_kv_launch(loc.shape[0], nope.shape[1], rope.shape[1], pool.dtype.itemsize),
    )
    return pool


def write_kv_launch(n: int, k_width: int, v_width: int, itemsize: int) -> dict:
    """Grid and constexprs of `write_kv_kernel`, for rows of these widths in elements."""
    k_block, v_block, rows, grid = tile(n, k_width, v_width, itemsize, TILE_BYTES)
    return dict(
        grid=grid,
        num_warps=4,
        K_WIDTH=k_width,
        V_WIDTH=v_width,
        K_BLOCK=k_block,
        V_BLOCK=v_block,
        ROWS=rows,
        LARGE=n * (k_width + v_width) * itemsize >= LARGE_BYTES,
    )


def write_mla_kv_launch(n: int, rank: int, rope: int, itemsize: int) -> dict:
    """Grid and constexprs of `write_mla_kv_kernel`, for parts of these widths in elements."""
    rank_block, rope_block, rows, grid = tile(n, rank, rope, itemsize, TILE_BYTES)
    is_large = n * (rank + rope) * itemsize >= LARGE_BYTES
    return dict(
        grid=grid,
        num_warps=8 if is_large else 4,
        RANK=rank,
        ROPE=rope,
        RANK_BLOCK=rank_block,
        ROPE_BLOCK=rope_block,
        ROWS=rows,
        LARGE=is_large,
    )


def tile(n: int, first: int, second: int, itemsize: int, tile_bytes: int) -> tuple[int, int, int, tuple[int, int]]:
    """Block widths of two parts of a row, rows a program, and the grid (row tiles, column tiles)."""
    blocks = [min(triton.next_power_of_2(max(width, 1)), MAX_BLOCK) for width in (first, second)]
    columns = max(triton.cdiv(width, block) for width, block in zip((first, second), blocks, strict=True))
    most = max(1, tile_bytes // (sum(blocks) * itemsize))
    rows = 1
    while rows * 2 <= most and n // (rows * 2) * columns >= FULL_GRID:
        rows *= 2
    return blocks[0], blocks[1], rows, (triton.cdiv(n, rows), columns)


@triton.jit
def _rows_of_program(layer, loc, n, layers, slots, ROWS: tl.constexpr):
    """Token ids of this program, their rows in the stack, and which of them are written. All int64 but the mask."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(loc + token, mask=token < n, other=0).to(tl.int64)
    which = tl.load(layer).to(tl.int64) + tl.zeros([ROWS], tl.int64)  # a vector: the interpreter splats no booleans
    keep = (slot > 0) & (slot < slots) & (which >= 0) & (which < layers)
    return token, which * slots + slot, keep


@triton.jit
def _columns_of_program(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return column[None, :], (column < WIDTH)[None, :]


@triton.jit
def write_kv_kernel(
    k_pool,  # (layers, slots, K_WIDTH) updated
    v_pool,  # (layers, slots, V_WIDTH) updated
    layer,  # () int32
    loc,  # (n,) int32
    k,  # (n, K_WIDTH)
    v,  # (n, V_WIDTH)
    n,
    layers,
    slots,
    k_alias,
    v_alias,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LARGE: tl.constexpr,  # its lines leave the L2 cache first
):
    token, row, keep = _rows_of_program(layer, loc, n, layers, slots, ROWS)
    k_column, k_inside = _columns_of_program(K_WIDTH, K_BLOCK)
    v_column, v_inside = _columns_of_program(V_WIDTH, V_BLOCK)
    read = (token < n)[:, None]
    keep = keep[:, None]
    POLICY: tl.constexpr = "evict_first" if LARGE else ""  # pyright: ignore[reportAssignmentType]
    k_tile = tl.load(k + token[:, None] * K_WIDTH + k_column, mask=read & k_inside, eviction_policy=POLICY)
    v_tile = tl.load(v + token[:, None] * V_WIDTH + v_column, mask=read & v_inside, eviction_policy=POLICY)
    tl.store(k_pool + row[:, None] * K_WIDTH + k_column, k_tile, mask=keep & k_inside, eviction_policy=POLICY)
    tl.store(v_pool + row[:, None] * V_WIDTH + v_column, v_tile, mask=keep & v_inside, eviction_policy=POLICY)


@triton.jit
def write_mla_kv_kernel(
    pool,  # (layers, slots, RANK + ROPE) updated
    layer,  # () int32
    loc,  # (n,) int32
    nope,  # (n, RANK)
    rope,  # (n, ROPE)
    n,
    layers,
    slots,
    pool_alias,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LARGE: tl.constexpr,  # its lines leave the L2 cache first
):
    token, row, keep = _rows_of_program(layer, loc, n, layers, slots, ROWS)
    nope_column, nope_inside = _columns_of_program(RANK, RANK_BLOCK)
    rope_column, rope_inside = _columns_of_program(ROPE, ROPE_BLOCK)
    read = (token < n)[:, None]
    keep = keep[:, None]
    POLICY: tl.constexpr = "evict_first" if LARGE else ""  # pyright: ignore[reportAssignmentType]
    nope_tile = tl.load(nope + token[:, None] * RANK + nope_column, mask=read & nope_inside, eviction_policy=POLICY)
    rope_tile = tl.load(rope + token[:, None] * ROPE + rope_column, mask=read & rope_inside, eviction_policy=POLICY)
    target = pool + row[:, None] * (RANK + ROPE)
    tl.store(target + nope_column, nope_tile, mask=keep & nope_inside, eviction_policy=POLICY)
    tl.store(target + RANK + rope_column, rope_tile, mask=keep & rope_inside, eviction_policy=POLICY)
