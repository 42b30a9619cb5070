"""A request, as far as a cache needs to know it.

tokens  0 ......... lock.length ......... kv_len ......... len(row pages) * P
        | the tree's pages  | the request's own pages, the last one perhaps in part |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxcache.arguments import as_integer
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.media import MediaRange
from jaxcache.index.receipt import Receipt
from jaxcache.index.tokens import FixedTokens, TokenList

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
    has_next: np.ndarray

    def touch(self, rows: int) -> None:
        """Tells that the request in a row has other lengths or pages than before."""
        ...


@dataclass(frozen=True, eq=False)
class HostCopy:
    """What is kept of a request's KV in host memory, as far as a request needs to know it.

    Attributes:
      key: The tokens whose KV it is, in their namespace.
    """

    key: RadixKey


@dataclass(eq=False)
class Request:
    """One request and what it owns in the cache.

    What a user may set is checked when it is set, here or later. The rest is the manager's: it is no argument, and to
    be read only. Any thread may make one; while it runs it belongs to its manager's thread.

    Attributes:
      rid: Its name in messages.
      origin_input_ids: Prompt tokens; fixed. They were copied: what the caller does to its list later changes nothing.
      extra_key: Namespace; KV is shared only inside one. Fixed.
      priority: Higher stays longer under `Policy.PRIORITY`. 64 bits.
      tag: An int32 of the engine's own that its steps see, such as the index of an adapter. Fixed while it runs.
      logprob_start_len: Match no further than this many tokens, because logits are wanted from there on.
      media: The ranges of prompt tokens that stand for images or audio, as `MediaRange`s; fixed. KV is shared past the
        start of one only with a request that has the same one there.
      output_ids: Tokens sampled so far. The engine appends; nothing is ever changed or taken back, for it may have KV.
        So a token that is not known yet has no placeholder here: append it once it is.
      req_pool_idx: Row in the request table; None unless running, and only then. Set by `enter` and `leave`.
      lock: Receipt for the prefix that belongs to the tree.
      cached_tokens: Tokens found in the cache when it was first admitted, and then when its steps were planned, instead
        of being computed: what is billed. No resumption changes it.
      resumed_tokens: Tokens that were found in the cache after a retraction, in sum.
      loaded_tokens: Tokens that its admissions loaded from a host copy, in sum.
      branching_len: Tokens that were cached then, but without a recurrent state to resume from; 0 for none. A state
        saved there serves later requests with the same prefix.
      evicted_seqlen_local: Tokens, from the start, without window pages of its own any more.
      cpu_copy: KV kept in host memory across a retraction. It may be set to None, to have it computed again, and to
        what was kept of the same tokens in the same namespace.
      prompt_len: Prompt tokens.

    Raises:
      ArgumentError: A value is none of those.
      RequestStateError: Something fixed is set again.
    """

    rid: str
    origin_input_ids: Sequence[int] | Int32[np.ndarray, " tokens"]
    extra_key: str | bytes | Namespace | None = None
    priority: int = 0
    tag: int = 0
    logprob_start_len: int | None = None
    output_ids: list[int] = field(default_factory=TokenList)
    media: Sequence[MediaRange] = ()
    req_pool_idx: int | None = field(default=None, init=False)
    lock: Receipt | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    resumed_tokens: int = field(default=0, init=False)
    loaded_tokens: int = field(default=0, init=False)
    branching_len: int = field(default=0, init=False)
    evicted_seqlen_local: int = field(default=0, init=False)
    cpu_copy: Any = field(default=None, init=False)
    prompt_len: int = field(init=False)
    _lengths: RowLengths | None = field(default=None, init=False, repr=False)
    _num_sampled: int = field(default=0, init=False, repr=False)
    _without_row: RequestState = field(default=RequestState.WAITING, init=False, repr=False)

    def __post_init__(self):
        self._key = RadixKey(self.origin_input_ids, self.extra_key, self.media)
        self.prompt_len = self._key.length
        if not self.prompt_len:
            raise ArgumentError(
                f"origin_input_ids of request {self.rid}: it is empty; a request needs at least one token"
            )
        vars(self)["media"] = self._key.media
        vars(self)["origin_input_ids"] = _fixed_prompt(self.origin_input_ids, self._key)

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(self, name, value))

    def enter(self, table: RowLengths, row: int) -> None:
        """Takes a row of the request table, which holds the request's lengths from now on."""
        table.kv_len[row] = table.num_pages[row] = 0  # first: what was in the row before is never this request's
        table.touch(row)
        self.req_pool_idx = row
        self._lengths = table  # last, and first to go: with it, the request has a row

    def leave(self) -> None:
        """Is without a row, and so without tokens and pages: done, unless `state` is set to RETRACTED."""
        self._num_sampled = self.num_tokens + self.pending
        self._lengths = None
        self.req_pool_idx = None
        self._without_row = RequestState.DONE
        self.evicted_seqlen_local = 0

    def count_found(self, tokens: int) -> bool:
        """So many tokens were found when a step was planned: they need not be computed.

        Returns:
          Whether they are hits; what is found again after a retraction is none.
        """
        is_hit = self._without_row is not RequestState.RETRACTED
        if is_hit:
            self.cached_tokens += tokens
        else:
            self.resumed_tokens += tokens
        return is_hit

    @property
    def state(self) -> RequestState:
        """Where it is in its life: RUNNING exactly while it has a row; else what was set."""
        return self._without_row if self._lengths is None else RequestState.RUNNING

    @state.setter
    def state(self, value: RequestState) -> None:
        if (value is RequestState.RUNNING) != (self._lengths is not None):
            has = "no row" if self._lengths is None else f"row {self.req_pool_idx}"
            raise RequestStateError(f"state of request {self.rid} cannot be {value.value}: it has {has}")
        self._without_row = value

    @property
    def kv_len(self) -> int:
        """Tokens whose KV is in the pool; 0 without a row. The last sampled token never has KV.

        With tokens pending it can be more than `num_tokens`.
        """
        return int(self._lengths.kv_len[self.req_pool_idx]) if self._lengths is not None else 0

    @kv_len.setter
    def kv_len(self, value: int) -> None:
        table, row = self._place()
        table.kv_len[row] = value
        table.touch(row)

    @property
    def pending(self) -> int:
        """Tokens that steps sampled and that are not in `output_ids` yet: on the device, until the engine reads them.

        Of a retracted request, those that it still waits for; it can be admitted once they are appended.
        """
        if self._lengths is not None:
            sampled = self.kv_len + int(self._lengths.has_next[self.req_pool_idx])
        else:
            sampled = self._num_sampled if self._without_row is RequestState.RETRACTED else 0
        return max(sampled - self.num_tokens, 0)

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
    def matchable_len(self) -> int:
        """Tokens that a lookup may find: one is left to compute, and so are those whose logits are wanted."""
        cap = self.num_tokens - 1
        return cap if self.logprob_start_len is None else min(cap, self.logprob_start_len)

    @property
    def key(self) -> RadixKey:
        """Prompt and sampled tokens as a key. Packed once; only tokens sampled since the last call are appended."""
        return self._packed_to(self.num_tokens)

    @property
    def computed_key(self) -> RadixKey:
        """The tokens that have KV as a key, whatever became of those after them.

        Tokens that only the device knows are not among them, though they have KV.
        """
        length = min(self.kv_len, self.num_tokens)
        return self._packed_to(length)[:length]

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


