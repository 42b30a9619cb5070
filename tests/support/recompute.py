"""An engine that lives at random, and whose every answer is compared with one that has no cache, no pages, no batches.

Greedy decoding in float32 over the four families of `examples.engine`. Conversations go on from what was said before,
so that most of their prompts are cached; memory is small, so that requests are retracted and prefixes evicted. Steps
run before the tokens of the last one are read; some tokens come from decode loops, with drafts where there is no state.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from examples.engine.models import FAMILIES, ModelConfig, forward, random_weights
from jaxcache import Batch, MemoryConfig, Request, init_memory_pool_and_cache
from jaxcache.request import RequestState
from jaxcache.steps.buckets import Buckets, StepKind
from tests.serve.dense import dense_logits

RUNNING, CONTEXT, CHUNK, WINDOW, VOCABULARY = 4, 96, 32, 10, 61
TIE = 1e-3
"""Logits that lie closer may change places between two ways of adding up."""


def small_model(family: str) -> ModelConfig:
    """Two layers of a family, of both kinds where it has two."""
    config = FAMILIES[family]
    return dataclasses.replace(config, layers=config.layers[-2:], vocabulary=VOCABULARY, window=WINDOW)


@functools.cache
def steps_of(config: ModelConfig):
    """A jitted-by-the-manager step and a loop, both greedy."""

    def step(pool, batch, weights):
        pool, logits = forward(config, pool, batch, batch.last, weights)
        sampled = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return pool, sampled, sampled

    def loop_step(pool, loop, weights):
        def one(carry, _):
            pool, loop, known = carry
            loop, slots = loop.grow()
            width = loop.shape.width
            tokens = jnp.repeat(known[:, None], width, axis=1)  # drafts: that it says the same again
            batch = batch_of(loop, tokens, slots)
            pool, logits = forward(config, pool, batch, jnp.arange(tokens.size), weights)
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(tokens.shape)
            is_right = jnp.cumprod(best[:, :-1] == tokens[:, 1:], axis=1)
            accepted = jnp.minimum(1 + jnp.sum(is_right, axis=1, dtype=jnp.int32), loop.rows.granted)
            known = jnp.take_along_axis(best, jnp.maximum(accepted - 1, 0)[:, None], axis=1)[:, 0]
            return (pool, loop.accept(accepted), known), (best, accepted)

        (pool, loop, _), out = jax.lax.scan(one, (pool, loop, loop.tokens), length=loop.shape.steps)
        return pool, loop, out

    return step, loop_step


def batch_of(loop, tokens, slots):
    """A step of a loop as a batch: each row that computes has `width` tokens; those of padding come last."""
    computes = loop.rows.granted > 0
    width, rows = loop.shape.width, loop.row.shape[0]
    prefix_len = jnp.where(computes, loop.rows.seq_len, 0)
    valid = jnp.repeat(computes, width)
    return Batch(
        tokens=tokens.ravel(),
        positions=jnp.where(valid, loop.positions.ravel(), 0),
        slots=slots.ravel(),
        request=jnp.where(valid, jnp.repeat(jnp.arange(rows, dtype=jnp.int32), width), rows),
        valid=valid,
        row=loop.row,
        prefix_len=prefix_len,
        seq_len=jnp.where(computes, prefix_len + width, 0),
        tag=loop.tag,
        table=loop.table,
        state=loop.computing_state,
        kind=StepKind.DECODE if width == 1 else StepKind.EXTEND,
        page_size=loop.shape.page_size,
        context=CONTEXT,
    )


class Serving:
    """One engine over one memory.

    Attributes:
      happened: How often each thing did.
      prompt_tokens, reused: Tokens of prompts, and those of them that were found, and so not computed.
    """

    def __init__(self, family: str, page_size: int, seed: int):
        self.rng = random.Random(seed)
        self.config = config = small_model(family)
        self.has_states = bool(config.state_config(2))
        tokens = 272  # of the 384 that four requests of full length would need
        window = CHUNK + RUNNING * (WINDOW + 3 * page_size)
        sizes = Buckets((RUNNING,), (8, CHUNK), (RUNNING,))
        self.memory = init_memory_pool_and_cache(
            MemoryConfig(
                config.kv_config(tokens, page_size, -(-window // page_size) * page_size),
                max_running=RUNNING,
                max_context_len=CONTEXT,
                chunk=CHUNK,
                sliding_window_size=WINDOW if config.has_window else None,
                states=config.state_config(16),
                state_interval=8,
                buckets=sizes,
            )
        )
        self.weights = random_weights(config, 0)
        self.step, self.loop_step = steps_of(config)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.unread: list[tuple[list[tuple[int, Request]], jax.Array]] = []
        self.ended: list[Request] = []
        self.said: list[list[int]] = [[self.rng.randrange(VOCABULARY) for _ in range(40)] for _ in range(3)]
        self.goal: dict[Request, int] = {}
        self.prefilling: set[Request] = set()
        self.happened: Counter[str] = Counter()
        self.prompt_tokens = self.reused = self.started = 0

    def run(self, requests: int) -> None:
        while len(self.ended) < requests:
            if len(self.running) < RUNNING and self.rng.random() < 0.5:
                self.admit()
            self.rng.choices(
                [self.compute, self.loop, self.fork, self.abort, self.evict, self.retract], self.weights_of
            )[0]()
            for request in [each for each in self.running if len(each.output_ids) >= self.goal[each]]:
                self.end(request)
            if self.rng.random() < 0.1:
                self.memory.check_memory()
        while self.running:
            self.end(self.running[0])
        self.memory.check_memory(read_device=True)

    weights_of = (30, 3, 2, 0.5, 0.7, 0.7)

    # ---- requests --------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        rng = self.rng
        if self.waiting:
            while self.waiting[0].pending:
                self.read()
            if self.memory.admit(self.waiting[0]) is not None:
                self.running.append(self.waiting.pop(0))
            return
        old = rng.choice(self.said[-6:])
        prompt = old[: rng.randint(len(old) // 2, len(old))] + [
            rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))
        ]
        for _ in range(rng.choice([1, 1, 2])):  # twins come together
            self.started += 1
            request = Request(str(self.started), prompt[:64])
            self.goal[request] = rng.randint(2, 24)
            self.prefilling.add(request)
            if len(self.running) < RUNNING and self.memory.admit(request) is not None:
                self.running.append(request)
            else:
                self.waiting.append(request)

    def end(self, request: Request) -> None:
        self.happened["surplus"] += request.pending > 0
        self.memory.finish(request)
        self.running.remove(request)
        self.ended.append(request)
        self.said.append([*request.origin_input_ids, *request.output_ids])

    def abort(self) -> None:
        if self.running:
            request = self.rng.choice(self.running)
            self.memory.abort(request)
            self.running.remove(request)
            self.happened["abort"] += 1

    def retract(self, request: Request | None = None) -> None:
        if not self.running:
            return
        request = request or self.rng.choice(self.running)
        offload = self.rng.random() < 0.5 and request.kv_len <= request.num_tokens
        self.memory.retract(request, offload=offload)
        self.running.remove(request)
        self.waiting.append(request)
        self.happened["restore" if offload else "retraction"] += 1

    def fork(self) -> None:
        while self.unread:
            self.read()
        whole = [each for each in self.running if not each.pending and each.kv_len <= each.num_tokens]
        if whole and len(self.running) < RUNNING:
            request = self.rng.choice(whole)
            for fork in self.memory.fork(request, 1) or ():
                self.running.append(fork)
                self.goal[fork] = self.goal[request] + 3
                if request in self.prefilling:
                    self.prefilling.add(fork)
                self.happened["fork"] += 1

    def evict(self) -> None:
        self.happened["eviction"] += self.memory.cache.evict(self.rng.randint(1, 64)) > 0

    # ---- steps -----------------------------------------------------------------------------------------------------

    def compute(self) -> None:
        prompts = [each for each in self.running if each.num_tokens - each.kv_len > 1 or each in self.prefilling]
        plan = None
        if prompts:
            work, left = [], self.rng.choice([5, CHUNK])
            for request in self.running:
                room = request.num_tokens + request.pending - request.kv_len
                if left and room and request.kv_len < CONTEXT:
                    count = self.memory.next_chunk(request, left, CHUNK - left) or 1 if room > 1 else 1
                    work.append((request, count))
                    left -= count
            plan = self.memory.extend(work) if work else None
        elif batch := [each for each in self.running if each.num_tokens + each.pending - each.kv_len == 1]:
            plan = self.memory.decode(batch)
        elif self.running:
            return self.read()
        if plan is None:
            if len(self.running) > 1:
                self.retract(self.memory.victim(self.running))
            return None
        return self.dispatch(plan)

    def dispatch(self, plan) -> None:
        totals = [each.num_tokens + each.pending for each in plan.requests]
        news = [(i, r) for i, (r, n) in enumerate(zip(plan.requests, totals, strict=True)) if plan.seq_len[i] == n]
        self.happened["chunk"] += len(plan.requests) - len(news)
        self.happened["pending"] += sum(each.pending > 0 for each in plan.requests)
        self.happened["shared in a step"] += len(plan.takers)
        sampled = self.memory.run(self.step, plan, self.weights)
        for request in plan.requests:
            if request in self.prefilling and request.kv_len >= request.prompt_len:
                self.prefilling.discard(request)
                found = min(request.cached_tokens, request.prompt_len)
                self.prompt_tokens, self.reused = self.prompt_tokens + request.prompt_len, self.reused + found
                self.happened["hit"] += found > 0
        self.unread.append((news, sampled))
        while len(self.unread) > 1 or (self.unread and self.rng.random() < 0.3):
            self.read()

    def read(self) -> None:
        """The tokens of the step that ran longest ago arrive."""
        if self.unread:
            news, sampled = self.unread.pop(0)
            for i, request in news:
                if request.state is not RequestState.DONE:
                    request.output_ids.append(int(sampled[i]))

    def loop(self) -> None:
        """Some steps in one call, with a draft behind each token where no state forbids it."""
        width, steps = (1 if self.has_states else 2), 3
        while self.unread and self.rng.random() < 0.5:
            self.read()
        batch = [each for each in self.running if each.num_tokens + each.pending - each.kv_len == 1]
        batch = [each for each in batch if each.output_ids or each.pending]
        batch = [each for each in batch if each.kv_len + steps * width < CONTEXT]
        plan = self.memory.decode_loop(batch, steps, width) if batch else None
        if plan is None:
            return
        self.happened["loop from a register"] += sum(each.pending > 0 for each in batch)
        best, accepted = map(np.asarray, self.memory.run_loop(self.loop_step, plan, self.weights))
        while self.unread:
            self.read()
        for tokens, counts in zip(best, accepted, strict=True):
            for request, row, count in zip(batch, tokens.tolist(), counts.tolist(), strict=False):
                request.output_ids += row[:count]
                self.happened["draft"] += count > 1
        self.memory.absorb(plan.replay(accepted), read_device=self.rng.random() < 0.1)
        self.happened["loop"] += 1

    # ---- the answer ------------------------------------------------------------------------------------------------

    def wrong(self) -> list[str]:
        """Requests with a token that is not the most likely one after those before it, computed without a cache."""
        wrong: list[str] = []
        for start in range(0, len(self.ended), 16):
            some = self.ended[start : start + 16]
            rows = np.zeros((16, CONTEXT + 16), np.int32)
            for row, request in zip(rows, some, strict=False):
                known = [*request.origin_input_ids, *request.output_ids]
                row[: len(known)] = known
            logits = np.asarray(dense_logits(self.config, self.weights, jnp.asarray(rows)))
            for row, request, own in zip(rows, some, logits, strict=False):
                at = np.arange(request.prompt_len, request.num_tokens)
                if (own[at - 1].max(axis=-1) - own[at - 1, row[at]] > TIE).any():
                    wrong.append(f"{request.rid}: {request.output_ids}")
        return wrong
