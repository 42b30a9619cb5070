"""Who owns which page: one state byte a page, and the checks against it. Vectorised, O(pages named)."""

from __future__ import annotations

import enum

import numpy as np

from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError


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


_OWNERS = frozenset({PageState.PRIVATE, PageState.TREE, PageState.IN_FLIGHT, PageState.QUARANTINED})


class PageOwners:
    """The state bytes of pages 0 .. `num_pages`. Checks raise, naming the page, and change nothing; `assign` changes.

    Attributes:
      states: uint8 (num_pages + 1,), index = page id; a live, read-only view.
    """

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._states = np.empty(num_pages + 1, np.uint8)
        self._tags = np.empty(num_pages + 1, np.int32)  # Scratch of `require_distinct`.
        self.states = self._states.view()
        self.states.flags.writeable = False
        self.clear()

    def clear(self) -> None:
        """Every page is FREE, but for the sink. O(num_pages)."""
        self._states.fill(PageState.FREE)
        self._states[0] = PageState.SINK

    def assign(self, pages: np.ndarray, state: PageState) -> None:
        """Puts pages, which have been checked, into `state`."""
        self._states[pages] = state

    def describe(self, page: int) -> str:
        return f"page {page} is {PageState(self._states[page]).name}"

    def require_in_range(self, name: str, pages: np.ndarray, lowest: int) -> None:
        """Raises OwnershipError unless every page of the argument `name` is in [lowest, num_pages]."""
        if len(pages) == 0 or (pages.min() >= lowest and pages.max() <= self._num_pages):
            return
        page = pages[(pages < lowest) | (pages > self._num_pages)][0]
        remedy = "page 0 is the sink for padding: drop it" if page == 0 else "it is none of this allocator's"
        raise OwnershipError(f"{name}: every page must be in [{lowest}, {self._num_pages}], got page {page}: {remedy}")

    def require_owned(self, name: str, pages: np.ndarray, owner: PageState) -> None:
        """Raises unless `owner` has every page of the argument `name`.

        Raises:
          DoubleFreeError: if the first page that it does not own is free or pending.
          OwnershipError: if that page is another owner's, or a page is out of range.
        """
        self.require_in_range(name, pages, lowest=1)
        owned = self._states[pages] == owner
        if owned.all():
            return
        page = int(pages[owned.argmin()])
        kind = DoubleFreeError if self._states[page] in (PageState.FREE, PageState.PENDING) else OwnershipError
        raise kind(f"{name}: every page must be {owner.name}, but {self.describe(page)}: leave it to its owner")

    def require_distinct(self, name: str, pages: np.ndarray, kind: type[CacheError]) -> None:
        """Raises `kind` if a page, all of them in range, is named twice."""
        order = np.arange(len(pages), dtype=np.int32)
        self._tags[pages] = order  # Of equal pages, one tag stays.
        unmatched = self._tags[pages] != order
        if unmatched.any():
            page = pages[unmatched.argmax()]
            raise kind(f"{name}: every page must be named once, but page {page} is named twice: drop the repeat")


def require_owner(name: str, state: PageState) -> None:
    """Raises ArgumentError unless `state` is one in which somebody owns a page."""
    if not isinstance(state, PageState) or state not in _OWNERS:
        owners = ", ".join(owner.name for owner in sorted(_OWNERS))
        raise ArgumentError(f"{name} must be a PageState out of {owners}, got {state!r}")
