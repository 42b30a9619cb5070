"""What an engine's steps cost beside what they compute: hits, batch sizes, padding, warm-up.

    python -m benchmarks.engine_steps [--repeat 15] [--json PATH]

A small GQA decoder (float32, 4 layers of 256) on a pool with pages of 16 tokens, attention in plain `jnp` over gathered
pages. Reported are medians of runs that take turns:

- `ttft_ratio`: time to first token of a prompt of 512 tokens of which 400 are cached, divided by that of one without a
  cache; from `admit` to the token on the host. `ttft_cpu_ratio` is the same in processor time.
- `decode_17_16`, `decode_65_64`: a decode step of 17 requests divided by one of 16, and so on.
- `warm_up_s`: compiling an extend and a decode function for all `executables` of an engine for 128 requests.
- `shared_prefill`: 8 samples of each of 6 prompts that begin alike, admitted together and computed in steps of 512
  tokens: of the prompt tokens that can be shared (whole pages that another one has too, but for the page of the last
  token), the part that was not computed again.
- `padding`: what random suffixes, cut by `next_chunk`, are padded to, divided by their tokens; by the longest suffix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import machine, write_figures
from jaxcache import (
    Batch,
    MemoryConfig,
    MemoryManager,
    MHAConfig,
    MHATokenToKVPool,
    Request,
    StepPlan,
    init_memory_pool_and_cache,
)
from jaxcache.steps.buckets import Buckets, StepKind
from jaxcache.steps.warm_up import show_progress

LAYERS, WIDTH, Q_HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 4, 256, 8, 4, 32, 688, 4096
PAGE_SIZE = 16
PROMPT, SHARED = 512, 410  # 400 of which are whole pages
PROMPTS, SAMPLES = 6, 8
Model = dict[str, jax.Array]


def random_model() -> Model:
    """Weights of a model that has learnt nothing; those of all layers are stacked."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "q": (LAYERS, WIDTH, Q_HEADS, HEAD_DIM),
        "kv": (LAYERS, WIDTH, 2, KV_HEADS, HEAD_DIM),
        "out": (LAYERS, Q_HEADS, HEAD_DIM, WIDTH),
        "up": (LAYERS, WIDTH, 2, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) * WIDTH**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def extend_step(pool: MHATokenToKVPool, batch: Batch, model: Model) -> tuple[MHATokenToKVPool, jax.Array]:
    """Computes runs of tokens; returns the most likely next token of each request."""
    return _forward(pool, batch, model)


def decode_step(pool: MHATokenToKVPool, batch: Batch, model: Model) -> tuple[MHATokenToKVPool, jax.Array]:
    """Computes a token of each request; returns the most likely next ones."""
    return _forward(pool, batch, model)


def _forward(pool: MHATokenToKVPool, batch: Batch, model: Model) -> tuple[MHATokenToKVPool, jax.Array]:
    layers = {name: model[name] for name in ("q", "kv", "out", "up", "down")}

    def one_layer(carry: Any, layer: Any) -> Any:
        pool, x = carry
        i, w = layer
        normed = _norm(x)
        q = jnp.einsum("tw,whd->thd", normed, w["q"])
        k, v = jnp.einsum("tw,wchd->cthd", normed, w["kv"])
        pool = pool.set_kv_buffer(i, batch.slots, k, v)
        x += jnp.einsum("thd,hdw->tw", _attention(pool, batch, i, q), w["out"])
        gate, up = jnp.einsum("tw,wch->cth", _norm(x), w["up"])
        return (pool, x + (jax.nn.silu(gate) * up) @ w["down"]), None

    x = model["embed"][batch.tokens]
    (pool, x), _ = jax.lax.scan(one_layer, (pool, x), (jnp.arange(LAYERS, dtype=jnp.int32), layers))
    return pool, jnp.argmax(_norm(x)[batch.last] @ model["embed"].T, axis=-1)


