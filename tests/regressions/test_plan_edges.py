"""Plans and requests that the manager once took at their word, and should not have."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.pages.allocator import PageState
from jaxcache.request import Request, RequestState
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.tables.request_table import ReqToTokenPool
from tests.model.manager_driver import assert_contents, small_manager, write_step


def admitted(manager, tokens, rid="r", **options):
    request = Request(rid, tokens, **options)
    assert manager.admit(request) is not None
    return request


def compute(manager, request, count):
    manager.run(write_step, manager.extend([(request, count)]))


def books(manager):
    return (
        manager.allocator.states.tolist(),
        manager.allocator.free_pages.tolist(),
        manager.cache.total_size(),
        manager.req_to_token_pool.pages.tolist(),
    )


# ---- plans -------------------------------------------------------------------------------------------------------


def test_a_cancelled_plan_does_not_run_in_place_of_the_next_one():
    """It passed for the next plan of the same length, and wrote into pages that another request had got meanwhile."""
    manager = small_manager()
    first, second = admitted(manager, [1] * 8, "1"), admitted(manager, [2] * 8, "2")
    cancelled = manager.extend([(first, 8)])
    manager.cancel(cancelled)
    compute(manager, second, 8)  # in the pages of the cancelled plan
    plan = manager.extend([(first, 8)])
    assert set(cancelled.new_pages) & set(manager.req_to_token_pool.row_pages(second.req_pool_idx, 0, 2))
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, cancelled)
    manager.run(write_step, plan)
    assert_contents(manager, [first, second])
    manager.check_memory()


def test_a_plan_from_before_a_retraction_does_not_write_into_the_old_page():
    """Loaded back from the host, a request has its old length and row, but another last page."""
    manager = small_manager()
    request = admitted(manager, list(range(6)))
    compute(manager, request, 6)
    request.output_ids.append(7)
    plan = manager.decode([request])  # takes no page: the last one has room
    manager.retract(request, offload=True)
    taken = manager.allocator.alloc_pages(1)  # the old last page has another owner by now
    size = manager.req_to_token_pool.size
    while request.req_pool_idx != plan.row[0]:
        if request.state is RequestState.RUNNING:
            manager.retract(request, offload=True)
        assert manager.admit(request) == 6
        size -= 1
        assert size >= 0
    assert plan.last_loc[0] // manager.page_size == taken[0]
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, plan)
    manager.allocator.release(taken, PageState.PRIVATE)
    assert_contents(manager, [request])


def test_a_cancelled_plan_that_took_no_pages_does_not_run_either():
    """Nothing in the table told it from one that was not cancelled: it ran, beside the plan that came after it."""
    manager = small_manager()
    request = admitted(manager, list(range(6)))
    compute(manager, request, 5)
    for plan in (manager.extend([(request, 1)]), manager.decode([request])):
        assert not len(plan.new_pages)
        manager.cancel(plan)
        with pytest.raises(RequestStateError, match="plan again"):
            manager.run(write_step, plan)
        assert request.kv_len == 5
    manager.run(write_step, manager.decode([request]))
    assert_contents(manager, [request])
    manager.check_memory()


def test_one_request_that_ends_does_not_strand_the_others_of_its_plan():
    """Neither run nor cancel took the plan any more, and the others could do nothing but end."""
    manager = small_manager()
    first, second = admitted(manager, [1] * 8, "1"), admitted(manager, [2] * 8, "2")
    plan = manager.extend([(first, 8), (second, 8)])
    manager.abort(first)
    with pytest.raises(RequestStateError):
        manager.run(write_step, plan)
    manager.cancel(plan)
    manager.check_memory()
    compute(manager, second, 8)
    assert_contents(manager, [second])
    manager.finish(second)
    with pytest.raises(RequestStateError):
        manager.cancel(plan)


@pytest.mark.parametrize(
    "wrong", [lambda pool, out: pool, lambda pool, out: (out, pool), lambda pool, out: (pool.k, out)]
)
def test_a_step_that_returns_no_pool_loses_none(wrong):
    """What stood in the place of the pool became the manager's, and every page was gone."""
    manager = small_manager()
    manager.runner.compiled = CompiledSteps()  # which would warn of three lambdas of one line
    request = admitted(manager, list(range(6)))
    plan = manager.extend([(request, 6)])
    pool = manager.pool
    with pytest.raises(ArgumentError, match="step must return"):
        manager.run(lambda pool, batch: wrong(*write_step(pool, batch)), plan)
    assert manager.pool is pool
    assert not pool.is_stale
    manager.run(write_step, plan)
    assert_contents(manager, [request])


