"""Where pages are in an array with one entry a page: as runs of consecutive ids, or as an index.

    ids     4 5 6 7 8 20 21 22 2 3
    runs    (4, 9)    (20, 23) (2, 4)       from, to

Pages mostly come in runs: allocated in order, inserted in order, evicted node by node. What is done a run at a time is
done to stretches of memory; short runs are dearer than an index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int32

Runs: TypeAlias = "list[tuple[int, int]]"
Rows: TypeAlias = "Runs | np.ndarray"
"""Runs, or an index (intp)."""
INDEX = np.dtype(np.intp)
_ONE = np.array(1, np.int32)
_MIN_PAGES = 4096
"""Fewer pages than these are not searched for runs: that takes a few NumPy calls, as does an index."""
_MIN_RUN = 128
"""The mean length from which a run costs less than its pages in an index."""


def rows_of(ids: Int32[np.ndarray, " n"]) -> Rows:
    """Where checked pages are. O(n)."""
    runs = runs_of(ids)
    return ids.astype(INDEX) if runs is None else runs


def runs_of(ids: Int32[np.ndarray, " n"]) -> Runs | None:
    """The runs of these ids, in order; None if an index is cheaper. O(n), vectorised, and O(runs)."""
    n = len(ids)
    if n < _MIN_PAGES:
        return None
    follows = np.equal(ids[1:] - ids[:-1], _ONE)  # One that wraps around is a run beyond the last page.
    if (n - np.count_nonzero(follows)) * _MIN_RUN > n:
        return None
    runs, begin, start, follows = [], 0, ids.item(0), follows.tobytes()
    end = follows.find(0) + 1
    while end:
        runs.append((start, start + end - begin))
        begin, start = end, ids.item(end)
        end = follows.find(0, end) + 1
    runs.append((start, start + n - begin))
    return runs


def ids_of(runs: Runs) -> Int32[np.ndarray, " n"]:
    """The ids in these runs, in order."""
    return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in runs])


def runs_ascend(runs: Runs) -> bool:
    """`ids_ascend` of the ids in these runs. O(runs)."""
    last = 0
    for start, stop in runs:
        if start < last:
            return False
        last = stop
    return True


def ids_ascend(ids: Int32[np.ndarray, " n"]) -> bool:
    """Whether each id is greater than the one before, so that none is named twice. O(n)."""
    return b"\0" not in (ids[1:] > ids[:-1]).tobytes()
