"""A request, as far as a cache needs to know it.

tokens  0 ......... lock.length ......... kv_len ......... len(row pages) * P
        | the tree's pages  | the request's own pages, the last one perhaps in part |
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.receipt import Receipt

if TYPE_CHECKING:
    from jaxtyping import Int32


class RequestState(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # owns nothing
    RUNNING = "running"  # owns a row, a lock and its private pages
    RETRACTED = "retracted"  # gave everything back to make room; may hold a copy of its KV in host memory
    DONE = "done"  # finished or aborted; owns nothing


class RowLengths(Protocol):
    """Where the lengths of running requests live: one entry a row, so that a batch is read in one go."""

    kv_len: np.ndarray
    num_pages: np.ndarray

    def touch(self, rows: int) -> None:
        """Tells that the request in a row has other lengths or pages than before."""
        ...


@dataclass(eq=False)
class Request:
    """One request and what it owns in the cache.

    Attributes:
      rid: Its name in messages.
      origin_input_ids: Prompt tokens.
      output_ids: Tokens sampled so far; the engine appends, nothing is ever taken back while the request runs.
      extra_key: Namespace; KV is shared only inside one.
      priority: Higher stays longer under `Policy.PRIORITY`.
      tag: A number of the engine's own that its steps see, such as the index of an adapter. Fixed while it runs.
      logprob_start_len: Match no further than this many tokens, because logits are wanted from there on.
      state: See `RequestState`.
      req_pool_idx: Row in the request table; None unless running. Set by `enter` and `leave`.
      lock: Receipt for the prefix that belongs to the tree.
      cached_tokens: Tokens found in the cache when it was last admitted.
      branching_len: Tokens that were cached then, but without a recurrent state to resume from; 0 for none. A state
        saved there serves later requests with the same prefix.
      evicted_seqlen_local: Tokens, from the start, without window pages of its own any more.
      cpu_copy: KV kept in host memory across a retraction.
      prompt_len: Prompt tokens. They were copied: what the caller does to its list later changes nothing.
    """

    rid: str
    origin_input_ids: Sequence[int] | Int32[np.ndarray, " tokens"]
    extra_key: str | bytes | Namespace | None = None
    priority: int = 0
    tag: int = 0
    logprob_start_len: int | None = None
    output_ids: list[int] = field(default_factory=list)
    state: RequestState = RequestState.WAITING
    req_pool_idx: int | None = None
    lock: Receipt | None = None
    cached_tokens: int = 0
    branching_len: int = 0
    evicted_seqlen_local: int = 0
    cpu_copy: Any = None

    def __post_init__(self):
        self._key = RadixKey(self.origin_input_ids, self.extra_key)
        self.prompt_len = self._key.length
        if not self.prompt_len:
            raise ArgumentError(
                f"origin_input_ids of request {self.rid}: it is empty; a request needs at least one token"
            )
        for name in ("priority", "tag"):
            if not isinstance(getattr(self, name), (int, np.integer)):
                raise ArgumentError(f"{name} of request {self.rid} must be an integer, got {getattr(self, name)!r}")
        start = self.logprob_start_len
        if start is not None and (not isinstance(start, (int, np.integer)) or start < 0):
            raise ArgumentError(
                f"logprob_start_len of request {self.rid} must be an integer and must not be negative, got {start!r}"
            )
        self._lengths: RowLengths | None = None

    def enter(self, table: RowLengths, row: int) -> None:
        """Takes a row of the request table, which holds the request's lengths from now on."""
        self._lengths, self.req_pool_idx = table, row
        self.kv_len = self.num_pages = 0

    def leave(self) -> None:
        """Is without a row, and so without tokens and pages."""
        self._lengths = self.req_pool_idx = None
        self.evicted_seqlen_local = 0

    @property
    def kv_len(self) -> int:
        """Tokens whose KV is in the pool; 0 without a row. The last sampled token never has KV."""
        return int(self._lengths.kv_len[self.req_pool_idx]) if self._lengths is not None else 0

    @kv_len.setter
    def kv_len(self, value: int) -> None:
        table, row = self._place()
        table.kv_len[row] = value
        table.touch(row)

    @property
    def num_pages(self) -> int:
        """Pages in its row: those of `kv_len` tokens, and those taken for a step that has not run yet."""
        return int(self._lengths.num_pages[self.req_pool_idx]) if self._lengths is not None else 0

    @num_pages.setter
    def num_pages(self, value: int) -> None:
        table, row = self._place()
        table.num_pages[row] = value
        table.touch(row)

    def _place(self) -> tuple[RowLengths, int]:
        if self._lengths is None or self.req_pool_idx is None:
            raise RequestStateError(f"request {self.rid} has no row: it is {self.state.value}; admit it first")
        return self._lengths, self.req_pool_idx

    @property
    def num_tokens(self) -> int:
        """Prompt and sampled tokens."""
        return self.prompt_len + len(self.output_ids)

    @property
    def num_cacheable(self) -> int:
        """Tokens that can have KV: all but the last one sampled."""
        return self.prompt_len + max(len(self.output_ids) - 1, 0)

    @property
    def key(self) -> RadixKey:
        """Prompt and sampled tokens as a key. Packed once; only tokens sampled since the last call are appended.

        Raises:
          RequestStateError: Tokens were taken back from `output_ids`, but may have KV.
          ArgumentError: A sampled token must be int32.
        """
        if self.num_tokens < self._key.length:
            raise RequestStateError(
                f"request {self.rid} had {self._key.length} tokens, now {self.num_tokens}: output_ids only grows; "
                "make another request"
            )
        return self._packed_to(self.num_tokens)

    @property
    def computed_key(self) -> RadixKey:
        """The tokens that have KV as a key, whatever became of those after them."""
        return self._packed_to(self.kv_len)[: self.kv_len]

    def _packed_to(self, length: int) -> RadixKey:
        """The key with at least `length` tokens."""
        done = self._key.length
        if length > done:
            self._key = self._key.extended(self.output_ids[done - self.prompt_len : length - self.prompt_len])
        return self._key

    @property
    def protected_len(self) -> int:
        """Tokens, from the start, whose pages belong to the tree."""
        return self.lock.length if self.lock is not None else 0
