"""Paged decode: one query a request attends to all its tokens, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray
from jaxcache.kernels.attention.contract import (
    Masking,
    PagedKV,
    check_group,
    check_layer,
    check_queries,
    check_sinks,
    without_gradient,
)
from jaxcache.kernels.attention.fit import unfit_for_decode
from jaxcache.kernels.attention.merge import with_sinks
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.attention.reference import Fetch, attend, fetch_kv
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


def paged_decode(
    q: Float[AnyArray, "requests q_heads k_dim"],
    kv: PagedKV,
    layer: int | Int32[AnyArray, ""],
    plan: Plan,
    masking: Masking,
    *,
    sinks: Float32[AnyArray, " q_heads"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "requests q_heads v_dim"], Float32[Array, "requests q_heads"]]:
    """Attention of the last token of each request to all its tokens.

    Args:
      q: The query of each request. Query head `i` belongs to KV head `i // (q_heads / kv_heads)`.
      kv: Keys and values of all layers. Read in place, not consumed.
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

    Cost: reads the keys and values of all requests once: it is bound by that. A shared prefix is read once a group.
    """
    check_attention(q, kv, layer, plan, masking, sinks)
    if q.shape[0] != plan.sequences.requests:
        raise ArgumentError(
            f"q must have one row for each of the plan's {plan.sequences.requests} requests, got {q.shape[0]}: "
            "make the plan of this batch, or use paged_extend for several tokens a request"
        )
    q, kv, sinks = without_gradient((q, kv, sinks))
    chosen = choose(Op.PAGED_DECODE, implementation=implementation, rows=q.shape[0], unfit=unfit_for_decode(q, kv))
    if chosen.implementation is Implementation.TRITON and q.shape[0]:
        from jaxcache.kernels.attention import decode_triton

        return decode_triton.paged_decode(q, kv, layer, plan, masking, sinks)
    return reference(q, fetch_kv(kv, layer), plan, masking, sinks)


def reference(
    q: Any, fetch: Fetch, plan: Plan, masking: Masking, sinks: AnyArray | None
) -> tuple[jax.Array, jax.Array]:
    """Decode in `jax.numpy`. It takes nothing from the plan but the sequences."""
    sequences = plan.sequences
    out, lse = attend(
        q[:, None],
        sequences.seq_len[:, None] - 1,
        jnp.zeros_like(sequences.seq_len),
        sequences.pages[sequences.row],
        fetch,
        plan.page_size,
        masking,
    )
    out, lse = out[:, 0], lse[:, 0]
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.astype(q.dtype), lse


def check_attention(q: Any, kv: PagedKV, layer: Any, plan: Plan, masking: Masking, sinks: Any) -> None:
    """Refuses what neither decode nor extend over keys and values can take.

    Raises:
      ArgumentError: names the argument.
    """
    kv.check()
    check_queries(q, kv.k.shape[-1])
    check_group(q.shape[1], kv.heads)
    check_layer(layer, kv.order)
    check_sinks(sinks, q.shape[1])
    check_plan(plan, kv.order.page_size, masking)


def check_plan(plan: Plan, page_size: int, masking: Masking) -> None:
    """Refuses a plan for other pages, or for another window.

    Raises:
      ArgumentError: names what the plan is for.
    """
    if plan.page_size != page_size:
        raise ArgumentError(f"plan must be for pages of {page_size} tokens like the pool's, got {plan.page_size}")
    if plan.window != masking.window:
        raise ArgumentError(
            f"window must be that of the plan, {plan.window}, got {masking.window}: make a plan for each kind of window"
        )
