"""A toy inference engine on jaxcache: a tiny random transformer, greedy decoding, KV in paged pools, prefixes shared.

    python examples/engine.py

It answers chats that share a system prompt twice, with the prefix cache and without, and checks that the tokens are
the same: what the cache saves is work, never a different answer. Read `model_step` for what a jitted step sees, and
`Engine.generate` for what a scheduler does. Attention is plain `jnp` over gathered pages: clear, not fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import Batch, MemoryConfig, MHAConfig, MHATokenToKVPool, Request, init_memory_pool_and_cache

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 2, 16, 97
WIDTH = HEADS * HEAD_DIM
CONTEXT, PAGE = 256, 8


def random_model(seed: int) -> dict[str, jax.Array]:
    """Weights of a model that has learnt nothing."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "qkv": (LAYERS, WIDTH, 3, HEADS, HEAD_DIM),
        "out": (LAYERS, HEADS, HEAD_DIM, WIDTH),
        "mlp": (LAYERS, WIDTH, WIDTH),
        "logits": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    scale = {"embed": 0.5, "qkv": 2 * WIDTH**-0.5, "out": 4 * WIDTH**-0.5, "mlp": WIDTH**-0.5, "logits": WIDTH**-0.5}
    return {
        name: scale[name] * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def model_step(pool: MHATokenToKVPool, batch: Batch, model: dict[str, jax.Array]) -> tuple[MHATokenToKVPool, jax.Array]:
    """One forward pass over a batch of prompt chunks or of single tokens; the pool is updated in place.

    Returns:
      The pool, and for each request of the batch the most likely token after its last one.
    """
    x = model["embed"][batch.tokens] + _rotary(batch.positions)
    for layer in range(LAYERS):
        q, k, v = jnp.einsum("tw,wchd->cthd", _norm(x), model["qkv"][layer])
        pool = pool.set_kv_buffer(layer, batch.slots, k, v)
        x = x + jnp.einsum("thd,hdw->tw", _paged_attention(pool, batch, layer, q), model["out"][layer])
        x = x + jnp.tanh(_norm(x) @ model["mlp"][layer])
    return pool, jnp.argmax(_norm(x)[batch.last] @ model["logits"], axis=-1)


def _paged_attention(pool: MHATokenToKVPool, batch: Batch, layer: int, q: jax.Array) -> jax.Array:
    """Each token looks at what its request has up to its own position, wherever the pages lie."""
    requests = batch.row.shape[0]
    place = jnp.arange(CONTEXT, dtype=jnp.int32)
    slots = batch.table.slots(jnp.repeat(batch.row, CONTEXT), jnp.tile(place, requests), pool.config.page_size)
    k, v = (rows.reshape(requests, CONTEXT, HEADS, HEAD_DIM) for rows in pool.gather(slots, layer))
    scores = jnp.einsum("thd,tchd->thc", q, k[batch.request]) / HEAD_DIM**0.5
    seen = place[None, None, :] <= batch.positions[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("thc,tchd->thd", weights, v[batch.request])


def _norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _rotary(positions: jax.Array) -> jax.Array:
    """Where a token stands, as waves of different lengths."""
    angle = positions[:, None] / 50.0 ** (jnp.arange(WIDTH // 2) / (WIDTH // 2))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


@dataclass(frozen=True)
class Answer:
    """What became of a prompt: the tokens generated, and how much of the prompt was in the cache."""

    tokens: list[int]
    prompt_len: int
    cached_len: int


class Engine:
    """Runs prompts to their end, a few at a time.

    Args:
      model: Weights.
      share_prefixes: False computes every prompt from its first token.
      device_tokens: Room of the pool; the longest request has to fit.
      max_running: Requests at once.
    """

    def __init__(
        self, model: dict[str, jax.Array], share_prefixes: bool = True, device_tokens: int = 1024, max_running: int = 4
    ):
        kv = MHAConfig(
            size=device_tokens, page_size=PAGE, dtype=jnp.float32, layer_num=LAYERS, head_num=HEADS, head_dim=HEAD_DIM
        )
        config = MemoryConfig(kv, max_running, CONTEXT, chunk=64, disable_radix_cache=not share_prefixes)
        self.memory = init_memory_pool_and_cache(config)
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Answer]:
        """Greedy continuations of `prompts`, `num_tokens` tokens each."""
        requests = [Request(rid=f"prompt {i}", origin_input_ids=list(prompt)) for i, prompt in enumerate(prompts)]
        waiting, running = deque(requests), list[Request]()
        while waiting or running:
            while waiting and self._start(waiting[0]):
                running.append(waiting.popleft())
            for request in [request for request in running if len(request.output_ids) == num_tokens]:
                self.memory.finish(request)
                running.remove(request)
            if running:
                self._decode(running, waiting)
        self.memory.check_memory()
        return [Answer(r.output_ids, len(r.origin_input_ids), r.cached_tokens) for r in requests]

    def _start(self, request: Request) -> bool:
        """Computes, in chunks, what the cache does not have of a request; False if there is no room now."""
        if self.memory.admit(request) is None:
            return False
        while request.kv_len < request.num_tokens:
            chunk = self.memory.next_chunk(request, self.memory.config.chunk)
            plan = self.memory.extend([(request, chunk)])
            if plan is None:
                self.memory.retract(request)
                return False
            token = self.memory.run(model_step, plan, self.model)
        request.output_ids.append(int(token[0]))
        return True

    def _decode(self, running: list[Request], waiting: deque[Request]) -> None:
        """One more token for everyone who runs; who came last makes room when memory is short."""
        while (plan := self.memory.decode(running)) is None:
            waiting.appendleft(running.pop())
            self.memory.retract(waiting[0])
        tokens = self.memory.run(model_step, plan, self.model)
        for request, token in zip(running, tokens.tolist(), strict=False):  # the batch is padded
            request.output_ids.append(token)


def chats(seed: int = 0) -> list[list[int]]:
    """Prompts of three chats under one system prompt, two turns each."""
    rng = np.random.default_rng(seed)
    system = rng.integers(VOCABULARY, size=48).tolist()
    first = [system + rng.integers(VOCABULARY, size=n).tolist() for n in (9, 20, 14)]
    return first + [prompt + rng.integers(VOCABULARY, size=12).tolist() for prompt in first]


def main() -> None:
    """Answers the chats with and without shared prefixes and compares."""
    model, prompts = random_model(0), chats()
    shared = Engine(model).generate(prompts, num_tokens=12)
    alone = Engine(model, share_prefixes=False).generate(prompts, num_tokens=12)
    for i, (answer, check) in enumerate(zip(shared, alone, strict=True)):
        same = "same as without cache" if answer.tokens == check.tokens else f"WITHOUT CACHE: {check.tokens}"
        print(f"prompt {i}: {answer.cached_len:3} of {answer.prompt_len} tokens cached, answer {answer.tokens}, {same}")
    if [answer.tokens for answer in shared] != [answer.tokens for answer in alone]:
        raise SystemExit("the cache changed an answer")


if __name__ == "__main__":
    main()
