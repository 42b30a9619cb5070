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
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxcache.audit import check_device_table, check_owners
from jaxcache.caches.base import expand_pages
from jaxcache.caches.radix import RadixCache
from jaxcache.decode_loop import LoopShape
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.loop_plan import DecodeLoops, LoopPlan, LoopReplay
from jaxcache.memory_config import MemoryConfig
from jaxcache.pages.arguments import as_count
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.planner import StepPlanner
from jaxcache.pools.base import KVCache
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.request import Request, RequestState
from jaxcache.runner import StepRunner
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
    return MemoryManager(config, pool, allocator, table, config.new_cache(table, allocator))


class MemoryManager:
    """Owner of the pools and of every running request's share of them. See `init_memory_pool_and_cache`.

    Attributes:
      req_to_token_pool: Host request table.
      allocator: Owner of the pages.
      cache: The prefix cache.
      runner: The device's side: pool, device table, compiled steps.
      buckets: Static shapes of steps.
      running: Running requests by row.
      planner: What plans steps and checks their plans.
    """

    def __init__(
        self,
        config: MemoryConfig,
        pool: KVCache,
        allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        cache: RadixCache,
    ):
        self.config = config
        self.allocator = allocator
        self.req_to_token_pool = req_to_token_pool
        self.cache = cache
        self.page_size = config.kv.page_size
        self.runner = StepRunner(pool, req_to_token_pool)
        self.buckets = default_buckets(config.max_running, config.chunk, self.page_size)
        self.running: dict[int, Request] = {}
        self._loops = DecodeLoops(allocator, req_to_token_pool)
        self.planner = StepPlanner(self.running, req_to_token_pool, allocator, cache, self._loops)

    @property
    def pool(self) -> KVCache:
        """The KV pool. Replaced by every `run`: never keep it across one."""
        return self.runner.pool

    @pool.setter
    def pool(self, pool: KVCache) -> None:
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
          ArgumentError: It is longer than `max_context_len`.
        """
        if request.state not in (RequestState.WAITING, RequestState.RETRACTED):
            raise RequestStateError(
                f"request {request.rid} is {request.state.value}: only a waiting one can be admitted"
            )
        if request.num_tokens > self.config.max_context_len:
            limit = self.config.max_context_len
            raise ArgumentError(f"request {request.rid} has {request.num_tokens} tokens, max_context_len is {limit}")
        if not self.req_to_token_pool.available_size():
            return None
        cap = request.num_tokens - 1
        if request.logprob_start_len is not None:
            cap = min(cap, request.logprob_start_len)
        found = self.cache.match_prefix(request.key[:cap])
        with contextlib.ExitStack() as undo:  # leaves with everything taken given back, unless `pop_all` keeps it
            lock = self.cache.inc_lock_ref(found)
            undo.callback(self.cache.dec_lock_ref, lock)
            copied = min(request.cpu_copy.num_tokens, request.num_tokens - 1) if request.cpu_copy is not None else 0
            kv_len = max(lock.length, copied)
            fresh = self.planner.take_pages(self._pages_of(kv_len) - len(found.pages))
            if fresh is None:
                return None
            undo.callback(self.allocator.release, fresh, PageState.PRIVATE)
            (row,) = self.req_to_token_pool.alloc(1) or (-1,)
            undo.callback(self.req_to_token_pool.free, row)
            self.req_to_token_pool.write_pages(row, 0, found.pages)
            self.req_to_token_pool.write_pages(row, len(found.pages), fresh)
            if len(fresh):
                self._load_back(request.cpu_copy, lock.length, kv_len, fresh)
            undo.pop_all()
        request.enter(self.req_to_token_pool, row)
        request.kv_len, request.num_pages = kv_len, len(found.pages) + len(fresh)
        request.lock, request.state = lock, RequestState.RUNNING
        request.cached_tokens = lock.length
        request.cpu_copy = None
        self.running[row] = request
        self.planner.forget_batch()
        if len(fresh):
            self.cache.cache_unfinished_req(request)
        return kv_len

    def _load_back(self, copy: Any, start: int, stop: int, fresh: np.ndarray) -> None:
        """Writes the tokens `[start, stop)` of a host copy into fresh pages."""
        slots = expand_pages(fresh, self.page_size)[: stop - start]
        rest = dataclasses.replace(copy, buffers=tuple(buffer[:, start:stop] for buffer in copy.buffers))
        self.pool = self.pool.load_cpu_copy(rest, slots)

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

        What it computed becomes evictable and is found again if it is still there.

        Args:
          request: A running request.
          offload: Keep a copy of its KV in host memory, so that nothing has to be computed again.
        """
        self.planner.require_running(request)
        if offload and request.kv_len:
            pages = self.req_to_token_pool.row_pages(self._row(request), 0, self._pages_of(request.kv_len))
            request.cpu_copy = self.pool.get_cpu_copy(expand_pages(pages, self.page_size)[: request.kv_len])
        self._release(request, RequestState.RETRACTED)

    def _release(self, request: Request, state: RequestState) -> None:
        self.planner.require_running(request)
        row = self._row(request)
        self.cache.cache_finished_req(request)
        del self.running[row]
        self.planner.forget_batch()
        request.state = state

    # ---- steps ---------------------------------------------------------------------------------------------------

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
        out = self.runner.run(step, plan, *args)
        self.req_to_token_pool.commit(plan.row, plan.seq_len)
        if plan.bucket.kind is StepKind.EXTEND:
            for request in plan.requests:
                self.cache.cache_unfinished_req(request, chunked=True)
        return out

    def cancel(self, plan: StepPlan) -> None:
        """Gives the pages of a plan that will not run back; RequestStateError if all its requests have ended."""
        rows = plan.row.tolist()
        left = [r for r, row in zip(plan.requests, rows, strict=True) if self.running.get(row) is r]
        for request in left or plan.requests:
            self.planner.require_running(request)
        left_rows = np.array([request.req_pool_idx for request in left], np.intp)
        self.allocator.release(self.req_to_token_pool.cut_spare_pages(left_rows), PageState.PRIVATE)

    def warm_up(self, step: Callable, *args: Any) -> None:
        """Compiles `step` for every bucket, and the table patch, with batches of padding."""
        for bucket in self.buckets:
            self.run(step, StepPlan.empty(bucket), *args)
        self.runner.warm_up_patch()

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
        """Gives the pages of a loop back, launched or not. Its requests are where they were when it was planned."""
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
        """Forgets every prefix and takes every page and row back, as if new; what is compiled stays.

        Raises:
          RequestStateError: Requests are running. Nothing has changed.
        """
        if self.running:
            raise RequestStateError(f"{len(self.running)} requests are running: finish, retract or abort them first")
        self.cache.reset()
        self.allocator.clear()
        self.req_to_token_pool.clear()

    def get_token_info(self) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable): tokens, and used as a fraction. Locked cached tokens count as used.

        Source: SGLang 0.5.2 scheduler, _get_token_info.
        """
        available = self.allocator.available_size()
        evictable = self.cache.evictable_size()
        used = self.allocator.size - available - evictable
        return used, used / self.allocator.size, available, evictable

    def check_memory(self, read_device: bool = False) -> None:
        """Verifies that every page and every row has exactly one owner, at any time, running requests and all.

        Args:
          read_device: Also read the device table back and compare it with the host's.

        Raises:
          BrokenInvariant: says which book does not balance.

        Cost: O(cached pages + pages of running requests). It checks identity, not counts: leaks that cancel out show.
        """
        self.cache.check()
        check_owners(self.running, self.req_to_token_pool, self.allocator)
        if read_device:
            self.runner.send_changes()
            check_device_table(self.running, self.req_to_token_pool, self.table)
