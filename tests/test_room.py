"""Admission that knows: room on every side, requests that can never fit, and whom to retract.

The oracle is the memory itself: who was told that there is room computes every token, one step after the other, and who
was told that there never is any cannot do so alone.
"""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.manager.room import Room
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.request import Request, RequestState
from jaxcache.steps.buckets import Buckets

P, WINDOW = 4, 6
KV = MHAConfig(size=10 * P, page_size=P, dtype=jnp.float32, layer_num=1, head_num=1, head_dim=1)
SIZES = Buckets((4,), (4, 8, 32), (4,), step_cost=0)
FLAVOURS = ["full", "eagle", "chunk", "window", "state", "window and state"]


def make(flavour="full", pages=10, windows=7, states=3, **options):
    """A memory on the host alone: it decides all there is to decide, and nothing has to be compiled."""
    kv = dataclasses.replace(KV, size=pages * P)
    if "window" in flavour:
        window = dataclasses.replace(KV, size=windows * P)
        kv = SWAConfig(full=kv, window=window, full_layers=(0,), window_layers=(1,))
        options["sliding_window_size"] = WINDOW
    if "state" in flavour:
        shape = {"conv_shape": (1,), "temporal_shape": (1,), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
        options["states"] = MambaConfig(num_states=states, layer_num=1, **shape)
    options |= {"is_eagle": flavour == "eagle", "disable_radix_cache": flavour == "chunk"}
    config = MemoryConfig(kv, max_running=4, max_context_len=64, buckets=SIZES, **options)
    return init_memory_pool_and_cache(config, host_only=True, copy_states=lambda source, target: None)


def compute(memory, request):
    """Computes all of an admitted request; False where memory is short on the way."""
    while request.kv_len < request.num_tokens:
        plan = memory.extend([(request, memory.next_chunk(request, 32))])
        if plan is None:
            return False
        memory.host_batch(plan)
        memory.commit(plan)
        memory.check_memory()
    return True


@st.composite
def lives(draw):
    """A flavour, sizes, and what has happened before: prompts that were computed, and which of them still run."""
    flavour = draw(st.sampled_from(FLAVOURS))
    pages, windows = draw(st.integers(2, 20)), draw(st.integers(2, 14))
    prompts = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.booleans()), max_size=4))
    length = draw(st.integers(1, 50) | st.just(64))
    asked = draw(st.integers(0, 2)), length, draw(st.sampled_from([0, 0, 1, 9]))
    return flavour, pages, windows, draw(st.integers(2, 5)), prompts, asked


def begin(memory, prompts):
    """Runs these prompts as far as memory allows; returns who still runs."""
    running = []
    for i, (kind, length, stays) in enumerate(prompts):
        request = Request(str(i), [kind] * length)
        if memory.room_for(request).never is None and memory.admit(request) is not None:
            if compute(memory, request) and stays:
                running.append(request)
            else:
                memory.finish(request)
    return running


@settings(max_examples=300)
@example(("state", 9, 2, 2, [(0, 8, False), (1, 3, True)], (0, 9, 0)))  # the one state is to be copied, not evicted
@example(("window", 20, 13, 2, [(0, 30, True)], (1, 64, 0)))  # two large chunks, and a window in between
@given(lives())
def test_who_is_told_that_there_is_room_computes_all_its_tokens(case):
    flavour, pages, windows, states, prompts, (kind, length, reserve) = case
    memory = make(flavour, pages, windows, states)
    running = begin(memory, prompts)
    request = Request("asked", [kind] * length)
    evictable = list(memory.cache.tree.evictable)
    room = memory.room_for(request, reserve)
    assert memory.room_for(request, reserve) == room  # asking takes nothing
    assert list(memory.cache.tree.evictable) == evictable
    assert room.after_evicting or not room.now
    assert not (room.never and room.after_evicting)
    if not running:
        assert room.after_evicting or room.never
    if room.after_evicting:
        cached = cached_tokens(memory, prompts)
        tokens = [kind] * (length + reserve)
        grown = Request("grown", tokens, logprob_start_len=length - 1)  # finds the same
        assert memory.admit(grown) is not None
        assert compute(memory, grown)
        if room.now and "state" not in flavour:  # then nobody had to go; but checkpoints take each other's place
            assert all(now >= then for now, then in zip(cached_tokens(memory, prompts), cached, strict=True))
        memory.finish(grown)
    memory.check_memory()


def cached_tokens(memory, prompts):
    """How many tokens of each prompt are cached, whatever could go on from there. No use of anything."""
    keys = [Request("", [kind] * length).key for kind, length, _ in prompts]
    return [memory.cache.tree.find(key.bigrams() if memory.config.is_eagle else key)[1] for key in keys]


