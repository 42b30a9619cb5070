"""The host's side of a decode loop: what it is told, what it must have done, and the pages lent to it meanwhile.

    plan ──launch──► in flight ──absorb──► over         the lent pages are IN_FLIGHT until then, and not shared;
      └────cancel────────┴──────cancel──►               absorb: those that hold tokens become their request's PRIVATE
                                                        pages, the others go back, as if they had never been taken

The host reads no allocator back: `LoopPlan.replay` runs the arithmetic of the device (`DecodeRows`) on the accepted
lengths and the stops, which the engine reads anyway.

Source: jaxcache's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import as_int32, require_kind
from jaxcache.device.placing import on_host
from jaxcache.errors import ArgumentError, BrokenInvariantError, RequestStateError, SnapshotError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, Mark, PageState
from jaxcache.request import Request
from jaxcache.slots import pages_of
from jaxcache.steps.loop import DecodeRows, LoopShape
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class LoopPlan:
    """One loop's host inputs, unpadded.

    Attributes:
      shape: Its static shape.
      requests: The batch, in order: column `i` of what comes back is request `i`.
      row, seq_len, limit, tag, tokens: One integer a request: its table row; tokens it has and may have; a number of
        the engine's own; the token it computes first.
      state: Recurrent state of each request; empty without states.
      window: int32, the pages lent to the loop, in the order in which its steps take them.
    """

    shape: LoopShape
    requests: tuple[Request, ...]
    row: Int32[np.ndarray, " requests"]
    seq_len: Int32[np.ndarray, " requests"]
    limit: Int32[np.ndarray, " requests"]
    tag: Int32[np.ndarray, " requests"]
    state: Int32[np.ndarray, " requests"]
    tokens: Int32[np.ndarray, " requests"]
    window: Int32[np.ndarray, " pages"] = field(default_factory=lambda: np.empty(0, np.int32))

    @classmethod
    def empty(cls, shape: LoopShape) -> LoopPlan:
        """A plan of padding alone, to compile a shape."""
        none = np.empty(0, np.int32)
        return cls(shape, (), none, none, none, none, none, none)

    @property
    def most_pages(self) -> int:
        """Pages that the loop takes if every token is accepted and no request stops."""
        size = self.shape.page_size
        ends = np.minimum(self.seq_len + self.shape.steps * self.shape.width, self.limit)
        return int((pages_of(ends, size) - pages_of(self.seq_len, size)).sum())

    def pack(self, out: Int32[np.ndarray, " size"] | None = None) -> Int32[np.ndarray, " size"]:
        """The one vector that is uploaded; in `out`, if that is given. Padding is 0."""
        return self.shape.packing.pack(vars(self) | {"num_pages": np.array([len(self.window)], np.int32)}, out)

    def replay(self, accepted: ArrayLike | None = None, stopped: ArrayLike | None = None) -> LoopReplay:
        """What the loop did, computed from what its steps accepted and stopped. Changes nothing, reads no device state.

        Args:
          accepted: int (steps, requests), the lengths given to `DecodeLoop.accept`, step by step; None if it was called
            without. Columns of padding may follow. Fewer rows than planned: a loop that ended early.
          stopped: bool, of the same shape, the masks given to `DecodeLoop.stop`; None if none stopped.

        Raises:
          ArgumentError: on another shape or dtype, or lengths that no step can accept.

        Cost: some thirty NumPy operations on (steps, requests), whatever the number of steps.
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
        """All steps of `DecodeRows` at once: each of its sums and maxima runs along the steps.

        Lengths only grow, and no further than the limit: clipping once behind the sum is clipping at each step. A row's
        pages are those of the furthest token that ever got a slot. What follows the step that found too few pages is
        cut off.
        """
        steps, n, size = len(given), len(self.requests), self.shape.page_size
        stopped = np.zeros((steps + 1, n), bool)  # row t of this and what follows: before step t
        np.logical_or.accumulate(masks, axis=0, out=stopped[1:])
        active = ~stopped
        length = np.zeros((steps + 1, n), np.int32)
        np.cumsum(given * active[:-1], axis=0, dtype=np.int32, out=length[1:])
        length = np.minimum(length + self.seq_len, self.limit)
        pages = np.zeros_like(length)
        pages[0] = pages_of(self.seq_len, size)
        pages[1:] = pages_of(np.minimum(length[:-1] + np.int32(self.shape.width), self.limit), size) * active[:-1]
        np.maximum.accumulate(pages, axis=0, out=pages)
        is_short = pages[1:].sum(axis=1) - pages[0].sum() > len(self.window)
        done = int(is_short.argmax()) if is_short.any() else steps
        accepted = np.zeros((steps, n), np.int32)
        accepted[:done] = np.diff(length[: done + 1], axis=0)
        owner = np.repeat(np.tile(np.arange(n), done), np.diff(pages[: done + 1], axis=0).ravel())
        no_drafts = np.zeros(n, np.int32)
        rows = DecodeRows(length[done], pages[done], self.limit, no_drafts, active[done], np.asarray(done == steps))
        return LoopReplay(self, accepted, rows, owner, None if done == steps else done)

    def _matrix(self, value: ArrayLike | None, name: str, kinds: str, words: str) -> np.ndarray | None:
        if value is None:
            return None
        try:
            array, n = on_host(value), len(self.requests)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # Ragged lists; deleted arrays.
            raise ArgumentError(f"{name} must be {words}, got {type(value).__name__}: {error}") from error
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

    def pages_by_request(self) -> tuple[Int32[np.ndarray, " requests"], Int32[np.ndarray, " taken"]]:
        """How many pages each request took, and all of them: request by request, in the order of its tokens.

        Cost: O(taken log taken).
        """
        by_request = np.argsort(self.owner, kind="stable")
        return np.bincount(self.owner, minlength=len(self.plan.requests)), self.plan.window[by_request]

    def pages_taken(self) -> list[Int32[np.ndarray, " pages"]]:
        """The pages that each request took, in the order of its tokens. O(requests + taken log taken)."""
        counts, pages = self.pages_by_request()
        return np.split(pages, np.cumsum(counts))[:-1]


