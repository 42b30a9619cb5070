"""Retracted requests with windows and states: what was kept in host memory comes back right, layer by layer."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from jaxcache.replay.content import write_step
from jaxcache.replay.proof import Proof
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps
from tests.support.loop_managers import WINDOW, make_manager

PAGE = 4
FLAVOURS = {"window": (True, False), "state": (False, True), "window+state": (True, True)}
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
_compiled = functools.cache(lambda flavour: CompiledSteps())


def new_manager(flavour):
    """Managers of a flavour share what is compiled."""
    manager = make_manager(PAGE, *FLAVOURS[flavour])
    manager.runner.compiled = _compiled(flavour)
    return manager


def compute(manager, request):
    while request.kv_len < request.num_tokens:
        manager.run(write_step, manager.extend([(request, manager.next_chunk(request, 32))]))


def computed(manager, tokens, rid="r"):
    request = Request(rid, tokens, tag=1)
    assert manager.admit(request) is not None
    compute(manager, request)
    return request


def finished(manager, tokens):
    manager.finish(computed(manager, tokens))


def overwritten(manager):
    """Nothing is cached any more, and whatever was free holds something else."""
    manager.cache.evict(10**6, 10**6, 10**6)
    for token in (1000, 2000):
        finished(manager, [token] * 60)
    manager.cache.evict(10**6, 10**6, 10**6)
    assert manager.cache.total_size() == 0


def assert_right(manager, *requests):
    proof = Proof(manager)
    for request in requests:
        proof.verify(request, request.kv_len)
        proof.verify_state(request)
    assert proof.mismatched == 0
    manager.check_memory(read_device=True)


@flavours
@pytest.mark.parametrize("cached", [0, 16, 27])
def test_what_was_kept_comes_back(flavour, cached):
    """Nothing is cached when it comes back, or part of it, or all."""
    manager = new_manager(flavour)
    tokens = list(range(27))
    if cached == 16:
        finished(manager, tokens[:17])
    request = computed(manager, tokens)
    request.output_ids.append(500)
    manager.retract(request, offload=True)
    if cached < 27:
        overwritten(manager)
    if cached == 16:
        finished(manager, tokens[:17])
    assert manager.admit(request) == 27
    found = {0: 0, 16: 16, 27: 24}[cached]
    assert (request.resumed_tokens, request.loaded_tokens) == (found, 27 - found)
    assert request.cached_tokens == (16 if cached == 16 else 0)  # what it was first admitted with
    assert_right(manager, request)
    manager.run(write_step, manager.decode([request]))
    assert_right(manager, request)
    manager.finish(request)
    manager.check_memory(read_device=True)


@pytest.mark.parametrize("flavour", ["window", "window+state"])
def test_window_pages_that_were_given_up_are_not_taken_again(flavour):
    manager = new_manager(flavour)
    request = computed(manager, [7])
    for token in range(30):
        request.output_ids.append(token)
        manager.run(write_step, manager.decode([request]))
    manager.cache.drop_out_of_window(request)
    kept = request.evicted_seqlen_local // PAGE
    assert kept == (28 - WINDOW) // PAGE  # no stop before 28 is left
    request.output_ids.append(500)
    manager.retract(request, offload=True)
    overwritten(manager)
    assert manager.admit(request) == 31
    pages = manager.req_to_token_pool.row_pages(request.req_pool_idx, 0, request.num_pages)
    assert (manager.allocator.window_pages(pages) > 0).tolist() == [False] * kept + [True] * (8 - kept)
    assert_right(manager, request)


def test_a_window_that_has_just_filled_a_hole_is_copied():
    """The device has not heard of it when the request is retracted right after."""
    manager = new_manager("window")
    tokens = list(range(16))
    finished(manager, tokens)
    finished(manager, [*tokens, *range(100, 116)])
    manager.cache.evict(0, PAGE)
    request = Request("r", [*tokens, 99], tag=1)
    assert manager.admit(request) == 0  # a hole
    compute(manager, request)
    assert request.protected_len == 16
    request.output_ids.append(500)
    manager.retract(request, offload=True)
    overwritten(manager)
    assert manager.admit(request) == 17
    assert_right(manager, request)


@pytest.mark.parametrize("flavour", ["state", "window+state"])
def test_a_state_is_of_use_at_its_own_position_only(flavour):
    """All tokens were computed and none is sampled yet: one has to be computed again, from the state before it."""
    manager = new_manager(flavour)
    request = computed(manager, list(range(27)))
    manager.retract(request, offload=True)
    assert manager.admit(request) == 24
    compute(manager, request)
    assert_right(manager, request)


def test_a_request_retracted_before_its_first_step_keeps_the_state_it_was_to_start_from():
    manager = new_manager("state")
    finished(manager, list(range(17)))
    request = Request("r", list(range(20)), tag=1)
    assert manager.admit(request) == 16
    manager.retract(request, offload=True)
    overwritten(manager)
    assert manager.admit(request) == 16
    assert_right(manager, request)
    compute(manager, request)
    assert_right(manager, request)


@pytest.mark.parametrize("flavour", ["window", "window+state"])
def test_map_changes_of_a_step_that_fails_are_sent_with_the_next(flavour):
    manager = new_manager(flavour)
    request = Request("r", list(range(9)), tag=1)
    manager.admit(request)
    plan = manager.extend([(request, 9)])
    changed = manager.allocator.num_changed()

    def failing_step(pool, batch):
        raise ZeroDivisionError("while tracing")

    with pytest.raises(ZeroDivisionError):
        manager.run(failing_step, plan)
    assert manager.allocator.num_changed() == changed > 0
    manager.run(write_step, plan)
    assert_right(manager, request)


def test_running_requests_give_up_windows_before_memory_is_short():
    """Four requests of 56 tokens do not fit the window side, their windows do."""
    manager = new_manager("window")
    requests = [computed(manager, [i], str(i)) for i in range(4)]
    assert manager.allocator.size_swa < 4 * 56
    for token in range(55):
        for request in requests:
            request.output_ids.append(token)
        plan = manager.decode(requests)
        assert plan is not None, token
        manager.run(write_step, plan)
    assert_right(manager, *requests)


def test_who_goes_on_from_a_cached_state_works_on_a_copy_of_it():
    manager = new_manager("state")
    finished(manager, list(range(17)))
    for token in (50, 60):  # one after the other, and then both at once
        request = Request("r", [*range(16), token, token], tag=1)
        assert manager.admit(request) == 16
        compute(manager, request)
        assert_right(manager, request)
        manager.finish(request)
    twins = [Request(str(token), [*range(16), token, token], tag=1) for token in (70, 80)]
    assert [manager.admit(twin) for twin in twins] == [16, 16]
    for twin in twins:
        compute(manager, twin)
    assert_right(manager, *twins)


# ---- where prompts stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "stops"), [(9, [8, 9]), (8, [4, 8]), (4, [4]), (3, [3])])
def test_a_prompt_stops_where_its_twin_can_go_on(length, stops):
    manager = new_manager("state")
    request = Request("r", list(range(length)), tag=1)
    manager.admit(request)
    ends = []
    while request.kv_len < length:
        manager.run(write_step, manager.extend([(request, manager.next_chunk(request, 32))]))
        ends.append(request.kv_len)
    assert ends == stops
    assert manager.admit(Request("twin", list(range(length)), tag=1)) == (stops[0] if len(stops) > 1 else 0)


def test_a_prompt_stops_where_an_earlier_one_went_another_way():
    manager = new_manager("state")
    finished(manager, list(range(20)))
    fork = [*range(10), *range(50, 60)]
    request = Request("r", fork, tag=1)
    assert manager.admit(request) == 0
    assert manager.next_chunk(request, 32) == 8
    compute(manager, request)
    assert_right(manager, request)
    third = Request("third", [*range(10), 70, 71], tag=1)
    assert manager.admit(third) == 8
    compute(manager, third)
    assert_right(manager, third)
    assert np.unique([manager.working_state(r) for r in (request, third)]).size == 2
