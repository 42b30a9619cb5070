"""Mosaic GPU kernels of `alloc_pages`.

Mosaic has neither prefix sums nor gathers, so what Triton does with vectors is done with scalars here, which are read
once for a whole block: a block of `alloc_extend` owns a stretch of the result, walks over the requests that touch it,
and then over the pages that it shows; a block of `alloc_decode` owns one request and counts those before it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128
"""Threads of a block; vectors are multiples of it."""
TOKENS_PER_BLOCK = 512
UNSET, NO_PAGE = -1, -2
"""Ordinals of a token that needs no page, and of a page that is not there."""


# Jitted, so that all calls of a step with the same shapes are one kernel, compiled once.
@partial(jax.jit, static_argnames=("page_size", "num_tokens", "interpret"))
def alloc_extend(
    prefix_lens: jax.Array,
    seq_lens: jax.Array,
    last_loc: jax.Array,
    new_pages: jax.Array,
    *,
    page_size: int,
    num_tokens: int,
    interpret: object = None,
) -> jax.Array:
    """See `alloc_pages.alloc_extend`; `num_tokens`, the batch and `new_pages` are not empty."""
    bs, num_pages = seq_lens.shape[0], new_pages.shape[0]
    blocks = pl.cdiv(num_tokens, TOKENS_PER_BLOCK)

    def body(prefix_ref, seq_ref, last_ref, pages_ref, slots_ref):
        first = jax.lax.axis_index("block") * TOKENS_PER_BLOCK
        behind = first + TOKENS_PER_BLOCK
        token = first + _lane_ids(TOKENS_PER_BLOCK)
        nothing = token - token

        def walk(row, carry):
            start, taken, state = carry
            prefix, seq = prefix_ref[row], seq_ref[row]
            end = start + seq - prefix
            pages_before = _ceil_div(prefix, page_size)

            def touch(slot, ordinal, offset, low, high):
                position = token - start + prefix
                boundary = pages_before * page_size
                mine = (token >= start) & (token < end)
                fresh = mine & (position >= boundary)
                slot = jnp.where(mine & (position < boundary), last_ref[row] + 1 - prefix + position, slot)
                ordinal = jnp.where(fresh, jax.lax.div(position, page_size) + (taken - pages_before), ordinal)
                offset = jnp.where(fresh, jax.lax.rem(position, page_size), offset)
                lowest = jnp.maximum(jnp.maximum(start, first) - start + prefix, boundary)
                highest = jnp.minimum(end, behind) - start + prefix - 1
                some = highest >= lowest
                low_page = jax.lax.div(lowest, page_size) + (taken - pages_before)
                high_page = jax.lax.div(highest, page_size) + (taken - pages_before) + 1
                return (
                    slot,
                    ordinal,
                    offset,
                    jnp.where(some, jnp.minimum(low, low_page), low),
                    jnp.where(some, jnp.maximum(high, high_page), high),
                )

            touches = (end > first) & (start < behind) & (end > start)
            state = jax.lax.cond(touches, touch, lambda *same: same, *state)
            return end, taken + _ceil_div(seq, page_size) - pages_before, state

        none = (nothing, nothing + UNSET, nothing, jnp.int32(2**30), jnp.int32(0))
        _, _, (slot, ordinal, offset, low, high) = jax.lax.fori_loop(0, bs, walk, (jnp.int32(0), jnp.int32(0), none))

        def fill(page_ordinal, slot):
            page = jnp.where(page_ordinal < num_pages, pages_ref[jnp.minimum(page_ordinal, num_pages - 1)], 0)
            wanted = jnp.where(page == 0, NO_PAGE, page_ordinal)  # tokens of a missing page keep the sink
            return jnp.where(ordinal == wanted, page * page_size + offset, slot)

        slots_ref[pl.ds(first, TOKENS_PER_BLOCK)] = jax.lax.fori_loop(jnp.minimum(low, high), high, fill, slot)

    slots = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks * TOKENS_PER_BLOCK,), jnp.int32),
        grid=(blocks,),
        grid_names=("block",),
        interpret=interpret,
    )(prefix_lens, seq_lens, last_loc, new_pages)
    return slots[:num_tokens]


@partial(jax.jit, static_argnames=("page_size", "interpret"))
def alloc_decode(
    seq_lens: jax.Array, last_loc: jax.Array, new_pages: jax.Array, *, page_size: int, interpret: object = None
) -> jax.Array:
    """See `alloc_pages.alloc_decode`; the batch and `new_pages` are not empty."""
    bs, num_pages = seq_lens.shape[0], new_pages.shape[0]
    padded = pl.cdiv(bs, LANES) * LANES

    def body(seq_ref, last_ref, pages_ref, slots_ref):
        row = jax.lax.axis_index("row")
        seq, last = seq_ref[row], last_ref[row]
        lengths = seq_ref[...]
        before = _lane_ids(padded) < row
        starts = (lengths > 0) & (jax.lax.rem(lengths - 1, page_size) == 0)
        ordinal = jnp.sum(jnp.where(before & starts, 1, 0))
        page = jnp.where(ordinal < num_pages, pages_ref[jnp.minimum(ordinal, num_pages - 1)], 0)
        starts_page = (seq > 0) & (jax.lax.rem(seq - 1, page_size) == 0)
        slots_ref[row] = jnp.where(starts_page, page * page_size, jnp.where(seq > 0, last + 1, 0))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((bs,), jnp.int32),
        grid=(bs,),
        grid_names=("row",),
        interpret=interpret,
    )(jnp.pad(seq_lens, (0, padded - bs)), last_loc, new_pages)


def _lane_ids(length: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=plgpu.Layout.WG_STRIDED((length,), vec_size=1))


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.div(a + (b - 1), jnp.int32(b))
