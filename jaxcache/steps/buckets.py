"""Buckets: the short list of static shapes that steps are compiled for, and how prompts are cut to fit them.

    Buckets     what an engine chooses: how many requests and tokens a step may have       part of `MemoryConfig`
      └► Bucket one static shape: one executable a step function                            what a plan is padded to

A step costs what it is padded to, not what it computes. So sizes lie close together, and a prompt is computed in more
than one step where that saves more padding than a step costs.

Source: jaxcache's own.
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcache.device.packing import NOWHERE, Field, Packing
from jaxcache.errors import ArgumentError, shown

PER_REQUEST = "row", "prefix_len", "seq_len", "last_loc", "tag"
"""Names of what a plan says of each request in one number."""
_MAX_NAMED = 4  # buckets in a message
MAX_EXECUTABLES = 64
"""Executables that the default sizes make of one step function, at most."""
EXTEND_REQUESTS = 8
"""Requests of an extend step, by default: one, so many, or as many as run."""


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
      maps: Names of the maps in the pool that steps bring changes of; for each as many entries as `changes`.
      has_states: Whether each request has a recurrent state.
      context: Tokens of a request that `Batch.block_table` has pages for; None for `max_context_len`.
    """

    kind: StepKind
    requests: int
    tokens: int
    pages: int
    changes: int
    maps: tuple[str, ...] = ()
    has_states: bool = False
    context: int | None = None

    @functools.cached_property
    def packing(self) -> Packing:
        """Where everything stands in the packed vector: the arrays of `StepPlan`, and the table changes."""
        lengths = dict.fromkeys(PER_REQUEST, self.requests) | {"tokens": self.tokens, "new_pages": self.pages}
        if self.has_states:
            lengths["state"] = self.requests
        fields = [Field(name, length) for name, length in lengths.items()]
        fields += Field("index", self.changes, NOWHERE), Field("page", self.changes)
        for name in self.maps:
            fields += Field(f"{name}_index", self.changes, NOWHERE), Field(f"{name}_page", self.changes)
        return Packing(tuple(fields))

    def holds(self, requests: int, tokens: int, pages: int, longest: int = 0) -> bool:
        """Whether a batch of that size fits, the longest of whose requests has `longest` tokens afterwards.

        Changes are cut to fit and never count.
        """
        fits = requests <= self.requests and tokens <= self.tokens and pages <= self.pages
        return fits and (self.context is None or longest <= self.context)


