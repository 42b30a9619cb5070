"""Steps and loops of steps on a managed memory: planned, dispatched, committed.

plan = extend(...) or decode(...)        take pages, write the table     (None: memory is short)
out  = run(step, plan)                   dispatch, then commit what was computed

plan = decode_loop(...)                  lend pages                      (None: memory is short)
out  = run_loop(step, plan)              dispatch; the steps take pages and write the table
absorb(plan.replay(...))                 commit what they did
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.arguments import as_count, require_callable, require_kind
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.guard import exclusive, exclusive_on_device
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.memory import ManagedMemory
from jaxcache.manager.room import RoomSearch
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request
from jaxcache.steps.buckets import Bucket, StepKind
from jaxcache.steps.host_batch import HostBatch, host_batch
from jaxcache.steps.host_runner import EnginePool
from jaxcache.steps.loop import LoopShape
from jaxcache.steps.loop_plan import DecodeLoops, LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan
from jaxcache.steps.planner import StepPlanner
from jaxcache.steps.warm_up import Progress
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class SteppedMemory(ManagedMemory):
    """A memory that steps compute on.

    Attributes:
      planner: What plans steps and checks their plans.
    """

    def __init__(
        self,
        config: MemoryConfig,
        pool: MemoryPool | EnginePool,
        allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        cache: RadixCache,
    ):
        super().__init__(config, pool, allocator, req_to_token_pool, cache)
        self._stepping = tuple(component for component in cache.components if component.per_request)
        self._room = RoomSearch(cache, config.max_context_len, config.step_sizes.extend_tokens[-1])
        self._loops = DecodeLoops(allocator, req_to_token_pool)
        self.planner = StepPlanner(
            self.running,
            req_to_token_pool,
            allocator,
            cache,
            self._loops,
            config.step_sizes,
            tuple(device_map.name for device_map in self.runner.maps),
        )

    def _audit(self) -> None:
        super()._audit()
        self._loops.check()

    def _forget(self) -> None:
        super()._forget()
        self._loops.clear()
        self.planner.clear()

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Static shapes of steps; the planner's."""
        return self.planner.buckets

    @property
    def _planned_pages(self) -> Int32[np.ndarray, " pages"]:
        """See `ManagedMemory._planned_pages`."""
        return self.planner.planned_pages

    # ---- steps ---------------------------------------------------------------------------------------------------

    def next_chunk(self, request: Request, most: int, beside: int = 0) -> int:
        """How many tokens of a running request to compute in its next step: what is left, but at most `most`.

        It is fewer where several steps save more padding than they cost (`Buckets.step_cost`), and with recurrent
        states where that lets the step end at a point whose state is worth keeping: at the branch point of an earlier
        request, or at the last page boundary. `beside` are tokens of other requests in the same step; it is 0 where
        they fill the largest one.

        Raises:
          RequestStateError: The request is not running.
          ArgumentError: `most` is not positive, or `beside` is negative.
        """
        self.planner.require_running(request)
        if as_count("most", most) < 1:
            raise ArgumentError("most must be at least 1: omit requests with nothing to compute")
        start = request.kv_len
        end = min(request.num_tokens, start + min(most, self._room.largest_chunk(start)))
        for component in self._stepping:
            end = component.next_stop(start, end, request.num_tokens, request.branching_len)
        return self.planner.sizes.chunk(end - start, as_count("beside", beside))

    def working_state(self, request: Request) -> int:
        """The recurrent state that a running request's steps update; 0 without states."""
        return sum(self.req_to_token_pool.states_of(np.array([_row_of(request)])).tolist())

    @exclusive
    def extend(self, work: Sequence[tuple[Request, int]], *, share_in_step: bool = True) -> StepPlan | None:
        """Plans a step that computes the next `n` prompt (or recomputed) tokens of each request, at most.

        Each is looked up again: what others have computed since it was admitted, and what those before it in `work`
        compute in this step, it resumes from, so that fewer tokens may be left than were asked for
        (`plan.num_computed`). Where a step cannot read what it writes, a request whose twin computes what it needs is
        left out and waits for the next plan: the batch is `plan.requests`. See `jaxcache.steps.sharing`.

        Evicts if needed. Returns None, without side effects, if memory is still insufficient.

        Args:
          work: Distinct running requests, each with a number of tokens >= 1 that it still has to compute.
          share_in_step: False for a step that attends to its new tokens otherwise than through the pool, after all rows
            of a layer were written.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A number is out of range, a request is named twice, or no bucket is large enough.

        Cost: a lookup a request, and a second one among those of the plan.
        """
        return self.planner.extend(work, share_in_step)

    @exclusive
    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """Plans a step that computes the last sampled token of each request, pending or not. None if memory is short.

        Cost: some NumPy calls and one pass of C loops over the batch, if it is the batch of the call before.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A request has not one token to compute, it does not fit int32, or a request is named twice.
        """
        return self.planner.decode(requests)

    @exclusive_on_device
    def run(self, step: Callable, plan: StepPlan, *args: Any) -> Any:
        """Dispatches a step on the pools and commits what it computes.

        The step is `step(pool, batch, *args) -> (pool, out)`, a pure function; it is jitted once a bucket, with pool
        and request table donated. After an extend, whole pages are shared through the prefix cache.

        A step may also return `(pool, out, sampled)`, with the next token of each request, int32 `[requests]`. These
        stay on the device, in a register for each row of the request table, and are pending: the next step can be
        planned and run before they are read, and takes them from there. Append them to `output_ids` when they are read,
        as they were sampled.

        Returns:
          `out`, perhaps still being computed.

        Raises:
          RequestStateError: A request is not where the plan takes it up: the plan ran or was cancelled already, or the
            request was retracted, or has other pages by now. Nothing has changed.
          ArgumentError: The step returns neither `(pool, out)` nor `(pool, out, sampled)`.
        """
        require_callable("step", step)
        self._before(plan)
        outcome = self._dispatched(self.runner.run, step, plan, *args)
        self._commit(plan, outcome.has_sampled)
        return outcome.out

    def _dispatched(self, run: Callable[..., Any], *args: Any) -> Any:
        """Runs a step. Others may read sizes meanwhile; where nothing was dispatched, the step can be run again."""
        try:
            with self.guard.paused:
                return run(*args)
        except BaseException:
            if self.runner.is_undone:
                self.guard.excuse()
            raise

    @exclusive_on_device
    def host_batch(self, plan: StepPlan) -> HostBatch:
        """A plan as arrays, for a step of the engine's own: see `jaxcache.steps.host_batch`. Raises: as `run`."""
        self._before(plan)
        return host_batch(plan, self.req_to_token_pool)

    @exclusive_on_device
    def commit(self, plan: StepPlan, sampled: bool = False) -> None:
        """Commits, in place of `run`, what the engine's own step over `host_batch(plan)` computes. Raises: as `run`.

        Args:
          plan: As for `run`.
          sampled: The engine has the next token of each request on its device: it may be computed by the next step
            before it is in `output_ids`. Where `host_batch` says `PENDING_TOKEN`, that is the token.
        """
        self.planner.require_current(plan)
        if any(component.waits(plan.row) for component in self._stepping):
            raise RequestStateError("plan: states wait to be filled: call host_batch(plan) before the step")
        self._commit(plan, sampled)

    def _before(self, plan: StepPlan) -> None:
        self.planner.require_current(plan)
        for component in self._stepping:
            component.before_step(plan.row, self.runner)

    def _commit(self, plan: StepPlan, has_sampled: bool) -> None:
        self.planner.commit(plan, has_sampled)
        is_prompt = plan.bucket.kind is StepKind.EXTEND
        for component in self._stepping:
            component.after_step(plan.row, plan.seq_len, is_prompt, self.cache, self.runner)
        if is_prompt:
            takers = set(plan.takers)
            for request, start in zip(plan.requests, plan.prefix_len.tolist(), strict=True):
                if request in takers:  # after the one that computed what it takes
                    self.cache.lock_taken(request, start)
                self.cache.cache_unfinished_req(request, chunked=True)

    @exclusive
    def cancel(self, plan: StepPlan) -> None:
        """Gives the pages of a plan back, which can no longer run; RequestStateError if all its requests have ended.

        Its requests are where they were, but for what the plan found in the cache. Where they share pages, it is also
        what happens when one of them ends before the plan has run.
        """
        require_kind("plan", plan, StepPlan)
        self.planner.cancel(plan)

    def warm_up(
        self,
        step: Callable,
        *args: Any,
        kinds: Iterable[StepKind] = tuple(StepKind),
        threads: int | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Compiles `step` for every bucket, and the table patch, and runs each with a batch of padding.

        Args:
          step: As for `run`.
          *args: Likewise; other shapes or dtypes later compile again.
          kinds: Of which kinds: call it once a kind where extend and decode are two functions.
          threads: That compile; by default as many as there are processors, up to 8.
          progress: Called after each executable, such as `jaxcache.steps.warm_up.show_progress`.
        """
        self.guard.require_owner("warm_up")
        buckets = self.planner.buckets_of(kinds)
        self.runner.compile_ahead(step, buckets, args, threads, progress)
        for bucket in buckets:
            self.run(step, StepPlan.empty(bucket), *args)
        self.runner.warm_up()

    # ---- loops of decode steps: jaxcache.steps.loop ---------------------------------------------------------------

    @exclusive
    def decode_loop(
        self,
        requests: Sequence[Request],
        steps: int,
        width: int = 1,
        *,
        limits: Sequence[int] | None = None,
        pages: int | None = None,
    ) -> LoopPlan | None:
        """Plans several decode steps in one jitted call and lends them pages. None if memory is short.

        Until `absorb` or `cancel_loop` its requests can do nothing else; others can.

        Args:
          requests: As for `decode`.
          steps: Most steps; static.
          width: Tokens each request computes in a step: 1, or one and its drafts; static.
          limits: Most tokens of each request that may have KV; at most, and by default, `max_context_len`.
          pages: Most pages to lend; by default all that the steps can need, which is more than they do need where
            drafts are rejected or requests stop. The step that finds too few, and all after it, do nothing.

        Raises:
          RequestStateError, ArgumentError: as `decode`, and if a number is out of range.
        """
        return self.planner.decode_loop(requests, steps, width, limits, pages)

    @exclusive_on_device
    def run_loop(self, step: Callable, plan: LoopPlan, *args: Any) -> Any:
        """Dispatches a loop on the pools.

        The step is `step(pool, loop, *args) -> (pool, loop, out)`, a pure function that scans over at most
        `loop.shape.steps` steps, see `DecodeLoop`; it is jitted once a shape, with pool and request table donated.

        Returns:
          `out`, perhaps still being computed: what was sampled and accepted, and who stopped, step by step.

        Raises:
          RequestStateError: The loop was launched already, or is over. Nothing has changed.
        """
        require_callable("step", step)
        self._loops.require_planned(plan)
        for component in self._stepping:
            component.before_step(plan.row, self.runner)
        left_behind, out = self._dispatched(self.runner.run_loop, step, plan, *args)
        self._loops.launched(plan, left_behind)
        return out

    @exclusive
    def absorb(self, replay: LoopReplay, *, read_device: bool = False) -> None:
        """Commits what a loop did, and ends it. Pages without accepted tokens go back. Waits for nothing.

        Args:
          replay: From `plan.replay(accepted, stopped)`. Append the tokens that count to the requests first, and
            `finish` those that stopped afterwards.
          read_device: Also read back what the loop left on the device, and compare bit for bit.

        Raises: (and nothing has changed)
          RequestStateError: The loop was not launched, or is over.
          ArgumentError: A request lacks tokens that the loop computed.
          BrokenInvariantError: The device did something else, such as for other `accepted` lengths.
        """
        self._loops.absorb(replay, self.table if read_device else None)

    @exclusive
    def cancel_loop(self, plan: LoopPlan) -> None:
        """Gives the pages of a loop back, launched or not. Its requests are where they were when it was planned.

        Raises:
          RequestStateError: The loop is over; or it was launched, and has taken recurrent states further.
        """
        self._loops.cancel(plan)

    def warm_up_loop(self, step: Callable, steps: int, width: int = 1, *args: Any) -> None:
        """Compiles a loop of that many steps for every batch size, in threads, and runs each with padding."""
        self.guard.require_owner("warm_up_loop")
        shapes = [LoopShape(size, steps, width, self.page_size) for size in self.planner.loop_sizes]
        self.runner.compile_ahead(step, shapes, args)
        for shape in shapes:
            self.runner.run_loop(step, LoopPlan.empty(shape), *args)


def _row_of(request: Request) -> int:
    require_kind("request", request, Request)
    if request.req_pool_idx is None:
        raise RequestStateError(f"request {request.rid} has no row: it is {request.state.value}")
    return request.req_pool_idx
