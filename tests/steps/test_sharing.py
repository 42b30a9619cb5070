"""Requests that are planned together, and requests that are planned again, compute a prefix once."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import RequestStateError, SnapshotError
from jaxcache.pages.allocator import PageState
from jaxcache.replay.content import write_step as write_any
from jaxcache.request import Request
from tests.model.manager_driver import assert_contents, few_buckets, small_manager, write_step
from tests.regressions.test_hybrid_manager_edges import make_manager, require_right


def admitted(manager, *prompts, **options):
    requests = [Request(str(i), list(prompt), **options) for i, prompt in enumerate(prompts)]
    for request in requests:
        assert manager.admit(request) is not None
    return requests


def whole(requests):
    return [(request, request.num_tokens - request.kv_len) for request in requests]


def run(manager, plan, step=write_step):
    out = manager.run(step, plan)
    if step is write_step:
        assert int(out[1]) == 0, "a token that the step read is not its own"
    manager.check_memory(read_device=True)
    return plan.num_computed.tolist()


def books(manager):
    return (
        manager.allocator.states.tolist(),
        manager.allocator.free_pages.tolist(),
        manager.cache.evictable_size(),
        manager.cache.protected_size(),
        [(request.kv_len, request.num_pages, request.protected_len) for request in manager.running.values()],
    )


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_samples_of_a_prompt_compute_it_once(page_size):
    manager = small_manager(page_size, {1: 64, 4: 40, 16: 12}[page_size], max_context_len=48)
    requests = admitted(manager, *[range(20)] * 4)
    plan = manager.extend(whole(requests))
    tail = 20 - 19 // page_size * page_size
    assert run(manager, plan) == [20, tail, tail, tail]
    assert_contents(manager, requests)
    assert [request.cached_tokens for request in requests] == [0, *[20 - tail] * 3]
    for request in requests:
        manager.finish(request)
    manager.check_memory()
    assert manager.allocator.available_size() + manager.cache.evictable_size() == manager.allocator.num_pages * (
        page_size
    ) - page_size * int((manager.allocator.states == PageState.QUARANTINED).sum())


def test_each_goes_on_from_whoever_is_on_its_way():
    """Three prompts that part at different places: the third takes pages of the first and of the second."""
    manager = small_manager(4, 24)
    first = [*range(12)]
    second = [*range(8), 50, 51, 52, 53, 54, 55]
    third = [*range(8), 50, 51, 52, 53, 99]
    requests = admitted(manager, first, second, third)
    plan = manager.extend(whole(requests))
    assert run(manager, plan) == [12, 6, 1]
    assert plan.takers == (requests[1], requests[2])
    assert_contents(manager, requests)


def test_chunks_that_end_inside_a_page_are_shared_too():
    """Who has begun a page of its own gives it back where another computes all of it."""
    manager = small_manager(4, 30, chunk=48, buckets=few_buckets(4, 48))
    requests = admitted(manager, range(21), range(21))
    assert run(manager, manager.extend([(requests[0], 6)])) == [6]
    assert run(manager, manager.extend([(requests[1], 6)])) == [6]  # 4 are cached: goes on to 10
    assert [request.kv_len for request in requests] == [6, 10]
    assert run(manager, manager.extend([(requests[0], 5), (requests[1], 6)])) == [5, 6]  # from 8 to 13, from 12 to 18
    assert [request.kv_len for request in requests] == [13, 18]
    assert_contents(manager, requests)
    assert run(manager, manager.extend([(requests[0], 8), (requests[1], 3)])) == [5, 1]
    assert_contents(manager, requests)


def test_a_cancelled_plan_takes_back_every_sharer():
    manager = small_manager(4, 20)
    requests = admitted(manager, *[range(10)] * 3)
    before = books(manager)
    plan = manager.extend(whole(requests))
    assert (manager.allocator.states == PageState.PLANNED).sum() == 2
    manager.check_memory()
    manager.cancel(plan)
    assert books(manager)[2:] == before[2:]
    assert sorted(books(manager)[1]) == sorted(before[1])
    manager.check_memory()
    with pytest.raises(RequestStateError):
        manager.run(write_step, plan)
    manager.cancel(plan)  # nothing is left of it
    assert run(manager, manager.extend(whole(requests))) == [10, 2, 2]
    assert_contents(manager, requests)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("end", ["finish", "abort", "retract"])
def test_a_plan_is_withdrawn_when_one_of_its_requests_ends(which, end):
    """The others would read, or have written, pages that were freed."""
    manager = small_manager(4, 20)
    requests = admitted(manager, *[range(10)] * 3)
    plan = manager.extend(whole(requests))
    getattr(manager, end)(requests.pop(which))
    manager.check_memory()
    assert not (manager.allocator.states == PageState.PLANNED).any()
    assert [request.num_pages for request in requests] == [0, 0]
    with pytest.raises(RequestStateError):
        manager.run(write_step, plan)
    again = manager.extend(whole(requests))
    manager.cancel(plan)  # an old plan takes nothing from the new one
    assert run(manager, again) == [10, 2]
    assert_contents(manager, requests)


def test_a_step_that_fails_leaves_its_plan_to_be_run_again_or_cancelled():
    manager = small_manager(4, 20)
    requests = admitted(manager, *[range(10)] * 2)
    plan = manager.extend(whole(requests))
    with pytest.raises(ZeroDivisionError):
        manager.run(lambda pool, batch: 1 // 0, plan)
    manager.check_memory()
    assert run(manager, plan) == [10, 2]
    assert_contents(manager, requests)


def test_who_shares_pages_of_a_plan_can_be_in_no_other():
    """The page that the first goes on to fill is the second's too, though the first takes no fresh page."""
    manager = small_manager(4, 20)
    first, second = admitted(manager, range(6), [*range(4), 9])
    run(manager, manager.extend([(first, 5)]))  # a page and a token of the next
    first.output_ids += [6, 7, 8]
    (twin,) = [Request("twin", [*range(6), 6, 7, 3])]
    manager.admit(twin)
    plan = manager.extend([(first, 3), (twin, 5)])
    assert plan.num_computed.tolist() == [3, 1]
    with pytest.raises(RequestStateError, match="has a plan that has not run"):
        manager.extend([(first, 1)])
    manager.cancel(plan)
    assert (first.kv_len, first.num_pages) == (5, 2)
    run(manager, manager.extend([(first, 3), (twin, 5)]))
    assert_contents(manager, [first, twin])
    manager.abort(second)


