"""Forks of running requests: whole pages are shared, what is not full is copied, each goes its own way."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError, UnsupportedError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import record, replay
from jaxcache.replay.content import write_step as write_any
from jaxcache.request import Request
from tests.model.manager_driver import assert_contents, small_manager, write_step
from tests.regressions.test_hybrid_manager_edges import make_manager, require_right


def prefilled(manager, tokens, step=write_step, **options):
    request = Request("r", list(tokens), **options)
    assert manager.admit(request) is not None
    while request.kv_len < request.num_tokens:
        manager.run(step, manager.extend([(request, manager.next_chunk(request, 16))]))
    return request


def books(manager):
    return (
        sorted(manager.allocator.free_pages.tolist()),
        manager.req_to_token_pool.available_size(),
        manager.cache.evictable_size(),
        manager.cache.protected_size(),
        len(manager.running),
    )


@pytest.mark.parametrize(("page_size", "prompt"), [(1, 7), (4, 8), (4, 11), (4, 3), (16, 20)])
def test_forks_have_what_is_computed_and_go_their_own_way(page_size, prompt):
    manager = small_manager(page_size, {1: 64, 4: 30, 16: 12}[page_size])
    request = prefilled(manager, range(prompt), tag=3, priority=2, logprob_start_len=None)
    request.output_ids.append(50)
    manager.run(write_step, manager.decode([request]))
    before = manager.allocator.available_size()
    forks = manager.fork(request, 3)
    manager.check_memory(read_device=True)
    is_partial = request.kv_len % page_size > 0
    assert before - manager.allocator.available_size() == 3 * is_partial * page_size
    assert [fork.rid for fork in forks] == ["r/1", "r/2", "r/3"]
    assert {(fork.tag, fork.priority, fork.cached_tokens) for fork in forks} == {(3, 2, prompt + 1)}
    everyone = [request, *forks]
    for step in range(page_size + 2):
        for i, each in enumerate(everyone):
            each.output_ids.append(60 + 10 * i + step)
        _, strangers = manager.run(write_step, manager.decode(everyone))
        assert int(strangers) == 0
    assert_contents(manager, everyone)
    for each in everyone:
        manager.finish(each)
    manager.check_memory()
    assert manager.cache.protected_size() == 0


@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize(("page_size", "prompt"), [(1, 6), (4, 8), (4, 11), (4, 17)])
def test_states_and_windows_are_the_forks_own(page_size, prompt, has_window):
    """Behind the last checkpoint no page can be shared, and the state stands for all tokens."""
    manager = make_manager(num_window_tokens=60 if has_window else None, num_states=12, page_size=page_size)
    request = prefilled(manager, range(prompt), write_any)
    (fork,) = manager.fork(request, 1)
    for each in (request, fork):
        require_right(manager, each)
    request.output_ids.append(5)
    manager.run(write_any, manager.decode([request]))
    require_right(manager, fork)
    fork.output_ids.append(6)
    manager.run(write_any, manager.decode([fork]))
    for each in (request, fork):
        require_right(manager, each)
        manager.finish(each)
    manager.check_memory(read_device=True)


def test_a_fork_right_after_a_hit_has_the_state_that_was_found():
    manager = make_manager(num_states=12)
    manager.finish(prefilled(manager, range(9), write_any))
    request = Request("again", list(range(12)))
    assert manager.admit(request) == 8
    (fork,) = manager.fork(request, 1)
    for each in (fork, request):
        manager.run(write_any, manager.extend([(each, 4)]))
        require_right(manager, each)


def test_windows_without_states():
    manager = make_manager(num_window_tokens=60)
    request = prefilled(manager, range(18), write_any)
    manager.cache.drop_out_of_window(request)
    for each in (request, *manager.fork(request, 2)):
        each.output_ids.append(len(manager.running))
        manager.run(write_any, manager.decode([each]))
        require_right(manager, each)


def test_what_is_not_computed_yet_is_computed_once():
    """A fork in the middle of a prompt: the rest is shared when it is planned."""
    manager = small_manager(4, 30)
    request = Request("r", list(range(20)))
    manager.admit(request)
    manager.run(write_step, manager.extend([(request, 6)]))
    forks = manager.fork(request, 2)
    plan = manager.extend([(each, 14) for each in (request, *forks)])
    assert plan.num_computed.tolist() == [14, 4, 4]
    manager.run(write_step, plan)
    assert_contents(manager, [request, *forks])


@pytest.mark.parametrize("short", ["rows", "pages", "states"])
def test_a_shortage_takes_nothing(short):
    if short == "states":
        manager, step = make_manager(num_states=4), write_any
    else:
        manager, step = small_manager(4, 30 if short == "rows" else 4), write_step
    request = prefilled(manager, range(10), step)
    before = books(manager)
    assert manager.fork(request, 4 if short == "rows" else 3) is None
    assert books(manager) == before
    assert len(manager.fork(request, 1)) == 1


def test_what_cannot_be_forked_is_refused():
    manager = small_manager(4, 20)
    waiting = Request("w", [1, 2])
    with pytest.raises(RequestStateError):
        manager.fork(waiting, 1)
    request = prefilled(manager, range(6))
    with pytest.raises(ArgumentError, match="n must be at least 1"):
        manager.fork(request, 0)
    request.output_ids += [1, 2, 3]
    plan = manager.extend([(request, 3)])
    with pytest.raises(RequestStateError, match="has a plan that has not run"):
        manager.fork(request, 1)
    manager.cancel(plan)
    chunked = small_manager(4, 20, disable_radix_cache=True)
    with pytest.raises(UnsupportedError, match="shares nothing"):
        chunked.fork(prefilled(chunked, range(6)), 1)


def test_a_log_replays_forks_and_what_they_do():
    config = small_manager(4, 20).config
    memory = record(config)
    request = prefilled(memory, range(10))
    request.output_ids.append(1)
    first, second = memory.fork(request, 2)
    for each in (first, second):
        each.output_ids.append(int(each.rid[-1]))
    memory.run(write_step, memory.extend([(first, 2), (second, 2), (request, 1)]))
    memory.finish(first)
    again = replay(memory.log)
    assert fingerprint(again) == fingerprint(memory)
    assert [request.output_ids for request in again.running.values()] == [[1], [1, 2]]
    np.testing.assert_array_equal(again.req_to_token_pool.kv_len, memory.req_to_token_pool.kv_len)
