"""Rows that own states: each state has one row, and no row is freed with a state in it."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError, RequestStateError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool


def books(table):
    return [array.tolist() for array in (table.state, table.state_from, table.saved, table.saved_len)], table.free_rows


def test_a_row_is_given_a_state_and_snapshots_and_gives_them_back():
    table = HybridReqToTokenPool(3, 64, page_size=4)
    first, second = table.alloc(2)
    table.set_state(first, 5, 0)
    table.set_state(second, 6, 9)
    assert (table.state[[0, 1, 2]].tolist(), table.state_from.tolist()) == ([5, 6, 0], [0, 9, NO_COPY])
    src, dst = table.state_copies([second, first])
    assert sorted(zip(src.tolist(), dst.tolist(), strict=True)) == [(0, 5), (9, 6)]
    assert [a.tolist() for a in table.state_copies([first])] == [[0], [5]]
    table.copied([first, second])
    assert all(not len(a) for a in table.state_copies([first, second]))
    table.set_saved(first, 7, 8)
    assert (table.saved.tolist(), table.saved_len.tolist()) == ([7, 0, 0], [8, 0, 0])
    assert table.held_states.tolist() == [5, 6, 7]
    assert table.take_saved(first) == (7, 8)
    assert table.take_saved(first) == (0, 0)
    table.set_saved(first, 8, 12)
    assert table.take_states(first).tolist() == [5, 8]
    assert table.take_states(first).tolist() == []
    table.save_working(second, 64)
    assert (table.state[second], table.saved[second], table.saved_len[second]) == (0, 6, 64)
    assert table.take_states(second).tolist() == [6]
    table.free([first, second])
    assert books(table) == (*books(HybridReqToTokenPool(3, 64, page_size=4))[:1], [2, 0, 1])


def test_a_state_that_is_reused_is_read_before_it_is_overwritten():
    """State 5 is row 1's source, was let go since, and is row 0's working state now: row order would empty it first."""
    table = HybridReqToTokenPool(2, 64)
    table.alloc(2)
    table.set_state(1, 9, 5)
    table.set_state(0, 5, 0)
    src, dst = table.state_copies([0, 1])
    assert list(zip(src.tolist(), dst.tolist(), strict=True)) == [(5, 9), (0, 5)]


def test_a_request_that_comes_back_with_its_state_needs_no_copy():
    table = HybridReqToTokenPool(2, 64)
    (row,) = table.alloc(1)
    table.set_state(row, 3, NO_COPY)
    assert not len(table.state_copies([row])[0])
    table.set_saved(row, 4, 1)


def test_the_arrays_are_read_only_and_live():
    table = HybridReqToTokenPool(2, 64)
    views = table.state, table.state_from, table.saved, table.saved_len
    for view in views:
        assert view.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    (row,) = table.alloc(1)
    table.set_state(row, 3, NO_COPY)
    table.set_saved(row, 4, 2)
    assert [view[row] for view in views] == [3, NO_COPY, 4, 2]


@pytest.mark.parametrize(
    "change", [lambda t: t.set_state(1, 7, 0), lambda t: t.take_states(0), lambda t: t.save_working(0, 4)]
)
def test_a_plan_made_before_a_working_state_changed_is_outdated(change):
    table = HybridReqToTokenPool(2, 64)
    table.alloc(2)
    table.set_state(0, 3, NO_COPY)
    stamp = table.stamp(np.array([0, 1]))
    table.copied([0, 1])
    assert table.is_current(stamp)
    change(table)
    assert not table.is_current(stamp)


def prepared():
    """Row 0 has a working state 3 and a snapshot 4, row 1 a state 5 to be filled, row 2 nothing; row 3 is free."""
    table = HybridReqToTokenPool(4, 64, page_size=4)
    table.alloc(3)
    table.set_state(0, 3, NO_COPY)
    table.set_saved(0, 4, 8)
    table.set_state(1, 5, 0)
    return table


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.set_state(3, 7, 0), ArgumentError, "row 3 is not in use"),
        (lambda t: t.set_state(9, 7, 0), ArgumentError, "row 9 is not in use"),
        (lambda t: t.set_state(2, 0, 0), ArgumentError, "state must be a state, 1 or more, got 0"),
        (lambda t: t.set_state(2, 2**31, 0), ArgumentError, "state must be a state"),
        (lambda t: t.set_state(2, 7.0, 0), ArgumentError, "state must be a state"),
        (lambda t: t.set_state(2, 3, 0), OwnershipError, "state 3 is owned by row 0: a state has one owner"),
        (lambda t: t.set_state(2, 4, 0), OwnershipError, "state 4 is owned by row 0"),
        (lambda t: t.set_state(0, 7, 0), RequestStateError, "row 0 has working state 3: take_states first"),
        (lambda t: t.set_state(2, 7, 7), ArgumentError, "source must be another state than 7, 0 or NO_COPY, got 7"),
        (lambda t: t.set_state(2, 7, -2), ArgumentError, "source must be another state"),
        (lambda t: t.set_state(2, 7, None), ArgumentError, "source must be another state"),
        (lambda t: t.set_state(2, 7, 2**31), ArgumentError, "source must be another state"),
        (lambda t: t.set_saved(3, 7, 8), ArgumentError, "row 3 is not in use"),
        (lambda t: t.set_saved(0, 7, 8), RequestStateError, "row 0 has a checkpoint in state 4: take_saved first"),
        (lambda t: t.set_saved(1, 7, 8), RequestStateError, "row 1 has no working state that a step has filled"),
        (lambda t: t.set_saved(2, 7, 8), RequestStateError, "row 2 has no working state"),
        (lambda t: t.save_working(1, 8), RequestStateError, "row 1 has no working state that a step has filled"),
        (lambda t: t.save_working(0, 8), RequestStateError, "row 0 has a checkpoint"),
        (lambda t: t.take_saved(3), ArgumentError, "row 3 is not in use"),
        (lambda t: t.take_states(3), ArgumentError, "row 3 is not in use"),
        (lambda t: t.free(0), RequestStateError, "row 0 owns states, which would be lost: take_states, and free them"),
        (lambda t: t.free([2, 1]), RequestStateError, "row 1 owns states"),
        (lambda t: t.free([2, 2]), ArgumentError, "names a row twice"),
        (lambda t: t.free(3), DoubleFreeError, "row 3 is free already"),
        (lambda t: t.free(4), ArgumentError, "free_index must be rows"),
    ],
)
def test_wrong_use_is_refused_and_nothing_changes(call, error, message):
    table, same = prepared(), prepared()
    with pytest.raises(error, match=message):
        call(table)
    assert books(table) == books(same)


@pytest.mark.parametrize("length", [0, -4, 6, 68, 8.0, None])
def test_a_snapshot_stands_for_whole_pages(length):
    table = prepared()
    table.take_saved(0)
    for save in (lambda: table.set_saved(0, 7, length), lambda: table.save_working(0, length)):
        with pytest.raises(ArgumentError, match=r"length must be a multiple of page_size = 4 in \(0, 64\]"):
            save()


def test_a_row_with_only_a_snapshot_is_not_freed_either():
    table = prepared()
    table.take_saved(0)
    table.save_working(0, 8)
    with pytest.raises(RequestStateError, match="row 0 owns states"):
        table.free(0)


def test_clear_forgets_the_states():
    table = prepared()
    table.clear()
    assert books(table) == books(HybridReqToTokenPool(4, 64, page_size=4))


class StateLife(RuleBasedStateMachine):
    """Requests come, take snapshots, give them to a tree, and go; whatever is called, no state is lost or shared."""

    def __init__(self):
        super().__init__()
        self.table, self.states = HybridReqToTokenPool(3, 64, page_size=4), StateAllocator(6)
        self.rows: list[int] = []
        self.tree: list[int] = []

    @precondition(lambda self: len(self.rows) < 3 and self.states.available_size())
    @rule(from_tree=st.booleans())
    def admit(self, from_tree):
        (row,) = self.table.alloc(1)
        self.table.set_state(row, self.states.alloc_track_slot(), self.tree[0] if from_tree and self.tree else 0)
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule()
    def step(self):
        sources, targets = self.table.state_copies(self.rows)
        assert set(targets) <= set(self.table.state[self.rows])
        assert set(sources) <= {0, *self.tree}
        self.table.copied(self.rows)

    @precondition(lambda self: self.rows and self.states.available_size())
    @rule(data=st.data(), length=st.sampled_from([0, 3, 4, 64]))
    def save(self, data, length):
        row, state = data.draw(st.sampled_from(self.rows)), self.states.alloc_track_slot()
        try:
            self.table.set_saved(row, state, length)
        except CacheError:
            self.states.free_track_slot(state)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def publish(self, data):
        state, length = self.table.take_saved(data.draw(st.sampled_from(self.rows)))
        if state:
            assert length % 4 == 0 < length
            self.states.transfer([state], PageState.PRIVATE, PageState.TREE)
            self.tree.append(state)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), careless=st.booleans())
    def leave(self, data, careless):
        row = data.draw(st.sampled_from(self.rows))
        if careless:
            with pytest.raises(RequestStateError):
                self.table.free(row)
            return
        self.states.release(self.table.take_states(row), PageState.PRIVATE)
        self.table.free(row)
        self.rows.remove(row)

    @precondition(lambda self: self.tree)
    @rule()
    def evict(self):
        if self.tree[0] not in self.table.state_from:
            self.states.release([self.tree.pop(0)], PageState.TREE)

    @invariant()
    def every_state_has_one_owner(self):
        private = np.flatnonzero(self.states.states == PageState.PRIVATE)
        assert self.table.held_states.tolist() == private.tolist()
        assert sorted(self.tree) == np.flatnonzero(self.states.states == PageState.TREE).tolist()
        idle = np.setdiff1d(np.arange(3), self.rows)
        assert not self.table.state[idle].any()
        assert not self.table.saved[idle].any()
        assert (self.table.state_from[idle] == NO_COPY).all()


TestStateLife = StateLife.TestCase
TestStateLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
