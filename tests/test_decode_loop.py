"""Decode loops: pages, slots, KV and books of many steps in one call, against the host's allocator step by step."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec

from jaxcache.errors import ArgumentError, BrokenInvariantError, RequestStateError
from jaxcache.kernels.in_place import inspect_compiled, prove_in_place
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pages.allocator import FreeOrder, PageState
from jaxcache.pages.graph import PageAllocatorState
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.replay.content import write_step
from jaxcache.request import Request, RequestState
from jaxcache.steps.buckets import StepKind
from jaxcache.steps.compiled import whole_loop
from jaxcache.steps.loop import DecodeLoop, DecodeRows, LoopShape, unpack_loop
from jaxcache.steps.loop_plan import LoopPlan
from jaxcache.tables.device_table import RequestTable
from tests.kernels import h200
from tests.support.loops import (
    Oracle,
    append_tokens,
    assert_contents,
    clear,
    launch,
    make_manager,
    padded,
    prefilled,
    speculate,
    twin_of,
)

SHAPES = [(1, 6, 1), (1, 3, 4), (4, 7, 1), (4, 5, 3), (4, 2, 9), (16, 20, 1), (16, 6, 5)]  # page size, steps, width


HOST_TRAFFIC = ("callback", "outfeed", "infeed", " send(", " recv(", "S(5)")  # S(5) is memory of the host


@functools.cache
def compiled_manager(page_size):
    return make_manager(page_size)


def new_manager(page_size):
    """As new, but with its steps compiled, and with stale content in pool and table."""
    manager = compiled_manager(page_size)
    clear(manager)
    return manager


def never(steps, requests):
    return np.zeros((steps, requests), bool)


def everything(steps, requests, width=1):
    return np.full((steps, requests), width)


def scramble(manager, rng):
    """A free list in no order, and prefixes in the cache."""
    for request in rng.permutation(np.array(prefilled(manager, [rng.integers(0, 99, n) for n in (9, 2, 17, 5)]))):
        manager.finish(request)


def books(manager):
    """What an operation that fails must leave as it was."""
    return (
        manager.allocator.states.tolist(),
        manager.allocator.free_pages.tolist(),
        manager.req_to_token_pool.pages.tolist(),
        manager.req_to_token_pool.num_changed(),
        [(request.kv_len, request.num_pages, request.state) for request in manager.running.values()],
    )


def run_and_compare(manager, requests, shape, accepted, stopped, limits=None, pages=None):
    """One loop, compared with the oracle: slots of each step, all device state bit for bit, the free list, the KV."""
    _, steps, width = shape
    before = manager.allocator.states.copy()
    evictable = manager.cache.evictable_size()
    oracle = Oracle(manager, requests, limits or [manager.config.max_context_len] * len(requests))
    plan = manager.decode_loop(requests, steps, width, limits=limits, pages=pages)
    assert plan is not None
    assert manager.cache.evictable_size() == evictable  # else the free lists differ for another reason
    oracle.lent = len(plan.window)
    out = launch(manager, plan, accepted, stopped)
    (slots, _, _, ok), rows, allocator = out

    n = len(requests)
    for step in range(len(accepted)):
        assert slots[step, :n].tolist() == oracle.step(width, accepted[step], stopped[step])
        assert ok[step] == oracle.ok
    assert not slots[:, n:].any()
    replay = plan.replay(accepted, stopped)
    assert plan.window[: len(replay.owner)].tolist() == oracle.taken
    assert (replay.short_at is None) == oracle.ok
    compare_with_device(replay, rows, allocator)
    assert replay.rows.seq_len.tolist() == [row.length for row in oracle.rows]
    assert replay.rows.active.tolist() == [row.active for row in oracle.rows]

    append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    assert manager.allocator.free_pages.tolist() == oracle.settle()
    assert manager.req_to_token_pool.num_changed() == 0  # what the device wrote is not sent again
    np.testing.assert_array_equal(np.asarray(manager.table.pages), manager.req_to_token_pool.pages)
    assert (manager.allocator.states[before == PageState.TREE] == PageState.TREE).all()
    assert_contents(manager, manager.running.values())
    return replay


def compare_with_device(replay, rows, allocator):
    n = len(replay.plan.requests)
    for field in dataclasses.fields(rows):
        host, device = np.asarray(getattr(replay.rows, field.name)), getattr(rows, field.name)
        assert host.dtype == device.dtype, field.name
        assert host.tobytes() == (device[:n] if device.ndim else device).tobytes(), field.name
    taken = len(replay.owner)
    assert allocator.ring[: len(replay.plan.window)].tolist() == replay.plan.window.tolist()
    assert (int(allocator.head), int(allocator.count)) == (taken % len(allocator.ring), len(replay.plan.window) - taken)


@st.composite
def batches(draw, steps, width):
    n = draw(st.integers(1, 5))
    step = st.lists(st.integers(0, width), min_size=n, max_size=n)
    accepted = draw(st.lists(step, min_size=steps, max_size=steps))
    stop_at = draw(st.lists(st.one_of(st.none(), st.integers(0, steps - 1)), min_size=n, max_size=n))
    stopped = never(steps, n)
    for i, step in enumerate(stop_at):
        if step is not None:
            stopped[step, i] = True
    return {
        "prompts": draw(st.lists(st.integers(1, 19), min_size=n, max_size=n)),
        "shared": draw(st.integers(0, 12)),
        "accepted": np.array(accepted),
        "stopped": stopped,
        "room": draw(st.one_of(st.none(), st.lists(st.integers(1, steps * width), min_size=n, max_size=n))),
        "pages": draw(st.one_of(st.none(), st.none(), st.integers(0, 2 * n))),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_a_loop_equals_the_host_step_by_step(shape, data):
    page_size, steps, width = shape
    batch = data.draw(batches(steps, width))
    manager = new_manager(page_size)
    rng = np.random.default_rng(batch["seed"])
    scramble(manager, rng)
    common = rng.integers(0, 99, batch["shared"])
    prompts = [np.concatenate([common, rng.integers(100, 199, length)]) for length in batch["prompts"]]
    bystander, *requests = prefilled(manager, [[*common.tolist(), 7, 7, 7], *prompts], tag=3)
    requests = list(rng.permutation(np.array(requests)))
    limits = batch["room"] and [r.kv_len + room for r, room in zip(requests, batch["room"], strict=True)]
    replay = run_and_compare(
        manager, requests, shape, batch["accepted"], batch["stopped"], limits=limits, pages=batch["pages"]
    )
    ended = [request for request, active in zip(requests, replay.rows.active, strict=True) if not active]
    for request in ended:
        manager.finish(request)
    assert_contents(manager, manager.running.values())
    going_on = [r for r in requests if r not in ended and r.kv_len + steps * width <= manager.config.max_context_len]
    if going_on:
        accepted = rng.integers(0, width + 1, (steps, len(going_on)))
        run_and_compare(manager, going_on, shape, accepted, never(steps, len(going_on)))
    wind_down(manager)
    assert bystander.state is RequestState.DONE


def wind_down(manager):
    for request in list(manager.running.values()):
        manager.finish(request)
    manager.check_memory(read_device=True)
    assert manager.cache.protected_size() == 0
    manager.cache.evict(manager.allocator.size)
    assert manager.allocator.available_size() == manager.allocator.size


# ---- one thing at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_slots_are_those_of_alloc_decode_step_by_step(page_size):
    manager = new_manager(page_size)
    requests = prefilled(manager, [range(n) for n in (3, 8, 1)])
    twin = twin_of(manager.allocator)
    lengths = np.array([request.kv_len for request in requests])
    table = manager.req_to_token_pool.req_to_token
    last = np.array([table[request.req_pool_idx, request.kv_len - 1] for request in requests])
    plan = manager.decode_loop(requests, 20)
    (slots, *_), *_ = launch(manager, plan, everything(20, 3), never(20, 3))
    for step in range(20):
        lengths = lengths + 1
        last = twin.alloc_decode(lengths, last)
        assert slots[step, :3, 0].tolist() == last.tolist()


def test_rejected_drafts_keep_their_pages_and_write_them_again():
    manager = new_manager(4)
    (request,) = prefilled(manager, [range(8)])
    replay = run_and_compare(manager, [request], (4, 4, 9), np.array([[1], [0], [2], [1]]), never(4, 1))
    assert len(replay.owner) == 3  # 9 tokens from position 8 on need 3 pages; no later step goes beyond them
    assert replay.rows.num_pages.tolist() == [5]
    assert (request.kv_len, request.num_pages) == (12, 3)
    assert manager.allocator.count(PageState.PRIVATE) == 1


def test_a_stopped_row_takes_no_page_and_writes_nothing():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 58)])
    stopped = never(6, 2)
    stopped[1, 0] = True
    plan = manager.decode_loop(requests, 6)
    out = launch(manager, plan, everything(6, 2), stopped)
    (slots, *_), *_ = out
    replay = plan.replay(stopped=stopped)
    assert (slots[:2] > 0)[:, :2].all()
    assert not slots[2:, 0].any()
    assert replay.accepted[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert np.bincount(replay.owner).tolist() == [1, 2]
    append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    manager.finish(requests[0])
    assert_contents(manager, requests[1:])
    wind_down(manager)


def test_a_shortage_stops_every_row_and_is_known_to_the_host():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 58), range(6)])
    plan = manager.decode_loop(requests, 7, pages=3)
    out = launch(manager, plan, everything(7, 3), never(7, 3))
    replay = plan.replay()
    assert replay.short_at == 4  # at step 4 two rows need a page each and one is left
    assert np.asarray(out[0][3]).tolist() == [True] * 4 + [False] * 3
    assert replay.accepted.sum(0).tolist() == [4, 4, 4]
    assert not out[0][0][4:].any()
    append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    assert_contents(manager, requests)
    assert [request.num_tokens - request.kv_len for request in requests] == [1, 1, 1]
    manager.run(write_step, manager.decode(requests))
    assert_contents(manager, requests)


def test_a_stop_after_a_shortage_means_nothing():
    manager = new_manager(4)
    (request,) = prefilled(manager, [range(8)])
    plan = manager.decode_loop([request], 3, pages=0)
    _, rows, _ = launch(manager, plan, everything(3, 1), ~never(3, 1))
    replay = plan.replay(stopped=~never(3, 1))
    assert replay.short_at == 0
    assert rows.active[:1].tolist() == replay.rows.active.tolist() == [True]
    manager.absorb(replay, read_device=True)
    assert request.kv_len == 8


def test_a_limit_is_where_a_row_stays():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 57)])
    limits = [10, manager.config.max_context_len]
    plan = manager.decode_loop(requests, 2, 5, limits=limits)
    assert plan.most_pages == len(plan.window) == 1 + 3
    replay = run_cancelled(manager, plan, limits)
    assert replay.accepted.tolist() == [[2, 5], [0, 5]]


def run_cancelled(manager, plan, limits):
    manager.cancel_loop(plan)
    shape = (manager.page_size, plan.shape.steps, plan.shape.width)
    full = everything(plan.shape.steps, len(plan.requests), plan.shape.width)
    return run_and_compare(manager, plan.requests, shape, full, never(*full.shape), limits=limits)


def test_the_longest_request_ends_at_the_end_of_its_row():
    manager = new_manager(4)
    context = manager.config.max_context_len
    requests = prefilled(manager, [range(context - 3), range(50, 57)])
    replay = run_and_compare(manager, requests, (4, 5, 3), everything(5, 2, 3), never(5, 2))
    assert replay.accepted[:, 0].tolist() == [3, 0, 0, 0, 0]
    assert requests[0].kv_len == context


def test_a_loop_that_ended_early_is_replayed_as_far_as_it_went():
    manager = new_manager(4)
    (request,) = prefilled(manager, [range(8)])
    replay = run_and_compare(manager, [request], (4, 8, 1), everything(3, 1), never(3, 1))
    assert request.kv_len == 11
    assert len(replay.plan.window) == 2


def test_planning_evicts_what_is_short_or_answers_none():
    manager = make_manager(4, num_pages=8)
    manager.finish(prefilled(manager, [range(16)])[0])
    (request,) = prefilled(manager, [range(90, 98)])
    plan = manager.decode_loop([request], 20)  # 5 pages, 2 are free
    assert len(plan.window) == 5
    assert manager.cache.evictable_size() <= 4
    manager.cancel_loop(plan)
    before = books(manager)
    assert manager.decode_loop([request], 25) is None  # 7 pages; 6 are all there are
    assert manager.allocator.available_size() == 24
    manager.check_memory()
    assert books(manager)[4] == before[4]
    plan = manager.decode_loop([request], 25, pages=6)
    out = launch(manager, plan, everything(25, 1), never(25, 1))
    replay = plan.replay()
    assert replay.short_at == 24
    append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    assert_contents(manager, [request])


def test_no_more_is_lent_than_can_be_needed():
    manager = new_manager(4)
    plan = manager.decode_loop(prefilled(manager, [range(8)]), 5, pages=50)
    assert len(plan.window) == plan.most_pages == 2


def test_a_loop_right_after_admission_reads_the_prefix_that_was_found():
    manager = new_manager(4)
    manager.finish(prefilled(manager, [range(8)])[0])
    request = Request("again", range(9), extra_key="0")
    assert manager.admit(request) == 8
    assert manager.req_to_token_pool.num_changed() == 2  # the device has not heard of the prefix yet
    replay = run_and_compare(manager, [request], (4, 3, 1), everything(3, 1), never(3, 1))
    assert replay.accepted.sum() == 3


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("need_sort", [False, True])
def test_others_live_on_while_a_loop_is_in_flight(page_size, need_sort):
    manager = make_manager(page_size, need_sort=need_sort)
    rng = np.random.default_rng(page_size)
    scramble(manager, rng)
    first, second, third = prefilled(manager, [range(8), range(5), range(50, 63)])
    plan = manager.decode_loop([first, second], 5, 3)
    accepted = rng.integers(0, 4, (5, 2))
    stopped = never(5, 2)
    out = launch(manager, plan, accepted, stopped)
    manager.finish(third)
    other = Request("other", range(70, 81), tag=9)
    manager.admit(other)
    manager.run(write_step, manager.extend([(other, 11)]))
    other.output_ids.append(1)
    plan_2 = manager.decode_loop([other], 5, 3)
    out_2 = launch(manager, plan_2, accepted[:, :1], stopped[:, :1])
    manager.check_memory(read_device=True)
    for this, its_out, columns in ((plan, out, 2), (plan_2, out_2, 1)):
        replay = this.replay(accepted[:, :columns], stopped[:, :columns])
        append_tokens(replay, its_out)
        manager.absorb(replay, read_device=True)
    assert_contents(manager, [first, second, other])
    wind_down(manager)


def test_pages_that_others_took_meanwhile_stay_theirs():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8)])
    plan = manager.decode_loop(requests, 9)
    out = launch(manager, plan, everything(1, 1), never(1, 1))
    other = Request("other", [7, 8, 9], tag=9)  # takes a page, frees none, and shares none
    manager.admit(other)
    manager.run(write_step, manager.extend([(other, 3)]))
    replay = plan.replay(everything(1, 1))
    append_tokens(replay, out)
    manager.absorb(replay, read_device=True)
    assert_contents(manager, [*requests, other])


def test_absorbing_inside_a_free_group():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 58)])
    plan = manager.decode_loop(requests, 9)
    out = launch(manager, plan, everything(1, 2), never(1, 2))
    replay = plan.replay(everything(1, 2))
    append_tokens(replay, out)
    with manager.allocator.free_group():
        manager.absorb(replay)
        manager.finish(requests[0])
    assert_contents(manager, requests[1:])
    wind_down(manager)


@pytest.mark.parametrize("is_launched", [False, True])
def test_a_cancelled_loop_never_was(is_launched):
    manager = new_manager(4)
    scramble(manager, np.random.default_rng(1))
    requests = prefilled(manager, [range(8), range(50, 57)])
    before = books(manager)
    plan = manager.decode_loop(requests, 5)
    if is_launched:
        launch(manager, plan, everything(5, 2), never(5, 2))
    manager.cancel_loop(plan)
    assert books(manager) == before
    assert_contents(manager, requests)  # tokens behind kv_len were written, and nobody sees them
    run_and_compare(manager, requests, (4, 5, 1), everything(5, 2), never(5, 2))


# ---- wrong use ---------------------------------------------------------------------------------------------------


def test_requests_in_flight_can_do_nothing_else():
    manager = new_manager(4)
    request, other = prefilled(manager, [range(8), range(50, 58)])
    step_plan = manager.decode([other])
    manager.cancel(step_plan)
    manager.decode_loop([request], 5)
    before = books(manager)
    for attempt in (
        lambda: manager.decode([request]),
        lambda: manager.decode_loop([request], 5),
        lambda: manager.decode_loop([other, request], 5),
        lambda: manager.finish(request),
        lambda: manager.abort(request),
        lambda: manager.retract(request),
    ):
        with pytest.raises(RequestStateError, match="is in a decode loop"):
            attempt()
        assert books(manager) == before


def test_a_loop_is_launched_once_and_ends_once():
    manager, foreign = new_manager(4), make_manager(4)
    (request,) = prefilled(manager, [range(8)])
    plan = manager.decode_loop([request], 3)
    replay = plan.replay(np.zeros((3, 1), int))
    with pytest.raises(RequestStateError, match="was not launched"):
        manager.absorb(replay)
    with pytest.raises(RequestStateError, match="another manager's"):
        foreign.run_loop(speculate, plan)
    launch(manager, plan, np.zeros((3, 1), int), never(3, 1))
    with pytest.raises(RequestStateError, match="launched already"):
        manager.run_loop(speculate, plan)
    manager.absorb(replay)
    before = books(manager)
    for attempt in (
        lambda: manager.absorb(replay),
        lambda: manager.cancel_loop(plan),
        lambda: manager.run_loop(speculate, plan),
    ):
        with pytest.raises(RequestStateError, match="is over"):
            attempt()
    assert books(manager) == before


def test_a_step_that_cannot_be_traced_leaves_the_loop_planned():
    manager = new_manager(4)
    (request,) = prefilled(manager, [range(8)])
    plan = manager.decode_loop([request], 3)
    for name, broken in (
        ("lengths", lambda pool, loop: (pool, loop.accept(jnp.zeros(1, jnp.int32)), None)),
        ("lengths", lambda pool, loop: (pool, loop.accept(jnp.zeros(2, jnp.float32)), None)),
        ("mask", lambda pool, loop: (pool, loop.stop(jnp.zeros(2, jnp.int32)), None)),
    ):
        with pytest.raises(ArgumentError, match=f"{name} must be"):
            manager.run_loop(broken, plan)
    out = launch(manager, plan, everything(3, 1), never(3, 1))
    append_tokens(plan.replay(), out)
    manager.absorb(plan.replay(), read_device=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "width": 0}, "width must be at least 1, got 0"),
        ({"steps": 1, "limits": [9]}, "limits must be one a request"),
        ({"steps": 1, "limits": [8, 20]}, "limits: that of request 0 must be above its 8 tokens"),
        ({"steps": 1, "limits": [9, 65]}, "limits: that of request 1 .* at most max_context_len = 64, got 65"),
        ({"steps": 1, "pages": -1}, "pages must not be negative"),
    ],
)
def test_a_loop_out_of_range_is_refused(options, message):
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(9)])
    before = books(manager)
    with pytest.raises(ArgumentError, match=message):
        manager.decode_loop(requests, **options)
    assert books(manager) == before


def test_a_batch_that_cannot_decode_is_refused():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(9)])
    before = books(manager)
    for batch, message in (([], "at least one"), ([requests[0]] * 2, "each request once")):
        with pytest.raises(ArgumentError, match=message):
            manager.decode_loop(batch, 3)
    requests[1].output_ids.append(3)
    with pytest.raises(ArgumentError, match="1 has 2 tokens to compute"):
        manager.decode_loop(requests, 3)
    assert books(manager) == before
    with pytest.raises(RequestStateError, match="is waiting"):
        manager.decode_loop([Request("new", [1])], 3)


@pytest.mark.parametrize(
    ("accepted", "stopped", "message"),
    [
        ([[3, 0]], None, r"accepted must be in \[0, 2\], the width, got \[0, 3\]"),
        ([[1, -1]], None, r"accepted must be in \[0, 2\]"),
        ([[1]], None, "accepted must be integers of shape"),
        ([[1, 1]] * 4, None, "accepted must be integers of shape"),
        ([1, 1], None, "accepted must be integers of shape"),
        ([[1.0, 1.0]], None, "accepted must be integers of shape"),
        (None, [[1, 0]], "stopped must be booleans of shape"),
        ([[1, 1]], [[True, False]] * 2, "as many steps, got 1 and 2"),
    ],
)
def test_a_replay_of_what_cannot_have_been_is_refused(accepted, stopped, message):
    manager = new_manager(4)
    plan = manager.decode_loop(prefilled(manager, [range(8), range(9)]), 3, 2)
    with pytest.raises(ArgumentError, match=message):
        plan.replay(accepted, stopped)


def test_columns_of_padding_are_ignored():
    manager = make_manager(4, max_running=5)
    plan = manager.decode_loop(prefilled(manager, [range(8), range(9), range(4)]), 3, 2)
    assert plan.shape.requests == 5
    accepted = np.array([[2, 1, 0, 77, -5]] * 3)
    np.testing.assert_array_equal(plan.replay(accepted).accepted, plan.replay(accepted[:, :3]).accepted)


def test_tokens_are_appended_before_they_are_absorbed():
    manager = new_manager(4)
    (request,) = prefilled(manager, [range(8)])
    plan = manager.decode_loop([request], 4)
    out = launch(manager, plan, everything(4, 1), never(4, 1))
    replay, before = plan.replay(), books(manager)
    with pytest.raises(ArgumentError, match="append the tokens"):
        manager.absorb(replay)
    assert books(manager) == before
    append_tokens(replay, out)
    manager.absorb(replay)
    assert_contents(manager, [request])


def other_lengths(replay):
    return replay.plan.replay(replay.accepted * 0 + 1)


def other_stops(replay):
    return replay.plan.replay(replay.accepted, np.eye(len(replay.accepted), 2, dtype=bool))


def other_pages(replay):
    plan = replay.plan
    plan.window[0], plan.window[1] = plan.window[1], plan.window[0]
    return replay


def other_pages_that_nobody_took(replay):
    assert len(replay.owner) < len(replay.plan.window)
    replay.plan.window[-1] += 1
    return replay


def other_owner(replay):
    return dataclasses.replace(replay, owner=1 - replay.owner)


def other_stop_at_the_end(replay):
    return replay.plan.replay(replay.accepted, np.eye(4, 2, k=-3, dtype=bool))


def other_number_of_pages(replay):
    return dataclasses.replace(replay, rows=dataclasses.replace(replay.rows, num_pages=replay.rows.num_pages + 1))


DIFFERENCES = [value for name, value in sorted(globals().items()) if name.startswith("other_")]


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_reading_back_finds(difference):
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 58)])
    plan = manager.decode_loop(requests, 4, 3)
    accepted = np.array([[1, 2]] * 4)
    out = launch(manager, plan, accepted, never(4, 2))
    replay = plan.replay(accepted)
    append_tokens(replay, out)
    wrong = difference(replay)
    before = books(manager)
    with pytest.raises(BrokenInvariantError, match="on the device"):
        manager.absorb(wrong, read_device=True)
    assert books(manager) == before


def test_nobody_accepts_what_was_not_granted():
    rows = DecodeRows.start(np.array([5, 0], np.int32), np.array([9, 0], np.int32), 4)
    assert rows.active.tolist() == [True, False]
    rows, need = rows.grown(3, 4, 1)
    assert need.tolist() == [0, 0]
    assert rows.granted.tolist() == [3, 0]
    once = rows.accepted(np.array([2, 2], np.int32))
    assert once.seq_len.tolist() == [7, 0]
    assert once.accepted(np.array([2, 2], np.int32)).seq_len.tolist() == [7, 0]


# ---- pages of the allocator in the graph -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [-1, 0, 1, 3, 4])
def test_alloc_pages_in_the_graph(n):
    ring = jnp.array([4, 5, 2, 9, 7], jnp.int32)
    state = PageAllocatorState(ring, jnp.int32(3), jnp.int32(3), page_size=4, free_order=FreeOrder.LIFO)
    after, pages, ok = jax.jit(lambda state, n: state.alloc_pages(n, most=3))(state, n)
    works = 0 <= n <= 3
    assert bool(ok) == works
    assert pages.tolist() == ([9, 7, 4][:n] + [0] * (3 - n) if works else [0, 0, 0])
    taken = n if works else 0
    assert (int(after.head), int(after.count)) == ((3 + taken) % 5, 3 - taken)
    short, _, ok = state.alloc_pages(4, most=5)
    assert not ok
    assert int(short.count) == 3


# ---- the device ------------------------------------------------------------------------------------------------------


def test_nothing_is_transferred_inside():
    manager = new_manager(4)
    requests = prefilled(manager, [range(8), range(50, 58)])
    accepted, stopped = padded(everything(6, 2), 2, np.int32), padded(never(6, 2), 2, bool)
    for _ in range(2):
        manager.runner.send_changes()
        plan = manager.decode_loop(requests, 6)
        with jax.transfer_guard("disallow"):  # the upload of the plan is explicit
            out = manager.run_loop(speculate, plan, accepted, stopped)
        replay = plan.replay()
        append_tokens(replay, jax.tree.map(np.asarray, out))
        manager.absorb(replay, read_device=True)
    assert_contents(manager, requests)
    packed = jnp.asarray(plan.pack())
    lowered = whole_loop(speculate, plan.shape).lower(manager.pool, manager.table, packed, accepted, stopped)
    program = lowered.compile().as_text()
    assert not any(word in program for word in HOST_TRAFFIC)


def test_nothing_compiles_after_the_warm_up():
    manager = make_manager(4)
    rng = np.random.default_rng(0)
    args = {n: (np.ones((3, n), np.int32), never(3, n)) for n in manager.planner.sizes.decode_sizes}
    for bucket in manager.buckets:
        if bucket.kind is StepKind.DECODE:
            plan = LoopPlan.empty(LoopShape(bucket.requests, 3, 2, 4))
            manager.runner.run_loop(speculate, plan, *map(jax.device_put, args[bucket.requests]))
    manager.warm_up(write_step)
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(12):
            n = int(rng.integers(1, 7))
            requests = prefilled(manager, [rng.integers(0, 9, rng.integers(1, 20)) for _ in range(n)])
            accepted = rng.integers(0, 3, (3, n))
            plan = manager.decode_loop(requests, 3, 2, limits=[int(r.kv_len + rng.integers(1, 7)) for r in requests])
            out = launch(manager, plan, accepted, never(3, n))
            replay = plan.replay(accepted)
            append_tokens(replay, out)
            manager.absorb(replay)
            for request in requests:
                manager.finish(request)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert seen == []


def test_warming_up_compiles_every_batch_size_and_leaves_no_trace():
    manager = make_manager(4)
    (request,) = prefilled(manager, [range(8)])
    traced = []

    def step(pool, loop, extra):
        traced.append(loop.shape.requests)
        loop, slots = loop.grow()
        return pool, loop.accept(), slots + extra

    before, table = books(manager), np.asarray(manager.table.pages)
    manager.warm_up_loop(step, 1, 1, jnp.int32(0))
    assert sorted(traced) == list(manager.planner.sizes.decode_sizes)
    assert books(manager) == before
    np.testing.assert_array_equal(np.asarray(manager.table.pages), table)
    manager.run_loop(step, manager.decode_loop([request], 1), jnp.int32(0))
    assert len(traced) == len(manager.planner.sizes.decode_sizes)


LAYERS, SLOTS, ROWS = 4, 4096, 64
SHAPE = LoopShape(ROWS, steps=8, width=3, page_size=16)
POOLS = {
    "mha": (
        MHATokenToKVPool,
        MHAConfig(head_num=2, head_dim=64, size=SLOTS, page_size=16, dtype=jnp.bfloat16, layer_num=LAYERS),
    ),
    "mla": (
        MLATokenToKVPool,
        MLAConfig(kv_lora_rank=96, qk_rope_head_dim=32, size=SLOTS, page_size=16, dtype=jnp.bfloat16, layer_num=LAYERS),
    ),
}


def abstract_arguments(kind, platform):
    """Pool, table, packed plan, accepted lengths, stops: shapes alone."""
    pool_class, config = POOLS[kind]
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    packed = int32((SHAPE.packing.size,))
    masks = jax.ShapeDtypeStruct((SHAPE.steps, ROWS), bool)
    return (
        pool_class.abstract(config, platform=platform),
        RequestTable(int32((1024, 512))),
        packed,
        int32((SHAPE.steps, ROWS)),
        masks,
    )


@pytest.mark.parametrize("kind", POOLS)
def test_the_whole_scan_is_in_place(kind):
    arguments = abstract_arguments(kind, jax.default_backend())
    report = prove_in_place(whole_loop(speculate, SHAPE), *arguments)
    assert report.ok, report.why
    assert len(report.buffers) == len(jax.tree.leaves(arguments[:2]))


def test_a_scan_that_keeps_the_old_table_is_noticed():
    def keeps(pool, loop, accepted, stopped):
        pool, after, _ = speculate(pool, loop, accepted, stopped)
        return pool, after, loop.table.pages[0, 0] + after.table.pages[0, 0]

    arguments = abstract_arguments("mha", jax.default_backend())
    assert not prove_in_place(whole_loop(keeps, SHAPE), *arguments).ok


@pytest.mark.h200
@pytest.mark.parametrize("kind", POOLS)
def test_the_whole_scan_is_in_place_on_an_h200(kind):
    arguments = abstract_arguments(kind, "gpu")

    def step(pool, table, packed, *rest):
        pool, loop, out = speculate(pool, unpack_loop(packed, SHAPE, table), *rest)
        return pool, loop.table, loop.rows, out

    compiled = h200.compile_for_h200(step, *arguments, donate=(0, 1))
    report = inspect_compiled(compiled)
    assert report.ok, report.why
    assert len(report.buffers) == len(jax.tree.leaves(arguments[:2]))
    program = compiled.as_text()
    assert not any(word in program for word in HOST_TRAFFIC)


def heads_step(pool, loop):
    """Three tokens a step, two of them kept; rows that tell layer, position and head apart."""
    config = pool.config
    first_head = 0 if config.axis_name is None else jax.lax.axis_index(config.axis_name) * config.shard_row_shapes[0][0]

    def one_step(carry, _):
        pool, loop = carry
        loop, slots = loop.grow()
        for layer in range(config.layer_num):
            heads, dim = config.shard_row_shapes[0]
            head = jnp.arange(heads, dtype=jnp.int32) + first_head
            rows = loop.positions.reshape(-1, 1, 1) * 8 + head[:, None] + jnp.zeros(dim, jnp.int32) + 100 * layer
            pool = pool.set_kv_buffer(layer, slots.ravel(), rows.astype(jnp.float32), -rows.astype(jnp.float32))
        return (pool, loop.accept(jnp.full(loop.row.shape, 2, jnp.int32))), None

    pool, loop = jax.lax.scan(one_step, (pool, loop), length=loop.shape.steps)[0]
    return pool, loop, loop.rows.seq_len


@pytest.mark.parametrize("shards", [2, 8])
def test_a_sharded_pool_is_bit_equal_to_one_device(shards):
    kv = MHAConfig(size=160, page_size=4, dtype=jnp.float32, layer_num=2, head_num=8, head_dim=4)
    config = MemoryConfig(kv, max_running=4, max_context_len=64, chunk=32)
    mesh = Mesh(np.array(jax.devices("cpu")[:shards]), ("tp",))
    single = init_memory_pool_and_cache(config)
    split_kv = dataclasses.replace(kv, axis_name="tp", shards=shards)
    split = init_memory_pool_and_cache(dataclasses.replace(config, kv=split_kv), mesh=mesh)
    specs, everywhere = split.pool.partition_specs(), PartitionSpec()
    split_step = jax.shard_map(
        heads_step,
        mesh=mesh,
        in_specs=(specs, everywhere),
        out_specs=(specs, everywhere, everywhere),
        check_vma=False,
    )
    for manager, step in ((single, heads_step), (split, split_step)):
        requests = [Request(str(i), range(i, i + 1), str(i)) for i in range(3)]
        for request in requests:
            assert manager.admit(request) == 0
        plan = manager.decode_loop(requests, 5, 3)
        manager.run_loop(step, plan)
        replay = plan.replay(everything(5, 3, 2))
        for request in requests:
            request.output_ids += range(10)
        manager.absorb(replay, read_device=True)
        manager.check_memory(read_device=True)
    for one, many in zip(
        (*single.pool.buffers, single.table.pages), (*split.pool.buffers, split.table.pages), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(many))
    assert np.asarray(single.pool.k).any()


def test_a_loop_is_a_pytree_of_arrays():
    manager = new_manager(4)
    plan = manager.decode_loop(prefilled(manager, [range(8)]), 3)
    loop = unpack_loop(jnp.asarray(plan.pack()), plan.shape, manager.table)
    leaves, tree = jax.tree.flatten(loop)
    assert isinstance(jax.tree.unflatten(tree, leaves), DecodeLoop)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype in (jnp.int32, bool) for leaf in leaves)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loop.row = loop.tag