def test_a_step_that_does_not_fit_evicts_nothing():
    """All that was cached went, and the answer was None all the same."""
    manager = small_manager(num_pages=8)
    done = admitted(manager, [1] * 8, "1")
    compute(manager, done, 8)
    manager.finish(done)
    long, held = admitted(manager, [2] * 24, "2"), admitted(manager, [3] * 12, "3")
    compute(manager, held, 12)
    before = books(manager)
    assert manager.cache.evictable_size() == 8
    assert manager.extend([(long, 24)]) is None
    assert books(manager) == before


# ---- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", [2**31, -(2**31) - 1])
def test_a_tag_that_does_not_fit_takes_no_pages(tag):
    """It ended in an OverflowError, after the pages were taken."""
    with pytest.raises(ArgumentError, match="tag of request r must fit int32"):
        Request("r", [1], tag=tag)
    manager = small_manager()
    request = Request("r", list(range(6)))
    with pytest.raises(ArgumentError, match="tag of request r must fit int32"):
        request.tag = tag
    assert request.tag == 0
    manager.admit(request)
    compute(manager, request, 6)
    manager.finish(request)


@pytest.mark.parametrize("token", [3.7, 2**31, "12", None])
def test_a_sampled_token_that_is_none_is_not_computed_and_its_request_can_end(token):
    """3.7 was computed as 3 and 2**31 as its negative; then the request could be neither finished nor aborted."""
    manager = small_manager()
    request = admitted(manager, list(range(6)))
    compute(manager, request, 6)
    before = books(manager)
    for add in (request.output_ids.append, lambda token: request.output_ids.extend([1, token])):
        with pytest.raises(ArgumentError, match="token"):
            add(token)
    with pytest.raises(ArgumentError, match="token"):
        request.output_ids += [1, token]
    with pytest.raises(ArgumentError, match="token"):
        Request("r", [1], output_ids=[token])
    assert request.output_ids == []
    assert books(manager) == before
    manager.abort(request)
    assert request.state is RequestState.DONE
    manager.check_memory()


def test_tokens_taken_back_are_refused():
    """The key grew by tokens it had already, and what was computed was cached under it."""
    request = Request("r", [1, 2, 3])
    request.output_ids += [4, 5]
    assert request.key == RadixKey([1, 2, 3, 4, 5])
    with pytest.raises(RequestStateError, match="output_ids only grows"):
        request.output_ids.pop()
    assert request.key == RadixKey([1, 2, 3, 4, 5])


def test_what_becomes_of_the_callers_prompt_does_not_matter():
    prompt = [1, 2, 3]
    request = Request("r", prompt)
    prompt.append(4)
    request.output_ids.append(9)
    assert (request.num_tokens, request.num_cacheable, request.key) == (4, 3, RadixKey([1, 2, 3, 9]))


def test_a_packed_prompt_is_counted_in_tokens():
    assert Request("r", np.arange(5, dtype="<i4").tobytes()).num_tokens == 5


def test_a_key_as_prompt_does_not_lose_its_namespace():
    with pytest.raises(ArgumentError, match="namespace"):
        Request("r", RadixKey([1, 2], extra_key=Namespace(lora_id="a")))


@pytest.mark.parametrize("field", ["priority", "tag", "logprob_start_len"])
@pytest.mark.parametrize("value", ["1", 1.0])
def test_the_numbers_of_a_request_are_integers(field, value):
    with pytest.raises(ArgumentError, match=f"{field} of request r must be an integer"):
        Request("r", [1], **{field: value})


# ---- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [[2**32 + 4, 2**32 + 5], [-4, -3], [4.0, 5.0], [[4, 5]], [True, False]])
def test_the_table_takes_slots_only(slots):
    """2**32 + 4 was stored as 4, somebody else's slot; -4 as page -1."""
    table = ReqToTokenPool(2, 16, 4)
    table.alloc(2)
    with pytest.raises(ArgumentError, match=r"values(: every slot)? must"):
        table.write((0, slice(0, 2)), np.array(slots))
    assert not table.pages.any()
    for indices in ((0, 0), (np.array([0, 1]), np.array([0, 0])), (1.0, slice(0, 2))):
        with pytest.raises(ArgumentError, match="indices must be"):
            table.write(indices, np.array([4, 5]))


@pytest.mark.parametrize("count", [-1, 1.0, None, "1"])
def test_rows_are_counted_in_integers(count):
    table = ReqToTokenPool(2, 16, 4)
    with pytest.raises(ArgumentError, match="need_size"):
        table.alloc(count)
    assert table.available_size() == 2
    with pytest.raises(ArgumentError, match="must be integers"):
        ReqToTokenPool(2, count, 4)
