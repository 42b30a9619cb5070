"""Rows of all layers at once: out of a pool, into a pool, and from slot to slot inside one.

Pools are `(layers, slots, ...)` of any further dimensions. Slot 0, the sink, and slots outside the pool are padding:
they read as zeros, or as the sink's own row, and are never written.

Source: SGLang 0.5.2 memory_pool.py (get_cpu_copy, load_cpu_copy, copy_all_layer_kv_cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.kernels.alloc_pages import SINK_SLOT
from jaxcache.kernels.arguments import AnyArray, require_int32, require_pool, require_rows, require_same_length
from jaxcache.kernels.dispatch import Implementation, Op, choose
from jaxcache.kernels.write_kv import drop_sink

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped


MAX_MOVE = 512
"""Most slots that a kernel moves at once: one program holds a column of all of them between reading and writing."""
LARGE_ROWS_AT_ONCE = 4
"""How many `copy_large_rows` moves by one kernel: enough to fill a program, few enough for a list of one."""


def gather_rows(pool: Shaped[Array, "layers slots *row"], loc: Int32[AnyArray, " n"]) -> Shaped[Array, "layers n *row"]:
    """Reads the rows of `n` slots in every layer.

    Args:
      pool: The stack; only read.
      loc: Slots, in any order, with repeats. A slot outside the pool reads as zeros, never as the KV of a request.

    Raises:
      ArgumentError: on a wrong dtype or shape.

    Cost: moves `layers * n` rows, read once and written once.
    """
    require_pool("pool", pool)
    require_int32(loc=loc)
    return pool.at[:, loc].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def scatter_rows(
    pool: Shaped[Array, "layers slots *row"], loc: Int32[AnyArray, " n"], rows: Shaped[AnyArray, "layers n *row"]
) -> Shaped[Array, "layers slots *row"]:
    """Writes rows to `n` slots in every layer: the inverse of `gather_rows`.

    Args:
      pool: The stack. Consumed: use the returned pool from here on.
      loc: Slots, distinct but for slot 0. Slot 0 and slots outside the pool are dropped.
      rows: Rows in the pool's storage dtype.

    Raises:
      ArgumentError: on a wrong dtype or shape.

    Cost: moves `layers * n` rows, read once and written once.
    """
    require_pool("pool", pool)
    require_int32(loc=loc)
    require_rows("rows", rows, (pool.shape[0], loc.shape[0], *pool.shape[2:]), pool.dtype)
    return pool.at[:, drop_sink(loc, pool.shape[1])].set(
        rows, mode="drop", unique_indices=True, wrap_negative_indices=False
    )


def move_rows(
    pool: Shaped[Array, "layers slots *row"],
    tgt: Int32[AnyArray, " n"],
    src: Int32[AnyArray, " n"],
    *,
    implementation: Implementation | None = None,
) -> Shaped[Array, "layers slots *row"]:
    """Copies slot `src[i]` to slot `tgt[i]` in every layer, all at the same instant: overlapping lists are safe.

    Args:
      pool: The stack. Consumed: use the returned pool from here on.
      tgt: Slots to write, distinct but for slot 0. Pad with 0.
      src: Slots to read. Pad with 0.
      implementation: Overrides `dispatch.choose`.

    Raises:
      ArgumentError: on a wrong dtype or shape.

    Cost: moves `layers * n` rows, read once and written once, up to MAX_MOVE slots on a GPU; else twice, through a
    temporary of that size.
    """
    require_pool("pool", pool)
    require_int32(tgt=tgt, src=src)
    require_same_length(tgt=tgt, src=src)
    if (
        pool.size
        and 0 < tgt.shape[0] <= MAX_MOVE
        and (choose(Op.MOVE_ROWS, implementation=implementation).implementation is Implementation.TRITON)
    ):
        from jaxcache.kernels import copy_pages_triton

        return copy_pages_triton.move_rows(pool, tgt, src)
    return scatter_rows(pool, tgt, gather_rows(pool, src))


def copy_large_rows(
    pools: Sequence[Shaped[Array, "layers slots *row"]],
    tgt: Int32[AnyArray, " n"],
    src: Int32[AnyArray, " n"],
    count: int | Int32[AnyArray, ""],
    *,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "layers slots *row"], ...]:
    """Copies slot `src[i]` to slot `tgt[i]` in every layer of every pool, a few at a time: rows may be megabytes.

    Args:
      pools: The stacks. Consumed: use the returned pools from here on.
      tgt: Slots to write, distinct but for slot 0, and in an order in which each is read before it is written.
      src: Slots to read.
      count: How many copies there are; what follows in the lists is not looked at. May be traced.
      implementation: Overrides `dispatch.choose`.

    Raises:
      ArgumentError: on a wrong dtype or shape.

    Cost: `count` rows of every layer, read once and written once on a GPU, without a temporary; else twice, through a
    temporary of one row. Nothing for what is beyond `count`.
    """
    require_int32(tgt=tgt, src=src)
    require_same_length(tgt=tgt, src=src)
    chosen = choose(Op.MOVE_ROWS, implementation=implementation).implementation
    at_once = LARGE_ROWS_AT_ONCE if chosen is Implementation.TRITON else 1
    padding = (0, -tgt.shape[0] % at_once)
    tgt = jnp.pad(jnp.where(jnp.arange(tgt.shape[0]) < count, tgt, SINK_SLOT), padding)
    src = jnp.pad(jnp.asarray(src), padding)

    def copy_some(i: Any, pools: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        to, of = (jax.lax.dynamic_slice_in_dim(slots, i * at_once, at_once) for slots in (tgt, src))
        return tuple(move_rows(pool, to, of, implementation=chosen) for pool in pools)

    limit = jnp.minimum(count, tgt.shape[0])
    return jax.lax.fori_loop(0, (limit + at_once - 1) // at_once, copy_some, tuple(pools))
