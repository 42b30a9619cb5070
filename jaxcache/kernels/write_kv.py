"""The KV write: new rows of one layer go to their slots in the stacked pool, in place.

A pool is stacked over layers, `(layers, slots, ...)`, and the layer is an operand: one compiled step serves every
layer, and a `lax.scan` over layers carries the stack without copying it. A write is in place when the step owns the
pool (donated at the jit boundary, or carried by the scan); `kernels/in_place.py` proves it.

Rows for slot 0, the sink, are dropped, and so are rows for slots outside the pool: padding is never written, and what a
pool holds is a function of what was written to it, bit for bit. Two rows of one call for the same slot (other than 0)
are the caller's bug: which one stays is undefined.

Source: SGLang 0.5.2 memory_pool.py (MHATokenToKVPool.set_kv_buffer, set_mla_kv_buffer_triton).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.alloc_pages import SINK_SLOT
from jaxcache.kernels.arguments import AnyArray, require_array, require_int32, require_layer, require_pool, require_rows
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

_BULK_BYTES = 16
_MAX_ROW_BYTES = 96 * 1024  # of each of two pools
_MAX_ROWS = 2**31 - 1


def write_kv(
    k_pool: Shaped[Array, "layers slots heads k_dim"],
    v_pool: Shaped[Array, "layers slots heads v_dim"],
    layer: int | Int32[AnyArray, ""],
    loc: Int32[AnyArray, " n"],
    k: Shaped[AnyArray, "n heads k_dim"],
    v: Shaped[AnyArray, "n heads v_dim"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "layers slots heads k_dim"], Shaped[Array, "layers slots heads v_dim"]]:
    """Writes the keys and values of `n` tokens into one layer.

    Args:
      k_pool: Keys of all layers. Consumed: use the returned pool from here on.
      v_pool: Values of all layers; their heads may be of another width. Consumed.
      layer: Index into the stack. An int is checked; an array out of range writes nothing.
      loc: Slot of each token. Slot 0 and slots outside the pool are dropped.
      k: Keys in the storage dtype of `k_pool`.
      v: Values in the storage dtype of `v_pool`.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The pools with the rows written.

    Raises:
      ArgumentError: on a wrong dtype, shape or layer, before anything is written.

    Cost: moves `n * heads * (k_dim + v_dim) * itemsize` bytes, read once and written once.
    """
    require_pool("k_pool", k_pool, 4)
    require_pool("v_pool", v_pool, 4)
    if k_pool.shape[:2] != v_pool.shape[:2]:
        raise ArgumentError(
            f"k_pool and v_pool must have the same layers and slots, got {k_pool.shape} and {v_pool.shape}"
        )
    require_int32(loc=loc)
    require_layer(layer, k_pool.shape[0])
    n = loc.shape[0]
    require_rows("k", k, (n, *k_pool.shape[2:]), k_pool.dtype)
    require_rows("v", v, (n, *v_pool.shape[2:]), v_pool.dtype)
    chosen = choose(
        Op.WRITE_KV,
        implementation=implementation,
        rows=n,
        unfit=_unfit(k_pool, math.prod(k_pool.shape[2:])) | _unfit(v_pool, math.prod(v_pool.shape[2:])),
    ).implementation
    if chosen is Implementation.TRITON:
        from jaxcache.kernels import write_kv_triton

        return write_kv_triton.write_kv(k_pool, v_pool, layer, loc, k, v)
    if chosen is Implementation.MOSAIC:
        from jaxcache.kernels import write_kv_mosaic

        return write_kv_mosaic.write_kv(k_pool, v_pool, layer, loc, k, v)
    return put_rows(k_pool, layer, loc, k), put_rows(v_pool, layer, loc, v)


def write_mla_kv(
    pool: Shaped[Array, "layers slots rank+rope"],
    layer: int | Int32[AnyArray, ""],
    loc: Int32[AnyArray, " n"],
    nope: Shaped[AnyArray, "n rank"],
    rope: Shaped[AnyArray, "n rope"],
    *,
    implementation: Implementation | None = None,
) -> Shaped[Array, "layers slots rank+rope"]:
    """Writes the latent and rope parts of `n` tokens side by side into the rows of one layer. Any two widths will do.

    Args:
      pool: Latent rows of all layers, as wide as both parts together. Consumed: use the returned pool from here on.
      layer: Index into the stack. An int is checked; an array out of range writes nothing.
      loc: Slot of each token. Slot 0 and slots outside the pool are dropped.
      nope: Latent part in the storage dtype of `pool`.
      rope: Rope part in the storage dtype of `pool`.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The pool with the rows written.

    Raises:
      ArgumentError: on a wrong dtype, shape or layer, before anything is written.

    Cost: moves `n * (rank + rope) * itemsize` bytes, read once and written once.
    """
    require_pool("pool", pool, 3)
    require_int32(loc=loc)
    require_layer(layer, pool.shape[0])
    require_array("nope", nope)
    n, rank = loc.shape[0], nope.shape[-1]
    require_rows("nope", nope, (n, rank), pool.dtype)
    require_rows("rope", rope, (n, pool.shape[2] - rank), pool.dtype)
    chosen = choose(
        Op.WRITE_MLA_KV, implementation=implementation, rows=n, unfit=_unfit(pool, rank, pool.shape[2] - rank)
    ).implementation
    if chosen is Implementation.TRITON:
        from jaxcache.kernels import write_kv_triton

        return write_kv_triton.write_mla_kv(pool, layer, loc, nope, rope)
    if chosen is Implementation.MOSAIC:
        from jaxcache.kernels import write_kv_mosaic

        return write_kv_mosaic.write_mla_kv(pool, layer, loc, nope, rope)
    return put_rows(pool, layer, loc, jnp.concatenate([nope, rope], axis=-1))


def _unfit(pool: jax.Array, *widths: int) -> dict[Implementation, str]:
    """Why Mosaic cannot write parts of these widths, in elements, side by side into the rows of `pool`."""
    itemsize, (layers, slots) = pool.dtype.itemsize, pool.shape[:2]
    rows = f"rows of {' + '.join(map(str, widths))} {pool.dtype}"
    if any(width * itemsize % _BULK_BYTES for width in widths):
        return {Implementation.MOSAIC: f"bulk copies move multiples of {_BULK_BYTES} bytes, not {rows}"}
    if sum(widths) * itemsize > _MAX_ROW_BYTES:
        return {Implementation.MOSAIC: f"{rows} do not fit the shared memory of a block"}
    if layers * slots > _MAX_ROWS:
        return {Implementation.MOSAIC: f"its row ids are int32, and the pool has {layers} x {slots} rows"}
    return {}


def drop_sink(loc: Int32[AnyArray, " n"], slots: int) -> Int32[Array, " n"]:
    """`loc` with the sink moved past the end of the pool, where a scatter with mode "drop" ignores it."""
    return jnp.where(jnp.asarray(loc) == SINK_SLOT, slots, loc)


def put_rows(pool: jax.Array, layer: int | AnyArray, loc: AnyArray, rows: AnyArray) -> jax.Array:
    """The reference of every write: rows to their slots of one layer, but for the sink's and those outside the pool."""
    # With the sink gone the slots are unique, and XLA needs that promise to scatter rows in parallel on a GPU.
    return pool.at[layer, drop_sink(loc, pool.shape[1])].set(
        rows, mode="drop", unique_indices=True, wrap_negative_indices=False
    )
