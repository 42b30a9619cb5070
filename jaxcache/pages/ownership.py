"""Who owns which page: one state byte a page, and the checks against it. O(pages named).

A call looks once at the pages it names, to find their runs (`pages/runs.py`). A run is checked by one comparison of
memory and passed on by one assignment of memory, whatever its length.
"""

from __future__ import annotations

import enum
from typing import NoReturn

import numpy as np

from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError, shown
from jaxcache.pages.runs import INDEX, Rows, ids_ascend, ids_of, runs_ascend, runs_of


class PageState(enum.IntEnum):
    """Who has a page. A page is in one state at a time, so it has one owner at a time."""

    FREE = 0
    PRIVATE = 1
    """A request's own: not (yet) in the tree."""
    TREE = 2
    IN_FLIGHT = 3
    """Source or target of a copy that has not finished."""
    QUARANTINED = 4
    """Withheld: its content is in doubt."""
    PENDING = 5
    """Freed inside a free group that is still open."""
    SINK = 6
    """Page 0, where padding is written."""
    PLANNED = 7
    """Of several requests of a plan that has not run: one computes it, the others read it."""


_OWNERS = (PageState.PRIVATE, PageState.TREE, PageState.IN_FLIGHT, PageState.QUARANTINED, PageState.PLANNED)
_BYTES = tuple(bytes((state,)) for state in PageState)
_IS_OWNER = tuple(state in _OWNERS for state in PageState)


class PageOwners:
    """The state bytes of pages 0 .. `num_pages`. Checks raise, naming the page, and change nothing; `assign` changes.

    Attributes:
      states: uint8 (num_pages + 1,), index = page id; a live, read-only view.
    """

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._bytes = bytearray(num_pages + 1)
        self._states = np.frombuffer(self._bytes, np.uint8)
        self._ids = np.arange(num_pages + 1, dtype=np.int32).tobytes()
        self._tags = np.empty(num_pages + 1, np.int32)  # Scratch of `_require_distinct`.
        self.states = self._states.view()
        self.states.flags.writeable = False
        self.clear()

    def clear(self) -> None:
        """Every page is FREE, but for the sink. O(num_pages)."""
        self._states.fill(PageState.FREE)
        self._states[0] = PageState.SINK

    def load(self, states: np.ndarray) -> None:
        """Puts every page into its state of `states`. O(num_pages)."""
        self._states[:] = states

    def assign(self, rows: Rows, state: PageState) -> None:
        """Puts pages, which have been looked at, into `state`."""
        states, byte = self._states, int(state)
        if isinstance(rows, list):
            for start, stop in rows:
                states[start:stop] = byte
        else:
            states[rows] = byte

    def describe(self, page: int) -> str:
        """The page and its state, for messages."""
        return f"page {page} is {PageState(self._states[page]).name}"

    def require_in_range(self, name: str, pages: np.ndarray, lowest: int) -> None:
        """Raises OwnershipError unless every page of the argument `name` is in [lowest, num_pages]."""
        if len(pages) == 0 or (pages.min() >= lowest and pages.max() <= self._num_pages):
            return
        page = pages[(pages < lowest) | (pages > self._num_pages)][0]
        remedy = "page 0 is the sink for padding: drop it" if page == 0 else "it is none of this allocator's"
        raise OwnershipError(f"{name}: every page must be in [{lowest}, {self._num_pages}], got page {page}: {remedy}")

    def require(
        self, name: str, pages: np.ndarray, owner: PageState, repeated: type[CacheError], in_order: bool = False
    ) -> tuple[np.ndarray, Rows]:
        """Checks that `owner` has every page of the argument `name`, and that none is named twice.

        Returns:
          The pages, sorted if they are to be `in_order`; and where they are, for `assign`.

        Raises:
          DoubleFreeError: if the first page that it does not own is free or pending.
          OwnershipError: if that page is another owner's, or a page is out of range.
          CacheError: of the kind `repeated`, if a page is named twice.
        """
        n = len(pages)
        if n == 0:
            return pages, []
        start, starts_with, byte = pages.item(0), self._bytes.startswith, _BYTES[owner]
        if start > 0 and pages.flags.c_contiguous and self._ids.startswith(pages.data, start * 4):
            if not starts_with(byte * n, start):
                self._refuse(name, pages, owner)
            return pages, [(start, start + n)]
        runs = runs_of(pages)
        if runs is None:
            return self._require_index(name, pages, owner, repeated, in_order)
        for start, stop in runs:
            # The sink has no owner, a negative page starts before it, and beyond the last one nothing is found.
            if start < 0 or not starts_with(byte * (stop - start), start):
                self._refuse(name, pages, owner)
        if runs_ascend(runs):
            return pages, runs
        ascending = sorted(runs)
        if not runs_ascend(ascending):
            self._require_distinct(name, pages, pages.astype(INDEX), repeated)
        return (ids_of(ascending) if in_order else pages), runs

    def _require_index(
        self, name: str, pages: np.ndarray, owner: PageState, repeated: type[CacheError], in_order: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """`require` by one gather and one comparison."""
        ascends = ids_ascend(pages)
        if in_order and not ascends:
            pages = np.sort(pages)
            ascends = ids_ascend(pages)
        rows = pages.astype(INDEX)
        try:
            is_owned = self._states[rows].tobytes() == _BYTES[owner] * len(rows)
        except IndexError:
            is_owned = False
        # NumPy counts negative pages from the end; the lowest one is the first, if they ascend.
        if not is_owned or (pages.item(0) if ascends else pages.min()) < 0:
            self._refuse(name, pages, owner)
        if not ascends:
            self._require_distinct(name, pages, rows, repeated)
        return pages, rows

    def _require_distinct(self, name: str, pages: np.ndarray, rows: np.ndarray, repeated: type[CacheError]) -> None:
        order = np.arange(len(pages), dtype=np.int32)
        self._tags[rows] = order  # Of equal pages, one tag stays.
        tags = self._tags[rows]
        if tags.tobytes() != order.tobytes():
            page = pages[(tags != order).argmax()]
            raise repeated(f"{name}: every page must be named once, but page {page} is named twice: drop the repeat")

    def _refuse(self, name: str, pages: np.ndarray, owner: PageState) -> NoReturn:
        """Raises the error for the first page that `owner` does not have; there is one."""
        self.require_in_range(name, pages, lowest=1)
        page = int(pages[(self._states[pages] != owner).argmax()])
        kind = DoubleFreeError if self._states[page] in (PageState.FREE, PageState.PENDING) else OwnershipError
        raise kind(f"{name}: every page must be {owner.name}, but {self.describe(page)}: leave it to its owner")


def require_owner(name: str, state: PageState) -> None:
    """Raises ArgumentError unless `state` is one in which a page has an owner."""
    if not isinstance(state, PageState) or not _IS_OWNER[state]:
        owners = ", ".join(owner.name for owner in _OWNERS)
        raise ArgumentError(f"{name} must be a PageState out of {owners}, got {shown(state)}")
