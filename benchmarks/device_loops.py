"""Decode loops on the present device: first whether the host's books are the device's, then what a step costs.

A checked loop is an engine's: requests that share a prefix, drafts of which some are rejected, requests that stop
midway. JAX refuses transfers while it is dispatched and runs. Then its slots are compared with an allocator that goes
step by step on the host, what it left on the device with what the host computed from the accepted lengths and the stops
alone, both bit for bit, and the KV of every token with what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import Peers
from benchmarks.timing import Report, time_jax_donated, with_kernel_time
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.mha import MHAConfig
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from jaxcache.steps.loop import unpack_loop
from tests.support import loops

PAGE_SIZE = 16
LOOPS = ((8, 1), (32, 1), (8, 4), (32, 4))
"""Steps of a loop, and tokens that each request computes in a step."""
LAYERS = 2


def check_decode_loops(*, small: bool) -> Iterator[str]:
    """Yields a line for each loop whose books agreed, else raises."""
    requests = 8 if small else 256
    for steps, width in LOOPS:
        tokens = check_decode_loop(requests, steps, width)
        yield f"decode loop: {requests} requests, {steps} steps of {width} tokens, {tokens:,} tokens accepted"


def check_decode_loop(requests: int, steps: int, width: int) -> int:
    """Tokens accepted by a loop of which everything agreed."""
    rng, context = np.random.default_rng(steps * width), 128 + steps * width
    num_pages = requests * -(-context // PAGE_SIZE)
    manager = loops.make_manager(PAGE_SIZE, num_pages, max_running=requests, max_context_len=context)
    common = rng.integers(0, 99, 40)
    prompts = [np.concatenate([common, rng.integers(100, 999, rng.integers(1, 60))]) for _ in range(requests)]
    running = loops.prefilled(manager, prompts, tag=7)
    oracle = loops.Oracle(manager, running, [context] * requests)
    accepted = rng.integers(0, width + 1, (steps, requests))
    stopped = rng.random((steps, requests)) < 0.02
    manager.cancel_loop(launch(manager, running, accepted, stopped, width)[0])  # compiles, and leaves no trace
    with jax.transfer_guard("disallow"):
        plan, out = launch(manager, running, accepted, stopped, width)
    oracle.lent = len(plan.window)
    out = jax.tree.map(np.asarray, out)
    for step, slots in enumerate(out[0][0]):
        np.testing.assert_array_equal(slots[:requests], oracle.step(width, accepted[step], stopped[step]))
    replay = plan.replay(accepted, stopped)
    loops.append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    loops.assert_contents(manager, running)
    return int(replay.accepted.sum())


def launch(manager: Any, running: list[Request], accepted: np.ndarray, stopped: np.ndarray, width: int) -> tuple:
    """The plan of a loop, and what it returned."""
    plan = manager.decode_loop(running, len(accepted), width)
    rows = plan.shape.requests
    inputs = loops.padded(accepted, rows, np.int32), loops.padded(stopped, rows, bool)
    return plan, jax.block_until_ready(manager.run_loop(loops.speculate, plan, *inputs))


def bench_decode_loop(report: Report, small: bool, peers: Peers) -> None:
    """A step of a loop: its pages, slots and books, with and without the KV of LAYERS layers of 8 heads x 128."""
    requests, context = (8, 64) if small else (256, 2048)
    for steps, width in LOOPS:
        state, packed, shape = planned_loop(requests, context, steps, width)
        accepted = jnp.asarray(np.random.default_rng(0).integers(1, width + 1, (steps, shape.requests)), jnp.int32)
        case = f"requests={requests},steps={steps},width={width},page={PAGE_SIZE}"
        for label, layers in (("books", 0), ("kv", LAYERS)):
            call = jax.jit(partial(decode, shape=shape, layers=layers), donate_argnums=0)
            took, state = time_jax_donated(call, state, packed, accepted, repeats=steps)
            took = with_kernel_time(took, call, jax.tree.map(jnp.copy, state), packed, accepted, repeats=steps)
            report.add("decode_loop", f"{case},layers={layers}", f"jaxcache-{label}", took)


def planned_loop(requests: int, context: int, steps: int, width: int) -> tuple[Any, jax.Array, Any]:
    """The state of `decode` with that many requests of half the context, a packed plan of a loop, and its shape."""
    pages = requests * -(-context // PAGE_SIZE)
    heads = {"layer_num": LAYERS, "head_num": 8, "head_dim": 128, "dtype": jnp.bfloat16}
    kv = MHAConfig(size=pages * PAGE_SIZE, page_size=PAGE_SIZE, **heads)  # pyright: ignore[reportArgumentType]
    length = context // 2
    manager = init_memory_pool_and_cache(MemoryConfig(kv, requests, context, chunk=length))
    running = [Request(str(i), np.full(length, i, np.int32)) for i in range(requests)]
    for request in running:
        manager.admit(request)
        plan = manager.extend([(request, length)])
        if plan is None:
            raise MemoryError("the pool was sized to hold every request")
        manager.run(write_step, plan)
        request.output_ids.append(1)
    loop = manager.decode_loop(running, steps, width)
    if loop is None:
        raise MemoryError("the pool was sized to hold every step")
    slots = jnp.zeros((steps, loop.shape.requests, width), jnp.int32)
    return (manager.pool, manager.table, slots), jax.device_put(loop.pack()), loop.shape


def decode(state: Any, packed: jax.Array, accepted: jax.Array, *, shape: Any, layers: int) -> Any:
    """The loop of `packed`, which does the same each time it is called; rows of KV that cost nothing to compute.

    The state is pool and table, and the slots of the loop before, so that nobody optimises slots away.
    """
    pool, table, _ = state

    def one_step(carry: Any, accept: jax.Array) -> tuple[Any, jax.Array]:
        pool, loop = carry
        loop, slots = loop.grow()
        rows = jnp.broadcast_to(slots.reshape(-1, 1, 1), (slots.size, 8, 128)).astype(jnp.bfloat16)
        for layer in range(layers):
            pool = pool.set_kv_buffer(layer, slots.ravel(), rows, rows)
        return (pool, loop.accept(accept)), slots

    (pool, loop), slots = jax.lax.scan(one_step, (pool, unpack_loop(packed, shape, table)), accepted)
    return pool, loop.table, slots


BENCHES: tuple[Callable[[Report, bool, Peers], None], ...] = (bench_decode_loop,)