def _attention(pool: MHATokenToKVPool, batch: Batch, layer: jax.Array, q: jax.Array) -> jax.Array:
    """Attention over gathered pages: of a decode step request by request, else of every token to all requests."""
    inputs = batch.attention(pool, layer)
    k, v = (array[inputs.block_table].reshape(batch.row.shape[0], -1, KV_HEADS, HEAD_DIM) for array in inputs.kv.arrays)
    q = q.reshape(-1, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM) * HEAD_DIM**-0.5
    place = jnp.arange(k.shape[1], dtype=jnp.int32)
    seen = place <= batch.positions[:, None]
    if batch.kind is StepKind.DECODE:
        scores = jnp.einsum("tgrd,tcgd->tgrc", q, k)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
        out = jnp.einsum("tgrc,tcgd->tgrd", weights, v)
    else:
        seen = (batch.request[:, None, None] == jnp.arange(k.shape[0])[:, None]) & seen[:, None]
        scores = jnp.einsum("tgrd,bcgd->tgrbc", q, k)
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=(-2, -1))
        out = jnp.einsum("tgrbc,bcgd->tgrd", weights, v)
    return out.reshape(-1, Q_HEADS, HEAD_DIM)


def _norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def new_memory(max_running: int, context: int, *, cached: bool = True) -> MemoryManager:
    """A manager whose steps have the default sizes."""
    kv = MHAConfig(
        size=16_384, page_size=PAGE_SIZE, dtype=jnp.float32, layer_num=LAYERS, head_num=KV_HEADS, head_dim=HEAD_DIM
    )
    return init_memory_pool_and_cache(
        MemoryConfig(kv, max_running, context, chunk=PROMPT, disable_radix_cache=not cached)
    )


def planned(plan: StepPlan | None) -> StepPlan:
    """The plan, which there must be: the pool was sized to hold every step."""
    if plan is None:
        raise MemoryError("the pool was sized to hold every step")
    return plan


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """What a call took, on the clock and of the processors, in ms, and what it returned."""
    clock, processors = time.perf_counter(), time.process_time()
    result = call()
    return 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processors), result


def first_token(memory: MemoryManager, model: Model, request: Request) -> int:
    """The first token of a request that has just come, on the host."""
    memory.admit(request)
    tokens = None
    while request.kv_len < request.num_tokens:
        plan = planned(memory.extend([(request, memory.next_chunk(request, PROMPT))]))
        tokens = memory.run(extend_step, plan, model)
    return int(np.asarray(tokens)[0])


def time_to_first_token(model: Model, repeat: int) -> dict[str, Any]:
    """Prompts of 512 tokens with one prefix, on a memory that shares and on one that does not."""
    rng = np.random.default_rng(0)
    shared = rng.integers(VOCABULARY, size=SHARED)
    memories = {"cached": new_memory(2, 640), "uncached": new_memory(2, 640, cached=False)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in memories}
    hits = []
    for memory in memories.values():
        memory.warm_up(extend_step, model, kinds=[StepKind.EXTEND])
    for i in range(repeat + 1):
        prompt = np.concatenate([shared, rng.integers(VOCABULARY, size=PROMPT - SHARED)])
        tokens = {}
        for name, memory in memories.items():
            request = Request(str(i), prompt)
            clock, processors, tokens[name] = timed(lambda m=memory, r=request: first_token(m, model, r))
            times[name].append((clock, processors))
            if name == "cached":
                hits.append(request.cached_tokens)
            request.output_ids.append(tokens[name])
            memory.finish(request)
        if len(set(tokens.values())) > 1:
            raise RuntimeError(f"the cache changed the first token: {tokens}")
    clock = {name: statistics.median(each[0] for each in values[1:]) for name, values in times.items()}
    processors = {name: statistics.median(each[1] for each in values[1:]) for name, values in times.items()}
    return {
        "prompt_tokens": PROMPT,
        "cached_tokens": statistics.median(hits[1:]),
        "ttft_cached_ms": round(clock["cached"], 2),
        "ttft_uncached_ms": round(clock["uncached"], 2),
        "ttft_ratio": round(clock["cached"] / clock["uncached"], 3),
        "ttft_cpu_ratio": round(processors["cached"] / processors["uncached"], 3),
    }


