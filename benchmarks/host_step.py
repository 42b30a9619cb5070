"""Host time of a decode step: plan, one upload, dispatch.

    python -m benchmarks.host_step [--requests 256] [--context 12000] [--steps 400] [--json PATH]

A batch of requests at long contexts decodes token after token with a step that writes one layer of KV. Reported are the
medians of the time to plan, and to plan, upload and dispatch, while the device keeps up; then the same for batches of
random size, which must compile nothing after warm-up.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from jaxcache import (
    Batch,
    MemoryConfig,
    MemoryManager,
    MHAConfig,
    MHATokenToKVPool,
    Request,
    init_memory_pool_and_cache,
)
from jaxcache.replay.run import count_compilations

PAGE_SIZE = 16


def write_one_layer(pool: MHATokenToKVPool, batch: Batch) -> tuple[MHATokenToKVPool, None]:
    """The least a step can do with a pool."""
    rows = jnp.broadcast_to(batch.tokens[:, None, None], (*batch.tokens.shape, 1, 8)).astype(pool.config.dtype)
    return pool.set_kv_buffer(0, batch.slots, rows, rows), None


def build(requests: int, context: int, steps: int) -> tuple[MemoryManager, list[Request]]:
    """A manager with that many running requests, their prompts computed."""
    room = requests * (context + steps + 2 * PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE + 64 * PAGE_SIZE
    kv = MHAConfig(size=room, page_size=PAGE_SIZE, dtype=jnp.bfloat16, layer_num=1, head_num=1, head_dim=8)
    manager = init_memory_pool_and_cache(MemoryConfig(kv, requests, context + steps + 1, chunk=context))
    manager.warm_up(write_one_layer)
    running = []
    for i in range(requests):
        request = Request(str(i), np.full(context, i, np.int32))
        manager.admit(request)
        plan = manager.extend([(request, context)])
        if plan is None:
            raise MemoryError("the pool was sized to hold every request")
        manager.run(write_one_layer, plan)
        request.output_ids.append(1)
        running.append(request)
    return manager, running


def decode(manager: MemoryManager, batch: list[Request]) -> tuple[float, float, int]:
    """One step: microseconds to plan, to plan and dispatch, and the bytes uploaded."""
    started = time.perf_counter()
    plan = manager.decode(batch)
    if plan is None:
        raise MemoryError("the pool was sized to hold every step")
    planned = time.perf_counter()
    manager.run(write_one_layer, plan)
    ended = time.perf_counter()
    for request in batch:
        request.output_ids.append(2)
    upload = 4 * plan.bucket.packing.size
    return 1e6 * (planned - started), 1e6 * (ended - started), upload


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Host time of a decode step.")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--context", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--random-steps", type=int, default=1_000, help="steps with batches of random size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    manager, running = build(options.requests, options.context, options.steps + options.random_steps)
    samples = []
    with count_compilations() as compilations:
        for i in range(options.steps):
            samples.append(decode(manager, running))
            if i % 8 == 7:  # the host must not run ahead of the queue, or it is the device that is timed
                jax.block_until_ready(manager.pool)
        rng = np.random.default_rng(0)
        for _ in range(options.random_steps):
            count = int(rng.integers(1, options.requests + 1))
            decode(manager, [running[i] for i in rng.permutation(options.requests)[:count]])
        jax.block_until_ready(manager.pool)
    manager.check_memory(read_device=True)
    result: dict[str, Any] = {
        "bench": "host_step",
        "requests": options.requests,
        "context": options.context,
        "plan_us": round(float(np.median([plan for plan, _, _ in samples])), 1),
        "plan_upload_dispatch_us": round(float(np.median([total for _, total, _ in samples])), 1),
        "upload_bytes": samples[0][2],
        "random_steps": options.random_steps,
        "recompiles": len(compilations),
        "device": jax.local_devices()[0].device_kind,
        "jax_version": jax.__version__,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
