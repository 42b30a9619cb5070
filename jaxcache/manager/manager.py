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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxcache.arguments import as_count, as_flag, as_sequence, require_callable, require_kind
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.manager.admission import Admission
from jaxcache.manager.audit import check_device_maps, check_device_table, check_owners, check_readable
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.memory import WholeMemory
from jaxcache.manager.room import Room, RoomSearch, cheapest_victim
from jaxcache.manager.swap import KeptCopy, warmed_up
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request, RequestState
from jaxcache.steps.buckets import Bucket, StepKind
from jaxcache.steps.host_batch import HostBatch, host_batch
from jaxcache.steps.host_runner import CopyStates, EnginePool, new_runner
from jaxcache.steps.loop import LoopShape
from jaxcache.steps.loop_plan import DecodeLoops, LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan
from jaxcache.steps.planner import StepPlanner
from jaxcache.steps.warm_up import Progress
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.request_table import ReqToTokenPool


def init_memory_pool_and_cache(
    config: MemoryConfig,
    *,
    mesh: Mesh | None = None,
    host_only: bool = False,
    copy_states: CopyStates | None = None,
) -> MemoryManager:
    """Builds pool, allocator, request table and prefix cache as the scheduler would choose them.

    Args:
      config: All sizes and choices.
      mesh: Where a sharded pool lies (`config.kv.axis_name`). The steps of `run` are then `jax.shard_map`s, with
        `manager.pool.partition_specs()` for the pool and `PartitionSpec()` for the batch.
      host_only: Without a pool, for an engine that has its own: plans are arrays (`host_batch`), which the engine's
        steps take and `commit` ends. Nothing is put on a device; what needs the pool raises UnsupportedError.
      copy_states: With `host_only` and recurrent states, what copies the engine's states.

    Raises:
      ArgumentError: Sizes do not fit together.

    Source: SGLang 0.5.2 scheduler.py, init_memory_pool_and_cache.
    """
    return MemoryManager(config, *config.new_parts(mesh, EnginePool(copy_states) if host_only else None))


