"""Host time of a decode step: plan, check, pack, dispatch.

    python -m benchmarks.host_step [--requests 256] [--context 12000] [--steps 400] [--random-steps 10000] [--json PATH]

A batch of requests at long contexts decodes token after token with a step that writes one layer of KV; one request in
`PAGE_SIZE` takes a page in each step. Reported are medians, while the device keeps up:

- `plan_upload_dispatch_us`: a step as an engine calls it, `manager.decode` (`plan_us`) and `manager.run`;
- what `run` consists of, from a second pass with a watch around each part: `check_us`, `changes_us` (of the request
  table), `pack_us`, `call_us`, `commit_us`;
- `bare_call_us`, the same steps dispatched by `jax.jit` alone with the same arguments, which is the floor of the
  machine, and `bare_call_numpy_us`, where the plan is handed to JAX as a NumPy array;
- `loop_step_us`: a step of a decode loop of `LOOP_STEPS` steps: plan, dispatch, replay and absorb, divided by them;
- `recompiles`: XLA compilations during steps with batches of random size, after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import (
    Batch,
    DecodeLoop,
    MemoryConfig,
    MemoryManager,
    MHAConfig,
    MHATokenToKVPool,
    Request,
    StepPlan,
    init_memory_pool_and_cache,
)
from jaxcache.device.donation import DonatingStep
from jaxcache.replay.run import count_compilations
from jaxcache.steps.buckets import Bucket, StepKind, smallest
from jaxcache.steps.compiled import whole_step

PAGE_SIZE = 16
LOOP_STEPS = 8
WAIT_EVERY = 8
"""Steps between two waits: the host must not run ahead of the queue, or it is the device that is timed."""

Samples = dict[str, list[float]]


def write_one_layer(pool: MHATokenToKVPool, batch: Batch) -> tuple[MHATokenToKVPool, None]:
    """The least a step can do with a pool."""
    rows = jnp.broadcast_to(batch.tokens[:, None, None], (*batch.tokens.shape, 1, 8)).astype(pool.config.dtype)
    return pool.set_kv_buffer(0, batch.slots, rows, rows), None


def loop_one_layer(pool: MHATokenToKVPool, loop: DecodeLoop) -> tuple[MHATokenToKVPool, DecodeLoop, None]:
    """The least a decode loop can do."""

    def one_step(carry: Any, _: None) -> Any:
        pool, loop = carry
        loop, slots = loop.grow()
        rows = jnp.broadcast_to(loop.tokens[:, None, None], (*loop.tokens.shape, 1, 8)).astype(pool.config.dtype)
        return (pool.set_kv_buffer(0, slots[:, 0], rows, rows), loop.accept()), None

    (pool, loop), _ = jax.lax.scan(one_step, (pool, loop), length=loop.shape.steps)
    return pool, loop, None


def build(requests: int, context: int, steps: int) -> tuple[MemoryManager, list[Request]]:
    """A manager with that many running requests, their prompts computed.

    A page is full after another number of steps for each of `PAGE_SIZE` neighbours.
    """
    room = requests * (context + steps + 2 * PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE + 64 * PAGE_SIZE
    kv = MHAConfig(size=room, page_size=PAGE_SIZE, dtype=jnp.bfloat16, layer_num=1, head_num=1, head_dim=8)
    manager = init_memory_pool_and_cache(MemoryConfig(kv, requests, context + steps + 1, chunk=context))
    manager.warm_up(write_one_layer)
    running = []
    for i in range(requests):
        length = context - i % PAGE_SIZE
        request = Request(str(i), np.full(length, i, np.int32))
        manager.admit(request)
        manager.run(write_one_layer, planned(manager.extend([(request, length)])))
        request.output_ids.append(1)
        running.append(request)
    return manager, running


def planned(plan: StepPlan | None) -> StepPlan:
    """The plan, which there must be: the pool was sized to hold every step."""
    if plan is None:
        raise MemoryError("the pool was sized to hold every step")
    return plan


def timed(call: Callable, times: list[float]) -> Callable:
    """`call`, which notes what each call of it took, in us."""

    def timing(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        times.append(1e6 * (time.perf_counter() - started))
        return result

    return timing


def decode(manager: MemoryManager, batch: list[Request], steps: int) -> Samples:
    """So many decode steps: what it took to plan, and to plan and run."""
    samples: Samples = {"plan_us": [], "plan_upload_dispatch_us": []}
    for i in range(steps):
        started = time.perf_counter()
        plan = planned(manager.decode(batch))
        has_plan = time.perf_counter()
        manager.run(write_one_layer, plan)
        ended = time.perf_counter()
        for request in batch:
            request.output_ids.append(2)
        samples["plan_us"].append(1e6 * (has_plan - started))
        samples["plan_upload_dispatch_us"].append(1e6 * (ended - started))
        if i % WAIT_EVERY == WAIT_EVERY - 1:
            jax.block_until_ready(manager.pool)
    return samples


def parts(manager: MemoryManager, batch: list[Request], steps: int) -> Samples:
    """What `manager.run` consists of, from steps that are otherwise the same."""
    table = manager.req_to_token_pool
    watched = {
        "check_us": (manager.planner, "require_current"),
        "changes_us": (table, "take_changes"),
        "pack_us": (StepPlan, "pack"),
        "call_us": (DonatingStep, "on_own_pools"),
        "commit_us": (manager.planner, "commit"),
    }
    samples: Samples = {name: [] for name in watched}
    with ExitStack() as stack:
        for name, (owner, method) in watched.items():
            stack.enter_context(mock.patch.object(owner, method, timed(getattr(owner, method), samples[name])))
        decode(manager, batch, steps)
    return samples


def dispatched_by(manager: MemoryManager, batch: list[Request], call: Callable, steps: int) -> list[float]:
    """What `call(pool, table, upload)` takes in place of the manager's jitted step, in us."""
    times: list[float] = []
    with mock.patch.object(DonatingStep, "on_own_pools", timed(lambda step, count, *args: call(*args), times)):
        decode(manager, batch, steps)
    return times[2:]  # the first may compile


