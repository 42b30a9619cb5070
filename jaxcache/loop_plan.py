"""The host's side of a decode loop: what it is told, what it must have done, and the pages lent to it meanwhile.

    plan ──launch──► in flight ──absorb──► over         the lent pages are IN_FLIGHT until then, and nobody else's;
      └────cancel────────┴──────cancel──►               absorb: those that hold tokens become their request's PRIVATE
                                                        pages, the others go back, as if they had never been taken

The host reads no allocator back: `LoopPlan.replay` runs the arithmetic of the device (`DecodeRows`) on the accepted
lengths and the stops, which the engine reads anyway.

Source: jaxcache's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.decode_loop import DecodeRows, LoopShape
from jaxcache.errors import ArgumentError, BrokenInvariant, RequestStateError, SnapshotError
from jaxcache.pages.arguments import int32_array
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState, Snapshot
from jaxcache.pages.expand import pages_of
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.request import Request

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class LoopPlan:
    """One loop's host inputs, unpadded.

    Attributes:
      shape: Its static shape.
      requests: The batch, in order: column `i` of what comes back is request `i`.
      row, seq_len, limit, tag, tokens: int32, one a request: its table row; tokens it has and may have; a number of the
        engine's own; the token it computes first.
      window: int32, the pages lent to the loop, in the order in which its steps take them.
    """

    shape: LoopShape
    requests: tuple[Request, ...]
    row: Int32[np.ndarray, " requests"]
    seq_len: Int32[np.ndarray, " requests"]
    limit: Int32[np.ndarray, " requests"]
    tag: Int32[np.ndarray, " requests"]
    tokens: Int32[np.ndarray, " requests"]
    window: Int32[np.ndarray, " pages"]

    @classmethod
    def of(cls, shape: LoopShape, requests: Sequence[Request], limits: Sequence[int]) -> LoopPlan:
        """The plan, without pages yet, for running requests with one token to compute; without requests, padding."""
        first = [request.output_ids[-1] if request.output_ids else request.origin_input_ids[-1] for request in requests]
        return cls(
            shape,
            tuple(requests),
            row=np.array([request.req_pool_idx for request in requests], np.int32),
            seq_len=np.array([request.kv_len for request in requests], np.int32),
            limit=np.array(limits, np.int32),
            tag=np.array([request.tag for request in requests], np.int32),
            tokens=int32_array("output_ids", first) if first else np.empty(0, np.int32),
            window=np.empty(0, np.int32),
        )

    @property
    def most_pages(self) -> int:
        """Pages that the loop takes if every token is accepted and nobody stops."""
        size = self.shape.page_size
        ends = np.minimum(self.seq_len + self.shape.steps * self.shape.width, self.limit)
        return int((pages_of(ends, size) - pages_of(self.seq_len, size)).sum())

    def pack(self) -> Int32[np.ndarray, " size"]:
        """The one array that is uploaded. Padding is 0."""
        return self.shape.packing.pack(vars(self) | {"num_pages": np.array([len(self.window)], np.int32)})

    def replay(self, accepted: ArrayLike | None = None, stopped: ArrayLike | None = None) -> LoopReplay:
        """What the loop did, computed from what its steps accepted and stopped. Changes nothing, reads no device state.

        Args:
          accepted: int (steps, requests), the lengths given to `DecodeLoop.accept`, step by step; None if it was called
            without. Columns of padding may follow. Fewer rows than planned: a loop that ended early.
          stopped: bool, of the same shape, the masks given to `DecodeLoop.stop`; None if nobody stopped.

        Raises:
          ArgumentError: on another shape or dtype, or lengths that no step can accept.

        Cost: some ten NumPy operations a step.
        """
        rules = (accepted, "accepted", "iu", "integers"), (stopped, "stopped", "b", "booleans")
        given, masks = (self._matrix(*rule) for rule in rules)
        if given is None:
            given = np.full((self.shape.steps if masks is None else len(masks), len(self.requests)), self.shape.width)
        if masks is None:
            masks = np.zeros(given.shape, bool)
        if len(given) != len(masks):
            raise ArgumentError(f"accepted and stopped must have as many steps, got {len(given)} and {len(masks)}")
        if given.size and not 0 <= given.min() <= given.max() <= self.shape.width:
            low, high = given.min(), given.max()
            raise ArgumentError(f"accepted must be in [0, {self.shape.width}], the width, got [{low}, {high}]")
        return self._replay(given, masks)

    def _replay(self, given: np.ndarray, masks: np.ndarray) -> LoopReplay:
        rows = DecodeRows.start(self.seq_len, self.limit, self.shape.page_size)
        accepted, owners = np.zeros(given.shape, np.int32), [np.empty(0, np.int64)]
        taken, short_at = 0, None
        for step in range(len(given)):
            before = rows.seq_len
            rows, need = rows.grown(self.shape.width, self.shape.page_size, len(self.window) - taken)
            rows = rows.accepted(given[step]).stopped(masks[step])
            accepted[step] = rows.seq_len - before
            owners.append(np.repeat(np.arange(len(need)), need))
            taken += len(owners[-1])
            if short_at is None and not rows.ok:
                short_at = step
        return LoopReplay(self, accepted, rows, np.concatenate(owners), short_at)

    def _matrix(self, value: ArrayLike | None, name: str, kinds: str, words: str) -> np.ndarray | None:
        if value is None:
            return None
        array, n = np.asarray(value), len(self.requests)
        fits = array.ndim == 2 and array.shape[1] in (n, self.shape.requests) and len(array) <= self.shape.steps
        if not fits or array.dtype.kind not in kinds:
            rule = f"{words} of shape (steps <= {self.shape.steps}, {n} requests)"
            raise ArgumentError(f"{name} must be {rule}, got {array.dtype}{list(array.shape)}")
        return array[:, :n]


@dataclass(frozen=True, eq=False)
class LoopReplay:
    """What a loop did.

    Attributes:
      plan: The loop.
      accepted: int32 (steps, requests), the tokens of each step that count. 0 where a request had stopped, was at its
        limit, or from `short_at` on: what the loop sampled there means nothing.
      rows: How far each request is; NumPy.
      owner: int (taken,), which request took each page of the window that was taken.
      short_at: The first step that found too few pages, or None.
    """

    plan: LoopPlan
    accepted: Int32[np.ndarray, "steps requests"]
    rows: DecodeRows
    owner: Int32[np.ndarray, " taken"]
    short_at: int | None

    def pages_taken(self) -> list[Int32[np.ndarray, " pages"]]:
        """The pages that each request took, in the order of its tokens. O(taken log taken)."""
        by_request = np.argsort(self.owner, kind="stable")
        ends = np.cumsum(np.bincount(self.owner, minlength=len(self.plan.requests)))
        return np.split(self.plan.window[by_request], ends)[:-1]


def loop_limits(requests: Sequence[Request], limits: Sequence[int] | None, longest: int) -> Sequence[int]:
    """The limits of a loop's requests, checked; by default `longest` for each.

    Raises:
      ArgumentError: they are not one a request, or one is above `longest` or leaves its request nothing to compute.
    """
    if limits is None:
        limits = [longest] * len(requests)
    if len(limits) != len(requests):
        raise ArgumentError(f"limits must be one a request, got {len(limits)} for {len(requests)} requests")
    for request, limit in zip(requests, limits, strict=True):
        if not request.kv_len < limit <= longest:
            raise ArgumentError(
                f"limits: that of request {request.rid} must be above its {request.kv_len} tokens and at most "
                f"max_context_len = {longest}, got {limit}: raise it, or finish the request"
            )
    return limits


class PageLoan:
    """Pages out of the allocator's hands: IN_FLIGHT until `settle`.

    Args:
      allocator: Who lends.
      before: The allocator's state before `pages` were taken.
      pages: int32, PRIVATE, just taken.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, before: Snapshot, pages: Int32[np.ndarray, " pages"]):
        self.pages = pages
        self._allocator, self._before, self._after = allocator, before, allocator.backup_state()
        allocator.transfer(pages, PageState.PRIVATE, PageState.IN_FLIGHT)

    def settle(self, used: int) -> None:
        """The first `used` pages become PRIVATE, the others free.

        Where nobody took or freed a page meanwhile, the free list is as if the others had never been taken.
        """
        self._allocator.transfer(self.pages, PageState.IN_FLIGHT, PageState.PRIVATE)
        if used == len(self.pages):
            return
        if self._rewound():
            self._allocator.alloc_pages(used)
        else:
            self._allocator.release(self.pages[used:], PageState.PRIVATE)

    def _rewound(self) -> bool:
        if self._allocator.backup_state() is not self._after:
            return False
        try:
            self._allocator.restore_state(self._before)
        except SnapshotError:  # a free group is open
            return False
        return True


