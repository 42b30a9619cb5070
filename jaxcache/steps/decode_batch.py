"""A batch that decodes step after step: what one plan needs and the next does not have to find out again.

As long as nothing else touches its rows, every request of the batch grows by one token a step. Lengths and last slots
are then those of the step before plus one, and who needs a fresh page follows from the number of steps.

Source: jaxcache's own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.request import Request
from jaxcache.steps.plan import StepPlan
from jaxcache.tables.device_table import PENDING_TOKEN
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class RunningBatch:
    """What does not change about a batch while it has the same requests.

    Attributes:
      requests: Distinct running requests.
      row: Their rows, as NumPy likes its indices: int32 would be converted at each use.
      outputs: Their `output_ids`, which are never replaced.
      prompt_len, tag: int32, one a request.
      state: int32 recurrent state of each request; empty without states.
    """

    requests: tuple[Request, ...]
    row: np.ndarray
    outputs: tuple[list[int], ...]
    prompt_len: np.ndarray
    tag: np.ndarray
    state: np.ndarray

    @classmethod
    def of(cls, requests: Sequence[Request], table: ReqToTokenPool) -> RunningBatch:
        """The batch of requests that all have a row."""
        row = np.array([request.req_pool_idx for request in requests], np.intp)
        return cls(
            tuple(requests),
            row=row,
            outputs=tuple([request.output_ids for request in requests]),
            prompt_len=np.array([request.prompt_len for request in requests], np.int32),
            tag=np.array([request.tag for request in requests], np.int32),
            state=table.states_of(row),
        )

    def last_tokens(
        self, sampled: Int32[np.ndarray, " requests"], table: ReqToTokenPool
    ) -> Int32[np.ndarray, " requests"]:
        """The one token that each request has to compute, once it has sampled so many.

        Where only the register of its row on the device holds it, `PENDING_TOKEN` stands for it.

        Raises:
          ArgumentError: One has none to compute, or several.
        """
        outputs = self.outputs
        lengths = np.fromiter(map(len, outputs), np.int32, len(outputs))
        if (lengths == sampled).all():
            return self._last_known()
        is_pending = (lengths < sampled) & table.has_next[self.row]
        is_wrong = (lengths != sampled) & ~is_pending
        if is_wrong.any():
            i = int(is_wrong.argmax())
            left = max(lengths[i] - sampled[i] + 1, 0)
            raise ArgumentError(f"requests: {self.requests[i].rid} has {left} tokens to compute, decode computes one")
        pending = np.full(len(outputs), PENDING_TOKEN, np.int32)
        return pending if is_pending.all() else np.where(is_pending, pending, self._last_known())

    def _last_known(self) -> Int32[np.ndarray, " requests"]:
        """The last token of each request that the host knows."""
        outputs = self.outputs
        try:
            last = [tokens[-1] for tokens in outputs]
        except IndexError:  # nothing was sampled yet
            last = [(request.output_ids or request.key.token_ids)[-1] for request in self.requests]
        return np.frombuffer(array("i", last), np.int32)


class DecodeCursor:
    """How far a batch is that decodes, and what its next step needs.

    Args:
      table: The host's request table.
      batch: Running requests, all pages of which hold tokens.
      kv_len: int32, tokens of each that have KV.
      room: int32, slots left in the last page of each.

    Attributes:
      batch: As given.
      longest: Tokens of the longest request after the next step.
      growing: Indices of the requests whose next token begins a page.
      plan: The plan made last; `advance` when it has run.
    """

    def __init__(self, table: ReqToTokenPool, batch: RunningBatch, kv_len: np.ndarray, room: np.ndarray):
        self.batch = batch
        self.longest = int(kv_len.max()) + 1
        self.plan: StepPlan | None = None
        self._table, self._stamp = table, table.stamp(batch.row)
        self._room, self._steps = room, 0
        self.growing = np.flatnonzero(room == 0)
        sampled = kv_len + 1 - batch.prompt_len
        self._numbers = np.stack([kv_len, kv_len + 1, table.last_slots(batch.row), sampled])
        self._last_slot = self._numbers[2]

    def continues(self, requests: Sequence[Request]) -> bool:
        """Whether these are its requests, and nothing has touched their rows since its last step."""
        return self.batch.requests == tuple(requests) and self._table.is_current(self._stamp)

    def last_tokens(self) -> Int32[np.ndarray, " requests"]:
        """As `RunningBatch.last_tokens`."""
        return self.batch.last_tokens(self._numbers[3], self._table)

    def lengths(self) -> np.ndarray:
        """int32 (3, requests), a copy: tokens before the next step and after it, and the slot of the last token."""
        return self._numbers[:3].copy()

    def advance(self, pages: Int32[np.ndarray, " growing"]) -> None:
        """The next step has run, in which those who grew took these pages."""
        self._numbers += 1
        if len(pages):
            self._last_slot[self.growing] = pages * np.int32(self._table.page_size)
        self.longest += 1
        self._steps = (self._steps + 1) % self._table.page_size
        (self.growing,) = (self._room == self._steps).nonzero()
        self._stamp = self._table.stamp(self.batch.row)