class MemoryManager:
    """Owner of the pools and of every running request's share of them. See `init_memory_pool_and_cache`.

    Attributes:
      req_to_token_pool: Host request table.
      allocator: Owner of the pages.
      cache: The prefix cache, with a component for each kind of memory.
      runner: The device's side: pool, device table, compiled steps.
      running: Running requests by row.
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
        self.config = config
        self.allocator = allocator
        self.req_to_token_pool = req_to_token_pool
        self.cache = cache
        self.page_size = config.kv.page_size
        self.running: dict[int, Request] = {}
        self.runner = new_runner(pool, req_to_token_pool, cache.components)
        self._stepping = tuple(component for component in cache.components if component.per_request)
        self._loops = DecodeLoops(allocator, req_to_token_pool)
        self.planner = StepPlanner(
            self.running,
            req_to_token_pool,
            allocator,
            cache,
            self._loops,
            config.step_sizes,
            tuple(device_map.name for device_map in self.runner.maps),
            bool(self._stepping),
        )
        self._room = RoomSearch(cache, config.max_context_len, config.step_sizes.extend_tokens[-1])
        self._admission = Admission(self._room, cache, req_to_token_pool, self.planner, self.runner)
        self._whole = WholeMemory(self.running, cache, req_to_token_pool, self.runner)

    @property
    def pool(self) -> MemoryPool:
        """The KV pool. Replaced by every `run`: never keep it across one. What is set must be an update of it.

        Raises:
          ReleasedError: Its memory was released.
          ArgumentError: What is set is a pool of other sizes or layers.
        """
        return self.runner.pool

    @pool.setter
    def pool(self, pool: MemoryPool) -> None:
        self.runner.pool = pool

    @property
    def table(self) -> RequestTable:
        """Device twin of the request table; replaced as the pool is."""
        return self.runner.table

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Static shapes of steps; the planner's."""
        return self.planner.buckets

    # ---- the life of a request -----------------------------------------------------------------------------------

    def room_for(self, request: Request, reserve: int = 0) -> Room:
        """Whether a waiting request fits, with room for `reserve` tokens more: see `RoomSearch.room_for`."""
        return self._room.room_for(request, reserve, self.req_to_token_pool.available_size())

    def victim(self, requests: Sequence[Request], tokens: int = 0) -> Request | None:
        """Whom of these running requests to retract, as `tokens` are short: see `cheapest_victim`."""
        for request in as_sequence("requests", requests):
            self.planner.require_running(request)
        return cheapest_victim(requests, tokens)

    def admit(self, request: Request) -> int | None:
        """Starts or resumes a request: finds and locks its cached prefix and gives it a row.

        The match leaves at least one token to compute, and respects `logprob_start_len`. A retracted request whose KV
        is kept in host memory gets pages for it and has it loaded back.

        Returns:
          Tokens whose KV is there already, or None if no row, or no memory to load back into, is left.

        Raises:
          RequestStateError: It is running or done.
          ReleasedError: The pool's memory was released.
          ArgumentError: It can never run here, being longer than `max_context_len` or than the memory; or its copy is
            of other layers, another kind of rows or pages of another size than this manager's.
        """
        entry = self._admission.admit(request)
        if entry is None:
            return None
        self.running[entry.row] = request
        self.planner.forget_batch()
        if entry.kept is not None:
            self.cache.cache_unfinished_req(request)
        return entry.kv_len

    def finish(self, request: Request) -> None:
        """Ends a request and leaves what it computed to others. Afterwards it owns nothing."""
        self._release(request, RequestState.DONE)

    def abort(self, request: Request) -> None:
        """Ends a request, waiting, running or retracted; whatever it computed is valid KV and stays for others.

        Raises:
          RequestStateError: It is in a decode loop, whose steps use its pages: `absorb` or `cancel_loop` first.
        """
        require_kind("request", request, Request)
        if request.state is RequestState.RUNNING:
            self._release(request, RequestState.DONE)
        request.cpu_copy = None
        request.state = RequestState.DONE

    def retract(self, request: Request, offload: bool = False) -> None:
        """Takes a running request's memory to make room; `admit` resumes it.

        What it computed becomes evictable and is found again if it is still there. Append the sampled token first; a
        resumed request needs one uncomputed token, or its last token is recomputed, and a kept recurrent state, which
        stands for all of them, is of no use.

        Args:
          request: A running request.
          offload: Keep a copy of its KV in host memory, so that nothing has to be computed again.
        """
        self.planner.require_running(request)
        if as_flag("offload", offload) and request.kv_len:
            request.cpu_copy = self._kept_copy(request)
        self._release(request, RequestState.RETRACTED)

    def _kept_copy(self, request: Request) -> KeptCopy:
        row = self.planner.require_running(request)
        for component in self._stepping:
            component.before_step(np.array([row], np.int32), self.runner)
        pages = self.req_to_token_pool.row_pages(row, 0, -(-request.kv_len // self.page_size))
        components, key = self.cache.components, request.computed_key
        return KeptCopy.of(key, self.pool, components, self.page_size, row, pages)

    def _release(self, request: Request, state: RequestState) -> None:
        row = self.planner.require_running(request)
        self.cache.cache_finished_req(request)
        del self.running[row]
        self.planner.forget_batch()
        request.state = state

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

    def extend(self, work: Sequence[tuple[Request, int]]) -> StepPlan | None:
        """Plans a step that computes the next `n` prompt (or recomputed) tokens of each request.

        Evicts if needed. Returns None, without side effects, if memory is still insufficient.

        Args:
          work: Distinct running requests, each with a number of tokens >= 1 that it still has to compute.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A number is out of range, a request is named twice, or no bucket is large enough.
        """
        return self.planner.extend(work)

    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """Plans a step that computes the last sampled token of each request. None if memory is short.

        Cost: some NumPy calls and one pass of C loops over the batch, if it is the batch of the call before.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A request has not one token to compute, it is no int32, or a request is named twice.
        """
        return self.planner.decode(requests)

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
        require_callable("step", step)
        self._before(plan)
        out = self.runner.run(step, plan, *args)
        self._commit(plan)
        return out

    def host_batch(self, plan: StepPlan) -> HostBatch:
        """A plan as arrays, for a step of the engine's own: see `jaxcache.steps.host_batch`. Raises: as `run`."""
        self._before(plan)
        return host_batch(plan, self.req_to_token_pool)

    def commit(self, plan: StepPlan) -> None:
        """Commits, in place of `run`, what the engine's own step over `host_batch(plan)` computes. Raises: as `run`."""
        self.planner.require_current(plan)
        if any(component.waits(plan.row) for component in self._stepping):
            raise RequestStateError("plan: states wait to be filled: call host_batch(plan) before the step")
        self._commit(plan)

    def _before(self, plan: StepPlan) -> None:
        self.planner.require_current(plan)
        for component in self._stepping:
            component.before_step(plan.row, self.runner)

    def _commit(self, plan: StepPlan) -> None:
        self.planner.commit(plan)
        is_prompt = plan.bucket.kind is StepKind.EXTEND
        for component in self._stepping:
            component.after_step(plan.row, plan.seq_len, is_prompt, self.cache, self.runner)
        if is_prompt:
            for request in plan.requests:
                self.cache.cache_unfinished_req(request, chunked=True)

    def cancel(self, plan: StepPlan) -> None:
        """Gives the pages of a plan back, which can no longer run; RequestStateError if all its requests have ended."""
        require_kind("plan", plan, StepPlan)
        rows = plan.row.tolist()
        left = [r for r, row in zip(plan.requests, rows, strict=True) if self.running.get(row) is r]
        for request in left or plan.requests:
            self.planner.require_running(request)
        left_rows = np.array([request.req_pool_idx for request in left], np.intp)
        self.req_to_token_pool.touch(left_rows)  # also where the plan took no pages
        self.allocator.release(self.req_to_token_pool.cut_spare_pages(left_rows), PageState.PRIVATE)

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
        buckets = self.planner.buckets_of(kinds)
        self.runner.compile_ahead(step, buckets, args, threads, progress)
        for bucket in buckets:
            self.run(step, StepPlan.empty(bucket), *args)
        self.runner.warm_up()

    def warm_up_offload(self) -> None:
        """Compiles what `retract(offload=True)` and coming back from it run."""
        self.pool = warmed_up(self.pool)

    # ---- loops of decode steps: jaxcache.steps.loop ---------------------------------------------------------------

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
        """Compiles a loop of that many steps for every batch size, in threads, and runs each with padding."""
        shapes = [LoopShape(size, steps, width, self.page_size) for size in self.planner.loop_sizes]
        self.runner.compile_ahead(step, shapes, args)
        for shape in shapes:
            self.runner.run_loop(step, LoopPlan.empty(shape), *args)

    # ---- memory --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every prefix and takes every page, state and row back, as if new; what is compiled stays.

        Raises:
          RequestStateError: Requests are running. Nothing has changed.
        """
        self._whole.reset()

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
        self._whole.release(as_flag("keep", keep))

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
        return self._whole.usage("full")

    def get_swa_token_info(self) -> tuple[int, int, float, float, int, int, int, int]:
        """Tokens of the full and the window side.

        Returns:
          (full used, window used, full usage, window usage, full available, full evictable, window available, window
          evictable); usages are fractions.

        Raises:
          ArgumentError: There is no window side.

        Source: SGLang 0.5.2 scheduler, _get_swa_token_info.
        """
        return self._whole.swa_usage()

    def get_state_info(self) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable) of the recurrent states: as `get_token_info`, in states.

        Raises:
          ArgumentError: No layer of this memory has states, or nothing is cached.
        """
        return self._whole.state_usage()

    def check_memory(self, read_device: bool = False) -> None:
        """Verifies that every page and every row has exactly one owner, at any time, running requests and all.

        Also that the next token of each of these finds what it attends to.

        Args:
          read_device: Also read the device table back and compare it with the host's.

        Raises:
          BrokenInvariant: says which book does not balance.

        Cost: O(cached pages + pages of running requests). It checks identity, not counts: leaks that cancel out show.
        """
        read_device = as_flag("read_device", read_device)
        self.cache.check()
        check_owners(self.running, self.req_to_token_pool, self.cache.components)
        check_readable(self.running, self.req_to_token_pool, self.cache.components)
        if read_device:
            self.runner.send_changes()
            check_device_table(self.running, self.req_to_token_pool, self.table)
            check_device_maps(self.pool, self.cache.components)


def _row_of(request: Request) -> int:
    require_kind("request", request, Request)
    if request.req_pool_idx is None:
        raise RequestStateError(f"request {request.rid} has no row: it is {request.state.value}")
    return request.req_pool_idx
