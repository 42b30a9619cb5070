"""Numbers that are said of rows of a request table, but are not as many."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.tables.request_table import ReqToTokenPool

TWO = np.array([0, 1])
THREE = np.array([1, 2, 3], np.int32)


@pytest.mark.parametrize(
    "call",
    [
        lambda table: table.commit(TWO, THREE),
        lambda table: table.commit(TWO, THREE[:1]),
        lambda table: table.append_pages(TWO, THREE),
        lambda table: table.append_pages(TWO, THREE[:1]),
        lambda table: table.append_pages(TWO, THREE, THREE),
        lambda table: table.append_pages(TWO, THREE, np.array([-1, 4], np.int32)),
        lambda table: table.append_pages(np.array([0, 3]), THREE[:2]),
        lambda table: table.append_pages(TWO[:1], np.arange(1, 9, dtype=np.int32), np.array([8], np.int32)),
        lambda table: table.last_slots(TWO, THREE),
        lambda table: table.page_list(TWO, THREE),
    ],
)
def test_they_are_refused_and_nothing_has_changed(call):
    """NumPy's own errors came out, some of them after the device's copy was told of a change."""
    table = ReqToTokenPool(3, 32, 4)
    table.alloc(2)
    table.append_pages(TWO, THREE[:2])
    stamp, waiting = table.stamp(TWO), table.num_changed()
    with pytest.raises(ArgumentError):
        call(table)
    assert table.is_current(stamp)
    assert table.num_changed() == waiting
    assert table.kv_len.tolist() == [0, 0, 0]
    assert table.num_pages.tolist() == [1, 1, 0]