# ---- what a user may set: checked whenever it is set, the first time too ---------------------------------------------


def _once(request: Request, name: str, value: Any) -> Any:
    if name in vars(request):
        raise RequestStateError(f"{name} of request {request.rid} is fixed, for KV depends on it: make another request")
    return value


def _priority(request: Request, name: str, value: Any) -> int:
    return as_integer(f"{name} of request {request.rid}", value, bits=64)


def _tag(request: Request, name: str, value: Any) -> int:
    if request.state is RequestState.RUNNING:
        raise RequestStateError(
            f"{name} of request {request.rid} is fixed while it runs, for plans know it: retract it first"
        )
    return as_integer(f"{name} of request {request.rid}", value, bits=32)


def _logprob_start_len(request: Request, name: str, value: Any) -> int | None:
    if value is None:
        return None
    start = as_integer(f"{name} of request {request.rid}", value, bits=64)
    if start < 0:
        raise ArgumentError(f"{name} of request {request.rid} must not be negative, got {start}")
    return start


def _output_ids(request: Request, name: str, value: Any) -> TokenList:
    present = vars(request).get(name)
    if present is None:
        return TokenList(value)
    if value is not present:  # it is where `output_ids += tokens` has appended to it
        raise RequestStateError(f"{name} of request {request.rid} only grows: append to it, or make another request")
    return value


def _cpu_copy(request: Request, name: str, value: Any) -> HostCopy | None:
    if value is None:
        return None
    if not isinstance(value, HostCopy):
        rule = "must be None, or what a retraction with offload=True kept"
        raise ArgumentError(f"{name} of request {request.rid} {rule}; got {type(value).__name__}")
    if request.key[: len(value.key)] != value.key:
        raise ArgumentError(
            f"{name} of request {request.rid} must be of its own tokens in its own namespace, got a copy of "
            f"{len(value.key)} others: set it to None, and they are computed again"
        )
    return value


_CHECKS: Mapping[str, Callable[[Request, str, Any], Any]] = MappingProxyType(
    {
        "origin_input_ids": _once,
        "extra_key": _once,
        "media": _once,
        "prompt_len": _once,
        "priority": _priority,
        "tag": _tag,
        "logprob_start_len": _logprob_start_len,
        "output_ids": _output_ids,
        "cpu_copy": _cpu_copy,
    }
)


def _fixed_prompt(token_ids: Any, key: RadixKey) -> Any:
    """The prompt as it was given, but so that it stays what the key says."""
    if isinstance(token_ids, (bytes, tuple, range)):
        return token_ids
    return key.token_ids if isinstance(token_ids, np.ndarray) else FixedTokens(token_ids)
