"""Decode loops over windows and recurrent states: every layer right afterwards, stops and limits included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.manager import MemoryConfig, init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.replay.content import write_step
from jaxcache.replay.proof import Proof
from jaxcache.request import Request
from jaxcache.runner import CompiledSteps
from jaxcache.step import Batch

WINDOW, STEPS = 6, 8
BY_LAYER = Layout.LAYER_MAJOR

_compiled = functools.cache(lambda page_size: CompiledSteps())
"""What is compiled for pages of a size, by any test; JAX tells the pools apart."""


def make_manager(page_size, has_window, has_states, layout=Layout.LAYER_MAJOR):
    side = {"page_size": page_size, "dtype": jnp.float32, "layer_num": 2, "head_num": 1, "head_dim": 4}
    side["layout"] = layout
    kv = MHAConfig(size=320, **side)
    if has_window:
        kv = SWAConfig(full=kv, window=MHAConfig(size=160, **side), full_layers=(0, 2), window_layers=(1, 3))
    shapes = {"conv_shape": (3, 2), "temporal_shape": (2, 4), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
    manager = init_memory_pool_and_cache(
        MemoryConfig(
            kv,
            max_running=4,
            max_context_len=64,
            chunk=32,
            sliding_window_size=WINDOW if has_window else None,
            states=MambaConfig(num_states=12, layer_num=2, **shapes) if has_states else None,
        )
    )
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
    padded = np.full(plan.shape.requests, 99, np.int32)
    padded[: len(requests)] = stop_at
    accepted, stopped = manager.run_loop(loop_step, plan, padded)
    replay = plan.replay(np.asarray(accepted), np.asarray(stopped))
    for request, count in zip(requests, np.asarray(accepted).sum(axis=0).tolist(), strict=False):
        for _ in range(count):
            request.output_ids.append(int(next_token(request.key.token_ids[-1])))
    manager.absorb(replay, read_device=True)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(
    ("has_window", "has_states", "layout"),
    [(True, False, BY_LAYER), (False, True, BY_LAYER), (True, True, BY_LAYER), (True, True, Layout.PAGE_MAJOR)],
)
def test_every_layer_is_right_after_loops_with_stops(page_size, has_window, has_states, layout):
    manager = make_manager(page_size, has_window, has_states, layout)
    requests = prefilled(manager, (9, 16, 3))
    decoded(manager, requests, stop_at=(12, 99, 5))  # two stop on the way
    decoded(manager, requests[1:2], stop_at=(99,))
    assert [request.kv_len for request in requests] == [12, 32, 5]
    proof = Proof(manager)
    for request in requests:
        proof.verify(request, request.kv_len)
        proof.verify_state(request)
    assert proof.mismatched == 0
    manager.check_memory(read_device=True)
    for request in requests:
        manager.finish(request)
    manager.check_memory()
    again = Request("again", requests[1].key.token_ids[:30], tag=1)
    assert manager.admit(again) > 0
    manager.run(write_step, manager.extend([(again, again.num_tokens - again.kv_len)]))
    proof.verify(again, again.kv_len)
    proof.verify_state(again)
    assert proof.mismatched == 0


def test_a_loop_may_be_the_first_step_after_a_hit():
    manager = make_manager(4, False, True)
    (first,) = prefilled(manager, (17,))
    manager.finish(first)
    again = Request("again", first.key.token_ids[:17], tag=0)
    assert manager.admit(again) == 16
    decoded(manager, [again], stop_at=(99,))
    proof = Proof(manager)
    proof.verify(again, again.kv_len)
    proof.verify_state(again)
    assert (again.kv_len, proof.mismatched) == (16 + STEPS, 0)


def test_states_cannot_be_taken_back():
    manager = make_manager(4, False, True)
    requests = prefilled(manager, (9,))
    with pytest.raises(ArgumentError, match="width must be 1 with recurrent states"):
        manager.decode_loop(requests, 2, width=2)
    plan = manager.decode_loop(requests, STEPS)
    manager.cancel_loop(plan)  # it was not launched
    plan = manager.decode_loop(requests, STEPS)
    accepted, stopped = manager.run_loop(loop_step, plan, np.full(plan.shape.requests, 99, np.int32))
    with pytest.raises(RequestStateError, match="absorb it"):
        manager.cancel_loop(plan)
    requests[0].output_ids += [1] * STEPS
    manager.absorb(plan.replay(np.asarray(accepted), np.asarray(stopped)))
    assert requests[0].kv_len == 9 + STEPS
