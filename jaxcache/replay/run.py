"""A trace through the whole stack, with every hit proven right.

    waiting ─► admit ─► extend, chunk by chunk ─► decode, a token a step ─► finish
                 ▲                                      │ memory short
                 └────────────── retract ◄──────────────┘

The model is `content.write_step`. What is read back (`proof`) is compared with what the request's own tokens ask for,
never with what pool or tree returned: the matched prefix after every admission, and the whole row when a request ends;
of window layers the last W tokens, and the recurrent state as the sum of everything before it.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import numpy as np

from jaxcache.errors import ArgumentError, CacheError
from jaxcache.index.key import Namespace
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.replay.attend import AttentionProof, attending
from jaxcache.replay.config import CacheKind, Fault, ReplayConfig
from jaxcache.replay.faults import Saboteur, step_for
from jaxcache.replay.host_time import HostTimes
from jaxcache.replay.proof import Proof, count_leaks
from jaxcache.replay.result import ReplayResult, Sample
from jaxcache.replay.setup import memory_config
from jaxcache.replay.trace import TraceRequest, output_tokens, prompt_tokens
from jaxcache.request import Request
from jaxcache.steps.buckets import Buckets
from jaxcache.steps.plan import StepPlan

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
SAMPLES = 400


def run_replay(
    config: ReplayConfig,
    progress: Callable[[Sample, int], None] | None = None,
    requests: list[TraceRequest] | None = None,
    observe: Callable[[MemoryManager], None] | None = None,
    buckets: Buckets | None = None,
) -> ReplayResult:
    """Replays a trace.

    Args:
      config: What to replay, and through what.
      progress: Called now and then with the present state and the number of requests.
      requests: Replay these instead of what the config names.
      observe: Called with the manager before the first request, to record what happens to it.
      buckets: Sizes of the steps; None: the manager's default. Fewer of them compile faster, and pad more.

    Returns:
      The totals. An error of the stack ends the replay and stands in `result.error`.

    Raises:
      TraceError, ArgumentError: The trace or an option is wrong.
    """
    requests = config.load_requests() if requests is None else requests
    config = config.for_platform(jax.default_backend())
    memory = dataclasses.replace(memory_config(config, requests), buckets=buckets)
    try:
        manager = init_memory_pool_and_cache(memory)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error) or "out of memory").splitlines()[0][:160]
        raise ArgumentError(f"--device-tokens {config.device_tokens}: no room for such a pool: {reason}") from error
    if observe is not None:
        observe(manager)
    replay = Replay(config, manager, requests, progress)
    return replay.run()


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
        self.attention = AttentionProof(manager) if config.attend else None
        self.step = step_for(config.plant)
        if config.attend:
            self.step = attending(self.step, config.plant)
        self.saboteur = Saboteur(config.plant, manager)
        self.host = HostTimes()
        self.result = ReplayResult()
        self.waiting: deque[int] = deque(range(len(requests)))
        self.retracted: deque[Request] = deque()
        self.running: list[Request] = []
        self.unverified: dict[Request, int] = {}  # admitted with so many tokens that have not been read back yet
        self.index: dict[Request, int] = {}
        self.answers: dict[Request, list[int]] = {}
        self.done = 0
        self.proof = Proof(manager)

    def run(self) -> ReplayResult:
        """Warms up, replays, balances the books."""
        result = self.result
        started = time.perf_counter()
        self._warm_up()
        result.warmup_s = round(time.perf_counter() - started, 3)
        with count_compilations() as compilations:
            started = time.perf_counter()
            try:
                with self.host.watching(self.manager.cache):
                    self._loop(started)
                self._balance()
            except CacheError as error:
                result.error = f"{type(error).__name__}: {error}"
            result.mismatched_slots = self.proof.mismatched
            result.verified_slots, result.verified_states = self.proof.verified_slots, self.proof.verified_states
            if self.attention is not None:
                result.mismatched_queries, result.verified_queries = self.attention.mismatched, self.attention.verified
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
            with self.host.measured("admit"):
                found = manager.admit(request)
            if found is None:
                return
            if request in self.index:
                self.retracted.popleft()
            else:
                self.index[request] = self.waiting.popleft()
                self.result.prompt_tokens += request.num_tokens
                self.result.hit_tokens += request.cached_tokens
            self.running.append(request)
            if found and self.config.verify:
                self.unverified[request] = found

    def _request(self, i: int) -> Request:
        tag, key = 0, None
        if self.config.cache is CacheKind.LORA:  # the same prefixes under other weights: another KV
            tag = int(np.random.default_rng([self.config.seed, i]).integers(self.config.adapters))
            key = Namespace(lora_id=f"adapter-{tag}")
        if self.config.plant is Fault.WRONG_NAMESPACE:  # two tenants, and a key that forgets them
            tag, key = i % 2, None
        return Request(rid=str(i), origin_input_ids=prompt_tokens(self.trace[i]), extra_key=key, tag=tag)

    def _extend(self) -> None:
        """One step of prompt chunks, first come, first served."""
        budget = self.config.chunk
        work: list[tuple[Request, int]] = []
        for request in self.running:
            missing = request.num_tokens - request.kv_len
            if missing and budget and not self._is_decoding(request):
                work.append((request, self.manager.next_chunk(request, budget)))
                budget -= work[-1][1]
        if not work:
            return
        while (plan := self._planned(self.manager.extend, work)) is None:
            if len(work) > 1:
                work = work[:1]
            else:
                self._make_room(keep=work[0][0])
        self.saboteur.after_plan()
        self.manager.run(self.step, plan)
        self.saboteur.after_step()
        self.result.chunks += 1
        self._verify_hits(plan.requests)  # one that waits for what others compute takes no part
        for request, _ in work:
            if request.kv_len == request.num_tokens:
                self._sample_token(request)

    def _planned(self, plan: Callable[[Any], StepPlan | None], work: Any) -> StepPlan | None:
        with self.host.measured("plan"):
            return plan(work)

    def _is_decoding(self, request: Request) -> bool:
        return bool(request.output_ids) and request.num_tokens - request.kv_len == 1

    def _decode(self) -> None:
        """One token for every request whose prompt is computed."""
        batch = [request for request in self.running if self._is_decoding(request)]
        if not batch:
            return
        while (plan := self._planned(self.manager.decode, batch)) is None:
            self._make_room(keep=None)
            batch = [request for request in batch if request.req_pool_idx is not None]
            if not batch:
                return
        self.saboteur.after_plan()
        out = self.manager.run(self.step, plan)
        self.saboteur.after_step()
        if self.attention is not None:
            self.attention.verify(batch, out)
        self.result.decode_steps += 1
        self._verify_hits(batch)
        self.result.decode_tokens += len(batch)
        for request in batch:
            self._sample_token(request)

    def _sample_token(self, request: Request) -> None:
        """The next output token, or the end of the request."""
        i = self.index[request]
        if len(request.output_ids) < self.trace[i].output_length:
            if not request.output_ids:
                self.answers[request] = output_tokens(i, self.trace[i].output_length, self.config.seed).tolist()
            request.output_ids.append(self.answers[request][len(request.output_ids)])
        if len(request.output_ids) == self.trace[i].output_length:
            self._end(request)

    def _end(self, request: Request) -> None:
        if self.config.verify:
            self.proof.verify(request, request.kv_len)
            self.proof.verify_state(request)
        self.saboteur.before_finish(request)
        self.result.resumed_tokens += request.resumed_tokens
        self.result.loaded_tokens += request.loaded_tokens
        self.manager.finish(request)
        self._leave(request)
        self.answers.pop(request, None)
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
        self.unverified.pop(request, None)

    # ---- proof ---------------------------------------------------------------------------------------------------

    def _verify_hits(self, batch: Iterable[Request]) -> None:
        """Reads back what requests were admitted with, after their first step: before, the device may not know it."""
        for request in batch:
            found = self.unverified.pop(request, 0)
            if found:
                self.proof.verify(request, found)
                self.proof.verify_state(request)

    def _balance(self) -> None:
        """Everything has ended: nothing may be owned but by the tree, nothing locked, every row free."""
        manager = self.manager
        self.result.leaked_slots = count_leaks(manager)
        if not self.result.leaked_slots:
            manager.check_memory(read_device=True)
            cached = manager.cache.full_evictable_size()
            manager.cache.evict(cached)
            self.result.leaked_slots = count_leaks(manager) + manager.cache.full_evictable_size()

    # ---- bookkeeping ---------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Compiles every shape a replay can need, before request 1."""
        manager = self.manager
        manager.warm_up(self.step)
        self.proof.warm_up()
        if self.attention is not None:
            self.attention.warm_up(manager, self.step)
        manager.warm_up_offload()
        jax.block_until_ready(manager.pool)

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
        result.evicted_tokens = self.host.evicted_tokens
        result.host_us = self.host.summary()
        result.page_size = config.page_size
        result.device_tokens = config.pool_tokens
        result.concurrency = config.concurrency
        result.chunk = config.chunk
        result.trace = config.trace.name if config.trace is not None else "generated chats"
        result.seed = config.seed
        result.plant = config.plant.value if config.plant is not None else None
        result.policy = config.policy.value
        result.cache = config.cache.value
        result.pool = config.pool.value
        result.layout = config.layout.value
        kv = manager.config.kv
        first: Any = next(iter(manager.pool.stacks().values())).config
        result.pool_bytes = sum(buffer.nbytes for buffer in jax.tree.leaves(manager.pool))
        result.layers = kv.layer_num
        result.row_shapes = [list(shape) for shape in first.row_shapes]
        result.dtype = str(first.dtype)
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
