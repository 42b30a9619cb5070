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
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcache.audit import check_device_table, check_owners
from jaxcache.caches.base import expand_pages
from jaxcache.caches.radix import RadixCache
from jaxcache.decode_loop import LoopShape
from jaxcache.donation import donating, is_update
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import pack
from jaxcache.index.recency import Policy
from jaxcache.loop_plan import DecodeLoops, LoopPlan, LoopReplay, loop_limits
from jaxcache.pages.arguments import as_count, int32_array
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.pools.base import KVCache, KVCacheConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.request import Request, RequestState
from jaxcache.step import Bucket, StepKind, StepPlan, default_buckets, smallest, unpack

_OUTPUT_IDS = operator.attrgetter("output_ids")
_LAST = operator.itemgetter(-1)

TABLE_PATCH_ENTRIES = 8192
"""Table entries that travel by themselves when a step's bucket has no room for them."""


@dataclass(frozen=True)
class MemoryConfig:
    """Everything `init_memory_pool_and_cache` decides from.

    Attributes:
      kv: Sizes, layers and dtype of the KV pool; its kind chooses the pool class.
      max_running: Requests that can run at once.
      max_context_len: Longest request, in tokens.
      chunk: Prompt tokens a step computes at most.
      policy: Eviction order of the prefix cache.
      disable_radix_cache: Share nothing between requests.
      enable_kv_cache_events: Queue an event for each cached block.
      need_sort: Hand out pages in ascending order where possible (contiguous transfers).
    """

    kv: KVCacheConfig
    max_running: int
    max_context_len: int
    chunk: int = 8192
    policy: Policy = Policy.LRU
    disable_radix_cache: bool = False
    enable_kv_cache_events: bool = False
    need_sort: bool = False


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
    kv = config.kv
    if isinstance(kv, MHAConfig):
        pool: KVCache = MHATokenToKVPool.create(kv, mesh=mesh)
    elif isinstance(kv, MLAConfig):
        pool = MLATokenToKVPool.create(kv, mesh=mesh)
    else:
        raise ArgumentError(f"kv must be an MHAConfig or MLAConfig, got {type(kv).__name__}")
    if kv.page_size == 1:
        allocator: BaseTokenToKVPoolAllocator = TokenToKVPoolAllocator(kv.size, need_sort=config.need_sort)
    else:
        allocator = PagedTokenToKVPoolAllocator(kv.size, kv.page_size, need_sort=config.need_sort)
    table = ReqToTokenPool(config.max_running, config.max_context_len, kv.page_size)
    cache = RadixCache(
        table,
        allocator,
        kv.page_size,
        disable=config.disable_radix_cache,
        enable_kv_cache_events=config.enable_kv_cache_events,
        policy=config.policy,
    )
    return MemoryManager(config, pool, allocator, table, cache)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What does not change about a batch while nobody comes or goes; a decode step after another needs no new one."""

    epoch: int
    requests: tuple[Request, ...]
    row: np.ndarray
    prompt_len: np.ndarray
    tag: np.ndarray

    @classmethod
    def of(cls, epoch: int, requests: Sequence[Request]) -> _Batch:
        return cls(
            epoch,
            tuple(requests),
            row=np.array([request.req_pool_idx for request in requests], np.int32),
            prompt_len=np.array([request.prompt_len for request in requests], np.int32),
            tag=int32_array("tag: those of the batch", [request.tag for request in requests]),
        )


class MemoryManager:
    """Owner of the pools and of every running request's share of them. See `init_memory_pool_and_cache`.

    Attributes:
      pool: The KV pool. Replaced by every `run`: never keep it across one.
      table: Device twin of the request table; likewise replaced.
      req_to_token_pool: Host request table.
      allocator: Owner of the pages.
      cache: The prefix cache.
      buckets: Static shapes of steps.
      running: Running requests by row.
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
        self.pool = pool
        self.allocator = allocator
        self.req_to_token_pool = req_to_token_pool
        self.cache = cache
        self.page_size = config.kv.page_size
        self.table: RequestTable = req_to_token_pool.device_table(pool.mesh)
        self.buckets = default_buckets(config.max_running, config.chunk, self.page_size)
        self.running: dict[int, Request] = {}
        self._steps: dict[Callable, Callable] = {}
        self._patch = donating(RequestTable.patched)
        self._loops = DecodeLoops(allocator, req_to_token_pool)
        self._epoch = 0  # counts changes of what runs, and so of what a batch may consist of
        self._last_batch: _Batch | None = None

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
            fresh = self._take_pages(self._pages_of(kv_len) - len(found.pages))
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
        self._epoch += 1
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
        self._require_running(request)
        if offload and request.kv_len:
            pages = self.req_to_token_pool.row_pages(self._row(request), 0, self._pages_of(request.kv_len))
            request.cpu_copy = self.pool.get_cpu_copy(expand_pages(pages, self.page_size)[: request.kv_len])
        self._release(request, RequestState.RETRACTED)

    def _release(self, request: Request, state: RequestState) -> None:
        self._require_running(request)
        row = self._row(request)
        self.cache.cache_finished_req(request)
        del self.running[row]
        self._epoch += 1
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
        batch = self._batch([request for request, _ in work])
        counts = np.array([as_count(f"work: tokens of request {request.rid}", n) for request, n in work])
        for request, n in work:
            if not 1 <= n <= request.num_tokens - request.kv_len:
                raise ArgumentError(f"work: {request.rid} has {request.num_tokens - request.kv_len} tokens, not {n}")
        tokens = [request.key.token_ids[request.kv_len : request.kv_len + n] for request, n in work]
        return self._plan(StepKind.EXTEND, batch, counts, np.concatenate(tokens))

    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """Plans a step that computes the last sampled token of each request. None if memory is short.

        Cost: some NumPy calls and one pass of C loops over the batch, if it is the batch of the call before.

        Raises:
          RequestStateError: A request is not running.
          ArgumentError: A request has not one token to compute, it is no int32, or a request is named twice.
        """
        batch = self._batch(requests)
        outputs = self._require_one_left(batch)
        if not all(outputs):
            outputs = [request.output_ids or request.key.token_ids for request in batch.requests]
        tokens = np.frombuffer(pack(map(_LAST, outputs)), np.int32)
        return self._plan(StepKind.DECODE, batch, np.ones(len(outputs), np.int32), tokens)

    def _plan(self, kind: StepKind, batch: _Batch, counts: np.ndarray, tokens: np.ndarray) -> StepPlan | None:
        """Takes the pages that `counts` more tokens of each request need, and says what the step is to do."""
        table, row = self.req_to_token_pool, batch.row
        prefix, held = table.kv_len[row], table.num_pages[row]
        target = (prefix + counts).astype(np.int32)
        if target.max() > self.config.max_context_len:
            i = int(target.argmax())
            raise ArgumentError(
                f"request {batch.requests[i].rid} would have {target[i]} tokens, max_context_len is "
                f"{self.config.max_context_len}: finish it"
            )
        new = (target + self.page_size - 1) // self.page_size - held
        bucket = smallest(self.buckets, kind, len(row), len(tokens), int(new.sum()))
        fresh = self._take_pages(int(new.sum()))
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
        self._require_current(plan)
        self._send_table_changes(plan.bucket.changes)
        changes = self.req_to_token_pool.take_changes(plan.bucket.changes)
        try:
            packed = plan.pack(changes)
            result = self._jitted(step)(self.pool, self.table, packed, *args, bucket=plan.bucket)
        except BaseException:
            self.req_to_token_pool.give_back(changes)
            raise
        self.pool, self.table, out = result
        self.req_to_token_pool.kv_len[plan.row] = plan.seq_len
        if plan.bucket.kind is StepKind.EXTEND:
            for request in plan.requests:
                self.cache.cache_unfinished_req(request, chunked=True)
        return out

    def _require_current(self, plan: StepPlan) -> None:
        """Raises unless every request is still in its row, as long as the plan expects, with the plan's pages."""
        is_in_place = tuple(map(self.running.get, plan.row.tolist())) == plan.requests
        if not is_in_place or not self._loops.are_over:
            for request in plan.requests:
                self._require_running(request)
        if plan.requests and not (is_in_place and self._rows_are_as_planned(plan)):
            request, row = plan.requests[0], int(plan.row[0])
            now = (request.req_pool_idx, request.kv_len, request.num_pages)
            raise RequestStateError(
                f"request {request.rid} or another of its batch is not where the plan found it, in row {row}: it has "
                f"(row, tokens, pages) = {now}; plan again"
            )

    def _rows_are_as_planned(self, plan: StepPlan) -> bool:
        table, row = self.req_to_token_pool, plan.row
        same_length = np.array_equal(table.kv_len[row], plan.prefix_len)
        # A row that was planned anew, or came back after a retraction, can be as long as before, in other pages.
        same_tail = np.array_equal(table.last_slots(row), plan.last_loc)
        same_pages = np.array_equal(table.tail_pages(row), plan.new_pages)
        return same_length and same_tail and same_pages

    def cancel(self, plan: StepPlan) -> None:
        """Gives the pages of a plan that will not run back; RequestStateError if all its requests have ended."""
        rows = plan.row.tolist()
        left = [r for r, row in zip(plan.requests, rows, strict=True) if self.running.get(row) is r]
        for request in left or plan.requests:
            self._require_running(request)
        for request in left:
            keep = self._pages_of(request.kv_len)
            extra = self.req_to_token_pool.row_pages(self._row(request), keep, request.num_pages)
            if len(extra):
                self.allocator.release(extra.copy(), PageState.PRIVATE)
                request.num_pages = keep

    def warm_up(self, step: Callable, *args: Any) -> None:
        """Compiles `step` for every bucket, and the table patch, with batches of padding."""
        for bucket in self.buckets:
            self.run(step, StepPlan.empty(bucket), *args)
        none = np.full(TABLE_PATCH_ENTRIES, np.iinfo(np.int32).max, np.int32)
        self.table = self._patch(self.table, none, none)

    def _jitted(self, step: Callable) -> Callable:
        if step not in self._steps:
            page_size = self.page_size

            def whole_step(pool: KVCache, table: RequestTable, packed: Any, *args: Any, bucket: Bucket) -> Any:
                batch = unpack(jnp.asarray(packed), bucket, table, page_size)
                result = step(pool, batch, *args)
                if isinstance(result, tuple) and len(result) == 2 and is_update(result[0], pool):
                    return result[0], batch.table, result[1]
                raise ArgumentError("step must return (pool, out), the pool being the one it was given, updated")

            self._steps[step] = donating(whole_step, static_argnames=("bucket",))
        return self._steps[step]

    def _send_table_changes(self, room: int) -> None:
        """Sends what a step has no room for ahead of it."""
        while self.req_to_token_pool.num_changed() > room:
            changes = self.req_to_token_pool.take_changes(TABLE_PATCH_ENTRIES)
            index = np.full(TABLE_PATCH_ENTRIES, np.iinfo(np.int32).max, np.int32)
            page = np.zeros(TABLE_PATCH_ENTRIES, np.int32)
            index[: len(changes.index)] = changes.index
            page[: len(changes.page)] = changes.page
            try:
                self.table = self._patch(self.table, index, page)
            except BaseException:
                self.req_to_token_pool.give_back(changes)
                raise

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
        self._require_one_left(self._batch(requests))
        bucket = smallest(self.buckets, StepKind.DECODE, len(requests), len(requests), 0)
        shape = LoopShape(bucket.requests, steps, width, self.page_size)
        plan = LoopPlan.of(shape, requests, loop_limits(requests, limits, self.config.max_context_len))
        num_pages = plan.most_pages if pages is None else min(as_count("pages", pages), plan.most_pages)
        self._evict_for(num_pages)
        self._epoch += 1
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
        self._send_table_changes(0)
        self.pool, self.table, out = self._loops.launch(step, plan, self.pool, self.table, *args)
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
                plan = LoopPlan.of(LoopShape(bucket.requests, steps, width, self.page_size), (), ())
                self.pool, self.table, _ = self._loops.launch(step, plan, self.pool, self.table, *args)

    # ---- memory --------------------------------------------------------------------------------------------------

    def _take_pages(self, need: int) -> np.ndarray | None:
        """Fresh pages, evicting only what is short; None, with no page taken, if that is not enough."""
        self._evict_for(need)
        return self.allocator.alloc_pages(need)

    def _evict_for(self, num_pages: int) -> None:
        short = num_pages * self.page_size - self.allocator.available_size()
        if 0 < short <= self.cache.evictable_size():  # else what is cached would be lost for nothing
            self.cache.evict(short)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _row(self, request: Request) -> int:
        if request.req_pool_idx is None:
            raise RequestStateError(f"request {request.rid} has no row: it is {request.state.value}")
        return request.req_pool_idx

    def _require_running(self, request: Request) -> None:
        if request.state is not RequestState.RUNNING or self.running.get(self._row(request)) is not request:
            raise RequestStateError(f"request {request.rid} is {request.state.value}: admit it to this manager first")
        if self._loops.holds(self._row(request)):
            raise RequestStateError(f"request {request.rid} is in a decode loop: absorb or cancel the loop first")

    def _batch(self, requests: Sequence[Request]) -> _Batch:
        """Distinct running requests that wait for a step, with their rows.

        Raises:
          RequestStateError: One is not running, is in a decode loop, or has a plan that has not run.
          ArgumentError: One is named twice, or there is none.
        """
        batch = self._last_batch
        if batch is None or batch.epoch != self._epoch or batch.requests != tuple(requests):
            for request in requests:
                self._require_running(request)
            if len(set(map(id, requests))) != len(requests) or not requests:
                raise ArgumentError("requests: name each request once, and at least one")
            batch = self._last_batch = _Batch.of(self._epoch, requests)
        table, row = self.req_to_token_pool, batch.row
        is_ready = table.num_pages[row] == (table.kv_len[row] + self.page_size - 1) // self.page_size
        if not is_ready.all():
            rid = batch.requests[int(is_ready.argmin())].rid
            raise RequestStateError(f"request {rid} has a plan that has not run: run or cancel it first")
        return batch

    def _require_one_left(self, batch: _Batch) -> list[list[int]]:
        """Raises ArgumentError unless each request has one token to compute; returns what they sampled so far."""
        outputs = list(map(_OUTPUT_IDS, batch.requests))
        sampled = np.fromiter(map(len, outputs), np.int32, len(outputs))
        left = batch.prompt_len + sampled - self.req_to_token_pool.kv_len[batch.row]
        if (left != 1).any():
            i = int((left != 1).argmax())
            rid = batch.requests[i].rid
            raise ArgumentError(f"requests: {rid} has {left[i]} tokens to compute, decode computes one")
        return outputs

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
            self._send_table_changes(0)
            check_device_table(self.running, self.req_to_token_pool, self.table)
