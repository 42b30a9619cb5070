"""Paged extend: several tokens a request attend to the request's prefix and, causally, to one another, in place.

For prompts, chunks of prompts on a cached prefix, drafts of speculative decoding, and mixtures of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray
from jaxcache.kernels.attention.contract import Masking, PagedKV, without_gradient
from jaxcache.kernels.attention.decode import check_attention
from jaxcache.kernels.attention.fit import unfit_for_extend
from jaxcache.kernels.attention.merge import with_sinks
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.attention.reference import Fetch, attend, fetch_kv
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


def paged_extend(
    q: Float[AnyArray, "tokens q_heads k_dim"],
    kv: PagedKV,
    layer: int | Int32[AnyArray, ""],
    plan: Plan,
    masking: Masking,
    *,
    sinks: Float32[AnyArray, " q_heads"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "tokens q_heads v_dim"], Float32[Array, "tokens q_heads"]]:
    """Attention of each token of a step to all tokens of its request up to itself.

    Args:
      q: The queries of the step, request after request. Query head `i` belongs to KV head
        `i // (q_heads / kv_heads)`.
      kv: Keys and values of all layers, those of this step written already. Read in place, not consumed.
      layer: Index into the layers. An int is checked; an array out of range reads the nearest layer.
      plan: Of this step and this kind of layers.
      masking: Scale, window and soft cap of the logits.
      sinks: A logit without a value for each query head.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The results in the dtype of `q`, and the natural log-sum-exp of the logits, sinks included. Zeros and -inf (the
      sink) for padding.

    Raises:
      ArgumentError: on arrays that do not fit together, or a plan of another batch, page size or window.
      UnsupportedError: if the caller insists on an implementation that cannot run, or asks for a gradient.

    Cost: `4 * q_heads * dim` operations for each pair of a token and a key that it sees. Keys are read once a tile of
      tokens. A single token is a tile as well: a batch of single tokens is for `paged_decode`.
    """
    check_attention(q, kv, layer, plan, masking, sinks)
    check_tokens(q, plan)
    q, kv, sinks = without_gradient((q, kv, sinks))
    chosen = choose(
        Op.PAGED_EXTEND, implementation=implementation, rows=q.shape[0], unfit=unfit_for_extend(q, kv, plan)
    )
    if chosen.implementation is Implementation.TRITON and q.shape[0]:
        from jaxcache.kernels.attention import extend_triton

        return extend_triton.paged_extend(q, kv, layer, plan, masking, sinks)
    if chosen.implementation is Implementation.MOSAIC:
        from jaxcache.kernels.attention import extend_mosaic

        return extend_mosaic.paged_extend(q, kv, layer, plan, masking, sinks)
    return reference(q, fetch_kv(kv, layer), plan, masking, sinks)


def check_tokens(q: Any, plan: Plan) -> None:
    """Refuses queries of another number than the plan's.

    Raises:
      ArgumentError: names both.
    """
    if q.shape[0] != plan.tokens:
        raise ArgumentError(
            f"q must have one row for each of the plan's {plan.tokens} tokens, got {q.shape[0]}: "
            "make the plan of this batch"
        )


def reference(
    q: Any, fetch: Fetch, plan: Plan, masking: Masking, sinks: AnyArray | None
) -> tuple[jax.Array, jax.Array]:
    """Extend in `jax.numpy`, a tile of tokens after the other."""
    sequences, tiles, size = plan.sequences, plan.tiles, plan.launches.extend.tokens
    tokens = q.shape[0]

    def one(tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        request, first = tile
        b = jnp.minimum(request, sequences.requests - 1)
        t = first + jnp.arange(size, dtype=jnp.int32)
        token, position = sequences.first_token[b] + t, sequences.prefix_len[b] + t
        is_live = (position < sequences.seq_len[b]) & (request < sequences.requests) & (token < tiles.stop[b])
        token = jnp.where(is_live, token, tokens)
        rows = jnp.asarray(q).at[token].get(mode="fill", fill_value=0)
        out, lse = attend(
            rows[None],
            jnp.where(is_live, position, -1)[None],
            jnp.zeros(1, jnp.int32),
            sequences.pages[sequences.row[b]][None],
            fetch,
            plan.page_size,
            masking,
        )
        return out[0], lse[0], token

    out, lse, token = jax.lax.map(one, (tiles.request, tiles.first))
    token = token.reshape(-1)
    out = jnp.zeros((tokens, *out.shape[2:])).at[token].set(out.reshape(-1, *out.shape[2:]), mode="drop")
    lse = jnp.full((tokens, lse.shape[2]), -jnp.inf).at[token].set(lse.reshape(-1, lse.shape[2]), mode="drop")
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.astype(q.dtype), lse
