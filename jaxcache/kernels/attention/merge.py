"""Merging partial results: attention over parts of the keys, weighted by the log-sum-exp of each part.

What softmax attention gives over all keys follows from what it gives over disjoint parts of them and the log-sum-exp of
their logits. A part may be a prefix that a batch shares, or the keys of one device (context parallelism).

Source: online softmax; FlashInfer's merge_states has the same contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray, require_array
from jaxcache.kernels.attention.contract import check_sinks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


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


def with_sinks(
    out: Float32[Array, "tokens heads dim"], lse: Float32[Array, "tokens heads"], sinks: Float32[AnyArray, " heads"]
) -> tuple[Float32[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """A result whose softmax also runs over the sinks."""
    total = jnp.logaddexp(lse, sinks)
    return out * jnp.exp(lse - total)[..., None], total
