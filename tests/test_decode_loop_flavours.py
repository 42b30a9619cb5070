"""Decode loops over windows and recurrent states: every layer right afterwards, stops and limits included."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.pools.layout import Layout
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from tests.support.loop_managers import STEPS, absorb, assert_right, decoded, launch, loop_step, make_manager, prefilled

BY_LAYER = Layout.LAYER_MAJOR


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
    assert_right(manager, *requests)
    for request in requests:
        manager.finish(request)
    manager.check_memory()
    again = Request("again", requests[1].key.token_ids[:30], tag=1)
    assert manager.admit(again) > 0
    manager.run(write_step, manager.extend([(again, again.num_tokens - again.kv_len)]))
    assert_right(manager, again)


def test_a_loop_may_be_the_first_step_after_a_hit():
    manager = make_manager(4, False, True)
    (first,) = prefilled(manager, (17,))
    manager.finish(first)
    again = Request("again", first.key.token_ids[:17], tag=0)
    assert manager.admit(again) == 16
    decoded(manager, [again], stop_at=(99,))
    assert again.kv_len == 16 + STEPS
    assert_right(manager, again)


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


FLAVOURS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("is_launched", [False, True])
@pytest.mark.parametrize(("has_window", "has_states"), FLAVOURS)
def test_a_loop_goes_on_while_others_end(has_window, has_states, is_launched):
    """Others abort, leave for host memory, lose what they cached to newcomers and come back, before a loop runs or
    while it does."""
    manager = make_manager(4, has_window, has_states)
    looping, aborted, kept = prefilled(manager, (9, 16, 13))
    plan = manager.decode_loop([looping], STEPS)
    out = launch(manager, [looping], plan, (12,)) if is_launched else None
    manager.abort(aborted)
    manager.retract(kept, offload=True)
    manager.cache.evict(1000, 1000, 1000)
    (newcomer,) = prefilled(manager, (60,))  # takes the pages and states that are free now
    with pytest.raises(RequestStateError, match="in a decode loop"):
        manager.finish(looping)
    assert manager.admit(kept) == 13
    absorb(manager, [looping], plan, out or launch(manager, [looping], plan, (12,)))
    assert looping.kv_len == 12  # so it has pages to give back, into a free list that others have changed
    assert_right(manager, looping, newcomer, kept)
    decoded(manager, [kept, looping], stop_at=(99, 99))
    assert_right(manager, looping, newcomer, kept)


@pytest.mark.parametrize(("has_window", "has_states"), FLAVOURS)
def test_a_loop_goes_on_from_a_host_copy(has_window, has_states):
    """Nothing of it is cached when it comes back; the loop after it begins in the middle of a page."""
    manager = make_manager(4, has_window, has_states)
    (request,) = prefilled(manager, (9,))
    decoded(manager, [request], stop_at=(99,))
    manager.retract(request, offload=True)
    manager.cache.evict(1000, 1000, 1000)
    (newcomer,) = prefilled(manager, (60,))
    assert manager.admit(request) == 9 + STEPS
    decoded(manager, [request], stop_at=(99,))
    assert request.kv_len == 9 + 2 * STEPS
    assert_right(manager, request, newcomer)
