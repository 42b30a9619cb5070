"""Managers of every flavour, and decode loops that a model without weights runs on them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.replay.content import write_step
from jaxcache.replay.proof import Proof
from jaxcache.request import Request
from jaxcache.steps.batch import Batch
from jaxcache.steps.buckets import StepKind
from jaxcache.steps.compiled import CompiledSteps

WINDOW = 6
STEPS = 8


_compiled = functools.cache(lambda page_size: CompiledSteps())
"""What is compiled for pages of a size, by any test; JAX tells the pools apart."""


def make_config(page_size, has_window, has_states, layout=Layout.LAYER_MAJOR):
    side = {"page_size": page_size, "dtype": jnp.float32, "layer_num": 2, "head_num": 1, "head_dim": 4}
    side["layout"] = layout
    kv = MHAConfig(size=320, **side)
    if has_window:
        kv = SWAConfig(full=kv, window=MHAConfig(size=160, **side), full_layers=(0, 2), window_layers=(1, 3))
    shapes = {"conv_shape": (3, 2), "temporal_shape": (2, 4), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
    return MemoryConfig(
        kv,
        max_running=4,
        max_context_len=64,
        chunk=32,
        sliding_window_size=WINDOW if has_window else None,
        states=MambaConfig(num_states=12, layer_num=2, **shapes) if has_states else None,
    )


def make_manager(page_size, has_window, has_states, layout=Layout.LAYER_MAJOR):
    manager = init_memory_pool_and_cache(make_config(page_size, has_window, has_states, layout))
    manager.runner.compiled = _compiled(page_size)
    return manager


def next_token(tokens):
    return (tokens * 31 + 7) % 4093


def loop_step(pool, loop, stop_at):
    def step(carried, _):
        pool, loop, tokens = carried
        loop, slots = loop.grow()
        rows = loop.row.shape[0]
        batch = Batch(
            tokens=tokens,
            positions=loop.positions[:, 0],
            slots=slots[:, 0],
            request=jnp.arange(rows),
            valid=loop.rows.granted > 0,
            row=loop.row,
            prefix_len=loop.rows.seq_len,
            seq_len=loop.rows.seq_len + loop.rows.granted,
            tag=loop.tag,
            table=loop.table,
            state=loop.computing_state,
            kind=StepKind.DECODE,
            page_size=loop.shape.page_size,
            context=64,
        )
        pool, _ = write_step(pool, batch)
        granted = loop.rows.granted
        stopped = loop.rows.seq_len + granted >= stop_at
        loop = loop.accept().stop(stopped)
        return (pool, loop, next_token(tokens)), (granted, stopped)

    (pool, loop, _), out = jax.lax.scan(step, (pool, loop, loop.tokens), None, length=loop.shape.steps)
    return pool, loop, out


def prefilled(manager, lengths):
    requests = [Request(str(i), np.arange(n) % 5 + i, tag=i) for i, n in enumerate(lengths)]
    for request in requests:
        assert manager.admit(request) is not None
        while request.kv_len < request.num_tokens:
            plan = manager.extend([(request, manager.next_chunk(request, 32))])
            manager.run(write_step, plan)
        request.output_ids.append(100 + int(request.rid))
    return requests


def decoded(manager, requests, stop_at):
    """One loop, from plan to absorbed."""
    plan = manager.decode_loop(requests, STEPS)
    absorb(manager, requests, plan, launch(manager, requests, plan, stop_at))


def launch(manager, requests, plan, stop_at):
    padded = np.full(plan.shape.requests, 99, np.int32)
    padded[: len(requests)] = stop_at
    return manager.run_loop(loop_step, plan, padded)


def absorb(manager, requests, plan, out):
    accepted, stopped = out
    replay = plan.replay(np.asarray(accepted), np.asarray(stopped))
    for request, count in zip(requests, np.asarray(accepted).sum(axis=0).tolist(), strict=False):
        for _ in range(count):
            request.output_ids.append(int(next_token(request.key.token_ids[-1])))
    manager.absorb(replay, read_device=True)


def assert_right(manager, *requests):
    proof = Proof(manager)
    for request in requests:
        proof.verify(request, request.kv_len)
        proof.verify_state(request)
    assert proof.mismatched == 0
    manager.check_memory(read_device=True)
