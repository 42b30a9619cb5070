"""Absorbed attention over latent rows, decode and extend, in place.

The queries are absorbed already: `(heads, rank + rope)`, multiplied with a row as it lies in the pool. The value is the
latent part of the row, so that results are `(heads, rank)`, for the caller to project up.

Source: DeepSeek-V2, multi-head latent attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray
from jaxcache.kernels.attention import decode, extend
from jaxcache.kernels.attention.contract import Masking, PagedLatent, check_layer, check_queries, without_gradient
from jaxcache.kernels.attention.fit import unfit_for_latent_decode, unfit_for_latent_extend
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.attention.reference import fetch_latent
from jaxcache.kernels.dispatch import Implementation, Op, choose

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


def mla_decode(
    q: Float[AnyArray, "requests heads rank+rope"],
    kv: PagedLatent,
    layer: int | Int32[AnyArray, ""],
    plan: Plan,
    masking: Masking,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "requests heads rank"], Float32[Array, "requests heads"]]:
    """Attention of the last token of each request to all its tokens.

    Args:
      q: The absorbed query of each request.
      kv: Latent rows of all layers. Read in place, not consumed.
      layer: Index into the layers. An int is checked; an array out of range reads the nearest layer.
      plan: Of this step and this kind of layers.
      masking: Scale, window and soft cap of the logits.
      implementation: Overrides `dispatch.choose`.

    Returns:
      The results in the dtype of `q`, and the natural log-sum-exp of the logits. Zeros and -inf for padding.

    Raises:
      ArgumentError: on arrays that do not fit together, or a plan of another batch, page size or window.
      UnsupportedError: if the caller insists on an implementation that cannot run, or asks for a gradient.

    Cost: reads the rows of all requests once for each 64 heads: bound by that for few heads, by the tensor cores for
      many.
    """
    _check(q, kv, layer, plan, masking)
    if q.shape[0] != plan.sequences.requests:
        raise ArgumentError(
            f"q must have one row for each of the plan's {plan.sequences.requests} requests, got {q.shape[0]}: "
            "make the plan of this batch, or use mla_extend for several tokens a request"
        )
    q, kv = without_gradient((q, kv))
    unfit = unfit_for_latent_decode(q, kv, plan)
    chosen = choose(Op.MLA_DECODE, implementation=implementation, rows=q.shape[0], unfit=unfit)
    if chosen.implementation is Implementation.TRITON and q.shape[0]:
        from jaxcache.kernels.attention import mla_triton

        return mla_triton.mla_decode(q, kv, layer, plan, masking)
    if chosen.implementation is Implementation.MOSAIC and q.shape[0]:
        from jaxcache.kernels.attention import mla_mosaic

        return mla_mosaic.mla_decode(q, kv, layer, plan, masking)
    return decode.reference(q, fetch_latent(kv, layer), plan, masking, None)


def mla_extend(
    q: Float[AnyArray, "tokens heads rank+rope"],
    kv: PagedLatent,
    layer: int | Int32[AnyArray, ""],
    plan: Plan,
    masking: Masking,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "tokens heads rank"], Float32[Array, "tokens heads"]]:
    """Attention of each token of a step to all tokens of its request up to itself.

    Args, results and errors are those of `mla_decode`, but that `q` has a row for each token of the step, request after
    request, and that rows of padding are zeros.

    Cost: `2 * heads * (2 * rank + rope)` operations for each pair of a token and a row that it sees.
    """
    _check(q, kv, layer, plan, masking)
    extend.check_tokens(q, plan)
    q, kv = without_gradient((q, kv))
    unfit = unfit_for_latent_extend(q, kv, plan)
    chosen = choose(Op.MLA_EXTEND, implementation=implementation, rows=q.shape[0], unfit=unfit)
    if chosen.implementation is Implementation.TRITON and q.shape[0]:
        from jaxcache.kernels.attention import mla_triton

        return mla_triton.mla_extend(q, kv, layer, plan, masking)
    return extend.reference(q, fetch_latent(kv, layer), plan, masking, None)


def _check(q: Any, kv: PagedLatent, layer: Any, plan: Plan, masking: Masking) -> None:
    kv.check()
    check_queries(q, kv.rows.shape[-1])
    check_layer(layer, kv.order)
    decode.check_plan(plan, kv.order.page_size, masking)
