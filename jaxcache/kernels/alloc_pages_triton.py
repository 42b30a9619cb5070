"""Triton kernels of `alloc_pages`. Parameter order: see `triton_call`.

SGLang launches one program a request, each summing all rows before its own and storing through a block as wide as the
longest batch seen. Here a program owns a fixed stretch of the result. It sums the lengths of the whole batch by itself,
which costs less than a second launch that would read the sums of a first one, and finds the request of each token by
bisection in the sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxcache.kernels.triton_call import triton_call

TOKENS_PER_PROGRAM = 256
ROWS_PER_STEP = 1024
"""Most requests that `alloc_decode` counts at once, and that four warps are enough to sum."""


def alloc_extend(
    prefix_lens: jax.Array,
    seq_lens: jax.Array,
    last_loc: jax.Array,
    new_pages: jax.Array,
    *,
    page_size: int,
    num_tokens: int,
) -> jax.Array:
    """See `alloc_pages.alloc_extend`; nothing is empty, and the batch fits one program."""
    bs = seq_lens.shape[0]
    (slots,) = triton_call(
        alloc_extend_kernel,
        (prefix_lens, seq_lens, last_loc, new_pages),
        (bs, new_pages.shape[0]),
        outputs=[jax.ShapeDtypeStruct((num_tokens,), jnp.int32)],
        **alloc_extend_launch(bs, num_tokens, page_size),
    )
    return slots


def alloc_decode(seq_lens: jax.Array, last_loc: jax.Array, new_pages: jax.Array, *, page_size: int) -> jax.Array:
    """See `alloc_pages.alloc_decode`; the batch and `new_pages` are not empty."""
    bs = seq_lens.shape[0]
    (slots,) = triton_call(
        alloc_decode_kernel,
        (seq_lens, last_loc, new_pages),
        (bs, new_pages.shape[0]),
        outputs=[jax.ShapeDtypeStruct((bs,), jnp.int32)],
        **alloc_decode_launch(bs, page_size),
    )
    return slots


def alloc_extend_launch(bs: int, num_tokens: int, page_size: int) -> dict:
    """Grid and constexprs of `alloc_extend_kernel`."""
    return dict(
        grid=(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),),
        num_warps=4 if bs <= ROWS_PER_STEP else 8,
        NUM_TOKENS=num_tokens,
        PAGE_SIZE=page_size,
        BISECTIONS=bs.bit_length(),
        ROWS=triton.next_power_of_2(bs),
        BLOCK=TOKENS_PER_PROGRAM,
    )


def alloc_decode_launch(bs: int, page_size: int) -> dict:
    """Grid and constexprs of `alloc_decode_kernel`: one program, because it counts the rows that take a page."""
    return dict(grid=(1,), num_warps=4, PAGE_SIZE=page_size, BLOCK=min(triton.next_power_of_2(bs), ROWS_PER_STEP))


@triton.jit
def alloc_extend_kernel(
    prefix_lens,  # (bs,)
    seq_lens,  # (bs,)
    last_loc,  # (bs,)
    new_pages,  # (num_pages,)
    bs,
    num_pages,
    slots,  # (NUM_TOKENS,) output
    NUM_TOKENS: tl.constexpr,  # a constant, so that whole vectors are stored
    PAGE_SIZE: tl.constexpr,
    BISECTIONS: tl.constexpr,  # bit length of bs
    ROWS: tl.constexpr,  # at least bs
    BLOCK: tl.constexpr,
):
    request = tl.arange(0, ROWS)
    prefix_len = tl.load(prefix_lens + request, mask=request < bs, other=0)
    seq_len = tl.load(seq_lens + request, mask=request < bs, other=0)
    pages_before = (prefix_len + PAGE_SIZE - 1) // PAGE_SIZE
    taken = (seq_len + PAGE_SIZE - 1) // PAGE_SIZE - pages_before
    end = tl.cumsum(seq_len - prefix_len, 0)  # as in alloc_pages.RowPlan, and so are the next two
    to_position = seq_len - end
    to_page = tl.cumsum(taken, 0) - taken - pages_before

    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.zeros([BLOCK], tl.int32)  # number of rows known to end at or before the token
    for i in tl.static_range(BISECTIONS):  # pyright: ignore[reportGeneralTypeIssues]
        probe = row + (1 << (BISECTIONS - 1 - i))
        probe_end = tl.gather(end, tl.minimum(probe, ROWS) - 1, 0)
        row = tl.where((probe <= bs) & (probe_end <= token), probe, row)
    in_batch = row < bs
    some_row = tl.minimum(row, ROWS - 1)
    position = token + tl.gather(to_position, some_row, 0)
    ordinal = position // PAGE_SIZE + tl.gather(to_page, some_row, 0)
    prefix = tl.load(prefix_lens + row, mask=in_batch, other=0)
    in_old_page = in_batch & (position < (prefix + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE)
    old_slot = position + tl.load(last_loc + row, mask=in_old_page, other=0) + 1 - prefix
    takes_page = in_batch & (position >= 0) & (ordinal >= 0) & (ordinal < num_pages)
    page = tl.load(new_pages + ordinal, mask=takes_page & ~in_old_page, other=0)
    fresh = tl.where(page == 0, 0, page * PAGE_SIZE + position % PAGE_SIZE)
    tl.store(slots + token, tl.where(in_old_page, old_slot, fresh), mask=token < NUM_TOKENS)


@triton.jit
def alloc_decode_kernel(
    seq_lens,  # (bs,)
    last_loc,  # (bs,)
    new_pages,  # (num_pages,)
    bs,
    num_pages,
    slots,  # (bs,) output
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    taken = 0
    for first in range(0, bs, BLOCK):
        row = first + tl.arange(0, BLOCK)
        seq_len = tl.load(seq_lens + row, mask=row < bs, other=0)
        starts_page = (seq_len > 0) & ((seq_len - 1) % PAGE_SIZE == 0)
        takes = starts_page.to(tl.int32)
        ordinal = taken + tl.cumsum(takes, 0) - takes
        page = tl.load(new_pages + ordinal, mask=starts_page & (ordinal < num_pages), other=0)
        old_slot = tl.load(last_loc + row, mask=(row < bs) & (seq_len > 0), other=-1) + 1
        tl.store(slots + row, tl.where(starts_page, page * PAGE_SIZE, old_slot), mask=row < bs)
        taken += tl.sum(takes, 0)  # pyright: ignore[reportOperatorIssue]
