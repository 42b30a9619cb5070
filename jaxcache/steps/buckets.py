"""Buckets: the short list of static shapes that steps are compiled for."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.device.packing import NOWHERE, Field, Packing
from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    pass


PER_REQUEST = "row", "prefix_len", "seq_len", "last_loc", "tag"
"""Names of what a plan says of each request in one number."""


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
    """

    kind: StepKind
    requests: int
    tokens: int
    pages: int
    changes: int
    maps: tuple[str, ...] = ()
    has_states: bool = False

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

    def holds(self, requests: int, tokens: int, pages: int) -> bool:
        """Whether a batch of that size fits. Changes are cut to fit and never count."""
        return requests <= self.requests and tokens <= self.tokens and pages <= self.pages


def default_buckets(
    max_running: int, chunk: int, page_size: int, *, maps: tuple[str, ...] = (), has_states: bool = False
) -> tuple[Bucket, ...]:
    """A short list that serves a batch of up to `max_running` requests and `chunk` prompt tokens a step.

    Decode: batch sizes in steps of four. Extend: an eighth of a chunk and a whole one.
    """
    if not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ArgumentError(f"chunk must be an integer of at least 1, got {chunk!r}: no prompt could be computed")
    buckets = []

    def add(kind: StepKind, requests: int, tokens: int, pages: int, changes: int) -> None:
        buckets.append(Bucket(kind, requests, tokens, pages, changes, maps, has_states))

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
