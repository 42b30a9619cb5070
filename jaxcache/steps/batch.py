"""A step's inputs on the device, unpacked from the one vector that the host uploads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.steps.buckets import Bucket, StepKind
from jaxcache.tables.device_table import RequestTable

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A step's inputs on the device. Padding tokens have slot 0, which every pool write drops.

    Attributes:
      tokens: Token ids.
      positions: Position of each token in its request.
      slots: Slot each token's KV goes to.
      request: Which request of the batch each token belongs to.
      valid: False for padding tokens.
      row, prefix_len, seq_len, tag: One a request; see `StepPlan`. Padding requests have seq_len 0.
      table: The request table, this step's changes included.
      state: Recurrent state that each request goes on from and leaves behind; 0, which no write reaches, for padding.
        None without states.
    """

    tokens: Int32[Array, " tokens"]
    positions: Int32[Array, " tokens"]
    slots: Int32[Array, " tokens"]
    request: Int32[Array, " tokens"]
    valid: Bool[Array, " tokens"]
    row: Int32[Array, " requests"]
    prefix_len: Int32[Array, " requests"]
    seq_len: Int32[Array, " requests"]
    tag: Int32[Array, " requests"]
    table: RequestTable
    state: Int32[Array, " requests"] | None


def unpack(packed: Int32[Array, " size"], bucket: Bucket, table: RequestTable, page_size: int) -> Batch:
    """The batch in a packed plan, with slots computed. For use inside a jitted step; the table is consumed.

    Cost: O(tokens + changes).
    """
    parts = bucket.packing.unpack(packed)
    prefix_len, seq_len, last_loc = parts["prefix_len"], parts["seq_len"], parts["last_loc"]
    if bucket.kind is StepKind.DECODE:
        slots = alloc_decode(seq_len, last_loc, parts["new_pages"], page_size=page_size)
        request = jnp.arange(bucket.requests, dtype=jnp.int32)
        positions = jnp.maximum(seq_len - 1, 0)
        valid = seq_len > 0
    else:
        slots = alloc_extend(
            prefix_len, seq_len, last_loc, parts["new_pages"], page_size=page_size, num_tokens=bucket.tokens
        )
        end = jnp.cumsum(seq_len - prefix_len, dtype=jnp.int32)
        token = jnp.arange(bucket.tokens, dtype=jnp.int32)
        ends_here = jnp.zeros(bucket.tokens, jnp.int32).at[end].add(1, mode="drop")
        request = jnp.minimum(jnp.cumsum(ends_here, dtype=jnp.int32), bucket.requests - 1)
        positions = token + (seq_len - end)[request]
        valid = token < end[-1]
    return Batch(
        tokens=parts["tokens"],
        positions=jnp.where(valid, positions, 0),
        slots=slots,
        request=request,
        valid=valid,
        row=parts["row"],
        prefix_len=prefix_len,
        seq_len=seq_len,
        tag=parts["tag"],
        table=table.patched(parts["index"], parts["page"]),
        state=parts.get("state"),
    )
