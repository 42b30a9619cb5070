"""The change log: what the device has not heard of is sent, with the values of that moment, and is never forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache.errors import ArgumentError
from jaxcache.tables.changes import ChangeLog

SIZE = 6
event = st.one_of(
    st.tuples(st.just("write"), st.lists(st.integers(0, SIZE - 1), unique=True), st.integers(1, 9)),
    st.tuples(st.just("send"), st.integers(0, 8), st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(event, max_size=40))
def test_the_device_follows(events):
    host, device = np.zeros((2, SIZE // 2), np.int32), np.zeros(SIZE, np.int32)
    log = ChangeLog(host)
    for kind, what, how in events:
        if kind == "write":
            index = np.array(what, np.int32)
            host.reshape(-1)[index] = how
            log.mark(index)
            continue
        waiting = len(log)
        changes = log.take(what)
        assert len(changes.index) == min(what, waiting)
        assert len(log) == waiting - len(changes.index)
        if how:
            device[changes.index] = changes.page
        else:
            log.give_back(changes)
        assert len(log) <= 2 * SIZE
    everything = log.take(99)
    device[everything.index] = everything.page
    assert device.tolist() == host.reshape(-1).tolist()
    assert everything.index.dtype == everything.page.dtype == np.int32


def test_a_log_that_nobody_reads_stays_small():
    log = ChangeLog(np.zeros(100, np.int32))
    for _ in range(1000):
        log.mark(np.arange(50, dtype=np.int32))
        assert len(log) <= 200
    assert set(log.take(10**6).index.tolist()) == set(range(50))


def test_a_value_is_read_when_it_leaves_and_a_copy_of_the_table_leaves_nothing_to_send():
    table = np.zeros(3, np.int32)
    log = ChangeLog(table)
    log.mark(np.array([2, 0], np.int32))
    table[:] = 7, 8, 9
    changes = log.take(1)
    assert (changes.index.tolist(), changes.page.tolist()) == ([2], [9])
    table[2] = 1
    assert changes.page.tolist() == [9]
    log.forget()
    assert len(log) == 0
    assert log.take(5).index.tolist() == []


def test_a_negative_limit_is_refused():
    log = ChangeLog(np.zeros(3, np.int32))
    log.mark(np.array([1], np.int32))
    with pytest.raises(ArgumentError, match="limit must not be negative, got -1"):
        log.take(-1)
    assert len(log) == 1
