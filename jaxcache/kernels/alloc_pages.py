"""Page allocation on the device: from lengths and fresh pages to one slot a token.

The host (or `pages/graph.py`) decides which pages a batch takes; these ops expand them to slots, so that 64k slots need
no upload. For one request, with P = page_size and C(x) = ceil(x / P):

    position   0 ............ p | p ........ C(p)*P | C(p)*P ........... s
               written before   | tail of the page  | the request's new pages, in order:
                                | that holds        | slot = page * P + position mod P
                                | last_loc: slots   |
                                | last_loc + 1 ..   |

Requests take consecutive pages of `new_pages` in batch order. Slot 0 (`SINK_SLOT`) stands for "no token": `write_kv`
drops it.

Source: SGLang 0.5.2 allocator.py (alloc_extend_kernel, alloc_decode_kernel) and allocator_ascend.py, in one closed
form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray, require_int32, require_same_length
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

SINK_SLOT = 0
MAX_SUMMED = 8192
"""Most requests whose lengths one Triton program holds at once; larger batches are left to the reference."""


def alloc_extend(
    prefix_lens: Int32[AnyArray, " bs"],
    seq_lens: Int32[AnyArray, " bs"],
    last_loc: Int32[AnyArray, " bs"],
    new_pages: Int32[AnyArray, " pages"],
    *,
    page_size: int,
    num_tokens: int,
    implementation: Implementation | None = None,
) -> Int32[Array, " num_tokens"]:
    """Slots of the tokens that extend each request from its prefix to its new length.

    Args:
      prefix_lens: Tokens of each request that have a slot already.
      seq_lens: Tokens of each request afterwards; `seq_lens >= prefix_lens`. A padding row has them equal.
      last_loc: Slot of token `prefix_lens - 1`, -1 where the prefix is empty; `(last_loc + 1) % page_size` must be
        `prefix_lens % page_size`. Not read for a row that gets no token in an old page.
      new_pages: The pages to consume, in order; unused entries behind them are not read.
      page_size: Slots a page.
      num_tokens: Length of the result, at least `sum(seq_lens - prefix_lens)`.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The slots of all requests one after another, then SINK_SLOT up to `num_tokens`. Tokens whose page lies past the
      end of `new_pages` (the caller took too few), or is page 0, get SINK_SLOT too: their KV is dropped, never
      misplaced.

    Raises:
      ArgumentError: on a wrong dtype, shape, `page_size` or `num_tokens`. Values are the caller's duty (`pages/` checks
        them).

    Cost: O(bs + num_tokens), one pass.
    """
    _check(page_size, prefix_lens=prefix_lens, seq_lens=seq_lens, last_loc=last_loc, new_pages=new_pages)
    if num_tokens < 0:
        raise ArgumentError(f"num_tokens must not be negative, got {num_tokens}: pass the bucket of the batch")
    if num_tokens == 0 or prefix_lens.shape[0] == 0:
        return jnp.full(num_tokens, SINK_SLOT, jnp.int32)
    rows = jnp.asarray(prefix_lens), jnp.asarray(seq_lens), jnp.asarray(last_loc)
    new_pages = _never_empty(jnp.asarray(new_pages))
    bs = seq_lens.shape[0]
    unfit = {Implementation.TRITON: f"one program sums at most {MAX_SUMMED} requests, got {bs}"}
    chosen = choose(
        Op.ALLOC_EXTEND, implementation=implementation, rows=bs, unfit=unfit if bs > MAX_SUMMED else {}
    ).implementation
    if chosen is Implementation.TRITON:
        from jaxcache.kernels import alloc_pages_triton

        return alloc_pages_triton.alloc_extend(*rows, new_pages, page_size=page_size, num_tokens=num_tokens)
    if chosen is Implementation.MOSAIC:
        from jaxcache.kernels import alloc_pages_mosaic

        return alloc_pages_mosaic.alloc_extend(*rows, new_pages, page_size=page_size, num_tokens=num_tokens)
    return _alloc_extend_reference(row_plan(*rows, page_size), new_pages, page_size, num_tokens)


def alloc_decode(
    seq_lens: Int32[AnyArray, " bs"],
    last_loc: Int32[AnyArray, " bs"],
    new_pages: Int32[AnyArray, " pages"],
    *,
    page_size: int,
    implementation: Implementation | None = None,
) -> Int32[Array, " bs"]:
    """Slot of one more token for each request.

    Args:
      seq_lens: Length of each request with the new token counted. 0 marks a padding row.
      last_loc: Slot of token `seq_lens - 2`, -1 where there is none; `(last_loc + 2) % page_size == seq_lens %
        page_size`.
      new_pages: The pages to consume, in order, by the rows whose new token starts a page.
      page_size: Slots a page.
      implementation: Overrides `dispatch.choose`.

    Returns:
      One slot a row; SINK_SLOT for padding rows and for rows whose page lies past the end of `new_pages`.

    Raises:
      ArgumentError: on a wrong dtype, shape or `page_size`.

    Cost: O(bs).
    """
    _check(page_size, seq_lens=seq_lens, last_loc=last_loc, new_pages=new_pages)
    if seq_lens.shape[0] == 0:
        return jnp.zeros(0, jnp.int32)
    seq_lens, last_loc, new_pages = jnp.asarray(seq_lens), jnp.asarray(last_loc), _never_empty(jnp.asarray(new_pages))
    chosen = choose(Op.ALLOC_DECODE, implementation=implementation, rows=seq_lens.shape[0]).implementation
    if chosen is Implementation.TRITON:
        from jaxcache.kernels import alloc_pages_triton

        return alloc_pages_triton.alloc_decode(seq_lens, last_loc, new_pages, page_size=page_size)
    if chosen is Implementation.MOSAIC:
        from jaxcache.kernels import alloc_pages_mosaic

        return alloc_pages_mosaic.alloc_decode(seq_lens, last_loc, new_pages, page_size=page_size)
    starts_page = (seq_lens > 0) & ((seq_lens - 1) % page_size == 0)
    ordinal = jnp.cumsum(starts_page, dtype=jnp.int32) - starts_page.astype(jnp.int32)
    fresh = _page_at(new_pages, ordinal) * page_size
    return jnp.where(starts_page, fresh, jnp.where(seq_lens > 0, last_loc + 1, SINK_SLOT))


class RowPlan(NamedTuple):
    """What a token must know about its request to find its slot; one int32 entry a row.

    Token `t` of the result belongs to the first row with `t < end`; its position is `t + to_position`. Below `boundary`
    its slot is `position + to_slot`, else it lies in page `new_pages[position // page_size + to_page]`.
    """

    end: jax.Array
    to_position: jax.Array
    boundary: jax.Array
    to_slot: jax.Array
    to_page: jax.Array


def row_plan(prefix_lens: jax.Array, seq_lens: jax.Array, last_loc: jax.Array, page_size: int) -> RowPlan:
    """The prefix sums over the batch, computed once for all tokens. O(bs)."""
    pages_before = -(-prefix_lens // page_size)
    taken = -(-seq_lens // page_size) - pages_before
    end = jnp.cumsum(seq_lens - prefix_lens, dtype=jnp.int32)
    return RowPlan(
        end=end,
        to_position=seq_lens - end,
        boundary=pages_before * page_size,
        to_slot=last_loc + 1 - prefix_lens,
        to_page=jnp.cumsum(taken, dtype=jnp.int32) - taken - pages_before,
    )


def _alloc_extend_reference(rows: RowPlan, new_pages: jax.Array, page_size: int, num_tokens: int) -> jax.Array:
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # The row of a token is the number of rows that end at or before it: a running count, no search.
    ends_here = jnp.zeros(num_tokens, jnp.int32).at[rows.end].add(1, mode="drop", indices_are_sorted=True)
    row = jnp.cumsum(ends_here, dtype=jnp.int32)
    to_position, boundary, to_slot, to_page = (field.at[row].get(mode="clip") for field in rows[1:])
    position = token + to_position
    page = _page_at(new_pages, position // page_size + to_page)
    fresh = jnp.where(page == 0, SINK_SLOT, page * page_size + position % page_size)
    slot = jnp.where(position < boundary, position + to_slot, fresh)
    return jnp.where(token < rows.end[-1], slot, SINK_SLOT)


def _page_at(new_pages: jax.Array, ordinal: jax.Array) -> jax.Array:
    """`new_pages[ordinal]`, page 0 past the end. Negative ordinals (tokens that need no page) give page 0 as well."""
    return new_pages.at[ordinal].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _never_empty(new_pages: jax.Array) -> jax.Array:
    """A batch that takes no page may bring no page; a gather needs something to read."""
    return new_pages if new_pages.shape[0] else jnp.zeros(1, jnp.int32)


def _check(page_size: int, *, new_pages: AnyArray, **rows: AnyArray) -> None:
    require_int32(new_pages=new_pages, **rows)
    require_same_length(**rows)
    if page_size < 1:
        raise ArgumentError(f"page_size must be at least 1, got {page_size}")
