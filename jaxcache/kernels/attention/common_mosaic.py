"""What the Mosaic GPU kernels of attention share: where a buffer's pages are, the softmax's numbers, accumulators."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COLUMNS = 64
"""Columns of a swizzled tile."""
TILED = (
    plgpu.TilingTransform((8, COLUMNS)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
"""How a buffer lies that wgmma reads."""
LOG2E = math.log2(math.e)
NO_LOGIT = -1e30
COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40
"""Of a thread; together at most 65,536 over two warpgroups that multiply and one that fetches."""
WGMMA = plgpu.Layout.WGMMA


def pages_of_buffer(
    table: Any, row: Any, page: Any, token: Any, stop: Any, tokens: int, page_size: int
) -> list[tuple[Any, Any]]:
    """Where `tokens` tokens from `token` on go in a buffer, and the rows where they are: a page, or a part, at a time.

    `table` is flat, and the pages of the request begin at `row`. `page` has the array's page that is page 0 of the
    layer, and the distance from one to the next. Behind the last page before `stop` it is read again: the numbers of
    the table there are stale.
    """
    piece = min(page_size, tokens)
    last = lax.div(jnp.maximum(stop - 1, 0), jnp.int32(page_size))
    found = []
    for place in range(0, tokens, piece):
        which = jnp.minimum(lax.div(token + place, jnp.int32(page_size)), last)
        physical = page[0] + table[row + which] * page[1]
        at = pl.multiple_of(physical * page_size + lax.rem(token + place, jnp.int32(page_size)), piece)
        found.append((pl.ds(place, piece), pl.ds(at, piece)))
    return found


def base2_logits(logits: Any, scale: Any, cap: float) -> Any:
    """Logits to base 2, capped if `cap` is not 0: tanh(x) = 1 - 2 / (1 + exp(2 x))."""
    if not cap:
        return logits * (scale * LOG2E)
    rising = jnp.exp2(logits * (scale * (2 * LOG2E / cap)))
    return (cap * LOG2E) * (1.0 - 2.0 / (1.0 + rising))


def accumulate(acc: Any, multiply: Any, interprets: bool) -> Any:
    """`acc` and what `multiply`, given an accumulator, adds to it. JAX's interpreter knows no initialized ones."""
    if not interprets:
        return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))

    def from_zero(ref: Any) -> Any:
        multiply(ref)
        return ref[...]

    return acc + pl.run_scoped(from_zero, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))


def filled(shape: tuple[int, ...], number: float) -> Any:
    """An array of one number, a row of queries a row."""
    return plgpu.layout_cast(jnp.full(shape, number, jnp.float32), WGMMA if len(shape) == 2 else WGMMA.reduce(1))


def spread(x: Any, like: Any) -> Any:
    """A number a row, in all columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def clear(buffer: Any, token: Any, stop: Any) -> None:
    """Zeros in the rows of a buffer, which begins with `token`, from `stop` on."""
    for column in range(0, buffer.shape[1], COLUMNS):
        tile = buffer.at[:, pl.ds(column, COLUMNS)]
        at = plgpu.broadcasted_iota(jnp.int32, (buffer.shape[0], COLUMNS), 0, layout=WGMMA) + token
        numbers = load(tile)
        tile[...] = jnp.where(at < stop, numbers, jnp.zeros_like(numbers))
    plgpu.commit_smem()


def load(ref: Any, layout: Any = WGMMA, *, optimized: bool = True) -> Any:
    """An array as wgmma has it in registers. JAX 0.10, which has no such kernels, asks for an index."""
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]
