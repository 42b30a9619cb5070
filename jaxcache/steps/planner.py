"""From running requests to a step plan, and whether that plan still holds when it is to run.

Lengths and pages of all running requests stand in the arrays of the request table: a plan is NumPy calls over a batch,
not a loop over requests. Only what an engine appends to, `output_ids`, is read request by request.

Source: jaxcache's own; SGLang 0.5.2 schedule_batch.py, prepare_for_extend and prepare_for_decode, do the same in torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxcache.arguments import as_count, as_sequence, require_kind
from jaxcache.caches.base import NONE_SPARED
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.request import Request
from jaxcache.slots import pages_of
from jaxcache.steps.buckets import Bucket, Buckets, StepKind, smallest
from jaxcache.steps.decode_batch import DecodeCursor, RunningBatch
from jaxcache.steps.loop import LoopShape
from jaxcache.steps.loop_plan import DecodeLoops, LoopPlan, loop_limits
from jaxcache.steps.plan import NO_PAGES, StepPlan
from jaxcache.steps.sharing import Part, PlanSearch, resolved
from jaxcache.tables.device_table import PENDING_TOKEN
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class Waiting(NamedTuple):
    """A batch that waits for a step, and how far its requests are.

    Attributes:
      batch: The batch.
      kv_len: int32, tokens of each request that have KV.
      room: int32, slots left in the last page of each: 0 .. page_size - 1.
    """

    batch: RunningBatch
    kv_len: np.ndarray
    room: np.ndarray


class StepPlanner:
    """Plans steps over the requests of one table: a plan has its bucket and its pages when it leaves here.

    Args:
      running: The running requests by row; the manager's own dict.
      table: The host's request table.
      allocator: Where fresh pages come from.
      cache: What is evicted for them, and where prefixes are found.
      loops: Whose requests cannot be planned.
      sizes: How large the steps are that are compiled.
      maps: Names of the maps in the pool that steps bring changes of.

    Attributes:
      sizes: As given.
      buckets: The static shapes of these sizes.
    """

    def __init__(
        self,
        running: Mapping[int, Request],
        table: ReqToTokenPool,
        allocator: BaseTokenToKVPoolAllocator,
        cache: RadixCache,
        loops: DecodeLoops,
        sizes: Buckets,
        maps: tuple[str, ...] = (),
    ):
        self._running, self._table, self._loops = running, table, loops
        self._allocator, self._cache = allocator, cache
        self._stepping = tuple(component for component in cache.components if component.per_request)
        self._shared: dict[int, StepPlan] = {}  # by row: plans that have not run, whose requests share pages
        self.sizes = sizes
        self.buckets = sizes.shapes(table.page_size, maps=maps, has_states=bool(self._stepping))
        self._last_batch: RunningBatch | None = None
        self._cursor: DecodeCursor | None = None

    def buckets_of(self, kinds: Iterable[StepKind]) -> list[Bucket]:
        """The static shapes of steps of these kinds."""
        wanted = set(kinds)
        return [bucket for bucket in self.buckets if bucket.kind in wanted]

    @property
    def loop_sizes(self) -> list[int]:
        """Rows that decode loops are padded to, ascending."""
        return sorted({bucket.requests for bucket in self.buckets_of([StepKind.DECODE])})

    def require_running(self, request: Request) -> int:
        """The row of a request. Raises RequestStateError unless it runs here, in no decode loop."""
        require_kind("request", request, Request)
        row = request.req_pool_idx
        if row is None or self._running.get(row) is not request:
            raise RequestStateError(f"request {request.rid} is {request.state.value}: admit it to this manager first")
        if self._loops.holds(row):
            raise RequestStateError(f"request {request.rid} is in a decode loop: absorb or cancel the loop first")
        return row

    def require_settled(self, request: Request) -> int:
        """The row of a request. Raises RequestStateError unless it runs here, in no loop and no plan to be run."""
        require_kind("request", request, Request)
        (row,) = self._waiting([request]).batch.row.tolist()
        return row

    def make_room(self, num_pages: int, spared: Mapping[str, int] = NONE_SPARED) -> None:
        """Evicts what is short of so many free pages, if that is enough; `spared` as for `make_room_for_pages`.

        Where only window pages are short, running requests give up those that none of their tokens will attend to
        again, one request after the other, and if that is not enough, checkpoints with the windows before them.
        """
        if self._cache.make_room_for_pages(num_pages, spared):
            return
        most = self._allocator.full_available_size() + self._cache.evictable_size()
        if most < num_pages * self._table.page_size:
            return
        for keep_checkpoint in (True, False):
            for request in self._running.values():
                self._cache.drop_out_of_window(request, keep_checkpoint)
                if self._cache.make_room_for_pages(num_pages, spared):
                    return

    def take_pages(self, num_pages: int) -> Int32[np.ndarray, " pages"] | None:
        """Fresh pages, evicting only what is short; None, with no page taken, if that is not enough."""
        if not num_pages:
            return np.empty(0, np.int32)
        self.make_room(num_pages)
        return self._allocator.alloc_pages(num_pages)

    def forget_batch(self) -> None:
        """Requests came or went: the next batch is looked at again."""
        self._last_batch = self._cursor = None

    # ---- plans ---------------------------------------------------------------------------------------------------

    def extend(self, work: Sequence[tuple[Request, int]], share_in_step: bool = True) -> StepPlan | None:
        """`MemoryManager.extend` has the contract."""
        if not all(isinstance(entry, tuple) and len(entry) == 2 for entry in as_sequence("work", work)):
            raise ArgumentError("work must be pairs of a request and a number of tokens")
        batch, kv_len, _ = self._waiting([request for request, _ in work])
        for (request, n), computed in zip(work, kv_len.tolist(), strict=True):
            left = request.num_tokens + request.pending - computed
            if not 1 <= as_count(f"work: tokens of request {request.rid}", n) <= left:
                raise ArgumentError(f"work: {request.rid} has {left} tokens, not {n}")
        with contextlib.ExitStack() as undo:  # the locks on what is found
            parts = PlanSearch(self._cache, self._table, self._stepping, undo, share_in_step).parts(work)
            if len(parts) < len(work):
                batch = RunningBatch.of([part.request for part in parts], self._table)
            plan = self._extend(batch, parts)
            if plan is not None:
                undo.pop_all()
        return plan

    def _extend(self, batch: RunningBatch, parts: Sequence[Part]) -> StepPlan | None:
        """The plan of these parts; None, and nothing has changed, if memory is short."""
        table, size = self._table, self._table.page_size
        start, target = np.array([(part.start, part.stop) for part in parts], np.int32).T.copy()
        more = target - start
        if target.max() > table.max_context_len:
            self._refuse_longer(batch, target)
        new = pages_of(target, size) - pages_of(start, size)
        num_pages, num_tokens = int(new.sum()), int(more.sum())
        bucket = smallest(self.buckets, StepKind.EXTEND, len(parts), num_tokens, num_pages, int(target.max()))
        tokens = [_tokens_of(part) for part in parts]
        fresh = self.take_pages(num_pages)
        if fresh is None:
            return None
        shared = [self._go_on(part, fresh) for part in parts if part.found is not None or len(part.taken)]
        last_loc = table.last_slots(batch.row, start)
        table.append_pages(batch.row, fresh, new)
        plan = self._step_plan(bucket, batch, start, target, last_loc, np.concatenate(tokens), fresh)
        return self._open_shared(plan, parts, np.unique(np.concatenate(shared))) if shared else plan

    def _go_on(self, part: Part, fresh: np.ndarray) -> np.ndarray:
        """Puts a request where its part starts; returns the pages that it takes from others of the plan."""
        request, taken = part.request, resolved(part.taken, fresh)
        if part.found is not None and part.lock is not None:
            self._cache.resume_from(request, part.found, part.lock)
        if len(taken):
            row = np.array([request.req_pool_idx], np.intp)
            request.kv_len -= request.kv_len % self._table.page_size  # another computes the rest of this page too
            self._allocator.release(self._table.cut_spare_pages(row), PageState.PRIVATE)
            self._table.append_pages(row, taken, np.array([len(taken)], np.int32))
        return taken

    def _open_shared(self, plan: StepPlan, parts: Sequence[Part], shared: np.ndarray) -> StepPlan:
        """The plan, with pages that several of its requests have."""
        if not len(shared):
            return plan
        self._allocator.transfer(shared, PageState.PRIVATE, PageState.PLANNED)
        takers = tuple(part.request for part in parts if len(part.taken))
        plan = dataclasses.replace(plan, shared_pages=shared, takers=takers)
        self._shared.update(dict.fromkeys(plan.row.tolist(), plan))
        return plan

    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """`MemoryManager.decode` has the contract."""
        as_sequence("requests", requests)
        cursor = self._cursor
        if cursor is None or not cursor.continues(requests):
            cursor = self._cursor = DecodeCursor(self._table, *self._waiting(requests))
        tokens = cursor.last_tokens()
        prefix, target, last_loc = cursor.lengths()
        if cursor.longest > self._table.max_context_len:
            self._refuse_longer(cursor.batch, target)
        num_pages = len(cursor.growing)
        bucket = smallest(self.buckets, StepKind.DECODE, len(tokens), len(tokens), num_pages, cursor.longest)
        fresh = self.take_pages(num_pages)
        if fresh is None:
            return None
        self._table.append_pages(cursor.batch.row[cursor.growing], fresh)
        cursor.plan = self._step_plan(bucket, cursor.batch, prefix, target, last_loc, tokens, fresh)
        return cursor.plan

    def decode_loop(
        self,
        requests: Sequence[Request],
        steps: int,
        width: int,
        limits: Sequence[int] | None = None,
        pages: int | None = None,
    ) -> LoopPlan | None:
        """`MemoryManager.decode_loop` has the contract."""
        steps, width = as_count("steps", steps), as_count("width", width)
        batch, kv_len, _ = self._waiting(requests)
        if len(batch.state) and width > 1:
            raise ArgumentError(
                f"width must be 1 with recurrent states, which no draft can be taken out of, got {width}"
            )
        tokens = batch.last_tokens(kv_len + 1 - batch.prompt_len, self._table)
        bucket = smallest(self.buckets, StepKind.DECODE, len(tokens), len(tokens), 0)
        plan = LoopPlan(
            LoopShape(bucket.requests, steps, width, self._table.page_size),
            batch.requests,
            row=batch.row,
            seq_len=kv_len,
            limit=loop_limits(batch.requests, kv_len, limits, self._table.max_context_len),
            tag=batch.tag,
            state=batch.state,
            tokens=tokens,
        )
        num_pages = plan.most_pages if pages is None else min(as_count("pages", pages), plan.most_pages)
        self.make_room(num_pages)
        return self._loops.open(plan, num_pages)

    def _waiting(self, requests: Sequence[Request]) -> Waiting:
        """Distinct running requests that wait for a step.

        Raises:
          RequestStateError: One is not running, is in a decode loop, or has a plan that has not run.
          ArgumentError: One is named twice, or there is none.
        """
        batch = self._last_batch
        if batch is None or batch.requests != tuple(as_sequence("requests", requests)) or self._loops.holds(batch.row):
            for request in as_sequence("requests", requests):
                self.require_running(request)
            if len(set(map(id, requests))) != len(requests) or not requests:
                raise ArgumentError("requests: name each request once, and at least one")
            batch = self._last_batch = RunningBatch.of(requests, self._table)
        table = self._table
        kv_len = table.kv_len[batch.row]
        room = table.num_pages[batch.row] * table.page_size - kv_len
        is_planned = room >= table.page_size
        if self._shared:
            is_planned |= np.isin(batch.row, list(self._shared))
        if is_planned.any():
            rid = batch.requests[int(is_planned.argmax())].rid
            raise RequestStateError(f"request {rid} has a plan that has not run: run or cancel it first")
        return Waiting(batch, kv_len, room)

    def _refuse_longer(self, batch: RunningBatch, target: np.ndarray) -> None:
        i = int(target.argmax())
        raise ArgumentError(
            f"request {batch.requests[i].rid} would have {target[i]} tokens, max_context_len is "
            f"{self._table.max_context_len}: finish it"
        )

    def _step_plan(
        self,
        bucket: Bucket,
        batch: RunningBatch,
        prefix: np.ndarray,
        target: np.ndarray,
        last_loc: np.ndarray,
        tokens: np.ndarray,
        fresh: np.ndarray,
    ) -> StepPlan:
        """The plan, once its pages are in the table."""
        return StepPlan(
            bucket,
            batch.requests,
            row=batch.row,
            prefix_len=prefix,
            seq_len=target,
            last_loc=last_loc,
            tag=batch.tag,
            tokens=tokens,
            new_pages=fresh,
            state=batch.state,
            stamp=self._table.stamp(batch.row),
        )

    def clear(self) -> None:
        """Forgets what was planned, without a page going back."""
        self._shared.clear()
        self.forget_batch()

    # ---- plans that were made ------------------------------------------------------------------------------------

    @property
    def planned_pages(self) -> Int32[np.ndarray, " pages"]:
        """Pages that several requests of a plan have, which has not run."""
        plans = set(self._shared.values())
        return np.concatenate([NO_PAGES, *[plan.shared_pages for plan in plans]])

    def cancel(self, plan: StepPlan) -> None:
        """`MemoryManager.cancel` has the contract."""
        if self._close_shared(plan):
            rows = plan.row
            self._table.cut_spare_pages(rows)
            self._allocator.release(plan.new_pages, PageState.PRIVATE)
        else:
            rows = np.array(self._rows_left(plan), np.intp)
            self._allocator.release(self._table.cut_spare_pages(rows), PageState.PRIVATE)
        self._table.touch(rows)  # also where the plan took no pages

    def _rows_left(self, plan: StepPlan) -> list[int]:
        """Rows of a plan whose requests still run and are in no other plan that shares pages."""
        rows = zip(plan.requests, plan.row.tolist(), strict=True)
        left = [row for request, row in rows if self._running.get(row) is request]
        for request in plan.requests:
            if not left or request.req_pool_idx in left:
                self.require_running(request)
        return [row for row in left if row not in self._shared]

    def withdraw(self, row: int) -> None:
        """The request in this row ends: a plan in which it shares pages is cancelled, for all of its requests."""
        if row in self._shared:
            self.cancel(self._shared[row])

    def _close_shared(self, plan: StepPlan) -> bool:
        """Whether requests of a plan share pages; they are those of one request from now on, as any others."""
        if not len(plan.shared_pages) or self._shared.get(int(plan.row[0])) is not plan:
            return False
        for row in plan.row.tolist():
            del self._shared[row]
        self._allocator.transfer(plan.shared_pages, PageState.PLANNED, PageState.PRIVATE)
        return True

    def commit(self, plan: StepPlan, has_sampled: bool = False) -> None:
        """The plan's step was dispatched: its tokens have KV; perhaps it left the next ones in the rows' registers."""
        self._close_shared(plan)
        self._table.commit(plan.row, plan.seq_len, has_sampled)
        if self._cursor is not None and self._cursor.plan is plan:
            self._cursor.advance(plan.new_pages)

    def require_current(self, plan: StepPlan) -> None:
        """Raises RequestStateError unless every request is in its row, as long as the plan expects, with its pages.

        Cost: one comparison of a number a row, unless it raises.
        """
        require_kind("plan", plan, StepPlan)
        if plan.stamp is None or self._table.is_current(plan.stamp):
            return
        for request in plan.requests:
            self.require_running(request)
        request, row = plan.requests[0], int(plan.row[0])
        now = (request.req_pool_idx, request.kv_len, request.num_pages)
        raise RequestStateError(
            f"request {request.rid} or another of its batch is not where the plan found it, in row {row}: it has "
            f"(row, tokens, pages) = {now}; plan again"
        )


def _tokens_of(part: Part) -> np.ndarray:
    """The tokens that a request computes; `PENDING_TOKEN` for the one that only the device knows."""
    known = part.request.key.token_ids[part.start : part.stop]
    if len(known) == part.stop - part.start:
        return known
    return np.append(known, np.int32(PENDING_TOKEN))
