"""Sampled tokens that stay on the device: a step is planned and dispatched before those of the last one are read."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import record, replay
from jaxcache.pages.allocator import PageState
from jaxcache.replay.content import write_step as write_any
from jaxcache.request import Request, RequestState
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.tables.device_table import PENDING_TOKEN
from tests.model.manager_driver import assert_contents, sampling_step, small_manager, write_step
from tests.regressions.test_hybrid_manager_edges import make_manager, require_right
from tests.test_runner import compilations


def next_token(token, length):
    """What `sampling_step` samples."""
    return (token + length) % 2


def started(manager, *prompts):
    """Running requests whose prompt is computed, and the array with their first tokens, which are pending."""
    requests = [Request(str(i), list(prompt)) for i, prompt in enumerate(prompts)]
    for request in requests:
        manager.admit(request)
    work = [(request, request.num_tokens - request.kv_len) for request in requests]
    _, sampled = manager.run(sampling_step, manager.extend(work))
    return requests, sampled


def arrived(requests, sampled):
    for request, token in zip(requests, np.asarray(sampled).tolist(), strict=False):
        request.output_ids.append(token)


def sampling_any(pool, batch):
    pool, _ = write_any(pool, batch)
    sampled = batch.tokens.at[batch.last].get(mode="clip") + 1
    return pool, sampled, sampled


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_step_runs_before_the_tokens_of_the_last_one_are_read(page_size):
    """Ten steps one ahead, a request joining in the middle: what is read late is what was computed."""
    manager = small_manager(page_size, {1: 64, 4: 40, 16: 12}[page_size])
    batch, last = started(manager, range(5), range(20, 27))
    unread = (list(batch), last)
    for step in range(10):
        if step == 4:
            joining = Request("j", [1, 2, 3])
            manager.admit(joining)
            manager.run(write_step, manager.extend([(joining, 3)]))
            joining.output_ids.append(9)  # known to the host: it uploads its own
            batch = [*batch, joining]
        (_, strangers), sampled = manager.run(sampling_step, manager.decode(batch))
        assert int(strangers) == 0
        assert [request.pending for request in batch] == [1 + (request in unread[0]) for request in batch]
        arrived(*unread)
        unread = (list(batch), sampled)
        assert [request.pending for request in batch] == [1] * len(batch)
        manager.check_memory(read_device=True)
    arrived(*unread)
    assert_contents(manager, batch)
    for request in batch:
        known = [*request.origin_input_ids, *request.output_ids]
        first = request.prompt_len + (request is joining)
        for i in range(first, len(known)):
            assert known[i] == next_token(known[i - 1], i)
    assert [len(request.output_ids) for request in batch] == [11, 11, 7]


def test_no_shape_depends_on_the_batch_before():
    """A batch of other requests, of the same size, some known and some pending: nothing compiles again."""
    manager = small_manager(4, 40)
    requests, sampled = started(manager, range(4), range(10, 14), range(20, 24))
    manager.run(sampling_step, manager.decode(requests[:2]))
    arrived(requests[2:], sampled[2:])
    assert not compilations(lambda: manager.run(sampling_step, manager.decode(requests[1:])))


def test_padding_leaves_the_registers_alone():
    """A padded batch: the row that padding is one past, the last, keeps its token."""
    manager = small_manager(4, 40)
    requests, sampled = started(manager, *[[i, i] for i in range(4)])
    others = [request for request in requests if request.req_pool_idx != 3]
    (last,) = [request for request in requests if request.req_pool_idx == 3]
    manager.run(sampling_step, manager.decode(others))
    arrived(requests, sampled)
    assert int(manager.table.next_token[3]) == last.output_ids[-1] == 1


def test_who_has_stopped_leaves_one_slot_that_is_never_inserted():
    """The token that was computed too many is not known: neither the tree nor an event has its page."""
    manager = small_manager(4, 20, enable_kv_cache_events=True)
    (request,), sampled = started(manager, range(7))
    manager.cache.take_events()
    manager.run(sampling_step, manager.decode([request]))  # token 7 fills the second page
    assert (request.kv_len, request.num_tokens, request.pending) == (8, 7, 2)
    manager.finish(request)  # the first token read says stop, and is not kept
    assert manager.cache.match_prefix([*range(7), *np.asarray(sampled)[:1].tolist(), 5]).prefix_len == 4
    assert manager.cache.take_events() == []
    manager.check_memory()
    assert (manager.allocator.states == PageState.PRIVATE).sum() == 0
    assert (request.pending, request.state) == (0, RequestState.DONE)


def test_a_retracted_request_waits_for_its_tokens():
    manager = small_manager(4, 20)
    (request,), first = started(manager, range(7))
    _, second = manager.run(sampling_step, manager.decode([request]))
    with pytest.raises(RequestStateError, match="append what was sampled"):
        manager.retract(request, offload=True)
    manager.retract(request)
    assert (request.pending, request.state) == (2, RequestState.RETRACTED)
    with pytest.raises(RequestStateError, match="waits for 2 tokens"):
        manager.admit(request)
    for sampled in (first, second):
        arrived([request], sampled)
    assert request.pending == 0
    assert manager.admit(request) == 4
    manager.run(write_step, manager.extend([(request, 5)]))
    assert_contents(manager, [request])


def test_a_copy_of_what_is_known_can_be_kept():
    manager = small_manager(4, 20)
    (request,), first = started(manager, range(7))
    manager.retract(request, offload=True)  # a token pending, and none of it computed
    arrived([request], first)
    assert manager.admit(request) == 7
    manager.run(write_step, manager.decode([request]))
    assert_contents(manager, [request])


def test_an_aborted_request_waits_for_nothing():
    manager = small_manager(4, 20)
    (request,), first = started(manager, range(7))
    manager.abort(request)
    arrived([request], first)
    assert request.pending == 0
    manager.check_memory()


def test_an_extend_step_takes_pending_tokens_with_it():
    """A prompt chunk beside requests that decode: these take their tokens from their registers."""
    manager = small_manager(4, 30)
    (request,), first = started(manager, range(7))
    other = Request("o", list(range(50, 60)))
    manager.admit(other)
    plan = manager.extend([(other, 6), (request, 1)])
    assert plan.tokens.tolist() == [*range(50, 56), PENDING_TOKEN]
    (_, strangers), second = manager.run(sampling_step, plan)
    assert int(strangers) == 0
    assert (request.pending, other.pending) == (2, 0)
    arrived([request], first)
    arrived([request], second[1:])
    assert_contents(manager, [request, other])
    with pytest.raises(ArgumentError, match="has 1 tokens, not 2"):
        manager.extend([(request, 2)])


def test_what_the_host_knows_goes_before_what_the_device_has():
    """An engine may append other tokens than were sampled, as long as no step has computed these."""
    manager = small_manager(4, 30)
    (request, other), _ = started(manager, range(7), range(20, 24))
    request.output_ids.append(77)
    plan = manager.decode([request, other])
    assert plan.tokens.tolist() == [77, PENDING_TOKEN]
    manager.run(write_step, plan)
    assert_contents(manager, [request])


def test_without_a_token_there_is_nothing_to_decode():
    manager = small_manager(4, 30)
    (request,), _ = started(manager, range(7))
    manager.run(write_step, manager.decode([request]))  # computes the pending one, and leaves none
    assert request.pending == 1
    with pytest.raises(ArgumentError, match="0 tokens to compute"):
        manager.decode([request])
    with pytest.raises(ArgumentError, match="has 0 tokens, not 1"):
        manager.extend([(request, 1)])


def test_forks_and_registers_of_those_before_are_none():
    manager = small_manager(4, 30, max_running=2)
    (request,), first = started(manager, range(7))
    with pytest.raises(RequestStateError, match="tokens pending"):
        manager.fork(request, 1)
    arrived([request], first)
    manager.finish(request)
    others, _ = [Request("a", [5, 6]), Request("b", [7, 8])], None
    for other in others:  # one of them is in the row of the first
        manager.admit(other)
        assert other.pending == 0


def test_a_loop_starts_with_a_pending_token():
    manager = small_manager(4, 30)
    (request,), first = started(manager, range(7))

    def loop_step(pool, loop):
        return pool, loop, loop.tokens

    plan = manager.decode_loop([request], 2)
    assert plan.tokens.tolist() == [PENDING_TOKEN]
    tokens = manager.run_loop(loop_step, plan)
    assert int(tokens[0]) == int(first[0]) == next_token(6, 7)
    arrived([request], first)
    manager.cancel_loop(plan)
    manager.check_memory()


@pytest.mark.parametrize("page_size", [1, 4])
def test_states_stand_for_pending_tokens_and_are_cached_once_they_are_known(page_size):
    manager = make_manager(num_states=8, page_size=page_size, state_interval=4)
    request = Request("r", list(range(6)))
    manager.admit(request)
    _, unread = None, []
    while request.kv_len < request.num_tokens:
        unread = [manager.run(sampling_any, manager.extend([(request, manager.next_chunk(request, 8))]))]
    for _ in range(7):
        unread.append(manager.run(sampling_any, manager.decode([request])))
        arrived([request], unread.pop(0))
    assert request.kv_len == request.num_tokens == 13
    require_right(manager, request)
    manager.run(sampling_any, manager.decode([request]))  # 14 tokens have KV, 13 are known
    known = [*range(6), *request.output_ids]
    manager.finish(request)
    manager.check_memory()
    again = Request("again", [*known, 1, 2])
    found = manager.admit(again)
    assert found <= 13
    manager.run(write_any, manager.extend([(again, 15 - found)]))
    require_right(manager, again)


def test_an_engines_own_step_says_that_it_has_sampled():
    manager = small_manager(4, 30)
    request = Request("r", list(range(7)))
    manager.admit(request)
    plan = manager.extend([(request, 7)])
    manager.host_batch(plan)
    manager.commit(plan, sampled=True)
    assert request.pending == 1
    assert manager.host_batch(manager.decode([request])).tokens.tolist() == [PENDING_TOKEN]


@pytest.mark.parametrize("sampled", [lambda batch: batch.row[:-1], lambda batch: batch.row * 1.0])
def test_a_step_that_samples_something_else_is_refused(sampled):
    manager = small_manager(4, 30)
    manager.runner.compiled = CompiledSteps()  # which would warn of two lambdas of one line
    request = Request("r", list(range(7)))
    manager.admit(request)
    plan = manager.extend([(request, 7)])
    with pytest.raises(ArgumentError, match="sampled must be integers, one a request"):
        manager.run(lambda pool, batch: (pool, None, jnp.asarray(sampled(batch))), plan)
    manager.run(write_step, plan)
    assert request.pending == 0


def test_a_log_replays_steps_whose_tokens_are_read_late():
    memory = record(small_manager(4, 20).config)
    (request,), first = started(memory, range(7))
    _, second = memory.run(sampling_step, memory.decode([request]))
    arrived([request], first)
    memory.run(sampling_step, memory.decode([request]))
    arrived([request], second)
    again = replay(memory.log)
    assert fingerprint(again) == fingerprint(memory)
    (twin,) = again.running.values()
    assert (twin.pending, request.pending) == (2, 1)  # the log has not been told of the second yet
