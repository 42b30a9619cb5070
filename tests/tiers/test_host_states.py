"""The states of host pages against the table of the specification, in random lives and case by case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError
from jaxcache.tiers.host_layout import HostArray, HostLayout, HostShape
from jaxcache.tiers.host_pool import HostPool
from jaxcache.tiers.host_states import HostState

SIZE = 4
IDLE, RESERVED, PROTECTED, SYNCED, BACKUP = range(5)
# What the specification allows (11.2), by the name that a transition has here: from, to.
TRANSITIONS = {
    "free": ({RESERVED, SYNCED, BACKUP}, IDLE),
    "evicted_on_device": ({SYNCED}, BACKUP),
    "adopted_on_device": ({BACKUP}, SYNCED),
    "landed": ({RESERVED}, BACKUP),
    "start_backup": ({RESERVED}, PROTECTED),
    "start_load": ({BACKUP}, PROTECTED),
    "end_transfer": ({PROTECTED}, SYNCED),
}


def make_pool(size: int = SIZE, layout: HostLayout = HostLayout.PAGE_FIRST) -> HostPool:
    shape = HostShape("kv", 0, 0, layers=2, rows=3, row=(4,), dtype=np.dtype(np.uint8))
    return HostPool("full", size, layout, [HostArray(shape, layout, np.zeros(size * 24, np.uint8))], device_ids=size)


def apply(pool: HostPool, name: str, ids: np.ndarray) -> None:
    if name == "start_backup":
        pool.start_transfer(ids, HostState.RESERVED)
    elif name == "start_load":
        pool.start_transfer(ids, HostState.BACKUP)
    else:
        getattr(pool, name)(ids)


# Mostly known ids, now and then one twice, or one that there is not.
IDS = st.lists(st.integers(1, SIZE), min_size=1, max_size=2) | st.lists(st.integers(-1, SIZE + 1), max_size=3)


class HostLife(RuleBasedStateMachine):
    """Any calls in any order: what the table allows happens, what it does not is refused and changes nothing."""

    def __init__(self):
        super().__init__()
        self.pool, self.states = make_pool(), [IDLE] * (SIZE + 1)
        self.free = list(range(1, SIZE + 1))  # first in, first out

    @rule(count=st.integers(0, SIZE + 1))
    def alloc(self, count):
        ids = self.pool.alloc(count)
        if count > len(self.free):
            assert ids is None
            return
        wanted, self.free = self.free[:count], self.free[count:]
        assert ids is not None and ids.dtype == np.int32 and ids.tolist() == wanted
        for i in wanted:
            self.states[i] = RESERVED

    @rule(name=st.sampled_from(sorted(TRANSITIONS)), ids=IDS)
    def transition(self, name, ids):
        sources, target = TRANSITIONS[name]
        known = all(1 <= i <= SIZE for i in ids)
        if known and len(set(ids)) == len(ids) and all(self.states[i] in sources for i in ids):
            apply(self.pool, name, np.array(ids, np.int32))
            for i in ids:
                self.states[i] = target
            self.free += ids if target == IDLE else []
        else:
            with pytest.raises(OwnershipError):
                apply(self.pool, name, np.array(ids, np.int32))

    @rule(i=st.integers(1, SIZE))
    def look(self, i):
        for call, sources in ((self.pool.payload, {SYNCED, BACKUP}), (self.pool.payload_target, {RESERVED})):
            if self.states[i] in sources:
                assert sum(map(len, call(i))) == self.pool.page_bytes == 24
            else:
                with pytest.raises(OwnershipError):
                    call(i)

    @rule()
    def clear(self):
        if PROTECTED in self.states:
            with pytest.raises(OwnershipError):
                self.pool.clear()
        else:
            self.pool.clear()
            self.states, self.free = [IDLE] * (SIZE + 1), list(range(1, SIZE + 1))

    @invariant()
    def same(self):
        assert self.pool.states.tolist() == self.states
        assert self.pool.available() == len(self.free)
        self.pool.check()


def test_any_life_of_a_host_pool_is_that_of_the_specification():
    run_state_machine_as_test(HostLife, settings=settings(max_examples=40, stateful_step_count=40))


def test_the_numbers_are_those_of_sglang():
    names = ["IDLE", "RESERVED", "PROTECTED", "SYNCED", "BACKUP"]
    assert {state.name: state.value for state in HostState} == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize(("name", "state"), list(itertools.product(TRANSITIONS, range(5))))
def test_every_transition_from_every_state(name, state):
    """S-31: SGLang checks none of them unless it logs at debug level, and answers True to every question."""
    pool = make_pool()
    ids = in_state(pool, state)
    sources, target = TRANSITIONS[name]
    if state in sources:
        apply(pool, name, ids)
        assert (pool.states[ids] == target).all()
    else:
        with pytest.raises(DoubleFreeError if state == IDLE else OwnershipError, match=HostState(state).name):
            apply(pool, name, ids)
        assert (pool.states[ids] == state).all()


def in_state(pool: HostPool, state: int) -> np.ndarray:
    ids = pool.alloc(2)
    assert ids is not None
    for name in {
        IDLE: ["free"],
        RESERVED: [],
        PROTECTED: ["start_backup"],
        SYNCED: ["start_backup", "end_transfer"],
        BACKUP: ["landed"],
    }[state]:
        apply(pool, name, ids)
    return ids


def test_ids_of_several_states_are_refused_as_a_whole():
    pool = make_pool(6)
    ids = pool.alloc(3)
    assert ids is not None
    pool.landed(ids[:1])
    with pytest.raises(OwnershipError, match=r"ids: every host page must be RESERVED, but host page 1 is BACKUP"):
        pool.landed(ids)
    assert pool.states.tolist() == [IDLE, BACKUP, RESERVED, RESERVED, IDLE, IDLE, IDLE]


def test_a_page_is_not_freed_twice():
    pool = make_pool()
    ids = pool.alloc(2)
    for freed in (np.array([1, 1]), np.array([1, 2, 1])):
        with pytest.raises(DoubleFreeError, match="host page 1 is named twice"):
            pool.free(freed)
    pool.free(ids)
    with pytest.raises(DoubleFreeError, match="IDLE"):
        pool.free(ids)
    assert pool.available() == SIZE


def test_a_pool_is_not_cleared_under_a_transfer():
    pool = make_pool()
    ids = in_state(pool, PROTECTED)
    for call in (pool.clear, pool.require_idle):
        with pytest.raises(OwnershipError, match=f"host page {ids[0]} is PROTECTED"):
            call()
    assert (pool.states[ids] == PROTECTED).all()


def test_pages_are_whole_whatever_was_freed_in_which_order():
    """S-32: SGLang's host pages are runs of slots, whole only if all frees come page by page, in order."""
    pool = make_pool(4)
    ids = pool.alloc(4)
    assert ids is not None
    for i in (3, 1, 4, 2):
        pool.free(np.array([i]))
    again = pool.alloc(4)
    assert again is not None and again.tolist() == [3, 1, 4, 2]
    for i in again.tolist():
        for piece in pool.payload_target(i):
            np.frombuffer(piece, np.uint8)[:] = i
    pool.landed(again)
    assert all(set(b"".join(pool.payload(i))) == {i} for i in again.tolist())


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([[1]]), np.array(1), ["a"], np.array([True])])
def test_what_is_no_list_of_ids_is_refused(ids):
    pool = make_pool()
    pool.alloc(2)
    with pytest.raises(ArgumentError, match="ids"):
        pool.free(ids)


