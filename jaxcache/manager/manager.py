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

Every acquisition is all or nothing: what fails, or comes back None, has changed nothing. Three files, one on the other:
the memory as a whole (`memory`), steps on it (`stepping`), and here the life of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxcache.arguments import as_flag, as_sequence, require_kind
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import RequestStateError
from jaxcache.guard import exclusive, exclusive_on_device
from jaxcache.manager.admission import Admission
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.forking import Forking
from jaxcache.manager.room import Room, cheapest_victim
from jaxcache.manager.stepping import SteppedMemory
from jaxcache.manager.swap import KeptCopy
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request, RequestState
from jaxcache.steps.host_runner import CopyStates, EnginePool
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


class MemoryManager(SteppedMemory):
    """Owner of the pools and of every running request's share of them. See `init_memory_pool_and_cache`.

    Attributes:
      config, req_to_token_pool, allocator, cache, runner, running, page_size: See `ManagedMemory`.
      planner: See `SteppedMemory`.

    Threads: of one thread, the first that changes something; `hand_over` moves it. `get_token_info`,
    `get_swa_token_info` and the events are for any thread; everything else raises ThreadError there.
    A call that is cut short: see `jaxcache.guard`; after an interrupt, `reset(force=True)`.
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
        self._admission = Admission(self._room, cache, req_to_token_pool, self.planner, self.runner)
        self._forking = Forking(cache, req_to_token_pool, self.planner, self.runner)

    @exclusive
    def room_for(self, request: Request, reserve: int = 0) -> Room:
        """Whether a waiting request fits, with room for `reserve` tokens more: see `RoomSearch.room_for`."""
        return self._room.room_for(request, reserve, self.req_to_token_pool.available_size())

    def victim(self, requests: Sequence[Request], tokens: int = 0) -> Request | None:
        """Whom of these running requests to retract, as `tokens` are short: see `cheapest_victim`."""
        for request in as_sequence("requests", requests):
            self.planner.require_running(request)
        return cheapest_victim(requests, tokens)

    @exclusive
    def admit(self, request: Request) -> int | None:
        """Starts or resumes a request: finds and locks its cached prefix and gives it a row.

        The match leaves at least one token to compute, and respects `logprob_start_len`. A retracted request whose KV
        is kept in host memory gets pages for it and has it loaded back.

        Returns:
          Tokens whose KV is there already, or None if no row, or no memory to load back into, is left.

        Raises:
          RequestStateError: It is running or done, or was retracted and lacks tokens that it has sampled.
          ReleasedError: The pool's memory was released.
          ArgumentError: It can never run here, being longer than `max_context_len` or than the memory; or its copy is
            of other layers, another kind of rows or pages of another size than this manager's.
        """
        entry = self._admission.admit(request)
        if entry is None:
            return None
        self.running[entry.row] = request  # first: a reset ends whatever has a row
        self._admission.start(request, entry)
        self.planner.forget_batch()
        if entry.kept is not None:
            self.cache.cache_unfinished_req(request)
        return entry.kv_len

    @exclusive_on_device
    def fork(self, request: Request, n: int) -> list[Request] | None:
        """`n` more running requests, as far as this one: for samples of one prompt, or beams.

        They have its tokens, sampled ones included, its namespace and all else that a user may set. Whole pages are
        shared; the last one, where it is not full, is copied on the device, and so is a recurrent state (with one,
        pages behind the last checkpoint are copied too). From then on each goes its own way.

        Args:
          request: A running request without a plan that has not run.
          n: How many: at least 1.

        Returns:
          The requests, running, named `"{rid}/1"` and so on; or None, with no row or page taken, if memory is short.

        Raises:
          RequestStateError: It is not running, is in a decode loop, has a plan that has not run, or tokens pending.
          UnsupportedError: This memory shares nothing, or has no pool to copy in.
          ArgumentError: `n` is less than 1.

        Cost: a lookup a fork, and one copy of at most a page for each.
        """
        forks = self._forking.fork(request, n)
        if forks is None:
            return None
        for fork in forks:
            self.running[fork.req_pool_idx or 0] = fork
        self.planner.forget_batch()
        return forks

    @exclusive
    def finish(self, request: Request) -> None:
        """Ends a request and leaves what it computed to others. Afterwards it owns nothing.

        What a step computed of tokens that are not in `output_ids` is no other's: of a request that turns out to have
        stopped, one token was computed too many.
        """
        self._release(request, RequestState.DONE)

    @exclusive
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

    @exclusive
    def retract(self, request: Request, offload: bool = False) -> None:
        """Takes a running request's memory to make room; `admit` resumes it.

        What it computed becomes evictable and is found again if it is still there. Append the sampled token first; a
        resumed request needs one uncomputed token, or its last token is recomputed, and a kept recurrent state, which
        stands for all of them, is of no use. With tokens pending it can be admitted again once they are appended.

        Args:
          request: A running request.
          offload: Keep a copy of its KV in host memory, so that nothing has to be computed again.

        Raises:
          RequestStateError: It is not running, or is to be offloaded and has KV of a token that is not known yet.
        """
        self.planner.require_running(request)
        offload = as_flag("offload", offload)
        if offload and request.kv_len > request.num_tokens:
            raise RequestStateError(
                f"offload: request {request.rid} has KV of tokens that are not in output_ids: append what was sampled"
            )
        if offload and request.kv_len:
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
        self.planner.withdraw(row)
        self.cache.cache_finished_req(request)
        request.state = state
        del self.running[row]
        self.planner.forget_batch()
