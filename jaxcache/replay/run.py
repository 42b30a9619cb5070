"""A trace through the whole stack, with every hit proven right.

    waiting ─► admit ─► extend, chunk by chunk ─► decode, a token a step ─► finish
                 ▲                                      │ memory short
                 └────────────── retract ◄──────────────┘

The model is `content.write_step`. What is read back is compared with what the request's own tokens ask for, never with
what pool or tree returned: the matched prefix after every admission, and the whole row when a request ends.
"""

from __future__ import annotations

import functools
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError, CacheError
from jaxcache.manager import MemoryConfig, MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.base import KVCacheConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.replay.config import Fault, PoolKind, ReplayConfig
from jaxcache.replay.content import count_mismatches
from jaxcache.replay.faults import Saboteur, step_for
from jaxcache.replay.result import ReplayResult, Sample, Stopwatch
from jaxcache.replay.trace import TraceRequest, output_tokens, prompt_tokens
from jaxcache.request import Request

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
READ_BACK_TOKENS = (1024, 8192)
"""Tokens that one read-back compares at most: two shapes serve every length."""
MEMORY_FRACTION = 0.9
"""Part of a GPU's free memory that `--layers auto` fills."""
SAMPLES = 400


def run_replay(
    config: ReplayConfig,
    progress: Callable[[Sample, int], None] | None = None,
    requests: list[TraceRequest] | None = None,
    observe: Callable[[MemoryManager], None] | None = None,
) -> ReplayResult:
    """Replays a trace.

    Args:
      config: What to replay, and through what.
      progress: Called now and then with the present state and the number of requests.
      requests: Replay these instead of what the config names.
      observe: Called with the manager before the first request, to record what happens to it.

    Returns:
      The totals. An error of the stack ends the replay and stands in `result.error`.

    Raises:
      TraceError, ArgumentError: The trace or an option is wrong.
    """
    requests = config.load_requests() if requests is None else requests
    config = config.for_platform(jax.default_backend())
    manager = init_memory_pool_and_cache(_memory_config(config, requests))
    if observe is not None:
        observe(manager)
    replay = Replay(config, manager, requests, progress)
    return replay.run()


def _memory_config(config: ReplayConfig, requests: list[TraceRequest]) -> MemoryConfig:
    longest = max(request.input_length + request.output_length for request in requests)
    if longest > config.pool_tokens:
        raise ArgumentError(f"--device-tokens {config.device_tokens} cannot hold the longest request, {longest} tokens")
    return MemoryConfig(
        kv=_kv_config(config),
        max_running=config.concurrency,
        max_context_len=longest + 1,
        chunk=config.chunk,
        policy=config.policy,
    )


def _kv_config(config: ReplayConfig) -> KVCacheConfig:
    dtype = jnp.dtype(config.dtype.value if config.dtype is not None else "float32")
    sizes: dict[str, Any] = {"size": config.pool_tokens, "page_size": config.page_size, "dtype": dtype}
    if config.pool is PoolKind.MHA:
        kind: Callable[..., KVCacheConfig] = MHAConfig
        sizes |= {"head_num": config.heads, "head_dim": config.head_dim}
    else:
        kind = MLAConfig
        sizes |= {"kv_lora_rank": config.rank, "qk_rope_head_dim": config.rope_dim}
    one = kind(layer_num=1, **sizes)
    return kind(layer_num=config.layers or _layers_that_fit(one), **sizes)


