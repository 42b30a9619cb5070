"""Plans and the rows they stand on: stamps, batches that decode step after step, and what interrupts them."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.replay import content
from jaxcache.request import Request
from jaxcache.tables.request_table import ReqToTokenPool
from tests.model.manager_driver import assert_contents, small_manager, write_step


def prefilled(manager, tokens, rid="r"):
    request = Request(rid, tokens)
    assert manager.admit(request) is not None
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    return request


def sample(*requests, token=7):
    for request in requests:
        request.output_ids.append(token)


# ---- stamps ------------------------------------------------------------------------------------------------------

CHANGES = {
    "alloc": lambda table: table.alloc(1),
    "free": lambda table: table.free(0),
    "write_pages": lambda table: table.write_pages(0, 1, np.array([5], np.int32)),
    "write": lambda table: table.write((0, slice(4, 8)), np.arange(4, 8)),
    "append_pages": lambda table: table.append_pages(np.array([0]), np.array([6], np.int32)),
    "commit": lambda table: table.commit(np.array([0]), np.array([3], np.int32)),
    "touch": lambda table: table.touch(0),
    "clear": lambda table: table.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_stamp_is_outdated_by_a_change_of_its_rows_alone(name):
    table = ReqToTokenPool(4, 32, 4)
    mine, other = table.alloc(2)
    assert (mine, other) == (0, 1)
    stamps = {row: table.stamp(np.array([row])) for row in range(4)}
    both = [table.stamp(np.array(rows)) for rows in ([0, 1], [1, 0])]
    CHANGES[name](table)
    changed = {"alloc": {2}, "clear": {0, 1, 2, 3}}.get(name, {0})
    assert {row for row, stamp in stamps.items() if not table.is_current(stamp)} == changed
    assert [table.is_current(stamp) for stamp in both] == [not changed & {0, 1}] * 2


def test_a_change_to_and_fro_is_a_change():
    table = ReqToTokenPool(2, 32, 4)
    (row,) = table.alloc(1)
    stamp = table.stamp(np.array([row]))
    table.commit(np.array([row]), np.array([4], np.int32))
    table.commit(np.array([row]), np.array([0], np.int32))
    assert not table.is_current(stamp)


def test_lengths_that_a_request_sets_are_changes_of_its_row():
    table = ReqToTokenPool(2, 32, 4)
    request = Request("r", [1])
    request.enter(table, *table.alloc(1))
    for name in ("kv_len", "num_pages"):
        stamp = table.stamp(np.array([request.req_pool_idx]))
        assert table.is_current(stamp)
        setattr(request, name, 1)
        assert not table.is_current(stamp)


def test_a_stamp_of_another_table_is_never_current():
    one, other = ReqToTokenPool(2, 32, 4), ReqToTokenPool(2, 32, 4)
    assert not other.is_current(one.stamp(np.array([0])))


def test_a_plan_of_another_manager_is_refused_though_its_rows_look_the_same():
    managers = [small_manager(), small_manager()]
    plans = []
    for manager in managers:
        request = Request("r", list(range(6)))
        manager.admit(request)
        plans.append(manager.extend([(request, 6)]))
    with pytest.raises(RequestStateError):
        managers[0].run(write_step, plans[1])
    managers[0].run(write_step, plans[0])
    assert_contents(managers[0], list(managers[0].running.values()))


def test_a_plan_from_before_a_decode_loop_is_refused_during_and_after_it():
    manager = small_manager()
    request = prefilled(manager, list(range(6)))
    sample(request)
    plan = manager.decode([request])
    loop = manager.decode_loop([request], 2)
    with pytest.raises(RequestStateError, match="in a decode loop"):
        manager.run(write_step, plan)
    with pytest.raises(RequestStateError, match="in a decode loop"):
        manager.decode([request])
    manager.cancel_loop(loop)
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, plan)
    manager.run(write_step, manager.decode([request]))
    assert_contents(manager, [request])


# ---- batches that decode step after step -------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_many_steps_of_one_batch(page_size):
    manager = small_manager(page_size, num_pages={1: 64, 4: 40, 16: 12}[page_size], max_context_len=64)
    requests = [prefilled(manager, [i] * (1 + i), rid=str(i)) for i in range(3)]
    for token in range(15):
        sample(*requests, token=token)
        manager.run(write_step, manager.decode(requests))
        assert_contents(manager, requests)


def test_a_first_decode_may_compute_a_prompt_of_one_token():
    manager = small_manager()
    requests = [Request(str(i), [i + 1]) for i in range(2)]
    for request in requests:
        manager.admit(request)
    manager.run(write_step, manager.decode(requests))
    for _ in range(6):
        sample(*requests)
        manager.run(write_step, manager.decode(requests))
        assert_contents(manager, requests)


def test_what_happens_to_a_request_between_two_steps_is_seen():
    """A retraction, another batch, an extend and a cancelled plan: the batch before goes on from where it is now."""
    manager = small_manager(num_pages=30, max_context_len=64)
    a, b, c = (prefilled(manager, [i] * (3 + i), rid=str(i)) for i in range(3))
    for step in range(12):
        sample(a, b, c, token=step)
        plan = manager.decode([a, b, c])
        if step == 2:
            manager.cancel(plan)
            manager.run(write_step, manager.decode([a, c]))
            plan = manager.decode([b])
        elif step == 4:
            manager.cancel(plan)
            manager.retract(b, offload=True)
            assert manager.admit(b) is not None
            plan = manager.decode([a, b, c])
        elif step == 6:
            manager.cancel(plan)
            plan = manager.extend([(request, 1) for request in (c, b, a)])
        elif step == 8:
            twin = manager.decode([a, b, c]) if not len(plan.new_pages) else None
            manager.run(write_step, plan)
            if twin is not None:
                with pytest.raises(RequestStateError, match="plan again"):
                    manager.run(write_step, twin)
            continue
        manager.run(write_step, plan)
        assert_contents(manager, [a, b, c])


def test_a_step_of_others_between_two_of_a_batch_takes_it_no_further():
    manager = small_manager()
    batch = [prefilled(manager, [i] * 6, rid=str(i)) for i in range(2)]
    other = Request("other", [9] * 16)
    manager.admit(other)
    for token in range(4):
        sample(*batch, token=token)
        manager.run(write_step, manager.decode(batch))
        manager.run(write_step, manager.extend([(other, 4)]))
        assert_contents(manager, [*batch, other])


def test_a_plan_keeps_its_numbers_when_the_next_one_is_made():
    manager = small_manager()
    requests = [prefilled(manager, [i] * 4, rid=str(i)) for i in range(2)]
    plans = []
    for _ in range(5):
        sample(*requests)
        plans.append(manager.decode(requests))
        manager.run(write_step, plans[-1])
    assert [plan.seq_len.tolist() for plan in plans] == [[5 + i] * 2 for i in range(5)]
    assert [plan.prefix_len.tolist() for plan in plans] == [[4 + i] * 2 for i in range(5)]
    for before, after in itertools.pairwise(plans):
        row_pages = manager.req_to_token_pool.pages[before.row, before.prefix_len // 4]
        assert after.last_loc.tolist() == (row_pages * 4 + before.prefix_len % 4).tolist()


@pytest.mark.parametrize(("more", "left"), [(0, 0), (2, 2)])
def test_each_step_has_one_token_a_request_to_compute(more, left):
    manager = small_manager()
    a, b = prefilled(manager, [1] * 3, "a"), prefilled(manager, [2] * 3, "b")
    sample(a, b)
    manager.run(write_step, manager.decode([a, b]))
    sample(a)
    sample(*[b] * more)
    with pytest.raises(ArgumentError, match=f"b has {left} tokens to compute"):
        manager.decode([a, b])


def test_a_batch_stops_at_the_context_length():
    manager = small_manager(max_context_len=8, chunk=8)
    a, b = prefilled(manager, [1] * 5, "a"), prefilled(manager, [2] * 3, "b")
    for _ in range(3):
        sample(a, b)
        manager.run(write_step, manager.decode([a, b]))
    sample(a, b)
    free = manager.allocator.free_pages.tolist()
    with pytest.raises(ArgumentError, match="request a would have 9 tokens, max_context_len is 8"):
        manager.decode([a, b])
    assert manager.allocator.free_pages.tolist() == free
    manager.run(write_step, manager.decode([b]))


def test_a_batch_waits_for_memory_and_goes_on():
    manager = small_manager(num_pages=3)
    a, b = prefilled(manager, [1] * 4, "a"), prefilled(manager, [2] * 4, "b")
    sample(a, b)
    assert manager.decode([a, b]) is None
    assert manager.decode([a, b]) is None
    manager.finish(b)
    manager.run(write_step, manager.decode([a]))
    for _ in range(4):
        sample(a)
        manager.run(write_step, manager.decode([a]))
    assert_contents(manager, [a])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_batches_and_interruptions(data):
    manager = small_manager(num_pages=30, max_context_len=64)
    requests = [prefilled(manager, [i] * data.draw(st.integers(1, 9)), rid=str(i)) for i in range(3)]
    for _ in range(data.draw(st.integers(1, 14))):
        batch = data.draw(st.permutations(requests))[: data.draw(st.integers(1, 3))]
        sample(*batch)
        plan = manager.decode(batch)
        match data.draw(st.sampled_from(["run"] * 6 + ["cancel", "retract", "extend"])):
            case "cancel":
                manager.cancel(plan)
                plan = manager.decode(batch)
            case "retract":
                manager.cancel(plan)
                manager.retract(batch[0], offload=True)
                assert manager.admit(batch[0]) is not None
                plan = manager.decode(batch)
            case "extend":
                manager.cancel(plan)
                plan = manager.extend([(request, 1) for request in batch])
        manager.run(write_step, plan)
    assert_contents(manager, requests)


# ---- reset -------------------------------------------------------------------------------------------------------


def test_reset_forgets_everything_once_nobody_runs():
    manager = small_manager(num_pages=40)
    request = prefilled(manager, list(range(9)))
    before = manager.allocator.free_pages.tolist()
    with pytest.raises(RequestStateError, match="1 requests are running: finish, retract or abort them first"):
        manager.reset()
    assert manager.allocator.free_pages.tolist() == before
    assert_contents(manager, [request])
    manager.finish(request)
    assert manager.cache.evictable_size() == 8
    manager.reset()
    manager.check_memory(read_device=True)
    assert manager.cache.total_size() == 0
    assert manager.allocator.available_size() == manager.allocator.size
    assert manager.req_to_token_pool.available_size() == manager.req_to_token_pool.size
    again = Request("again", list(range(9)))
    assert manager.admit(again) == 0
    manager.run(write_step, manager.extend([(again, 9)]))
    assert_contents(manager, [again])


def test_reset_refuses_while_a_loop_is_open():
    manager = small_manager()
    request = prefilled(manager, list(range(6)))
    sample(request)
    loop = manager.decode_loop([request], 2)
    with pytest.raises(RequestStateError):
        manager.reset()
    manager.cancel_loop(loop)
    manager.finish(request)
    manager.reset()
    manager.check_memory()


def test_reset_takes_windows_and_states_back():
    kv = MHAConfig(size=32, page_size=4, dtype=jnp.float32, layer_num=1, head_num=1, head_dim=2)
    swa = SWAConfig(full=kv, window=kv, full_layers=(0,), window_layers=(1,))
    shapes = {"conv_shape": (2, 3), "temporal_shape": (1, 2, 2), "conv_dtype": jnp.float32}
    states = MambaConfig(num_states=6, layer_num=1, temporal_dtype=jnp.float32, **shapes)
    config = MemoryConfig(swa, 2, 16, chunk=16, sliding_window_size=6, states=states)
    manager = init_memory_pool_and_cache(config)
    allocator = manager.allocator
    free = allocator.full_available_size(), allocator.swa_available_size(), manager.cache.usage("state")[1]
    request = Request("r", list(range(8)))
    manager.admit(request)
    manager.run(content.write_step, manager.extend([(request, 8)]))
    manager.finish(request)
    assert manager.cache.total_size()
    manager.reset()
    manager.check_memory(read_device=True)
    assert manager.cache.total_size() == 0
    assert (allocator.full_available_size(), allocator.swa_available_size(), manager.cache.usage("state")[1]) == free
    manager.runner.send_changes()
    assert not np.asarray(manager.pool.kv.full_to_window).any()