def test_short_memory_changes_nothing():
    manager = small_manager(4, 5)
    requests = admitted(manager, range(13), [*range(8), 50, 51, 52, 53, 54, 55, 56, 57, 58])
    before = books(manager)
    assert manager.extend(whole(requests)) is None
    assert books(manager) == before
    assert run(manager, manager.extend([(requests[0], 13), (requests[1], 1)])) == [13, 1]


def test_short_memory_gives_back_the_lock_on_what_was_found():
    manager = small_manager(4, 7)
    first, second = admitted(manager, range(13), [*range(12), *range(50, 74)])
    run(manager, manager.extend([(first, 13)]))
    manager.finish(first)
    before = books(manager)
    assert manager.extend([(second, 24)]) is None  # 12 are cached by now, and 20 more need 5 pages; 2 can be evicted
    assert books(manager) == before


def test_nothing_outside_the_plan_sees_its_pages():
    """No mark of the allocator goes back before them, no snapshot has them, no event and no lookup tells of them."""
    manager = small_manager(4, 20, enable_kv_cache_events=True)
    requests = admitted(manager, *[range(10)] * 2)
    mark = manager.allocator.backup_state()
    plan = manager.extend(whole(requests))
    with pytest.raises(SnapshotError):
        manager.allocator.restore_state(mark)
    with pytest.raises(SnapshotError, match="PLANNED"):
        manager.allocator.state_dict()
    assert manager.cache.take_events() == []
    assert manager.cache.match_prefix(list(range(10))).prefix_len == 0
    run(manager, plan)
    assert sum(len(event.block_hashes) for event in manager.cache.take_events()) == 2


def test_what_was_computed_since_a_request_was_admitted_is_found():
    manager = small_manager(4, 20)
    first, second = admitted(manager, range(14), range(14))
    run(manager, manager.extend([(first, 14)]))
    assert run(manager, manager.extend([(second, 5)])) == [2]
    assert second.kv_len == 14
    assert second.cached_tokens == 12
    assert_contents(manager, [first, second])


def test_an_equal_prompt_of_whole_pages_leaves_a_token_to_compute():
    manager = small_manager(4, 20)
    (first,) = admitted(manager, range(8))
    run(manager, manager.extend(whole([first])))
    assert [request.kv_len for request in admitted(manager, range(8))] == [4]


def test_tokens_whose_logits_are_wanted_are_computed_by_each():
    manager = small_manager(4, 20)
    first, second = admitted(manager, range(14), range(14), logprob_start_len=5)
    assert run(manager, manager.extend(whole([first, second]))) == [14, 10]
    assert_contents(manager, [first, second])
    manager.abort(second)
    first, second = admitted(manager, range(50, 64), range(50, 64), logprob_start_len=5)
    assert run(manager, manager.extend(whole([first]))) == [14]
    assert run(manager, manager.extend(whole([second]))) == [10]


def test_a_cache_that_shares_nothing_shares_no_plan():
    manager = small_manager(4, 20, disable_radix_cache=True)
    requests = admitted(manager, *[range(10)] * 2)
    assert run(manager, manager.extend(whole(requests))) == [10, 10]


