"""Mosaic GPU kernels of `write_kv`: rows go through shared memory by the bulk copy engine of Hopper and newer GPUs.

One block moves `rows` consecutive tokens: one bulk load for each part brings them in, one bulk store a token and part
takes each to its slot. The slots are read while the loads are in flight. Copies are contiguous, of any length that is a
multiple of 16 bytes; widths that are none, such as 33, are left to the other implementations.

The pool is a `Ref` of the step's own array: updated in place when the step owns it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

BLOCK_BYTES = 8 * 1024
"""Shared memory of one block; several blocks a multiprocessor keep enough bytes in flight."""
FULL_GRID = 512
"""Blocks that keep every GPU busy; below it a block takes fewer rows."""


def write_kv(
    k_pool: jax.Array, v_pool: jax.Array, layer: int | AnyArray, loc: AnyArray, k: AnyArray, v: AnyArray
) -> tuple[jax.Array, jax.Array]:
    """See `write_kv.write_kv`."""
    if loc.shape[0] == 0:
        return k_pool, v_pool
    targets = (Target(0, 0), Target(1, 0))
    k_pool, v_pool = write_parts((k_pool, v_pool), jnp.asarray(layer, jnp.int32), loc, (k, v), targets=targets)
    return k_pool, v_pool


def write_mla_kv(pool: jax.Array, layer: int | AnyArray, loc: AnyArray, nope: AnyArray, rope: AnyArray) -> jax.Array:
    """See `write_kv.write_mla_kv`."""
    if loc.shape[0] == 0:
        return pool
    targets = (Target(0, 0), Target(0, nope.shape[1]))
    (pool,) = write_parts((pool,), jnp.asarray(layer, jnp.int32), loc, (nope, rope), targets=targets)
    return pool


class Target(NamedTuple):
    """Where a part of a row goes: which pool, and from which column on."""

    pool: int
    column: int


# Jitted, so that all calls of a step with the same shapes are one kernel, compiled once.
@partial(jax.jit, static_argnames=("targets", "interpret"))
def write_parts(
    pools: tuple[jax.Array, ...],
    layer: jax.Array,
    loc: jax.Array,
    parts: tuple[jax.Array, ...],
    *,
    targets: tuple[Target, ...],
    interpret: object = None,
) -> list[jax.Array]:
    """Writes each of `parts` to its target. `interpret` takes a `plgpu.InterpretGPUParams`: no GPU needed."""
    layers, slots = pools[0].shape[:2]
    n = loc.shape[0]
    parts = tuple(part.reshape(n, -1) for part in parts)
    rows = rows_of_block(n, sum(part.shape[1] * part.dtype.itemsize for part in parts))

    def body(layer_ref, loc_ref, *refs):
        part_refs, pool_refs = refs[: len(parts)], refs[len(parts) : len(parts) + len(pools)]
        *buffers, barrier = refs[len(parts) + len(pools) :]
        first = jax.lax.axis_index("block") * rows
        for source, buffer in zip(part_refs, buffers, strict=True):
            # Rows divide the batch, and the promise that nothing is out of bounds makes the copy a plain bulk copy.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source.at[pl.ds(first, rows)], buffer, barrier, oob_mode=in_bounds)
        which = layer_ref[0]
        found = [loc_ref[first + i] for i in range(rows)]
        plgpu.barrier_wait(barrier)
        for i, slot in enumerate(found):
            keep = (slot > 0) & (slot < slots) & (which >= 0) & (which < layers)
            pl.when(keep)(partial(store_row, i, which * slots + slot, buffers, pool_refs))
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store_row(i, row, buffers, pool_refs):
        for buffer, part, target in zip(buffers, parts, targets, strict=True):
            columns = pl.ds(target.column, part.shape[1])
            plgpu.copy_smem_to_gmem(buffer.at[i], pool_refs[target.pool].at[row, columns], commit_group=False)

    refs = [jax.new_ref(pool.reshape(layers * slots, -1)) for pool in pools]
    plgpu.kernel(
        body,
        out_type=(),
        grid=(n // rows,),
        grid_names=("block",),
        scratch_types=[
            *(plgpu.SMEM((rows, part.shape[1]), part.dtype) for part in parts),
            plgpu.Barrier(num_arrivals=len(parts)),
        ],
        interpret=interpret,
    )(layer.reshape(1), loc, *parts, *refs)
    return [jax.freeze(ref).reshape(pool.shape) for ref, pool in zip(refs, pools, strict=True)]


def rows_of_block(n: int, row_bytes: int) -> int:
    """Tokens a block moves: a power of two that divides `n`, so that no tile is ragged."""
    rows = 1
    while n % (rows * 2) == 0 and rows * 2 * row_bytes <= BLOCK_BYTES and n // (rows * 2) >= FULL_GRID:
        rows *= 2
    return rows