@settings(max_examples=150)
@given(st.sampled_from(FLAVOURS), st.integers(2, 12), st.integers(2, 9), st.integers(1, 70))
def test_never_is_said_of_exactly_those_who_cannot_run_alone(flavour, pages, windows, length):
    memory = make(flavour, pages, windows)
    request = Request("a", [1] * length)
    never = memory.room_for(request).never
    # What it needs at once: all its pages; of windows those that its next page attends to, and that page.
    needs_windows = min(-(-length // P), -(-WINDOW // P) + 2) if "window" in flavour else 0
    fits = length <= 64 and -(-length // P) <= pages and needs_windows <= windows
    assert (never is None) == fits
    if fits:
        assert memory.admit(request) == 0
        assert compute(memory, request)
    else:
        with pytest.raises(ArgumentError, match="request a can never run here: it"):
            memory.admit(request)
        assert request.state is RequestState.WAITING
        memory.check_memory()


def test_room_is_said_of_rows_too():
    memory = make()
    others = [Request(str(i), [i]) for i in range(4)]
    for other in others:
        memory.admit(other)
    request = Request("a", [9])
    assert memory.room_for(request) == Room(now=False, after_evicting=False)
    memory.finish(others[0])
    assert memory.room_for(request).now


def test_what_is_cached_and_not_in_use_makes_room_and_what_is_in_use_does_not():
    memory = make(pages=6)
    cached, running = Request("c", [1] * 12), Request("r", [2] * 8)
    for each in (cached, running):
        memory.admit(each)
        assert compute(memory, each)
    memory.finish(cached)
    assert memory.room_for(Request("a", [3] * 4)) == Room(now=True, after_evicting=True)
    assert memory.room_for(Request("a", [3] * 16)) == Room(now=False, after_evicting=True)
    assert memory.room_for(Request("a", [3] * 17)) == Room(now=False, after_evicting=False)
    assert memory.room_for(Request("a", [3] * 9), reserve=8) == Room(now=False, after_evicting=False)
    assert memory.room_for(Request("a", [2] * 8 + [3] * 16)) == Room(now=False, after_evicting=True)  # shares two pages
    assert memory.room_for(Request("a", [1] * 12 + [3] * 4)) == Room(now=True, after_evicting=True)  # and three
    assert (
        memory.room_for(Request("a", [3] * 25)).never == "its 25 tokens need 7 of component 'full' at once, there are 6"
    )
    for wrong in (running, cached):
        with pytest.raises(RequestStateError, match="only a waiting one"):
            memory.room_for(wrong)
    with pytest.raises(ArgumentError, match="reserve must not be negative"):
        memory.room_for(Request("a", [3]), reserve=-1)


# ---- victims -----------------------------------------------------------------------------------------------------


def running(memory, tokens, rid, priority=0):
    request = Request(rid, tokens, priority=priority)
    memory.admit(request)
    assert compute(memory, request)
    return request


def test_a_victim_is_whom_it_costs_least_to_compute_again():
    memory = make(pages=30)
    shared = [7] * 16
    a = running(memory, shared + [1] * 3, "a")
    b = running(memory, [2] * 12, "b")
    c = running(memory, shared + [3] * 9, "c")
    assert memory.victim([a, b, c]) is a  # 3 tokens; 12; 9
    assert memory.victim([b, c]) is c
    assert memory.victim([a, b, c], tokens=4) is c
    assert memory.victim([a, b, c], tokens=10) is b
    assert memory.victim([a, b, c], tokens=100) is a  # nobody gives up as many
    memory.finish(c)
    assert memory.victim([a, b]) is b  # the prefix is a's alone now
    assert memory.victim([]) is None


def test_a_victim_is_of_the_lowest_priority_and_of_equals_the_last():
    memory = make(pages=30)
    a, b = running(memory, [1] * 8, "a", priority=1), running(memory, [2] * 30, "b")
    c = running(memory, [3] * 30, "c")
    assert memory.victim([a, b, c]) is c
    assert memory.victim([a, c, b]) is b
    memory.finish(c)
    with pytest.raises(RequestStateError):
        memory.victim([a, c])
    with pytest.raises(ArgumentError, match="tokens must not be negative"):
        memory.victim([a], tokens=-1)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4))
def test_a_victim_costs_what_its_retraction_and_a_full_eviction_leave_to_compute(prompts):
    """Oracle: retract each of them in a memory of its own, evict all that can go, and see what is found again."""

    def life():
        memory = make(pages=60)
        # Prefixes of one kind, then what tells requests apart.
        work = [[kind] * (4 * pages) + [10 + i] * n for i, (kind, pages, n) in enumerate(prompts)]
        return memory, [running(memory, tokens, str(i)) for i, tokens in enumerate(work)]

    memory, requests = life()
    costs = []
    for i in range(len(prompts)):
        other, twins = life()
        other.retract(twins[i])
        other.cache.evict(other.allocator.size)
        left = twins[i].num_tokens - other.cache.match_prefix(twins[i].key).prefix_len
        costs.append(left)
    victim = memory.victim(requests)
    assert costs[requests.index(victim)] == min(costs)
    assert requests.index(victim) == max(np.flatnonzero(np.array(costs) == min(costs)))