def _layers_that_fit(one_layer: KVCacheConfig) -> int:
    """As many layers as a GPU's memory has room for; two on a CPU, which is enough to mix them up."""
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats:
        return 2
    layer_bytes = sum(
        int(np.prod(buffer.shape)) * buffer.dtype.itemsize
        for buffer in one_layer.abstract_buffers(jax.default_backend())
    )
    room = MEMORY_FRACTION * (stats["bytes_limit"] - stats["bytes_in_use"])
    return max(1, int(room // layer_bytes))


class Replay:
    """One replay: the scheduler of a serving engine, reduced to what concerns memory."""

    def __init__(
        self,
        config: ReplayConfig,
        manager: MemoryManager,
        requests: list[TraceRequest],
        progress: Callable[[Sample, int], None] | None,
    ):
        self.config = config
        self.manager = manager
        self.trace = requests
        self.progress = progress
        self.step = step_for(config.plant)
        self.saboteur = Saboteur(config.plant, manager)
        self.stopwatch = Stopwatch("match", "admit", "plan", "insert", "evict")
        self.result = ReplayResult()
        self.waiting: deque[int] = deque(range(len(requests)))
        self.retracted: deque[Request] = deque()
        self.running: list[Request] = []
        self.unverified: list[Request] = []  # admitted with a hit that has not been read back yet
        self.index: dict[Request, int] = {}
        self.done = 0
        self.mismatched = jnp.zeros((), jnp.int32)
        self.read_back = jax.jit(count_mismatches)
        self._time_host_calls()

    def run(self) -> ReplayResult:
        """Warms up, replays, balances the books."""
        result = self.result
        started = time.perf_counter()
        self._warm_up()
        result.warmup_s = round(time.perf_counter() - started, 3)
        with count_compilations() as compilations:
            started = time.perf_counter()
            try:
                self._loop(started)
                self._balance()
            except CacheError as error:
                result.error = f"{type(error).__name__}: {error}"
            result.mismatched_slots = int(self.mismatched)
            result.wall_s = round(time.perf_counter() - started, 3)
            result.recompiles_after_warmup = len(compilations)
        self._describe()
        return result

    # ---- scheduling ----------------------------------------------------------------------------------------------

    def _loop(self, started: float) -> None:
        every = max(1, len(self.trace) // SAMPLES)
        sampled = -1
        while self.waiting or self.retracted or self.running:
            self._admit_what_fits()
            self.result.max_running = max(self.result.max_running, len(self.running))
            self._extend()
            self._decode()
            if self.done // every != sampled:
                sampled = self.done // every
                self._sample(time.perf_counter() - started)
        if self.done != self.result.samples[-1].done_requests:
            self._sample(time.perf_counter() - started)

    def _admit_what_fits(self) -> None:
        manager = self.manager
        while len(self.running) < self.config.concurrency and (self.retracted or self.waiting):
            request = self.retracted[0] if self.retracted else self._request(self.waiting[0])
            _, _, available, evictable = manager.get_token_info()
            promised = sum(running.num_tokens - running.kv_len for running in self.running)
            page = manager.page_size
            if self.running and available + evictable - promised < request.num_tokens + (len(self.running) + 1) * page:
                return  # let those that run end first
            if manager.admit(request) is None:
                return
            if request in self.index:
                self.retracted.popleft()
            else:
                self.index[request] = self.waiting.popleft()
                self.result.prompt_tokens += request.num_tokens
                self.result.hit_tokens += request.cached_tokens
            self.running.append(request)
            if request.cached_tokens and self.config.verify:
                self.unverified.append(request)

    def _request(self, i: int) -> Request:
        tag = i % 2 if self.config.plant is Fault.WRONG_NAMESPACE else 0  # two tenants, and a key that forgets them
        return Request(rid=str(i), origin_input_ids=prompt_tokens(self.trace[i]), tag=tag)

    def _extend(self) -> None:
        """One step of prompt chunks, first come, first served."""
        budget = self.config.chunk
        work: list[tuple[Request, int]] = []
        for request in self.running:
            missing = request.num_tokens - request.kv_len
            if missing and budget and not self._is_decoding(request):
                work.append((request, min(missing, budget)))
                budget -= work[-1][1]
        if not work:
            return
        plan = self.manager.extend(work)
        while plan is None:
            if len(work) > 1:
                work = work[:1]
            else:
                self._make_room(keep=work[0][0])
            plan = self.manager.extend(work)
        self.saboteur.after_plan()
        self.manager.run(self.step, plan)
        self.saboteur.after_step()
        self.result.chunks += 1
        self._verify_hits()
        for request, _ in work:
            if request.kv_len == request.num_tokens:
                self._sample_token(request)

    def _is_decoding(self, request: Request) -> bool:
        return bool(request.output_ids) and request.num_tokens - request.kv_len == 1

    def _decode(self) -> None:
        """One token for every request whose prompt is computed."""
        batch = [request for request in self.running if self._is_decoding(request)]
        if not batch:
            return
        plan = self.manager.decode(batch)
        while plan is None:
            self._make_room(keep=None)
            batch = [request for request in batch if request.req_pool_idx is not None]
            if not batch:
                return
            plan = self.manager.decode(batch)
        self.saboteur.after_plan()
        self.manager.run(self.step, plan)
        self.saboteur.after_step()
        self.result.decode_steps += 1
        self.result.decode_tokens += len(batch)
        for request in batch:
            self._sample_token(request)

    def _sample_token(self, request: Request) -> None:
        """The next output token, or the end of the request."""
        i = self.index[request]
        if len(request.output_ids) < self.trace[i].output_length:
            if not request.output_ids:
                self._answers[request] = output_tokens(i, self.trace[i].output_length, self.config.seed).tolist()
            request.output_ids.append(self._answers[request][len(request.output_ids)])
        if len(request.output_ids) == self.trace[i].output_length:
            self._end(request)

    @functools.cached_property
    def _answers(self) -> dict[Request, list[int]]:
        return {}

    def _end(self, request: Request) -> None:
        if self.config.verify:
            self._verify(request, request.kv_len)
        self.saboteur.before_finish(request)
        self.manager.finish(request)
        self._leave(request)
        self._answers.pop(request, None)
        del self.index[request]
        self.done += 1

    def _make_room(self, keep: Request | None) -> None:
        """Retracts the running request with the least output, the longest prompt first among equals."""
        candidates = [request for request in self.running if request is not keep]
        if not candidates or (keep is None and len(candidates) == 1):
            raise ArgumentError(f"--device-tokens {self.config.device_tokens} is too small for a single request")
        victim = min(candidates, key=lambda request: (len(request.output_ids), -len(request.origin_input_ids)))
        self.manager.retract(victim, offload=self.result.retractions % 2 == 0)
        self.result.retractions += 1
        self.retracted.append(victim)
        self._leave(victim)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        if request in self.unverified:
            self.unverified.remove(request)

    # ---- proof ---------------------------------------------------------------------------------------------------

    def _verify_hits(self) -> None:
        """Reads matched prefixes back, once their rows of the table are on the device."""
        for request in self.unverified:
            self._verify(request, request.cached_tokens)
        self.unverified.clear()

    def _verify(self, request: Request, count: int) -> None:
        row = request.req_pool_idx
        tokens = np.frombuffer(request.key.packed, "<i4")
        for start in range(0, count, READ_BACK_TOKENS[-1]):
            size = min(READ_BACK_TOKENS[-1], count - start)
            packed = self._packed(size)
            packed[:4] = row, request.tag, start, size
            packed[4 : 4 + size] = tokens[start : start + size]
            self.mismatched = self.read_back(self.manager.pool, self.manager.table, packed, self.mismatched)
        self.result.verified_slots += count

    @staticmethod
    def _packed(size: int) -> np.ndarray:
        return np.zeros(4 + next(room for room in READ_BACK_TOKENS if room >= size), np.int32)

    def _balance(self) -> None:
        """Everything has ended: nothing may be owned but by the tree, nothing locked, every row free."""
        manager = self.manager
        cached = manager.cache.total_size()
        leaked = manager.allocator.size - manager.allocator.available_size() - cached
        self.result.leaked_slots = abs(leaked) + manager.cache.protected_size()
        if not leaked:
            manager.check_memory(read_device=True)
            type(manager.cache).evict(manager.cache, cached)  # neither timed nor counted: nobody needs the room
            self.result.leaked_slots += manager.allocator.size - manager.allocator.available_size()

    # ---- bookkeeping ---------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Compiles every shape a replay can need, before request 1."""
        manager = self.manager
        manager.warm_up(self.step)
        for room in READ_BACK_TOKENS:
            self.read_back(manager.pool, manager.table, self._packed(room), self.mismatched)
        manager.pool = manager.pool.load_cpu_copy(
            manager.pool.get_cpu_copy(np.zeros(1, np.int32)), np.zeros(1, np.int32)
        )
        jax.block_until_ready(manager.pool)

    def _time_host_calls(self) -> None:
        manager, cache = self.manager, self.manager.cache
        for name, owner, method in (
            ("match", cache, "match_prefix"),
            ("admit", manager, "admit"),
            ("plan", manager, "extend"),
            ("plan", manager, "decode"),
            ("insert", cache, "cache_unfinished_req"),
            ("insert", cache, "cache_finished_req"),
            ("evict", cache, "evict"),
        ):
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter_ns()
            out = call(*args, **kwargs)
            self.stopwatch.add(name, time.perf_counter_ns() - started)
            if name == "evict":
                self.result.evicted_tokens += out
            return out

        return timed

    def _sample(self, wall_s: float) -> None:
        used, _, _, evictable = self.manager.get_token_info()
        sample = Sample(
            done_requests=self.done,
            prompt_tokens=self.result.prompt_tokens,
            hit_tokens=self.result.hit_tokens,
            running=len(self.running),
            used_tokens=used,
            cached_tokens=self.manager.cache.total_size(),
            evictable_tokens=evictable,
            wall_s=wall_s,
        )
        self.result.samples.append(sample)
        if self.progress is not None:
            self.progress(sample, len(self.trace))

    def _describe(self) -> None:
        result, config, manager = self.result, self.config, self.manager
        result.requests = self.done
        result.hit_rate = result.hit_tokens / result.prompt_tokens if result.prompt_tokens else 0.0
        result.host_us = self.stopwatch.summary()
        result.page_size = config.page_size
        result.device_tokens = config.pool_tokens
        result.concurrency = config.concurrency
        result.chunk = config.chunk
        result.trace = config.trace.name if config.trace is not None else "generated chats"
        result.seed = config.seed
        result.plant = config.plant.value if config.plant is not None else None
        result.policy = config.policy.value
        result.pool = config.pool.value
        result.pool_bytes = sum(buffer.nbytes for buffer in manager.pool.buffers)
        result.layers = manager.config.kv.layer_num
        result.row_shapes = [list(shape) for shape in manager.config.kv.row_shapes]
        result.dtype = str(manager.config.kv.dtype)
        result.device = jax.local_devices()[0].device_kind
        result.jax_version = jax.__version__
        result.python_version = platform.python_version()


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Every XLA compilation of the process while the block runs."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == COMPILE_EVENT:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
