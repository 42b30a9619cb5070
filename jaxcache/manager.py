"""What an engine calls: memory, set up from one record, and the life of a request in it.

    WAITING ──admit──► RUNNING ──finish, abort──► DONE
                       │     ▲
                       │     └──admit── RETRACTED ◄──┐
                       └──────────retract────────────┘

    while running:   plan = extend(...) or decode(...)        take pages, write the table     (None: memory is short)
                     out  = run(step, plan)                   dispatch, then commit what was computed
    or many steps:   plan = decode_loop(...)                  lend pages                      (None: memory is short)
                     out  = run_loop(step, plan)              dispatch; the steps take pages and write the table
                     absorb(plan.replay(...))                 commit what they did

Every acquisition is all or nothing: what fails, or comes back None, has changed nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxcache.audit import check_device_map, check_device_table, check_owners, check_windows
from jaxcache.caches.radix import RadixCache
from jaxcache.contents import rows_in_use
from jaxcache.decode_loop import LoopShape
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.node import NOTHING
from jaxcache.loop_plan import DecodeLoops, LoopPlan, LoopReplay
from jaxcache.memory_config import MemoryConfig
from jaxcache.offload import KeptCopy, warmed_up
from jaxcache.pages.arguments import as_count
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.swa import SWATokenToKVPoolAllocator
from jaxcache.planner import StepPlanner
from jaxcache.pools.hybrid_requests import NO_COPY, HybridReqToTokenPool
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request, RequestState
from jaxcache.runner import StepRunner
from jaxcache.running_states import RunningStates
from jaxcache.step import StepKind, StepPlan, default_buckets


def init_memory_pool_and_cache(config: MemoryConfig, *, mesh: Mesh | None = None) -> MemoryManager:
    """Builds pool, allocator, request table and prefix cache as the scheduler would choose them.

    Args:
      config: All sizes and choices.
      mesh: Where a sharded pool lies (`config.kv.axis_name`). The steps of `run` are then `jax.shard_map`s, with
        `manager.pool.partition_specs()` for the pool and `PartitionSpec()` for the batch.

    Raises:
      ArgumentError: Sizes do not fit together.

    Source: SGLang 0.5.2 scheduler.py, init_memory_pool_and_cache.
    """
    pool, allocator, table = config.new_pool(mesh), config.new_allocator(), config.new_table()
    states = config.new_state_allocator()
    return MemoryManager(config, pool, allocator, table, config.new_cache(table, allocator, states), states)


class MemoryManager:
    """Owner of the pools and of every running request's share of them. See `init_memory_pool_and_cache`.

    Attributes:
      req_to_token_pool: Host request table.
      allocator: Owner of the pages.
      states: Owner of the recurrent states; None without them.
      cache: The prefix cache.
      runner: The device's side: pool, device table, compiled steps.
      buckets: Static shapes of steps.
      running: Running requests by row.
      planner: What plans steps and checks their plans.
    """

    def __init__(
        self,
        config: MemoryConfig,
        pool: MemoryPool,
        allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        cache: RadixCache,
        states: StateAllocator | None = None,
    ):
        self.config = config
        self.allocator = allocator
        self.states = states
        self.req_to_token_pool = req_to_token_pool
        self.cache = cache
        self.page_size = config.kv.page_size
        self._windows = allocator if isinstance(allocator, SWATokenToKVPoolAllocator) else None
        self.runner = StepRunner(pool, req_to_token_pool, self._windows)
        self.buckets = default_buckets(
            config.max_running,
            config.chunk,
            self.page_size,
            has_window=self._windows is not None,
            has_states=states is not None,
        )
        self.running: dict[int, Request] = {}
        self._loops = DecodeLoops(allocator, req_to_token_pool)
        self.planner = StepPlanner(self.running, req_to_token_pool, allocator, cache, self._loops)
        self._states: RunningStates | None = None
        if isinstance(req_to_token_pool, HybridReqToTokenPool) and states is not None:
            self._states = RunningStates(req_to_token_pool, states, cache, self.runner, config.state_interval)

    @property
    def pool(self) -> MemoryPool:
        """The KV pool. Replaced by every `run`: never keep it across one.

        Raises:
          ReleasedError: Its memory was released.
        """
        return self.runner.pool

    @pool.setter
    def pool(self, pool: MemoryPool) -> None:
        self.runner.pool = pool

    @property
    def table(self) -> RequestTable:
        """Device twin of the request table; replaced as the pool is."""
        return self.runner.table

    # ---- the life of a request -----------------------------------------------------------------------------------

    def admit(self, request: Request) -> int | None:
        """Starts or resumes a request: finds and locks its cached prefix and gives it a row.

        The match leaves at least one token to compute, and respects `logprob_start_len`. A retracted request whose KV
        is kept in host memory gets pages for it and has it loaded back.

        Returns:
          Tokens whose KV is there already, or None if no row, or no memory to load back into, is left.

        Raises:
          RequestStateError: It is running or done.
          ReleasedError: The pool's memory was released.
          ArgumentError: It is longer than `max_context_len`, or its copy is from a manager with pages of another size.
        """
        if request.state not in (RequestState.WAITING, RequestState.RETRACTED):
            raise RequestStateError(
                f"request {request.rid} is {request.state.value}: only a waiting one can be admitted"
            )
        if request.num_tokens > self.config.max_context_len:
            limit = self.config.max_context_len
            raise ArgumentError(f"request {request.rid} has {request.num_tokens} tokens, max_context_len is {limit}")
        if request.cpu_copy is not None and request.cpu_copy.page_size != self.page_size:
            raise ArgumentError(
                f"request {request.rid} has a host copy in pages of {request.cpu_copy.page_size}, here they have "
                f"{self.page_size}: set its cpu_copy to None, and it is computed again"
            )
        self.runner.require_resumed()
        if not self.req_to_token_pool.available_size():
            return None
        cap = request.num_tokens - 1
        if request.logprob_start_len is not None:
            cap = min(cap, request.logprob_start_len)
        found = self.cache.match_prefix(request.key[:cap])
        with contextlib.ExitStack() as undo:  # leaves with everything taken given back, unless `pop_all` keeps it
            lock = self.cache.inc_lock_ref(found)
            undo.callback(self.cache.dec_lock_ref, lock)
            kept = request.cpu_copy
            kv_len = max(lock.length, kept.worth(request.num_tokens - 1) if kept is not None else 0)
            kept = kept if kv_len > lock.length else None
            state = self._take_state(undo)
            if state is None:
                return None
            fresh = self._take_kept_pages(kept, lock.length, kv_len)
            if fresh is None:
                return None
            undo.callback(self.allocator.release, fresh, PageState.PRIVATE)
            (row,) = self.req_to_token_pool.alloc(1) or (-1,)
            undo.callback(self.req_to_token_pool.free, row)
            self.req_to_token_pool.write_pages(row, 0, found.pages)
            self.req_to_token_pool.write_pages(row, len(found.pages), fresh)
            if kept is not None:
                self.runner.send_changes()  # the pool looks window pages up in its own map
                self.pool = kept.loaded(self.pool, lock.length, kv_len, fresh, state)
            undo.pop_all()
        request.enter(self.req_to_token_pool, row)
        request.kv_len, request.num_pages = kv_len, len(found.pages) + len(fresh)
        request.lock, request.state = lock, RequestState.RUNNING
        request.cached_tokens = lock.length
        if self.cache.observer is not None:
            self.cache.observer.admitted(request.num_tokens, lock.length)
        request.branching_len = found.mamba_branching_seqlen or 0
        request.cpu_copy = None
        if self._states is not None:
            self._states.place(row, state, found.state if kept is None else NO_COPY)
        self.running[row] = request
        self.planner.forget_batch()
        if kept is not None:
            self.cache.cache_unfinished_req(request)
        return kv_len

    def _take_state(self, undo: contextlib.ExitStack) -> int | None:
        """A working state, 0 without states; None if there is none left."""
        if self._states is None or self.states is None:
            return 0
        state = self._states.take()
        if state is not None:
            undo.callback(self.states.free_track_slot, state)
        return state

    def _take_kept_pages(self, kept: KeptCopy | None, start: int, stop: int) -> np.ndarray | None:
        """Pages for the tokens `[start, stop)` of a host copy; none without one; None if memory is short."""
        if kept is None:
            return NOTHING
        first = start // self.page_size
        num_pages = self._pages_of(stop) - first
        self.planner.make_room(num_pages, kept.without_window(first, num_pages))
        return kept.take_pages(self.allocator, first, num_pages)

    def finish(self, request: Request) -> None:
        """Ends a request and leaves what it computed to others. Afterwards it owns nothing."""
        self._release(request, RequestState.DONE)

    def abort(self, request: Request) -> None:
        """Ends a request in any state; whatever it computed is valid KV and stays for others."""
        if request.state is RequestState.RUNNING:
            self._release(request, RequestState.DONE)
        request.cpu_copy = None
        request.state = RequestState.DONE

    def retract(self, request: Request, offload: bool = False) -> None:
        """Takes a running request's memory to make room; `admit` resumes it.

        What it computed becomes evictable and is found again if it is still there. Append the sampled token first: who
        comes back has to have a token left to compute, so without it the last one is computed again, and a kept
        recurrent state, which stands for all of them, is of no use.

        Args:
          request: A running request.
          offload: Keep a copy of its KV in host memory, so that nothing has to be computed again.
        """
        self.planner.require_running(request)
        if offload and request.kv_len:
            request.cpu_copy = self._kept_copy(request)
        self._release(request, RequestState.RETRACTED)

    def _kept_copy(self, request: Request) -> KeptCopy:
        row = self._row(request)
        pages = self.req_to_token_pool.row_pages(row, 0, self._pages_of(request.kv_len))
        windows = NOTHING if self._windows is None else self._windows.window_pages(pages)
        if self._states is not None:
            self._states.fill(np.array([row], np.int32))
        self.runner.send_changes()
        return KeptCopy.of(self.pool, self.page_size, pages, request.kv_len, windows, self.working_state(request))

    def _release(self, request: Request, state: RequestState) -> None:
        self.planner.require_running(request)
        row = self._row(request)
        self.cache.cache_finished_req(request)
        del self.running[row]
        self.planner.forget_batch()
        request.state = state

    # ---- steps ---------------------------------------------------------------------------------------------------

    def next_chunk(self, request: Request, most: int) -> int:
        """How many tokens of a running request to compute in its next step: `most`, or what is left, if fewer.

        With recurrent states it is less where that lets the step end at a point whose state is worth keeping: where an
        earlier request branched off, or at the last page boundary.

        Raises:
          RequestStateError: The request is not running.
          ArgumentError: `most` is not positive.
        """
        self.planner.require_running(request)
        if as_count("most", most) < 1:
            raise ArgumentError("most must be at least 1: leave a request out that shall not compute")
        start = request.kv_len
        end = min(request.num_tokens, start + most)
        if self._states is not None:
            end = self._states.next_stop(start, end, request.num_tokens, request.branching_len)
        return end - start

    def working_state(self, request: Request) -> int:
        """The recurrent state that a running request's steps go on from; 0 without states."""
        table = self.req_to_token_pool
        return int(table.state[self._row(request)]) if isinstance(table, HybridReqToTokenPool) else 0

    def extend(self, work: Sequence[tuple[Request, int]]) -> StepPlan | None:
        """Plans a step that computes the next `n` prompt (or recomputed) tokens of each request.

        Evicts what is short. None if memory is short all the same: nothing has changed then, nothing was evicted.

        Args:
          work: Distinct running requests, each with a number of tokens >= 1 that it still has to compute.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A number is out of range, a request is named twice, or no bucket is large enough.
        """
        return self.planner.extend(work, self.buckets)

    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """Plans a step that computes the last sampled token of each request. None if memory is short.

        Cost: some NumPy calls and one pass of C loops over the batch, if it is the batch of the call before.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A request has not one token to compute, it is no int32, or a request is named twice.
        """
        return self.planner.decode(requests, self.buckets)

    def run(self, step: Callable, plan: StepPlan, *args: Any) -> Any:
        """Dispatches a step on the pools and commits what it computes.

        The step is `step(pool, batch, *args) -> (pool, out)`, a pure function; it is jitted once a bucket, with pool
        and request table donated. After an extend, whole pages are shared through the prefix cache.

        Returns:
          `out`, perhaps still being computed.

        Raises:
          RequestStateError: A request is not where the plan takes it up: the plan ran or was cancelled already, or the
            request was retracted, or has other pages by now. Nothing has changed.
          ArgumentError: The step does not return `(pool, out)`.
        """
        self.planner.require_current(plan)
        if self._states is not None:
            self._states.fill(plan.row)
        out = self.runner.run(step, plan, *args)
        self.planner.commit(plan)
        if self._states is not None:
            self._states.snapshot(plan)
        if plan.bucket.kind is StepKind.EXTEND:
            for request in plan.requests:
                self.cache.cache_unfinished_req(request, chunked=True)
        return out

    def cancel(self, plan: StepPlan) -> None:
        """Gives the pages of a plan back, which can no longer run; RequestStateError if all its requests have ended."""
        rows = plan.row.tolist()
        left = [r for r, row in zip(plan.requests, rows, strict=True) if self.running.get(row) is r]
        for request in left or plan.requests:
            self.planner.require_running(request)
        left_rows = np.array([request.req_pool_idx for request in left], np.intp)
        self.req_to_token_pool.touch(left_rows)  # also where the plan took no pages
        self.allocator.release(self.req_to_token_pool.cut_spare_pages(left_rows), PageState.PRIVATE)

    def warm_up(self, step: Callable, *args: Any) -> None:
        """Compiles `step` for every bucket, and the table patch, with batches of padding."""
        for bucket in self.buckets:
            self.run(step, StepPlan.empty(bucket), *args)
        self.runner.warm_up()

    def warm_up_offload(self) -> None:
        """Compiles what `retract(offload=True)` and coming back from it run."""
        self.pool = warmed_up(self.pool)

    # ---- loops of decode steps: jaxcache.decode_loop ---------------------------------------------------------------

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
        plan = self.planner.decode_loop(requests, steps, width, limits, self.buckets)
        num_pages = plan.most_pages if pages is None else min(as_count("pages", pages), plan.most_pages)
        self.planner.make_room(num_pages)
        return self._loops.open(plan, num_pages)

    def run_loop(self, step: Callable, plan: LoopPlan, *args: Any) -> Any:
        """Dispatches a loop on the pools.

        The step is `step(pool, loop, *args) -> (pool, loop, out)`, a pure function that scans over at most
        `loop.shape.steps` steps, see `DecodeLoop`; it is jitted once a shape, with pool and request table donated.

        Returns:
          `out`, perhaps still being computed: what was sampled and accepted, and who stopped, step by step.

        Raises:
          RequestStateError: The loop was launched already, or is over. Nothing has changed.
        """
        self._loops.require_planned(plan)
        if self._states is not None:
            self._states.fill(plan.row)
        books, out = self.runner.run_loop(step, plan, *args)
        self._loops.launched(plan, books)
        return out

    def absorb(self, replay: LoopReplay, *, read_device: bool = False) -> None:
        """Commits what a loop did, and ends it. Pages without accepted tokens go back. Waits for nothing.

        Args:
          replay: From `plan.replay(accepted, stopped)`. Append the tokens that count to the requests first, and
            `finish` those that stopped afterwards.
          read_device: Also read back what the loop left on the device, and compare bit for bit.

        Raises: (and nothing has changed)
          RequestStateError: The loop was not launched, or is over.
          ArgumentError: A request lacks tokens that the loop computed.
          BrokenInvariant: The device did something else, such as for other `accepted` lengths.
        """
        self._loops.absorb(replay, self.table if read_device else None)

    def cancel_loop(self, plan: LoopPlan) -> None:
        """Gives the pages of a loop back, launched or not. Its requests are where they were when it was planned.

        Raises:
          RequestStateError: The loop is over; or it was launched, and has taken recurrent states further.
        """
        self._loops.cancel(plan)

    def warm_up_loop(self, step: Callable, steps: int, width: int = 1, *args: Any) -> None:
        """Compiles a loop of that many steps for every batch size, with batches of padding."""
        for bucket in self.buckets:
            if bucket.kind is StepKind.DECODE:
                plan = LoopPlan.empty(LoopShape(bucket.requests, steps, width, self.page_size))
                self.runner.run_loop(step, plan, *args)

    # ---- memory --------------------------------------------------------------------------------------------------

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _row(self, request: Request) -> int:
        if request.req_pool_idx is None:
            raise RequestStateError(f"request {request.rid} has no row: it is {request.state.value}")
        return request.req_pool_idx

    def reset(self) -> None:
        """Forgets every prefix and takes every page, state and row back, as if new; what is compiled stays.

        Raises:
          RequestStateError: Requests are running. Nothing has changed.
        """
        self._require_idle()
        self._forget()

    def _require_idle(self) -> None:
        if self.running:
            raise RequestStateError(f"{len(self.running)} requests are running: finish, retract or abort them first")

    def _forget(self) -> None:
        self.cache.reset()
        self.allocator.clear()
        if self.states is not None:
            self.states.clear()
        self.req_to_token_pool.clear()

    def release_memory(self, *, keep: bool = False) -> None:
        """Frees the pool's device memory until `resume_memory`: for other arrays of this process, such as training's.

        What needs the pool meanwhile raises ReleasedError: `pool`, `admit`, the steps, copies to the host. Request
        table and compiled steps stay. JAX keeps freed memory for itself unless it was told to allocate from the driver
        (`XLA_PYTHON_CLIENT_ALLOCATOR=platform`).

        Args:
          keep: Keep pages and states in use, in page-locked host memory. Requests may be running, and run on after
            `resume_memory`. If False, all is forgotten as by `reset`.

        Raises: (and nothing has changed)
          ReleasedError: It was released before.
          RequestStateError: Requests are running, and nothing is to be kept.
          BorrowedError: Another framework has borrowed or shares the pool: its tensors would lie in memory that is
            gone, and JAX may put the pool elsewhere when it comes back.
          StalePoolError: A donated step consumed the pool behind the manager's back.

        Cost: waits for the steps in flight; then what is kept, over the host link.
        Source: SGLang 0.5.2 scheduler, release_memory_occupation.
        """
        if keep:
            self.runner.release(rows_in_use(self.allocator, self.states))
            return
        self._require_idle()
        self.runner.release(None)
        self._forget()

    def resume_memory(self) -> None:
        """Brings the pool's device memory back, with what was kept; at other addresses, perhaps: share it anew.

        Raises:
          ReleasedError: It was not released.
          jax.errors.JaxRuntimeError: The device has no room. It stays released, with what was kept: try again.

        Source: SGLang 0.5.2 scheduler, resume_memory_occupation.
        """
        self.runner.resume()

    def get_token_info(self) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable): tokens, and used as a fraction. Locked cached tokens count as used.

        Source: SGLang 0.5.2 scheduler, _get_token_info.
        """
        windows, size = self._windows, self.allocator.size
        available = self.allocator.available_size() if windows is None else windows.full_available_size()
        evictable = self.cache.full_evictable_size()
        used = size - available - evictable
        return used, used / size, available, evictable

    def get_swa_token_info(self) -> tuple[int, int, float, float, int, int, int, int]:
        """Of full and window side: (full used, window used, full usage, window usage, full available, full evictable,
        window available, window evictable).

        Raises:
          ArgumentError: There is no window side.

        Source: SGLang 0.5.2 scheduler, _get_swa_token_info.
        """
        if self._windows is None:
            raise ArgumentError("get_swa_token_info: no layer of this memory has a window; see get_token_info")
        full_used, full_usage, full_available, full_evictable = self.get_token_info()
        available, evictable = self._windows.swa_available_size(), self.cache.swa_evictable_size()
        used = self._windows.size_swa - available - evictable
        usage = used / self._windows.size_swa
        return full_used, used, full_usage, usage, full_available, full_evictable, available, evictable

    def check_memory(self, read_device: bool = False) -> None:
        """Verifies that every page and every row has exactly one owner, at any time, running requests and all.

        Also that the next token of each of these finds the window pages that it attends to.

        Args:
          read_device: Also read the device table back and compare it with the host's.

        Raises:
          BrokenInvariant: says which book does not balance.

        Cost: O(cached pages + pages of running requests). It checks identity, not counts: leaks that cancel out show.
        """
        self.cache.check()
        check_owners(self.running, self.req_to_token_pool, self.allocator, self.states)
        if self._windows is not None and self.config.sliding_window_size is not None:
            check_windows(self.running, self.req_to_token_pool, self._windows, self.config.sliding_window_size)
        if read_device:
            self.runner.send_changes()
            check_device_table(self.running, self.req_to_token_pool, self.table)
            if self._windows is not None:
                check_device_map(self.pool, self._windows)
