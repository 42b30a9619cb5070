"""Scheduling: which requests run, what each step computes, and what becomes of its tokens.

    submit ─► waiting ──admitted──► prefilling ──last chunk──► decoding ──► finished
                 ▲                       └───────── retracted ─────┘
                 └───────────────────────────────────┘

A step mixes prompt chunks with the next token of each decoding request. Where memory is short, the request of the
lowest priority that is cheapest to compute again gives way, and waits for its turn again with what it has sampled.

Source: jaxcache's own; SGLang 0.5.2 scheduler.py and vLLM's scheduler for what they decide.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError, BrokenInvariantError
from jaxcache.manager.manager import MemoryManager
from jaxcache.request import Request, RequestState
from jaxcache.serve.sampling import SampledTokens, SamplingParams, SamplingRows, sample, with_logprobs
from jaxcache.steps.batch import Batch
from jaxcache.steps.plan import StepPlan
from jaxcache.steps.warm_up import Progress


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"  # it sampled one of its stop tokens
    LENGTH = "length"  # it has `max_tokens`
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Generation:
    """A request and what was generated for it so far. To be read only.

    Attributes:
      request: What the manager knows of it.
      params: How it is sampled.
      order: Its place among those submitted: of equal priority, the first comes first.
      logprobs: Log-probability of each sampled token.
      top_logprobs: For each sampled token the `params.logprobs` most likely ones and theirs.
      prompt_logprobs: float32 (prompt tokens,), if asked for; the first token has none, which is NaN.
      cached_tokens: Prompt tokens that it did not compute, as they were cached, or computed by another request of the
        same step; None before its first token.
      retractions: How often it gave way to others.
      finish_reason: None until it ends.
    """

    request: Request
    params: SamplingParams
    order: int
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: np.ndarray | None = None
    cached_tokens: int | None = None
    retractions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> Sequence[int]:
        """Tokens sampled so far."""
        return self.request.output_ids

    @property
    def urgency(self) -> tuple[int, int]:
        """What it is sorted by: the most urgent first."""
        return -self.request.priority, self.order


@dataclass(frozen=True)
class Output:
    """One token of one generation.

    Attributes:
      generation: Whose; its `finish_reason` says whether this token is its last.
      token: The token.
    """

    generation: Generation
    token: int


class Scheduler:
    """Continuous batching over one manager, which nothing else uses meanwhile.

    Args:
      memory: Where KV lies. Its `chunk` is how many tokens a step computes at most.
      forward: The model: `forward(pool, batch, tokens, *args) -> (pool, logits)`, a pure function that writes the KV of
        the batch and returns float32 logits `(len(tokens), vocabulary)` after the tokens with these indices in the
        batch. An index past its end is padding, whose logits mean nothing.
      *args: What it is given beside, such as weights.
      top_logprobs: Most `SamplingParams.logprobs` that can be asked for; static.
      sampler: Chooses tokens in place of `sample`, which has the contract.
      offload: Keep a host copy of what a retracted request has computed.

    Attributes:
      args: As given; may be set to other arrays of the same shapes. After other weights, `memory.reset()`.
      waiting, running: Generations, in the order in which they are served.

    Raises:
      ArgumentError: The steps of `memory` are too small for what can run.
    """

    def __init__(
        self,
        memory: MemoryManager,
        forward: Callable[..., tuple[Any, Any]],
        *args: Any,
        top_logprobs: int = 0,
        sampler: Callable[[Any, SamplingRows, Any], Any] = sample,
        offload: bool = False,
    ):
        self.memory, self.args = memory, args
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        sizes, most = memory.config.step_sizes, memory.config.max_running
        if sizes.decode_sizes[-1] < most:
            raise ArgumentError(f"buckets: decode_sizes must reach max_running = {most}, got {sizes.decode_sizes[-1]}")
        self._most_tokens = min(memory.config.chunk, sizes.extend_tokens[-1])
        self._most_requests = sizes.extend_requests[-1]
        self._top, self._offload = top_logprobs, offload
        self._rows, self._device_rows = SamplingRows.of(most), None
        self._order = itertools.count()
        self._step, self._scoring_step = _steps(forward, sampler, top_logprobs)

    # ---- what a user calls ---------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        rid: str | None = None,
        priority: int = 0,
        extra_key: Hashable = None,
        tag: int = 0,
    ) -> Generation:
        """Queues a prompt; the steps to come compute it.

        Args:
          prompt: Token ids, at least one.
          params: How to sample; by default greedily.
          rid: Its name in messages; by default a number.
          priority, extra_key, tag: As of `Request`. Higher priorities run first, and lower ones give way to them.

        Raises:
          ArgumentError: It can never run here: prompt and `max_tokens` are longer than `max_context_len` or than the
            memory, which the message says; or a value is out of range.
        """
        params, order = params or SamplingParams(), next(self._order)
        if params.logprobs > self._top:
            raise ArgumentError(
                f"logprobs must be at most {self._top}, this scheduler's top_logprobs: {params.logprobs}"
            )
        name = f"request-{order}" if rid is None else rid
        start = 0 if params.prompt_logprobs else None
        request = Request(name, prompt, extra_key, priority, tag, start)  # pyright: ignore[reportArgumentType]
        never = self.memory.room_for(request, reserve=params.max_tokens - 1).never  # the last token needs no KV
        if never is not None:
            raise ArgumentError(f"request {name} can never run here with max_tokens={params.max_tokens}: {never}")
        generation = Generation(request, params, order)
        if params.prompt_logprobs:
            generation.prompt_logprobs = np.full(request.prompt_len, np.nan, np.float32)
        self._wait(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a generation, whatever it has so far; what it computed stays in the cache. No-op if it has ended."""
        if generation.finish_reason is None:
            self.memory.abort(generation.request)
            (self.running if generation in self.running else self.waiting).remove(generation)
            generation.finish_reason = FinishReason.CANCELLED

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting or self.running)

    def step(self) -> list[Output]:
        """Admits whom there is room for, computes one step, and returns the tokens that it sampled.

        Cost: one device step, which is waited for; two where decoding requests fill more than half of a chunk.
        """
        self._admit()
        if self.waiting and not self.running:
            raise BrokenInvariantError(f"request {self.waiting[0].request.rid} waits for memory that nothing uses")
        prefilling, decoding = self._by_phase()
        if not prefilling:
            return self._compute(decoding) if decoding else []
        if 2 * len(decoding) <= self._most_tokens and len(decoding) < self._most_requests:
            return self._compute(decoding, prefilling)
        outputs = self._compute([], prefilling)
        _, decoding = self._by_phase()
        return outputs + (self._compute(decoding) if decoding else [])

    def generate(self, prompts: Iterable[Sequence[int]], params: SamplingParams | None = None) -> list[Generation]:
        """Submits prompts, computes until all work is done, and returns their generations."""
        generations = [self.submit(prompt, params) for prompt in prompts]
        while self.has_work:
            self.step()
        return generations

    def warm_up(self, progress: Callable[[Progress], None] | None = None) -> None:
        """Compiles the steps, but for those of `prompt_logprobs`, which compile when they are first needed."""
        self.memory.warm_up(self._step, self._options(), *self.args, progress=progress)

    # ---- who runs ------------------------------------------------------------------------------------------------

    def _wait(self, generation: Generation) -> None:
        bisect.insort(self.waiting, generation, key=lambda each: each.urgency)

    def _admit(self) -> None:
        """Starts waiting requests in their order while there is room; lower priorities give way to higher ones."""
        while self.waiting:
            first = self.waiting[0]
            if not (self._has_room(first.request) and self._start(first)):
                lower = [each for each in self.running if each.request.priority < first.request.priority]
                if not lower:
                    return
                self._retract(self._victim(lower))

    def _has_room(self, request: Request) -> bool:
        """Whether a request fits beside what the running ones have yet to compute, and a page of growth for each."""
        unspent = sum(each.request.num_tokens - each.request.kv_len for each in self.running)
        reserve = unspent + self.memory.page_size * len(self.running)
        longest = self.memory.config.max_context_len - request.num_tokens
        return self.memory.room_for(request, min(reserve, longest)).after_evicting

    def _start(self, generation: Generation) -> bool:
        request = generation.request
        if self.memory.admit(request) is None or request.req_pool_idx is None:
            return False
        self.waiting.remove(generation)
        bisect.insort(self.running, generation, key=lambda each: each.urgency)
        self._rows.set(request.req_pool_idx, generation.params, request.prompt_len)
        self._device_rows = None
        return True

    def _victim(self, among: Sequence[Generation]) -> Generation:
        victim = self.memory.victim([each.request for each in among])
        return next(each for each in among if each.request is victim)

    def _retract(self, generation: Generation) -> None:
        request = generation.request
        self.memory.retract(request, offload=self._offload)
        if request.output_ids:
            request.logprob_start_len = None  # the prompt has its log-probabilities: it may be found in the cache
        generation.retractions += 1
        self.running.remove(generation)
        self._wait(generation)

    def _by_phase(self) -> tuple[list[Generation], list[Generation]]:
        """Those with a prompt (or what is to be computed again) left, and those with one sampled token to compute."""
        phases: tuple[list[Generation], list[Generation]] = [], []
        for each in self.running:
            phases[bool(each.tokens) and each.request.num_tokens - each.request.kv_len == 1].append(each)
        return phases

    # ---- what a step computes ------------------------------------------------------------------------------------

    def _compute(self, decoding: list[Generation], prefilling: Sequence[Generation] = ()) -> list[Output]:
        """One step: a token of each decoding request, and chunks of prompts where there are any."""
        while (plan := self._plan(decoding, prefilling)) is None:
            if len(self.running) == 1:
                rid = self.running[0].request.rid
                raise BrokenInvariantError(f"request {rid} runs alone and finds no memory, though it was said to fit")
            self._retract(self._victim(self.running))
            decoding = [each for each in decoding if each.request.state is RequestState.RUNNING]
            prefilling = [each for each in prefilling if each.request.state is RequestState.RUNNING]
            if not (decoding or prefilling):
                return []
        return self._collect(plan, *self._dispatch(plan))

    def _plan(self, decoding: Sequence[Generation], prefilling: Sequence[Generation]) -> StepPlan | None:
        """A plan of the step; None where memory is short."""
        if not prefilling:
            return self.memory.decode([each.request for each in decoding])
        work = [(each.request, 1) for each in decoding]
        beside = len(work)
        for each in prefilling[: self._most_requests - len(work)]:
            if beside >= self._most_tokens:
                break
            count = self.memory.next_chunk(each.request, self._most_tokens - beside, beside)
            if count:
                work.append((each.request, count))
                beside += count
        return self.memory.extend(work)

    def _options(self) -> SamplingRows:
        """How each row samples, on the device: sent again when requests have joined."""
        if self._device_rows is None:
            self._device_rows = self._rows.on_device()
        return self._device_rows

    def _dispatch(self, plan: StepPlan) -> tuple[SampledTokens, jax.Array | None]:
        """Starts a planned step. What it samples is perhaps still being computed."""
        scores = [each.logprob_start_len is not None for each in plan.requests]
        begins = [start < each.prompt_len for start, each in zip(plan.prefix_len, plan.requests, strict=True)]
        try:
            if any(map(operator.and_, scores, begins)):
                return self.memory.run(self._scoring_step, plan, self._options(), _next_tokens(plan), *self.args)
            return self.memory.run(self._step, plan, self._options(), *self.args), None
        except BaseException:
            self.memory.cancel(plan)
            raise

    def _collect(self, plan: StepPlan, sampled: SampledTokens, scores: jax.Array | None) -> list[Output]:
        """Waits for a step, and gives every request whose last known token it computed its next one."""
        by_request = {each.request: each for each in self.running}
        if scores is not None:
            _keep_scores(plan, np.asarray(scores), by_request)
        host: SampledTokens = jax.device_get(sampled)
        outputs = []
        for i, request in enumerate(plan.requests):
            if request.kv_len == request.num_tokens:
                self._append(by_request[request], host, i)
                outputs.append(Output(by_request[request], request.output_ids[-1]))
        return outputs

    def _append(self, generation: Generation, sampled: SampledTokens, i: int) -> None:
        request, params, token = generation.request, generation.params, int(sampled.token[i])
        if generation.cached_tokens is None:
            generation.cached_tokens = min(request.cached_tokens, request.prompt_len)
        request.output_ids.append(token)
        generation.logprobs.append(float(sampled.logprob[i]))
        if params.logprobs:
            top = sampled.top_token[i, : params.logprobs], sampled.top_logprob[i, : params.logprobs]
            generation.top_logprobs.append(dict(zip(*(part.tolist() for part in top), strict=True)))
        if token in params.stop_token_ids:
            generation.finish_reason = FinishReason.STOP
        elif len(request.output_ids) >= params.max_tokens:
            generation.finish_reason = FinishReason.LENGTH
        if generation.finish_reason is not None:
            self.memory.finish(request)
            self.running.remove(generation)


