"""Twelve chats whose tail windows and last states fit keep all of them, whatever else has to be evicted for that.

Windows and states were evicted a node at a time in the policy's order, so that a conversation lost its end to the
middle of others: 20 to 29 % of what could be reused was, where a larger side gave 100 %.
"""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.index.policies.registry import Policy
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps

CHATS, TURNS, TOKENS, WINDOW, PAGE, CHUNK = 12, 5, 128, 32, 8, 64
WINDOW_TOKENS = 840  # all tails together need 480, a running request 120 more
STATES = 60
compiled: dict[str, CompiledSteps] = {}


def nothing(pool, batch):
    return pool, None


def new_manager(flavour, policy):
    side = {"page_size": PAGE, "dtype": jnp.float32, "layer_num": 1, "head_num": 1, "head_dim": 1}
    kv = MHAConfig(size=2 * CHATS * TURNS * TOKENS, **side)
    if "window" in flavour:
        window = MHAConfig(size=WINDOW_TOKENS, **side)
        kv = SWAConfig(full=kv, window=window, full_layers=(0,), window_layers=(1,))
    shapes = {"conv_shape": (1, 1), "temporal_shape": (1, 1), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
    config = MemoryConfig(
        kv,
        max_running=1,
        max_context_len=(TURNS + 1) * TOKENS,
        chunk=CHUNK,
        policy=policy,
        sliding_window_size=WINDOW if "window" in flavour else None,
        states=MambaConfig(num_states=STATES, layer_num=1, **shapes) if "state" in flavour else None,
    )
    manager = init_memory_pool_and_cache(config)
    manager.runner.compiled = compiled.setdefault(flavour, CompiledSteps())
    return manager


def serve(manager, tokens):
    """Computes a prompt, and returns how much of it was cached."""
    request = Request("turn", tokens)
    manager.admit(request)
    while request.kv_len < request.num_tokens:
        plan = manager.extend([(request, manager.next_chunk(request, CHUNK))])
        assert plan is not None
        manager.run(nothing, plan)
    manager.finish(request)
    return request.cached_tokens


@pytest.mark.parametrize("order", ["in turn", "at random"])
@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("flavour", ["window", "state", "window and state"])
def test_chats_are_found_again_where_their_ends_fit(flavour, policy, order):
    rng = np.random.default_rng(0)
    chats = [rng.integers(0, 2**30, TURNS * TOKENS).tolist() for _ in range(CHATS)]
    turns = [number for _ in range(TURNS) for number in range(CHATS)]
    if order == "at random":
        random.Random(0).shuffle(turns)
    manager = new_manager(flavour, policy)
    done = [0] * CHATS
    found = most = 0
    for number in turns:
        found += serve(manager, chats[number][: (done[number] + 1) * TOKENS])
        most += done[number] * TOKENS
        done[number] += 1
    manager.check_memory()
    assert found >= 0.9 * most
    assert manager.cache.total_size() >= CHATS * (TURNS * TOKENS - PAGE)  # no full KV went, as there was room for it