def decode_steps(model: Model, repeat: int) -> dict[str, Any]:
    """Decode steps of batches of which one has a request more; and the warm-up before them."""
    memory = new_memory(128, 128)
    started = time.perf_counter()
    memory.warm_up(extend_step, model, kinds=[StepKind.EXTEND], progress=show_progress)
    memory.warm_up(decode_step, model, kinds=[StepKind.DECODE], progress=show_progress)
    warm_up = time.perf_counter() - started
    requests = [Request(str(i), [i + 1, 2, 3]) for i in range(72)]
    for request in requests:
        request.output_ids.append(first_token(memory, model, request))
    times: dict[int, list[float]] = {16: [], 17: [], 64: [], 65: []}
    for _ in range(repeat + 1):
        for size, taken in times.items():
            batch = requests[:size]
            clock, _, tokens = timed(
                lambda b=batch: np.asarray(memory.run(decode_step, planned(memory.decode(b)), model))
            )
            taken.append(clock)
            for request, token in zip(batch, tokens.tolist(), strict=False):
                request.output_ids.append(token)
    step = {size: statistics.median(taken[1:]) for size, taken in times.items()}
    return {
        "warm_up_s": round(warm_up, 1),
        "executables": len(memory.buckets),
        **{f"decode_{size}_ms": round(taken, 2) for size, taken in step.items()},
        "decode_17_16": round(step[17] / step[16], 3),
        "decode_65_64": round(step[65] / step[64], 3),
    }


def shared_prefill(model: Model) -> dict[str, Any]:
    """Samples of some prompts that begin alike, admitted together."""
    memory = new_memory(SAMPLES * PROMPTS, 256)
    rng = np.random.default_rng(1)
    system = rng.integers(VOCABULARY, size=37)
    prompts = [np.concatenate([system, rng.integers(VOCABULARY, size=size)]) for size in range(11, 60, 49 // PROMPTS)]
    prompts = prompts[:PROMPTS]
    requests = [Request(f"{i}/{j}", prompt) for i, prompt in enumerate(prompts) for j in range(SAMPLES)]
    for request in requests:
        memory.admit(request)
    computed = 0
    while waiting := [request for request in requests if request.kv_len < request.num_tokens]:
        work, left = [], PROMPT
        for request in waiting:
            if left and (chunk := min(memory.next_chunk(request, left), left)):
                work.append((request, chunk))
                left -= chunk
        plan = planned(memory.extend(work))
        memory.run(extend_step, plan, model)
        computed += int(plan.num_computed.sum())
    memory.check_memory()
    total = sum(request.num_tokens for request in requests)
    shareable = total - _computed_at_least([request.origin_input_ids for request in requests])
    return {
        "shared_prefill_tokens": total,
        "shared_prefill_computed": computed,
        "shared_prefill": round((total - computed) / shareable, 3),
    }


def _computed_at_least(prompts: list[Any]) -> int:
    """Tokens that have to be computed if each whole page is computed once, and the last token of each prompt."""
    seen: set[bytes] = set()
    computed = 0
    for prompt in prompts:
        tokens = np.asarray(prompt, np.int32)
        ends = range(PAGE_SIZE, len(tokens), PAGE_SIZE)
        computed += len(tokens) - len(ends) * PAGE_SIZE
        for end in ends:
            computed += PAGE_SIZE * (tokens[:end].tobytes() not in seen)
            seen.add(tokens[:end].tobytes())
    return computed


def padding(longest: int, page_size: int = PAGE_SIZE, prompts: int = 5000) -> float:
    """Tokens that random suffixes are padded to, divided by their tokens."""
    sizes = Buckets.default(256, 8192, page_size)
    suffixes = np.random.default_rng(0).integers(1, longest + 1, prompts)
    padded = 0
    for left in suffixes.tolist():
        while left:
            taken = sizes.chunk(left)
            padded += min(size for size in sizes.extend_tokens if size >= taken)
            left -= taken
    return round(padded / int(suffixes.sum()), 3)


def measure(repeat: int) -> dict[str, Any]:
    """Every figure of the module's list."""
    model = random_model()
    figures = time_to_first_token(model, repeat) | decode_steps(model, repeat)
    figures |= shared_prefill(model)
    figures["padding"] = {str(longest): padding(longest) for longest in (128, 512, 2048, 8192)}
    return {"bench": "engine_steps", **figures, "repeat": repeat, "jax": jax.__version__, **machine()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="What an engine's steps cost beside what they compute.")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(options.repeat)
    for name, value in figures.items():
        print(f"{name:20} {value}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
