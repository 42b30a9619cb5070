"""From running requests to a step plan, and whether that plan still holds when it is to run.

Lengths and pages of all running requests stand in the arrays of the request table: a plan is NumPy calls over a batch,
not a loop over requests.

Source: jaxcache's own; SGLang 0.5.2 schedule_batch.py, prepare_for_extend and prepare_for_decode, do the same in torch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import pack
from jaxcache.loop_plan import DecodeLoops
from jaxcache.pages.arguments import as_count, int32_array
from jaxcache.pages.base import BaseTokenToKVPoolAllocator
from jaxcache.pages.expand import pages_of
from jaxcache.pools.requests import ReqToTokenPool
from jaxcache.request import Request, RequestState
from jaxcache.step import Bucket, StepKind, StepPlan, smallest

_OUTPUT_IDS = operator.attrgetter("output_ids")
_LAST = operator.itemgetter(-1)


@dataclass(frozen=True, eq=False)
class RunningBatch:
    """What does not change about a batch while nobody comes or goes; a decode step after another needs no new one.

    Attributes:
      requests: Distinct running requests.
      row, prompt_len, tag: int32, one a request.
    """

    requests: tuple[Request, ...]
    row: np.ndarray
    prompt_len: np.ndarray
    tag: np.ndarray

    @classmethod
    def of(cls, requests: Sequence[Request]) -> RunningBatch:
        """The batch of requests that all have a row.

        Raises:
          ArgumentError: A tag is no int32.
        """
        return cls(
            tuple(requests),
            row=np.array([request.req_pool_idx for request in requests], np.int32),
            prompt_len=np.array([request.prompt_len for request in requests], np.int32),
            tag=int32_array("tag: those of the batch", [request.tag for request in requests]),
        )


class StepPlanner:
    """Plans steps over the requests of one table.

    Args:
      running: The running requests by row; the manager's own dict.
      table: The host's request table.
      allocator: Where fresh pages come from.
      cache: What is evicted for them.
      loops: Whose requests cannot be planned.
    """

    def __init__(
        self,
        running: Mapping[int, Request],
        table: ReqToTokenPool,
        allocator: BaseTokenToKVPoolAllocator,
        cache: RadixCache,
        loops: DecodeLoops,
    ):
        self._running, self._table, self._loops = running, table, loops
        self._allocator, self._cache = allocator, cache
        self._last_batch: RunningBatch | None = None

    def require_running(self, request: Request) -> None:
        """Raises RequestStateError unless a request runs here, in no decode loop."""
        row = request.req_pool_idx
        if request.state is not RequestState.RUNNING or row is None or self._running.get(row) is not request:
            raise RequestStateError(f"request {request.rid} is {request.state.value}: admit it to this manager first")
        if self._loops.holds(row):
            raise RequestStateError(f"request {request.rid} is in a decode loop: absorb or cancel the loop first")

    def make_room(self, num_pages: int) -> None:
        """Evicts what is short of so many free pages, if that is enough."""
        short = num_pages * self._table.page_size - self._allocator.available_size()
        if 0 < short <= self._cache.evictable_size():  # else what is cached would be lost for nothing
            self._cache.evict(short)

    def take_pages(self, num_pages: int) -> np.ndarray | None:
        """Fresh pages, evicting only what is short; None, with no page taken, if that is not enough."""
        self.make_room(num_pages)
        return self._allocator.alloc_pages(num_pages)

    def forget_batch(self) -> None:
        """Requests came, went, or entered a loop: the next batch is looked at anew."""
        self._last_batch = None

    def extend(self, work: Sequence[tuple[Request, int]], buckets: Sequence[Bucket]) -> StepPlan | None:
        """`MemoryManager.extend` has the contract."""
        batch = self._batch([request for request, _ in work])
        counts = np.array([as_count(f"work: tokens of request {request.rid}", n) for request, n in work])
        for request, n in work:
            if not 1 <= n <= request.num_tokens - request.kv_len:
                raise ArgumentError(f"work: {request.rid} has {request.num_tokens - request.kv_len} tokens, not {n}")
        tokens = [request.key.token_ids[request.kv_len : request.kv_len + n] for request, n in work]
        return self._plan(StepKind.EXTEND, batch, counts, np.concatenate(tokens), buckets)

    def decode(self, requests: Sequence[Request], buckets: Sequence[Bucket]) -> StepPlan | None:
        """`MemoryManager.decode` has the contract."""
        batch, tokens = self.decode_batch(requests)
        return self._plan(StepKind.DECODE, batch, np.ones(len(tokens), np.int32), tokens, buckets)

    def decode_batch(self, requests: Sequence[Request]) -> tuple[RunningBatch, np.ndarray]:
        """A batch whose requests have one token each to compute, and those tokens.

        Raises:
          RequestStateError: As `MemoryManager.decode`.
          ArgumentError: A request has not one token to compute, it is no int32, or a request is named twice.
        """
        batch = self._batch(requests)
        outputs = list(map(_OUTPUT_IDS, batch.requests))
        sampled = np.fromiter(map(len, outputs), np.int32, len(outputs))
        left = batch.prompt_len + sampled - self._table.kv_len[batch.row]
        if (left != 1).any():
            i = int((left != 1).argmax())
            rid = batch.requests[i].rid
            raise ArgumentError(f"requests: {rid} has {left[i]} tokens to compute, decode computes one")
        if not all(outputs):
            outputs = [request.output_ids or request.key.token_ids for request in batch.requests]
        return batch, np.frombuffer(pack(map(_LAST, outputs)), np.int32)

    def _batch(self, requests: Sequence[Request]) -> RunningBatch:
        """Distinct running requests that wait for a step, with their rows.

        Raises:
          RequestStateError: One is not running, is in a decode loop, or has a plan that has not run.
          ArgumentError: One is named twice, or there is none.
        """
        batch = self._last_batch
        if batch is None or batch.requests != tuple(requests):
            for request in requests:
                self.require_running(request)
            if len(set(map(id, requests))) != len(requests) or not requests:
                raise ArgumentError("requests: name each request once, and at least one")
            batch = self._last_batch = RunningBatch.of(requests)
        table, row = self._table, batch.row
        is_ready = table.num_pages[row] == pages_of(table.kv_len[row], table.page_size)
        if not is_ready.all():
            rid = batch.requests[int(is_ready.argmin())].rid
            raise RequestStateError(f"request {rid} has a plan that has not run: run or cancel it first")
        return batch

    def _plan(
        self, kind: StepKind, batch: RunningBatch, counts: np.ndarray, tokens: np.ndarray, buckets: Sequence[Bucket]
    ) -> StepPlan | None:
        """Takes the pages that `counts` more tokens of each request need, and says what the step is to do."""
        table, row = self._table, batch.row
        prefix, held = table.kv_len[row], table.num_pages[row]
        target = (prefix + counts).astype(np.int32)
        if target.max() > table.max_context_len:
            i = int(target.argmax())
            raise ArgumentError(
                f"request {batch.requests[i].rid} would have {target[i]} tokens, max_context_len is "
                f"{table.max_context_len}: finish it"
            )
        new = pages_of(target, table.page_size) - held
        bucket = smallest(buckets, kind, len(row), len(tokens), int(new.sum()))
        fresh = self.take_pages(int(new.sum()))
        if fresh is None:
            return None
        last_loc = table.last_slots(row)
        table.append_pages(row, new, fresh)
        return StepPlan(
            bucket,
            batch.requests,
            row=row,
            prefix_len=prefix,
            seq_len=target,
            last_loc=last_loc,
            tag=batch.tag,
            tokens=tokens,
            new_pages=fresh,
        )

    def require_current(self, plan: StepPlan) -> None:
        """Raises RequestStateError unless every request is in its row, as long as the plan expects, with its pages."""
        is_in_place = tuple(map(self._running.get, plan.row.tolist())) == plan.requests
        if not is_in_place or not self._loops.are_over:
            for request in plan.requests:
                self.require_running(request)
        if plan.requests and not (is_in_place and self._rows_are_as_planned(plan)):
            request, row = plan.requests[0], int(plan.row[0])
            now = (request.req_pool_idx, request.kv_len, request.num_pages)
            raise RequestStateError(
                f"request {request.rid} or another of its batch is not where the plan found it, in row {row}: it has "
                f"(row, tokens, pages) = {now}; plan again"
            )

    def _rows_are_as_planned(self, plan: StepPlan) -> bool:
        table, row = self._table, plan.row
        same_length = np.array_equal(table.kv_len[row], plan.prefix_len)
        # A row that was planned anew, or came back after a retraction, can be as long as before, in other pages.
        same_tail = np.array_equal(table.last_slots(row), plan.last_loc)
        same_pages = np.array_equal(table.tail_pages(row), plan.new_pages)
        return same_length and same_tail and same_pages