@dataclass(eq=False)
class _Flight:
    """A loop that is not over. `books` are its rows and allocator at the end, on the device, once it was launched."""

    loan: PageLoan
    books: tuple[DecodeRows, Any] | None = None


class DecodeLoops:
    """The loops of one manager that are not over yet.

    Args:
      allocator: Lends pages to them.
      table: The host's request table.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, table: ReqToTokenPool):
        self._allocator, self._table = allocator, table
        self._flights: dict[LoopPlan, _Flight] = {}

    @property
    def are_over(self) -> bool:
        """Whether there is no loop to absorb or cancel."""
        return not self._flights

    def holds(self, row: int) -> bool:
        """Whether the request in that row is part of a loop that is not over."""
        return any(row in plan.row for plan in self._flights)

    def open(self, plan: LoopPlan, num_pages: int) -> LoopPlan | None:
        """Lends the pages of a new loop to its plan; None, and nothing has changed, if there are not as many."""
        before = self._allocator.backup_state()
        window = self._allocator.alloc_pages(num_pages)
        if window is None:
            return None
        plan = dataclasses.replace(plan, window=window)
        self._flights[plan] = _Flight(PageLoan(self._allocator, before, window))
        return plan

    def require_planned(self, plan: LoopPlan) -> None:
        """Raises RequestStateError unless the loop waits to be launched."""
        if self._flight(plan).books is not None:
            raise RequestStateError("plan: this loop was launched already: replay and absorb it")

    def launched(self, plan: LoopPlan, books: tuple[DecodeRows, Any]) -> None:
        """Remembers what a loop that was launched leaves on the device: its rows and its allocator."""
        self._flight(plan).books = books

    def absorb(self, replay: LoopReplay, device_table: RequestTable | None) -> None:
        """Commits what a loop did, and ends it. `MemoryManager.absorb` has the contract."""
        plan = replay.plan
        flight = self._flight(plan)
        if flight.books is None:
            raise RequestStateError("replay: its loop was not launched: run or cancel it")
        for request, length in zip(plan.requests, replay.rows.seq_len.tolist(), strict=True):
            if request.num_tokens < length:
                raise ArgumentError(
                    f"replay: request {request.rid} has {request.num_tokens} tokens, the loop computed {length} of "
                    "them: append the tokens it sampled to output_ids first"
                )
        if device_table is not None:
            check_loop(replay, flight.books, self._table, device_table)
        self._commit(replay, flight.loan)
        del self._flights[plan]

    def cancel(self, plan: LoopPlan) -> None:
        """Ends a loop as if it had not been; launched or not, its pages go back."""
        self._flight(plan).loan.settle(0)
        del self._flights[plan]

    def _commit(self, replay: LoopReplay, loan: PageLoan) -> None:
        plan, rows = replay.plan, replay.rows
        loan.settle(len(replay.owner))
        kept = (-(-rows.seq_len // plan.shape.page_size)).tolist()
        columns = plan.row.tolist(), replay.pages_taken(), kept, rows.seq_len.tolist()
        spare = [np.empty(0, np.int32)]
        for request, row, pages, keep, length in zip(plan.requests, *columns, strict=True):
            self._table.write_pages(row, request.num_pages, pages, on_device=True)
            spare.append(self._table.row_pages(row, keep, request.num_pages + len(pages)))
            request.kv_len, request.num_pages = length, keep
        self._allocator.release(np.concatenate(spare), PageState.PRIVATE)

    def _flight(self, plan: LoopPlan) -> _Flight:
        if plan not in self._flights:
            raise RequestStateError("plan: this loop is over, or another manager's: plan again")
        return self._flights[plan]


def check_loop(
    replay: LoopReplay, books: tuple[DecodeRows, Any], table: ReqToTokenPool, device_table: RequestTable
) -> None:
    """Reads back what a loop left on the device and compares it with its replay, bit for bit.

    Args:
      replay: What the host computed; not absorbed yet.
      books: The loop's rows and allocator.
      table: The host's table.
      device_table: The table that the loop, or a later step, returned.

    Raises:
      BrokenInvariant: names the first thing that differs.

    Cost: waits for the device and reads back the table. For debugging.
    """
    plan, taken = replay.plan, len(replay.owner)
    rows, allocator = books
    shape = plan.shape
    window = np.zeros(shape.window, np.int32)
    window[: len(plan.window)] = plan.window
    expected: dict[str, Any] = {
        "ring": window,
        "head": taken % shape.window,
        "count": len(plan.window) - taken,
        "ok": replay.rows.ok,
    }
    found: dict[str, Any] = {name: getattr(allocator, name) for name in ("ring", "head", "count")} | {"ok": rows.ok}
    for name in ("seq_len", "num_pages", "limit", "granted", "active"):
        expected[name], found[name] = getattr(replay.rows, name), getattr(rows, name)[: len(plan.requests)]
    device = np.asarray(device_table.pages)
    for request, row, pages in zip(plan.requests, plan.row.tolist(), replay.pages_taken(), strict=True):
        name = f"pages of request {request.rid}"
        expected[name] = np.concatenate([table.row_pages(row, 0, request.num_pages), pages])
        found[name] = device[row, : len(expected[name])]
    for name, value in expected.items():
        if not np.array_equal(value, np.asarray(found[name])):
            raise BrokenInvariant(f"decode loop: {name} is {np.asarray(found[name])} on the device, not {value}")