def loop_limits(
    requests: Sequence[Request],
    kv_len: Int32[np.ndarray, " requests"],
    limits: Sequence[int] | None,
    longest: int,
) -> Int32[np.ndarray, " requests"]:
    """The limits of a loop's requests, which have `kv_len` tokens; checked, and by default `longest` for each.

    Raises:
      ArgumentError: they are not one a request, or one is above `longest` or leaves its request nothing to compute.
    """
    limit = np.full(len(requests), longest, np.int32) if limits is None else as_int32("limits", limits)
    if len(limit) != len(requests):
        raise ArgumentError(f"limits must be one a request, got {len(limit)} for {len(requests)} requests")
    is_wrong = (limit <= kv_len) | (limit > longest)
    if is_wrong.any():
        i = int(is_wrong.argmax())
        raise ArgumentError(
            f"limits: that of request {requests[i].rid} must be above its {kv_len[i]} tokens and at most "
            f"max_context_len = {longest}, got {limit[i]}: raise it, or finish the request"
        )
    return limit


_NO_PAGES = np.empty(0, np.int32)


class PageLoan:
    """Pages out of the allocator's hands: IN_FLIGHT until `settle`.

    Args:
      allocator: Who lends.
      before: The allocator's state before `pages` were taken.
      pages: int32, PRIVATE, just taken.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, before: Mark, pages: Int32[np.ndarray, " pages"]):
        self.pages = pages
        self._allocator, self._before, self._after = allocator, before, allocator.backup_state()
        allocator.transfer(pages, PageState.PRIVATE, PageState.IN_FLIGHT)

    def settle(self, used: int) -> None:
        """The first `used` pages become PRIVATE, the others free.

        Where no page was taken or freed meanwhile, the free list is as if the others had never been taken.
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
    """The loops of one manager that are not over yet. Not thread-safe: the manager's thread owns them.

    Args:
      allocator: Lends pages to them.
      table: The host's request table.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, table: ReqToTokenPool):
        self._allocator, self._table = allocator, table
        self._flights: dict[LoopPlan, _Flight] = {}
        self._held = np.zeros(table.size, bool)

    def holds(self, rows: int | Int32[np.ndarray, " rows"]) -> bool:
        """Whether a request in these rows is part of a loop that is not over."""
        return bool(self._flights) and bool(self._held[rows].any())

    def open(self, plan: LoopPlan, num_pages: int) -> LoopPlan | None:
        """Lends the pages of a new loop to its plan; None, and nothing has changed, if there are not as many."""
        before = self._allocator.backup_state()
        window = self._allocator.alloc_pages(num_pages)
        if window is None:
            return None
        plan = dataclasses.replace(plan, window=window)
        self._flights[plan] = _Flight(PageLoan(self._allocator, before, window))
        self._held[plan.row] = True
        self._table.touch(plan.row)
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
        require_kind("replay", replay, LoopReplay)
        plan = replay.plan
        flight = self._flight(plan)
        if flight.books is None:
            raise RequestStateError("replay: its loop was not launched: run or cancel it")
        num_tokens = np.array([request.prompt_len + len(request.output_ids) for request in plan.requests], np.int32)
        is_short = num_tokens < replay.rows.seq_len
        if is_short.any():
            i = int(is_short.argmax())
            raise ArgumentError(
                f"replay: request {plan.requests[i].rid} has {num_tokens[i]} tokens, the loop computed "
                f"{replay.rows.seq_len[i]} of them: append the tokens it sampled to output_ids first"
            )
        if device_table is not None:
            check_loop(replay, flight.books, self._table, device_table)
        self._commit(replay, flight.loan)
        self._end(plan)

    def cancel(self, plan: LoopPlan) -> None:
        """Ends a loop as if it had not been; launched or not, its pages go back."""
        flight = self._flight(plan)
        if flight.books is not None and len(plan.state):
            raise RequestStateError(
                "plan: this loop was launched, and the recurrent states of its requests have gone on: absorb it"
            )
        flight.loan.settle(0)
        self._end(plan)

    def check(self) -> None:
        """Verifies that loops hold the pages and rows that are lent to them, and no others are.

        Raises:
          BrokenInvariantError: says what differs.
        """
        lent = np.sort(np.concatenate([_NO_PAGES, *[flight.loan.pages for flight in self._flights.values()]]))
        in_flight = np.flatnonzero(self._allocator.states == PageState.IN_FLIGHT)
        if not np.array_equal(lent, in_flight):
            raise BrokenInvariantError(f"decode loops hold {len(lent)} pages, {len(in_flight)} are in flight")
        rows = np.sort(np.concatenate([_NO_PAGES, *[plan.row for plan in self._flights]]))
        if not np.array_equal(rows, np.flatnonzero(self._held)):
            raise BrokenInvariantError(f"decode loops hold rows {rows}, marked are {np.flatnonzero(self._held)}")

    def clear(self) -> None:
        """Forgets all loops, without a page going back."""
        self._flights.clear()
        self._held[:] = False

    def _end(self, plan: LoopPlan) -> None:
        del self._flights[plan]
        self._held[plan.row] = False

    def _commit(self, replay: LoopReplay, loan: PageLoan) -> None:
        plan, rows = replay.plan, replay.rows
        counts, pages = replay.pages_by_request()
        loan.settle(len(replay.owner))
        self._table.append_pages(plan.row, pages, counts, on_device=True)
        self._table.commit(plan.row, rows.seq_len)
        self._allocator.release(self._table.cut_spare_pages(plan.row), PageState.PRIVATE)

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
      BrokenInvariantError: names the first thing that differs.

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
    device = on_host(device_table.pages)
    for request, row, pages in zip(plan.requests, plan.row.tolist(), replay.pages_taken(), strict=True):
        name = f"pages of request {request.rid}"
        expected[name] = np.concatenate([table.row_pages(row, 0, request.num_pages), pages])
        found[name] = device[row, : len(expected[name])]
    for name, value in expected.items():
        if not np.array_equal(value, on_host(found[name])):
            raise BrokenInvariantError(f"decode loop: {name} is {on_host(found[name])} on the device, not {value}")
