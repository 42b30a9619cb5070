"""Merging partial results: attention over parts of the keys, weighted by the log-sum-exp of each part.

What softmax attention gives over all keys follows from what it gives over disjoint parts of them and the log-sum-exp of
their logits. A part may be a prefix that a batch shares, or the keys of one device (context parallelism).

Source: online softmax; FlashInfer's merge_states has the same contract.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray, require_array
from jaxcache.kernels.attention.contract import check_sinks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

    from jaxcache.kernels.attention.plan import Units


def merge_attention(
    out: Float[AnyArray, "parts tokens heads dim"],
    lse: Float32[AnyArray, "parts tokens heads"],
    sinks: Float32[AnyArray, " heads"] | None = None,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Attention over all keys, from that over parts of them.

    Args:
      out: Results of the parts. Rows of a part without keys (lse -inf) do not count, whatever they hold.
      lse: Natural log-sum-exp of the logits of each part, -inf for none.
      sinks: Logit of each head without a value, if no part has counted them.

    Returns:
      The result in the dtype of `out`, summed in float32, and its log-sum-exp. Zeros and -inf where no part has keys.

    Raises:
      ArgumentError: on shapes or dtypes that do not fit together.

    Cost: reads the parts once.
    """
    for name, array in (("out", out), ("lse", lse)):
        require_array(name, array)
    if out.ndim != 4 or lse.shape != out.shape[:3] or lse.dtype != np.float32:
        raise ArgumentError(
            f"out must be (parts, tokens, heads, dim) and lse float32 (parts, tokens, heads), "
            f"got {out.shape} and {lse.dtype}{list(lse.shape)}"
        )
    check_sinks(sinks, out.shape[2])
    total = jax.nn.logsumexp(lse, axis=0)
    if sinks is not None:
        total = jnp.logaddexp(total, sinks)
    weight = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total)))[..., None]
    merged = jnp.where(weight > 0, jnp.asarray(out, jnp.float32), 0.0) * weight
    return merged.sum(axis=0).astype(out.dtype), total


def merge_planned(
    part_o: Float32[Array, "parts heads dim"], part_lse: Float32[Array, "parts heads"], units: Units, dtype: Any
) -> tuple[Float[Array, "units heads dim"], Float32[Array, "units heads"]]:
    """The results of all units, in `dtype`, from the parts that programs left, in their order.

    `part_lse` is to base 2; the log-sum-exp that is returned is natural. What a Triton kernel does in one launch, as so
    many launches as the longest unit has parts.
    """
    lo, hi = units.first_block[:-1], units.first_block[1:]
    share = jnp.maximum(-(-units.first_block[-1] // units.programs), 1)
    first = lo // share
    count = jnp.where(hi > lo, (hi - 1) // share - first + 1, 0)
    place = first + jnp.arange(units.count, dtype=jnp.int32)

    def fold(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        is_part = (i < count)[:, None]
        lse = jnp.where(is_part, part_lse.at[place + i].get(mode="clip"), -jnp.inf)
        part = jnp.where(is_part[..., None], part_o.at[place + i].get(mode="clip"), 0.0)
        new = jnp.maximum(top, lse)
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        fade, weight = jnp.exp2(top - safe), jnp.exp2(lse - safe)
        return out * fade[..., None] + part * weight[..., None], new, total * fade + weight

    shape = (units.count, *part_o.shape[1:])
    empty = jnp.zeros(shape), jnp.full(shape[:2], -jnp.inf), jnp.zeros(shape[:2])
    out, top, total = jax.lax.fori_loop(0, jnp.max(count), fold, empty)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return out.astype(dtype), (top + jnp.log2(jnp.maximum(total, 1e-37))) * math.log(2)


def with_sinks(
    out: Float32[Array, "tokens heads dim"], lse: Float32[Array, "tokens heads"], sinks: Float32[AnyArray, " heads"]
) -> tuple[Float32[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """A result whose softmax also runs over the sinks."""
    total = jnp.logaddexp(lse, sinks)
    return out * jnp.exp(lse - total)[..., None], total