def test_other_namespaces_share_nothing():
    manager = small_manager(4, 20)
    requests = [Request("a", list(range(10)), "x", tag=0), Request("b", list(range(10)), "y", tag=1)]
    for request in requests:
        manager.admit(request)
    assert run(manager, manager.extend(whole(requests))) == [10, 10]
    assert_contents(manager, requests)


def test_pairs_of_tokens_are_shared_as_far_as_they_are_known():
    """The pair of a chunk's last token is not: its page is no other's."""
    manager = small_manager(4, 20, is_eagle=True)
    requests = admitted(manager, range(9), [*range(8), 5])
    plan = manager.extend(whole(requests))
    assert plan.num_computed.tolist() == [9, 5]
    manager.run(write_step, plan)
    manager.check_memory(read_device=True)


def test_where_a_step_cannot_read_what_it_writes_the_twin_waits():
    manager = small_manager(4, 30)
    requests = admitted(manager, *[range(10)] * 3)
    plan = manager.extend(whole(requests), share_in_step=False)
    assert plan.requests == (requests[0],)
    assert run(manager, plan) == [10]
    assert run(manager, manager.extend(whole(requests[1:]), share_in_step=False)) == [2, 2]
    assert_contents(manager, requests)


def test_nobody_waits_for_a_prefix_that_is_a_small_part():
    manager = small_manager(4, 30)
    requests = admitted(manager, range(12), [*range(4), *range(40, 50)])
    plan = manager.extend(whole(requests), share_in_step=False)
    assert run(manager, plan) == [12, 14]
    assert_contents(manager, requests)


@pytest.mark.parametrize("page_size", [1, 4])
def test_states_are_not_shared_within_a_step(page_size):
    """The twin waits for the state that the other one leaves where a page ends, and goes on from a copy of it."""
    manager = make_manager(num_states=12, page_size=page_size)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    requests = admitted(manager, prompt, prompt)
    first = [(request, manager.next_chunk(request, 16)) for request in requests]
    plan = manager.extend(first)
    assert plan.requests == (requests[0],)
    run(manager, plan, write_any)
    plan = manager.extend([(request, manager.next_chunk(request, 16)) for request in requests])
    assert plan.prefix_len.tolist() == [9 // page_size * page_size] * 2
    run(manager, plan, write_any)
    for request in requests:
        require_right(manager, request)


def test_a_state_that_others_left_since_is_gone_on_from():
    """The second has computed a part, and has a checkpoint, when the first one's goes further."""
    manager = make_manager(num_states=12)
    prompt = list(range(14))
    first, second = admitted(manager, prompt, prompt)
    run(manager, manager.extend([(second, 4)]), write_any)
    run(manager, manager.extend([(first, 8)]), write_any)  # finds 4, goes on to 12
    assert first.kv_len == 12
    plan = manager.extend([(second, 1)])
    assert plan.prefix_len.tolist() == [12]
    run(manager, plan, write_any)
    require_right(manager, second)
    for request in (first, second):
        manager.finish(request)
    manager.check_memory()


def test_pages_that_have_left_the_window_of_their_request_are_not_taken():
    """They are whole, but private, and what another one needs of them is gone."""
    manager = make_manager(num_window_tokens=60)
    (long,) = admitted(manager, range(8))
    run(manager, manager.extend([(long, 8)]), write_any)
    for token in range(8, 24):
        long.output_ids.append(token)
        manager.run(write_any, manager.decode([long]))
    manager.cache.drop_out_of_window(long)
    long.output_ids += [24, 25, 26, 27, 28]
    short = Request("short", [*range(13), 50])
    manager.admit(short)
    run(manager, manager.extend([(long, 5), (short, short.num_tokens - short.kv_len)]), write_any)
    for request in (long, short):
        require_right(manager, request)


@pytest.mark.parametrize("has_states", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_windows_are_shared_with_their_pages(page_size, has_states):
    manager = make_manager(num_window_tokens=48, num_states=12 if has_states else None, page_size=page_size)
    prompt = [7, *range(13)]
    requests = admitted(manager, prompt, prompt, [*prompt[:9], 50, 51])
    while any(request.kv_len < request.num_tokens for request in requests):
        work = [
            (request, manager.next_chunk(request, 5)) for request in requests if request.kv_len < request.num_tokens
        ]
        run(manager, manager.extend(work), write_any)
        for request in requests:
            if request.kv_len:
                require_right(manager, request)
    for request in requests:
        manager.finish(request)
    manager.check_memory(read_device=True)


def test_a_plan_keeps_its_numbers_when_its_requests_go_on():
    manager = small_manager(4, 30)
    requests = admitted(manager, range(9), range(9))
    plan = manager.extend(whole(requests))
    numbers = plan.prefix_len.copy(), plan.seq_len.copy(), plan.new_pages.copy()
    run(manager, plan)
    for before, now in zip(numbers, (plan.prefix_len, plan.seq_len, plan.new_pages), strict=True):
        np.testing.assert_array_equal(before, now)