@pytest.mark.parametrize("count", [-1, 1.0, "1", None, True])
def test_what_is_no_count_is_refused(count):
    with pytest.raises(ArgumentError, match="count"):
        make_pool().alloc(count)


def test_states_are_a_view_that_nobody_writes_to():
    pool = make_pool()
    states = pool.states
    pool.alloc(1)
    assert states[1] == RESERVED
    with pytest.raises(ValueError, match="read-only"):
        states[1] = SYNCED


PIECES = {HostLayout.LAYER_FIRST: 2, HostLayout.PAGE_FIRST: 6, HostLayout.PAGE_FIRST_DIRECT: 1}


@pytest.mark.parametrize("layout", HostLayout)
def test_a_payload_is_in_one_order_in_as_few_pieces_as_can_be(layout):
    pool = make_pool(3, layout)
    ids = pool.alloc(3)
    assert ids is not None
    for i in (1, 2, 3):
        counted = iter(range(24 * i, 24 * i + 24))
        pieces = pool.payload_target(i)
        assert (
            len(pieces)
            == {HostLayout.LAYER_FIRST: 2, HostLayout.PAGE_FIRST: 6, HostLayout.PAGE_FIRST_DIRECT: 1}[layout]
        )
        for piece in pieces:
            piece[:] = bytes(itertools.islice(counted, len(piece)))
    pool.landed(ids)
    (array,) = pool.arrays
    by_layout = {
        HostLayout.LAYER_FIRST: array.buffer.reshape(2, 3, 3, 4)[:, 1],
        HostLayout.PAGE_FIRST: array.buffer.reshape(3, 3, 2, 4)[1].swapaxes(0, 1),
        HostLayout.PAGE_FIRST_DIRECT: array.buffer.reshape(3, 2, 3, 4)[1],
    }
    np.testing.assert_array_equal(by_layout[layout].reshape(-1), np.arange(48, 72))
    assert b"".join(pool.payload(2)) == bytes(range(48, 72))
    assert all(piece.readonly for piece in pool.payload(2))


def test_a_broken_free_list_is_found():
    pool = make_pool()
    pool.alloc(2)
    pool._states._states[1] = IDLE
    with pytest.raises(CacheError, match="1"):
        pool.check()
