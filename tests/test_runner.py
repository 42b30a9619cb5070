"""StepRunner and what it stands on: packed vectors, page-locked uploads, compiled steps that do not pile up."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxcache.device.packing import NOWHERE, Field, Packing
from jaxcache.device.staging import Uploads, fetched
from jaxcache.errors import ArgumentError, BorrowedError, StalePoolError
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.runner import StepRunner
from tests.model.manager_driver import assert_contents, small_manager, write_step

# ---- packed vectors ----------------------------------------------------------------------------------------------


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    fields = tuple(Field(str(i), length, draw(st.sampled_from([0, -1, NOWHERE]))) for i, length in enumerate(lengths))
    parts = {field.name: np.arange(draw(st.integers(0, field.length)), dtype=np.int32) + 100 for field in fields}
    return Packing(fields), parts


@given(packings(), st.booleans())
def test_what_is_packed_is_unpacked_with_its_padding(case, in_place):
    packing, parts = case
    out = np.full(packing.size, 7, np.int32) if in_place else None
    packed = packing.pack(parts, out)
    assert packed.dtype == np.int32
    assert len(packed) == packing.size
    assert (packed is out) == in_place
    found = packing.unpack(packed)
    for field in packing.fields:
        padding = [field.padding] * (field.length - len(parts[field.name]))
        assert found[field.name].tolist() == [*parts[field.name], *padding]


def test_every_packed_vector_is_a_new_one():
    packing = Packing((Field("a", 2),))
    first = packing.pack({"a": np.array([1, 2], np.int32)})
    packing.pack({"a": np.array([3], np.int32)})
    assert first.tolist() == [1, 2]


def test_a_part_that_is_too_long_is_refused():
    with pytest.raises(ArgumentError, match="b: 3 entries do not fit the bucket's 2"):
        Packing((Field("b", 2),)).pack({"b": np.zeros(3, np.int32)})


# ---- uploads -----------------------------------------------------------------------------------------------------


class Result:
    """What a step returned: ready when it is told so, or waited for."""

    def __init__(self):
        self.ready = self.waited_for = False

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        self.ready = self.waited_for = True


def new_uploads(size=3):
    return Uploads(size, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def test_a_slot_is_written_again_only_when_its_reader_is_done():
    uploads, results = new_uploads(), []
    slots = []
    for _ in range(3):
        slots.append(uploads.take())
        results.append(Result())
        uploads.give_back(slots[-1], results[-1])
    assert len(set(map(id, slots))) == 3
    results[1].ready = True
    other = uploads.take()
    assert other not in slots  # the oldest is still read; those behind it will be later than it
    uploads.give_back(other, Result())
    results[0].ready = True
    assert uploads.take() is slots[0]
    assert uploads.take() is slots[1]
    assert not any(result.waited_for for result in results)


def test_the_host_waits_where_too_many_steps_are_in_flight(monkeypatch):
    monkeypatch.setattr("jaxcache.device.staging.MOST_SLOTS", 2)
    uploads, results = new_uploads(), [Result(), Result()]
    slots = [uploads.take()]
    uploads.give_back(slots[0], results[0])
    slots.append(uploads.take())
    uploads.give_back(slots[1], results[1])
    assert uploads.take() is slots[0]
    assert [result.waited_for for result in results] == [True, False]


def test_a_slot_whose_step_failed_is_not_used_again():
    uploads = new_uploads()
    lost = uploads.take()
    assert uploads.take() is not lost


def test_each_step_in_flight_sees_its_own_plan():
    uploads = new_uploads(1000)
    wait = jnp.zeros((300, 300))

    @jax.jit
    def slow(array, wait):
        packed = fetched(array)
        return packed, jnp.sum(packed) + (wait @ wait @ wait).sum().astype(jnp.int32)

    sums = []
    for i in range(100):
        slot = uploads.take()
        slot.values[:] = i
        slot.fill_copies()
        packed, total = slow(slot.array, wait)
        uploads.give_back(slot, packed)
        sums.append(total)
    assert [int(total) for total in sums] == [1000 * i for i in range(100)]


# ---- compiled steps ----------------------------------------------------------------------------------------------


def test_steps_that_are_made_anew_do_not_pile_up():
    compiled, built = CompiledSteps(max_functions=3), []

    def find(step, shape="a"):
        return compiled.find(step, shape, lambda: built.append((step, shape)) or len(built))

    kept, others = object(), [object() for _ in range(10)]
    first = find(kept)
    for other in others:
        find(other)
        assert find(kept) == first  # used all the time
        assert len(compiled) <= 3
    assert find(kept, "b") != first
    assert find(kept) == first
    count = len(built)
    find(others[-1])
    assert len(built) == count
    find(others[0])
    assert built[-1] == (others[0], "a")  # gone, and so built once more


def test_a_step_that_went_is_compiled_again():
    manager = small_manager()
    manager.runner.compiled = CompiledSteps(max_functions=1)
    request = Request("r", list(range(6)))
    manager.admit(request)
    for count, step in ((2, write_step), (1, lambda *args: write_step(*args)), (3, write_step)):
        manager.run(step, manager.extend([(request, count)]))
    assert len(manager.runner.compiled) == 1
    assert_contents(manager, [request])


# ---- the runner's own pools --------------------------------------------------------------------------------------


def planned(manager):
    request = Request("r", list(range(6)))
    manager.admit(request)
    return request, manager.extend([(request, 6)])


def test_a_pool_that_somebody_consumed_is_named():
    manager = small_manager()
    _, plan = planned(manager)
    jax.jit(lambda pool: jax.tree.map(lambda array: array + 1, pool), donate_argnums=0)(manager.pool)
    with pytest.raises(StalePoolError, match="MHATokenToKVPool was consumed"):
        manager.run(write_step, plan)
    assert not manager.table.is_stale


def test_a_borrowed_pool_is_not_donated_and_the_plan_runs_afterwards():
    manager = small_manager()
    request, plan = planned(manager)
    pool = manager.pool
    pool.mark_borrowed()
    with pytest.raises(BorrowedError):
        manager.run(write_step, plan)
    assert not pool.is_stale
    pool.unmark_borrowed()
    manager.run(write_step, plan)
    assert_contents(manager, [request])


def test_a_pool_with_views_keeps_them():
    """Bound to its device, it was another pool, and whoever looked into its memory was told of no step."""
    source = small_manager()
    pool = source.pool
    pool.mark_borrowed()
    runner = StepRunner(pool, source.req_to_token_pool)
    assert runner.pool is pool
    assert runner.pool.is_shared
    pool.unmark_borrowed()
    assert StepRunner(pool, source.req_to_token_pool).pool.k.unsafe_buffer_pointer() == pool.k.unsafe_buffer_pointer()


def test_an_error_of_the_step_itself_stays_what_it_is():
    manager = small_manager()
    request, plan = planned(manager)

    def failing(pool, batch):
        raise ValueError("of the step")

    with pytest.raises(ValueError, match="of the step"):
        manager.run(failing, plan)
    manager.run(write_step, plan)
    assert_contents(manager, [request])