def _steps(forward: Callable, sampler: Callable, top: int) -> tuple[Callable, Callable]:
    """The two step functions: one that samples, and one that also scores each token of the prompt."""

    def choose(logits: Any, batch: Batch, rows: SamplingRows) -> SampledTokens:
        mine = rows.of_requests(batch.row)
        return with_logprobs(logits, sampler(logits, mine, batch.seq_len - mine.prompt_len), top)

    def step(pool: Any, batch: Batch, rows: SamplingRows, *args: Any) -> Any:
        pool, logits = forward(pool, batch, batch.last, *args)
        return pool, choose(logits, batch, rows)

    def scoring_step(pool: Any, batch: Batch, rows: SamplingRows, following: Any, *args: Any) -> Any:
        pool, logits = forward(pool, batch, jnp.arange(batch.tokens.shape[0], dtype=jnp.int32), *args)
        scores = with_logprobs(logits, following, 0).logprob
        return pool, (choose(logits.at[batch.last].get(mode="clip"), batch, rows), scores)

    return step, scoring_step


def _next_tokens(plan: StepPlan) -> np.ndarray:
    """The known token behind each token of a step, int32 (tokens of its bucket,); 0 where none is known."""
    following = np.zeros(plan.bucket.tokens, np.int32)
    at = 0
    for request, start, stop in zip(plan.requests, plan.prefix_len, plan.seq_len, strict=True):
        known = request.key.token_ids[start + 1 : stop + 1]
        following[at : at + len(known)] = known
        at += int(stop - start)
    return following


def _keep_scores(plan: StepPlan, scores: np.ndarray, generations: dict[Request, Generation]) -> None:
    """Puts the log-probabilities of prompt tokens where they belong."""
    at = 0
    for request, start, stop in zip(plan.requests, plan.prefix_len, plan.seq_len, strict=True):
        kept = generations[request].prompt_logprobs
        if kept is not None and start + 1 < len(kept):
            count = min(int(stop) + 1, len(kept)) - int(start) - 1
            kept[start + 1 : start + 1 + count] = scores[at : at + count]
        at += int(stop - start)
