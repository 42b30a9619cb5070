"""The reference of every attention op: plain `jax.numpy`, the oracle of the kernels, and what runs without a GPU.

A chunk of keys at a time is gathered, for all requests at once, and folded into a running softmax in float32. The loop
goes as far as the longest request, so that what a table could hold costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent, ScaleKind, scale_kind

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

CHUNK_TOKENS = 256
"""Keys that are gathered at a time, about."""

Fetch = Callable[[Any], tuple[jax.Array, jax.Array]]
"""From pages `(n, pages)` of a layer to keys `(n, tokens, heads, k_dim)` and values, float32."""


def attend(
    q: Float[Array, "n m q_heads k_dim"],
    position: Int32[Array, "n m"],
    start: Int32[Array, " n"],
    pages: Int32[Array, "n max_pages"],
    fetch: Fetch,
    page_size: int,
    masking: Masking,
) -> tuple[Float32[Array, "n m q_heads v_dim"], Float32[Array, "n m q_heads"]]:
    """Attention of `m` queries to each of `n` lists of pages: to keys from `start` up to their own position.

    Queries at position -1 attend to nothing: zeros, and a log-sum-exp of -inf.
    """
    q = q.astype(jnp.float32)
    first = start[:, None]
    if masking.window is not None:
        first = jnp.maximum(first, position - masking.window + 1)
    step = max(1, min(CHUNK_TOKENS // page_size, pages.shape[1]))
    tokens = step * page_size

    def fold(chunk: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        column = chunk * step + jnp.arange(step, dtype=jnp.int32)
        k, v = fetch(jnp.take(pages, column, axis=1, mode="clip"))
        key = chunk * tokens + jnp.arange(tokens, dtype=jnp.int32)
        seen = (key >= first[..., None]) & (key <= position[..., None])  # n m tokens
        v = jnp.where(seen.any(1)[..., None, None], v, 0.0)
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        logits = jnp.einsum("nmhgd,nchd->nmhgc", grouped, k, precision="highest") * masking.scale
        if masking.soft_cap is not None:
            logits = masking.soft_cap * jnp.tanh(logits / masking.soft_cap)
        logits = jnp.where(seen[:, :, None, None], logits, -jnp.inf)
        new = jnp.maximum(top, logits.max(-1))
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        weight, fade = jnp.exp(logits - safe[..., None]), jnp.exp(top - safe)
        out = out * fade[..., None] + jnp.einsum("nmhgc,nchd->nmhgd", weight, v, precision="highest")
        return out, new, total * fade + weight.sum(-1)

    k, v = jax.eval_shape(fetch, jax.ShapeDtypeStruct((q.shape[0], step), jnp.int32))
    shape = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2])
    empty = jnp.zeros((*shape, v.shape[3])), jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    has_any = position >= first
    begin = jnp.min(jnp.where(has_any, jnp.maximum(first, 0), np.int32(2**31 - 1)), initial=2**31 - 1) // tokens
    end = jnp.max(jnp.where(has_any, position + 1, 0), initial=0)
    out, top, total = jax.lax.fori_loop(begin, -(-end // tokens), fold, empty)
    out = jnp.where(total[..., None] > 0, out / total[..., None], 0.0)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def fetch_kv(kv: PagedKV, layer: Any) -> Fetch:
    """Reads pages of keys and values of one layer."""
    order = kv.order

    def read(array: jax.Array, scale: Any, physical: jax.Array) -> jax.Array:
        rows = _pages_of(array, order.page_size, kv.dtype, physical)
        kind = scale_kind("scale", scale, kv.k.shape[:3])
        if kind is ScaleKind.ROW:
            scale = _pages_of(scale, order.page_size, np.dtype(np.float32), physical)
        return rows if kind is ScaleKind.NONE else rows * scale[..., None]

    def fetch(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        physical = order.physical(layer, pages)
        return read(kv.k, kv.k_scale, physical), read(kv.v, kv.v_scale, physical)

    return fetch


def fetch_latent(kv: PagedLatent, layer: Any) -> Fetch:
    """Reads pages of latent rows of one layer: keys of one head, whose latent part is the value."""

    def fetch(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = _pages_of(kv.rows, kv.order.page_size, kv.dtype, kv.order.physical(layer, pages))
        rows = (rows if kv.scale is None else rows * kv.scale)[:, :, None]
        return rows, rows[..., : kv.rank]

    return fetch


def _pages_of(array: Any, page_size: int, dtype: np.dtype, physical: jax.Array) -> jax.Array:
    """Rows of some pages `(n, pages)` as float32 `(n, tokens, ...)`."""
    rows = jnp.asarray(array).reshape(-1, page_size, *array.shape[2:]).at[physical].get(mode="clip")
    rows = rows.reshape(physical.shape[0], -1, *array.shape[2:])
    rows = rows if rows.dtype == dtype else jax.lax.bitcast_convert_type(rows, dtype)
    return rows.astype(jnp.float32)
