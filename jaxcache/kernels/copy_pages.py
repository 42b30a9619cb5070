"""Whole pages of all layers: out of a pool into one contiguous block a page, and back.

A pool keeps a page's rows apart, one stretch a layer. Host tiers, disks and networks want a page in one piece, so that
one copy, or one file, is one page:

    pool    (layers, slots, *row)               slots = pages x page_size
    blocks  (n, layers, page_size, *row)        block i is page pages[i]

Page 0, the sink, and pages outside the pool are padding: they read as zeros and are never written.

Source: SGLang 0.5.2 memory_pool_host.py (page_first layout, get_flat_data, set_from_flat_data).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray, require_int32, require_pool, require_rows
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped


def gather_pages(
    pool: Shaped[Array, "layers slots *row"],
    pages: Int32[AnyArray, " n"],
    *,
    page_size: int,
    implementation: Implementation | None = None,
) -> Shaped[Array, "n layers page_size *row"]:
    """Reads `n` pages, each into one contiguous block.

    Args:
      pool: The stack; only read.
      pages: Page ids, in any order, with repeats. Page 0 and pages outside the pool read as zeros.
      page_size: Slots a page; divides the slots of the pool.
      implementation: Overrides `dispatch.choose`.

    Raises:
      ArgumentError: on a wrong dtype, shape or `page_size`.

    Cost: moves `n` pages of all layers, read once and written once.
    """
    _check(pool, pages, page_size)
    if not _is_empty(pool, pages) and (
        choose(Op.GATHER_PAGES, implementation=implementation).implementation is Implementation.TRITON
    ):
        from jaxcache.kernels import copy_pages_triton

        return copy_pages_triton.gather_pages(pool, jnp.asarray(pages), page_size)
    by_page = _by_page(pool, page_size)
    blocks = by_page.at[:, _drop_sink(pages, by_page.shape[1])].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )
    return jnp.swapaxes(blocks, 0, 1)


def scatter_pages(
    pool: Shaped[Array, "layers slots *row"],
    pages: Int32[AnyArray, " n"],
    blocks: Shaped[AnyArray, "n layers page_size *row"],
    *,
    page_size: int,
    implementation: Implementation | None = None,
) -> Shaped[Array, "layers slots *row"]:
    """Writes `n` blocks to their pages: the inverse of `gather_pages`.

    Args:
      pool: The stack. Consumed: use the returned pool from here on.
      pages: Page ids, distinct but for page 0. Page 0 and pages outside the pool are dropped.
      blocks: Blocks in the pool's storage dtype.
      page_size: Slots a page; divides the slots of the pool.
      implementation: Overrides `dispatch.choose`.

    Raises:
      ArgumentError: on a wrong dtype, shape or `page_size`, before anything is written.

    Cost: moves `n` pages of all layers, read once and written once.
    """
    _check(pool, pages, page_size)
    require_rows("blocks", blocks, (pages.shape[0], pool.shape[0], page_size, *pool.shape[2:]), pool.dtype)
    if not _is_empty(pool, pages) and (
        choose(Op.SCATTER_PAGES, implementation=implementation).implementation is Implementation.TRITON
    ):
        from jaxcache.kernels import copy_pages_triton

        return copy_pages_triton.scatter_pages(pool, jnp.asarray(pages), blocks, page_size)
    by_page = _by_page(pool, page_size)
    by_page = by_page.at[:, _drop_sink(pages, by_page.shape[1])].set(
        jnp.swapaxes(blocks, 0, 1), mode="drop", unique_indices=True, wrap_negative_indices=False
    )
    return by_page.reshape(pool.shape)


def _by_page(pool: jax.Array, page_size: int) -> jax.Array:
    return pool.reshape(pool.shape[0], -1, page_size, *pool.shape[2:])


def _drop_sink(pages: AnyArray, num_pages: int) -> jax.Array:
    """`pages` with page 0 moved past the end of the pool, where it is out of range like any other."""
    return jnp.where(jnp.asarray(pages) == 0, num_pages, pages)


def _is_empty(pool: jax.Array, pages: AnyArray) -> bool:
    return pool.size == 0 or pages.shape[0] == 0


def _check(pool: AnyArray, pages: AnyArray, page_size: int) -> None:
    require_pool("pool", pool)
    require_int32(pages=pages)
    if page_size < 1 or pool.shape[1] % page_size:
        raise ArgumentError(
            f"page_size must divide the pool's {pool.shape[1]} slots, got {page_size}: pass the page size of its config"
        )
