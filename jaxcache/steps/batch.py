"""A step's inputs on the device, unpacked from the one vector that the host uploads.

Padding is safe to read and to scatter. Padding requests stand behind the real ones and padding tokens behind the real
ones. Their indices (`row`, `last`, and `request` of a token) are one past the end of what they point into: JAX drops
what is scattered there, and reads the last entry instead (but `jnp.take` fills). `out.at[batch.row].set(x)` writes real
rows alone. What is read for padding is some other request's and means nothing: mask it with `valid` where it is summed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.steps.buckets import Bucket, StepKind
from jaxcache.steps.paged_attention import PagedAttention
from jaxcache.tables.device_table import RequestTable

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A step's inputs on the device. See the module for what padding is.

    Attributes:
      tokens: Token ids; 0 for padding.
      positions: Position of each token in its request; 0 for padding.
      slots: Slot each token's KV goes to; 0 for padding, which every pool write drops.
      request: Which request of the batch each token belongs to; the number of requests for padding.
      valid: False for padding tokens.
      row: Row of each request in the request table, and in any array of the engine's own with `max_running` entries;
        the number of rows for padding.
      prefix_len: Tokens with KV that each request had before the step; 0 for padding.
      seq_len: Tokens that it has afterwards; 0 for padding.
      tag: A number of the engine's own, such as its adapter; 0 for padding.
      table: The request table, this step's changes included.
      state: Recurrent state that each request reads and overwrites; 0, which no write reaches, for padding.
        None without states.
      kind: What the step does: a static choice, made when it is compiled. A batch whose shape is that of a decode step
        may still be an extend.
      page_size: Tokens a page; static.
      context: Tokens of a request that `block_table` has pages for; static.
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
    kind: StepKind = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    context: int = field(metadata={"static": True})

    @property
    def num_tokens(self) -> Int32[Array, ""]:
        """Tokens, without padding."""
        return self.cu_q[-1]

    @property
    def num_requests(self) -> Int32[Array, ""]:
        """Requests, without padding."""
        return jnp.sum(self.seq_len > 0, dtype=jnp.int32)

    @property
    def cu_q(self) -> Int32[Array, " requests+1"]:
        """Where the tokens of each request begin, and where the last one's end; padding requests have none."""
        ends = jnp.cumsum(self.seq_len - self.prefix_len, dtype=jnp.int32)
        return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])

    @property
    def last(self) -> Int32[Array, " requests"]:
        """Index of each request's last token among `tokens`; the number of tokens for padding requests."""
        return jnp.where(self.seq_len > 0, self.cu_q[1:] - 1, self.tokens.shape[0])

    @property
    def token_row(self) -> Int32[Array, " tokens"]:
        """`row` of each token's request; the number of rows for padding tokens."""
        rows = self.table.pages.shape[0]
        return jnp.where(self.valid, self.row.at[self.request].get(mode="clip"), rows)

    @property
    def block_table(self) -> Int32[Array, "requests pages"]:
        """The pages of each request in the order of its tokens; 0, the sink, behind its last one and for padding.

        Cost: a copy of `requests` rows, as wide as `context`. Ops that look pages up themselves take `table` and `row`.
        """
        return self.table.block_table(self.row, self.seq_len, self.page_size, self.context)

    def attention(self, pool: Any, layer: Any) -> PagedAttention:
        """What an attention op over pages is told of one layer.

        Args:
          pool: The pool that the last update returned, with this step's rows of the layer in it.
          layer: As for `pool.pages`.

        Cost: a copy of the block table. XLA makes it once for all layers of a kind, where they are unrolled.
        """
        kv = pool.pages(layer)
        return PagedAttention(kv, kv.locate(self.block_table), self.prefix_len, self.seq_len, self.cu_q)


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
    rows, width = table.pages.shape
    return Batch(
        tokens=table.known(parts["tokens"], parts["row"][request]),
        positions=jnp.where(valid, positions, 0),
        slots=slots,
        request=jnp.where(valid, request, bucket.requests),
        valid=valid,
        row=jnp.where(seq_len > 0, parts["row"], rows),
        prefix_len=prefix_len,
        seq_len=seq_len,
        tag=parts["tag"],
        table=table.patched(parts["index"], parts["page"]),
        state=parts.get("state"),
        kind=bucket.kind,
        page_size=page_size,
        context=width * page_size if bucket.context is None else bucket.context,
    )
