"""Step plans: everything a step needs from the host, in one int32 vector of a static shape.

    host                                              device, inside the jitted step
    StepPlan.pack()  ── one upload ──►  packed  ──►  unpack(packed, bucket)  ──►  Batch: tokens, positions, slots, ...
                                                     and the request table, with its changed entries patched in

Shapes come from a short list of buckets, so after warm-up no step compiles. Slots never travel: the device expands them
from the pages (`kernels/alloc_pages`).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.mirror import TableChanges
from jaxcache.packing import NOWHERE, Field, Packing
from jaxcache.pools.requests import RequestTable, RowStamp
from jaxcache.request import Request

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


PER_REQUEST = "row", "prefix_len", "seq_len", "last_loc", "tag"
"""Names of what a plan says of each request in one number."""

NO_CHANGES = TableChanges(np.empty(0, np.int32), np.empty(0, np.int32))


class StepKind(enum.Enum):
    """What a step does for each of its requests."""

    EXTEND = "extend"  # computes a run of tokens
    DECODE = "decode"  # computes one token


@dataclass(frozen=True)
class Bucket:
    """The static shape of a plan: how many of each thing fit.

    Attributes:
      kind: Extend or decode; in a decode bucket `tokens == requests`.
      requests: Requests in the batch.
      tokens: Tokens computed.
      pages: Fresh pages.
      changes: Changed entries of the request table.
      window_changes: Changed entries of the map to window pages; 0 without window layers.
      has_states: Whether each request has a recurrent state.
    """

    kind: StepKind
    requests: int
    tokens: int
    pages: int
    changes: int
    window_changes: int = 0
    has_states: bool = False

    @functools.cached_property
    def packing(self) -> Packing:
        """Where everything stands in the packed vector: the arrays of `StepPlan`, and the table changes."""
        lengths = dict.fromkeys(PER_REQUEST, self.requests) | {"tokens": self.tokens, "new_pages": self.pages}
        if self.has_states:
            lengths["state"] = self.requests
        fields = [Field(name, length) for name, length in lengths.items()]
        fields += Field("index", self.changes, NOWHERE), Field("page", self.changes)
        if self.window_changes:
            fields += Field("window_index", self.window_changes, NOWHERE), Field("window_page", self.window_changes)
        return Packing(tuple(fields))

    def holds(self, requests: int, tokens: int, pages: int) -> bool:
        """Whether a batch of that size fits. Changes are cut to fit and never count."""
        return requests <= self.requests and tokens <= self.tokens and pages <= self.pages


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's host inputs, unpadded.

    Attributes:
      bucket: Where it is padded to.
      requests: The batch, in order.
      row, prefix_len, seq_len, last_loc, tag: One integer a request: its table row; tokens it had and will have; the
        slot of its last token (-1 for none); a number of the engine's own, such as its adapter.
      tokens: int32 token ids computed, request by request.
      new_pages: int32 fresh pages, in the order the requests take them.
      state: int32 recurrent state of each request; empty without states.
      stamp: The rows as the plan leaves them: once they change, it is outdated. None for padding.
    """

    bucket: Bucket
    requests: tuple[Request, ...]
    row: np.ndarray
    prefix_len: np.ndarray
    seq_len: np.ndarray
    last_loc: np.ndarray
    tag: np.ndarray
    tokens: np.ndarray
    new_pages: np.ndarray
    state: np.ndarray
    stamp: RowStamp | None = None

    @classmethod
    def empty(cls, bucket: Bucket) -> StepPlan:
        """A plan of padding alone, to compile a bucket."""
        none = np.empty(0, np.int32)
        return cls(bucket, (), none, none, none, none, none, none, none, none)

    def pack(
        self,
        changes: TableChanges,
        window_changes: TableChanges = NO_CHANGES,
        out: Int32[np.ndarray, " size"] | None = None,
    ) -> Int32[np.ndarray, " size"]:
        """The one vector that is uploaded, changes of the request table and of the map to window pages included.

        Padding is 0; padding of table changes is out of range, which drops them.

        Raises:
          ArgumentError: Something does not fit the bucket.
        """
        parts = vars(self) | vars(changes)
        if self.bucket.window_changes:
            parts |= {"window_index": window_changes.index, "window_page": window_changes.page}
        return self.bucket.packing.pack(parts, out)


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


def default_buckets(
    max_running: int, chunk: int, page_size: int, *, has_window: bool = False, has_states: bool = False
) -> tuple[Bucket, ...]:
    """A short list that serves a batch of up to `max_running` requests and `chunk` prompt tokens a step.

    Decode: batch sizes in steps of four. Extend: an eighth of a chunk and a whole one.
    """
    if not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ArgumentError(f"chunk must be an integer of at least 1, got {chunk!r}: no prompt could be computed")
    buckets = []

    def add(kind: StepKind, requests: int, tokens: int, pages: int, changes: int) -> None:
        window_changes = changes if has_window else 0
        buckets.append(Bucket(kind, requests, tokens, pages, changes, window_changes, has_states))

    size = max_running
    while True:
        add(StepKind.DECODE, size, size, size, size + 512)
        if size <= 4:
            break
        size = -(-size // 4)
    for tokens in sorted({chunk, -(-chunk // 8)}):
        pages = -(-tokens // page_size) + max_running
        add(StepKind.EXTEND, max_running, tokens, pages, pages + 1024)
    return tuple(buckets)


def smallest(buckets: Sequence[Bucket], kind: StepKind, requests: int, tokens: int, pages: int) -> Bucket:
    """The smallest bucket of that kind that holds the batch.

    Raises:
      ArgumentError: None does; the message says how large they are.
    """
    fitting = [bucket for bucket in buckets if bucket.kind is kind and bucket.holds(requests, tokens, pages)]
    if not fitting:
        raise ArgumentError(
            f"no {kind.value} bucket holds {requests} requests, {tokens} tokens and {pages} pages: {list(buckets)}"
        )
    return min(fitting, key=lambda bucket: (bucket.tokens, bucket.requests, bucket.pages))
