"""Which window page goes with which full page, in both directions, and which entries the device has not been sent.

    full page     1  2  3  4  5  6        full_to_window = [0, 0, 0, 2, 5, 0, 0]
    window page   -  -  2  5  -  -        0: none, because its tokens left every window

Source: SGLang 0.5.2 allocator.py (full_to_swa_index_mapping), a page an entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import ArgumentError, BrokenInvariantError
from jaxcache.pages.ownership import PageState
from jaxcache.pages.runs import INDEX
from jaxcache.tables.changes import ChangeLog

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

_UNOWNED = (PageState.FREE, PageState.PENDING, PageState.SINK)


class WindowMap:
    """A partial one-to-one map of full pages to window pages, empty at first. Pages are checked by the allocators.

    Args:
      num_pages: Full pages 1 .. `num_pages`.
      num_windows: Window pages 1 .. `num_windows`.

    Attributes:
      full_to_window: int32 (num_pages + 1,), the window page of each full page, 0 = none. A live, read-only view.
      changes: Entries of it that the device has not been sent.
    """

    def __init__(self, num_pages: int, num_windows: int):
        self._full_to_window = np.zeros(num_pages + 1, np.int32)
        self._window_to_full = np.zeros(num_windows + 1, np.int32)
        self.full_to_window = self._full_to_window.view()
        self.full_to_window.flags.writeable = False
        self.changes = ChangeLog(self._full_to_window)

    def windows_of(self, pages: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The window page of each full page, 0 where there is none. O(n)."""
        return self._full_to_window[pages.astype(INDEX)]

    def pages_of(self, windows: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The full page of each window page, 0 where there is none. O(n)."""
        return self._window_to_full[windows.astype(INDEX)]

    def slots_of(self, slots: Int32[np.ndarray, " n"], page_size: int) -> Int32[np.ndarray, " n"]:
        """The window slot of each full slot, 0 where there is none. O(n)."""
        pages = slots // page_size
        windows = self.windows_of(pages)
        offsets = slots - pages * np.int32(page_size)
        return np.where(windows > 0, windows * np.int32(page_size) + offsets, np.int32(0))

    def movable(self, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The window pages of `source`, which can be given to `target`. O(n).

        Raises:
          ArgumentError: A source has no window page, or a target has one.
        """
        windows = self.windows_of(source)
        require_pages(windows > 0, "source: every page must have a window page, but page {} has none", source)
        has_none = self.windows_of(target) == 0
        require_pages(has_none, "target: every page must have no window page, but page {} has one", target)
        return windows

    def paired(self) -> Int32[np.ndarray, " n"]:
        """The full pages that have a window page, ascending. O(num_pages)."""
        return np.flatnonzero(self._full_to_window).astype(np.int32)

    def pair(self, pages: Int32[np.ndarray, " n"], windows: Int32[np.ndarray, " n"]) -> None:
        """Pairs full with window pages. O(n)."""
        self.changes.mark(pages.copy())  # The caller may write to its own array. First, so that none is ever missing.
        self._full_to_window[pages.astype(INDEX)] = windows
        self._window_to_full[windows.astype(INDEX)] = pages

    def unpair(self, pages: Int32[np.ndarray, " n"], windows: Int32[np.ndarray, " n"]) -> None:
        """Forgets pairs of full and window pages. O(n)."""
        self.changes.mark(pages.copy())
        self._full_to_window[pages.astype(INDEX)] = 0
        self._window_to_full[windows.astype(INDEX)] = 0

    def clear(self) -> None:
        """Forgets all pairs. O(num_pages)."""
        self.changes.mark(self.paired())
        self._full_to_window[:] = 0
        self._window_to_full[:] = 0

    def send_all(self) -> None:
        """The device's copy of the map is a new one, of zeros: every entry waits that is not."""
        self.changes.forget()
        self.changes.mark(self.paired())

    def check(self, states: UInt8[np.ndarray, " num_pages+1"], window_states: UInt8[np.ndarray, " windows+1"]) -> None:
        """Each window page in use belongs to one full page, of the same owner.

        Args:
          states: The `PageState` of each full page.
          window_states: The `PageState` of each window page.

        Raises:
          BrokenInvariantError: says what does not agree.

        Cost: O(num_pages) of both sides.
        """
        full = np.flatnonzero(self._full_to_window)
        windows = self._full_to_window[full]
        in_use = np.flatnonzero(~np.isin(window_states, _UNOWNED))
        if not np.array_equal(np.sort(windows), in_use):
            raise BrokenInvariantError(
                "each window page in use must belong to one full page, see window pages "
                f"{_odd(windows, in_use)}, which the map and the window's allocator do not agree on"
            )
        back = self._window_to_full
        if not np.array_equal(np.flatnonzero(back), in_use) or np.any(back[windows] != full):
            raise BrokenInvariantError(f"the two directions of the map differ for some of the full pages {full[:5]}")
        differs = states[full] != window_states[windows]
        if differs.any():
            page, window = full[differs][0], windows[differs][0]
            raise BrokenInvariantError(
                f"full page {page} is {PageState(states[page]).name}, but its window page {window} is "
                f"{PageState(window_states[window]).name}"
            )


def require_pages(holds: np.ndarray, rule: str, pages: np.ndarray) -> None:
    """Raises ArgumentError with the first page for which the rule does not hold."""
    if not holds.all():
        raise ArgumentError(rule.format(pages[holds.argmin()]))


def _odd(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """A few elements that only one side has, or that the first has twice."""
    values, counts = np.unique(mine, return_counts=True)
    return np.concatenate([np.setxor1d(values, theirs), values[counts > 1]])[:5]