@dataclass(frozen=True)
class Buckets:
    """How large the steps are that are compiled: a record of an engine's choices, all of them static.

    Each step function compiles once for every decode size, and once for every extend step of so many tokens and
    requests; for each of them once for every context, if there are any.

    Attributes:
      decode_sizes: Requests of a decode step, ascending. The last is the most that can decode in one step.
      extend_tokens: Tokens of an extend step, ascending. The last is the most that one step can compute.
      extend_requests: Requests of an extend step, ascending. A size above the tokens is cut to them.
      contexts: Tokens of context that `Batch.block_table` is cut to, ascending: for steps that gather all rows of it,
        and so cost what it is wide. Ops that read pages by length need none: empty, the table is never cut.
      step_cost: What one step more costs, in tokens of padding. A chunk is split only to save more than that.
      changes: Changed entries of the request table that travel with a step, beyond those of its own pages. What does
        not fit travels ahead.

    Raises:
      ArgumentError: Sizes are not positive and ascending.
    """

    decode_sizes: tuple[int, ...]
    extend_tokens: tuple[int, ...]
    extend_requests: tuple[int, ...]
    contexts: tuple[int, ...] = ()
    step_cost: int = 32
    changes: int = 512

    def __post_init__(self) -> None:
        """Checks every list of sizes."""
        for name in ("decode_sizes", "extend_tokens", "extend_requests", "contexts"):
            sizes = getattr(self, name)
            is_list = isinstance(sizes, tuple) and all(_is_count(size) and size > 0 for size in sizes)
            if not is_list or list(sizes) != sorted(set(sizes)) or not (sizes or name == "contexts"):
                raise ArgumentError(f"{name} must be a tuple of positive integers, ascending, got {sizes!r}")
        for name in ("step_cost", "changes"):
            if not _is_count(getattr(self, name)):
                raise ArgumentError(f"{name} must be an integer and not negative, got {getattr(self, name)!r}")

    @classmethod
    def default(
        cls, max_running: int, chunk: int, page_size: int, *, contexts: tuple[int, ...] = (), step_cost: int = 32
    ) -> Buckets:
        """Sizes with little padding, in `MAX_EXECUTABLES` executables, for up to `max_running` requests.

        Decode: 1, 2, 4, then in steps of a quarter of the power of two below, of an eighth from 64 on. Extend: powers
        of two from one page to `chunk` tokens, of one request, a few, or `max_running`. Where these are too many
        executables, as with contexts, there are fewer sizes of requests.

        Raises:
          ArgumentError: `chunk`, `max_running` or `page_size` is not a positive integer.
        """
        for name, value in (("chunk", chunk), ("max_running", max_running), ("page_size", page_size)):
            if not _is_count(value) or value < 1:
                raise ArgumentError(f"{name} must be an integer of at least 1, got {shown(value)}")
        tokens = tuple(_doubling(page_size, chunk))
        few = {1, min(EXTEND_REQUESTS, max_running), max_running}
        choices = itertools.product(((4, 8), (2, 4), (1, 2), (1, 1)), (few, {1, max_running}))
        for parts, rows in choices:
            sizes = tuple(_decode_sizes(max_running, *parts))
            found = cls(sizes, tokens, tuple(sorted(rows)), contexts, step_cost)
            if len(found.shapes(page_size)) <= MAX_EXECUTABLES:
                return found
        return cls(tuple(_decode_sizes(max_running, 1, 1)), tokens, (max_running,), contexts, step_cost)

    def shapes(self, page_size: int, *, maps: tuple[str, ...] = (), has_states: bool = False) -> tuple[Bucket, ...]:
        """The static shapes of these sizes, decode before extend; `maps` and `has_states` as in `Bucket`."""
        sizes = [(StepKind.DECODE, size, size, size, size + self.changes) for size in self.decode_sizes]
        for tokens in self.extend_tokens:
            for requests in sorted({min(size, tokens) for size in self.extend_requests}):
                pages = min(tokens, -(-tokens // page_size) + requests)
                sizes.append((StepKind.EXTEND, requests, tokens, pages, pages + 2 * self.changes))
        return tuple(Bucket(*size, maps, has_states, context) for size in sizes for context in self.contexts or (None,))

    def chunk(self, tokens: int, beside: int = 0) -> int:
        """How many of `tokens` to compute in the next step, which computes `beside` tokens of other requests already.

        All of them, unless a smaller step now and others later save more padding than they cost. Never more than the
        largest step has room for; 0 where the others fill it.

        Cost: O(log(tokens)).
        """
        tokens = min(tokens, self.extend_tokens[-1] - beside)
        if tokens <= 0:
            return 0
        _, first = self._cheapest(tokens + beside)
        return first - beside if first > beside else tokens

    def _cheapest(self, total: int) -> tuple[int, int]:
        """The least that steps of `total` tokens cost, in tokens, and how many of them the first step takes."""
        sizes = self.extend_tokens
        at = bisect.bisect_left(sizes, total)
        whole = sizes[at] + self.step_cost
        if not at or sizes[at] == total:
            return whole, total
        full = sizes[at - 1]
        split = full + self.step_cost + self._cheapest(total - full)[0]
        return (split, full) if split < whole else (whole, total)


def smallest(
    buckets: Sequence[Bucket], kind: StepKind, requests: int, tokens: int, pages: int, longest: int = 0
) -> Bucket:
    """The smallest bucket of that kind that holds the batch: see `Bucket.holds`.

    Args:
      buckets: Ascending among those of a kind, as `Buckets.shapes` gives them.
      kind: Of the step.
      requests, tokens, pages, longest: See `Bucket.holds`.

    Raises:
      ArgumentError: None does; the message says how large they are.
    """
    for bucket in buckets:
        if tokens <= bucket.tokens and bucket.kind is kind and bucket.holds(requests, tokens, pages, longest):
            return bucket
    raise _too_large(buckets, kind, requests, tokens, pages, longest)


def _too_large(
    buckets: Sequence[Bucket], kind: StepKind, requests: int, tokens: int, pages: int, longest: int
) -> ArgumentError:
    """What to say where no bucket of a kind holds a batch."""
    of_kind = [b for b in buckets if b.kind is kind]
    most_tokens = max((b.tokens for b in of_kind), default=0)
    if kind is StepKind.EXTEND and tokens > most_tokens:
        return ArgumentError(
            f"work: {tokens} tokens, but a step computes at most {most_tokens}, the config's chunk: split prompts "
            "with next_chunk, or configure a larger chunk (or buckets)"
        )
    most = [(b.requests, b.tokens, b.pages, b.context) for b in of_kind][-_MAX_NAMED:]
    return ArgumentError(
        f"no {kind.value} bucket holds {requests} requests, {tokens} tokens, {pages} pages, {longest} of context: "
        f"plan less at once, or configure larger buckets than (requests, tokens, pages, context): {most}"
    )


def _decode_sizes(most: int, parts: int, parts_from_64: int) -> Iterator[int]:
    """1, 2, 4, then in so many equal steps to twice the size, up to `most`."""
    size = 1
    while size < most:
        yield size
        power = 1 << (size.bit_length() - 1)
        size += max(power // (parts if size < 64 else parts_from_64), min(power, 4))
    yield most


def _doubling(least: int, most: int) -> Iterator[int]:
    """`least`, twice that and so on, up to `most`, which is the last."""
    size = least
    while size < most:
        yield size
        size *= 2
    yield most


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)