def decode_bucket(manager: MemoryManager, requests: int) -> Bucket:
    """The bucket that decodes so many requests."""
    return smallest(manager.buckets, StepKind.DECODE, requests, requests, 0)


def in_loops(manager: MemoryManager, batch: list[Request], loops: int) -> list[float]:
    """Host time of one step of a decode loop: plan, dispatch, replay and absorb, not what the engine appends."""
    samples = []
    for _ in range(loops):
        started = time.perf_counter()
        plan = manager.decode_loop(batch, LOOP_STEPS)
        if plan is None:
            raise MemoryError("the pool was sized to hold every step")
        manager.run_loop(loop_one_layer, plan)
        replay = plan.replay()
        taken = time.perf_counter() - started
        for request in batch:
            request.output_ids += [2] * LOOP_STEPS
        jax.block_until_ready(manager.pool)
        started = time.perf_counter()
        manager.absorb(replay)
        samples.append(1e6 * (taken + time.perf_counter() - started) / LOOP_STEPS)
    return samples


def at_random(manager: MemoryManager, running: list[Request], steps: int) -> int:
    """Decode steps with batches of random size; returns the XLA compilations among them."""
    rng = np.random.default_rng(0)
    with count_compilations() as compilations:
        for _ in range(steps):
            count = int(rng.integers(1, len(running) + 1))
            decode(manager, [running[i] for i in rng.permutation(len(running))[:count]], 1)
            if manager.req_to_token_pool.kv_len.max() % WAIT_EVERY == 0:
                jax.block_until_ready(manager.pool)
        jax.block_until_ready(manager.pool)
    return len(compilations)


def measure(requests: int, context: int, steps: int, random_steps: int) -> dict[str, Any]:
    """Every figure of the module's list."""
    loops = steps // LOOP_STEPS + 2
    manager, running = build(requests, context, 5 * steps + LOOP_STEPS * loops + random_steps)
    manager.warm_up_loop(loop_one_layer, LOOP_STEPS)
    step = whole_step(write_one_layer, decode_bucket(manager, requests), PAGE_SIZE)
    bare = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))  # traced, a donating step is a plain function
    decode(manager, running, steps)
    samples = decode(manager, running, steps) | parts(manager, running, steps)
    samples["bare_call_us"] = dispatched_by(manager, running, bare, steps)
    samples["loop_step_us"] = in_loops(manager, running, loops)[2:]
    recompiles = at_random(manager, running, random_steps)
    manager.check_memory(read_device=True)
    bucket = decode_bucket(manager, requests)
    padding = StepPlan.empty(bucket).pack(manager.req_to_token_pool.take_changes(0))
    samples["bare_call_numpy_us"] = dispatched_by(manager, running, lambda p, t, _: bare(p, t, padding), steps)
    return {
        "bench": "host_step",
        "requests": requests,
        "context": context,
        **{name: round(float(np.median(times)), 1) for name, times in samples.items()},
        "fastest_tenth_us": round(float(np.percentile(samples["plan_upload_dispatch_us"], 10)), 1),
        "upload_bytes": 4 * bucket.packing.size,
        "random_steps": random_steps,
        "recompiles": recompiles,
        "device": jax.local_devices()[0].device_kind,
        "python_version": platform.python_version(),
        "jax_version": jax.__version__,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Host time of a decode step.")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--context", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--random-steps", type=int, default=400, help="steps with batches of random size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.requests, options.context, options.steps, options.random_steps)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
