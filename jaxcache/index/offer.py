"""What an insert offers: for each component an array of ids, one a page, or one state.

full      7  8  9 10 11     the first component: every page
window    0  0  4  5  6     0 where nothing is offered; what comes before the last 0 does not count either
state     3                 what was saved at the end of the key; 0, or no id, where nothing was
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.component import Component


class Offer:
    """What one insert offers, checked.

    Args:
      components: Of the tree.
      values: See the module.
      first: Pages from the start that are the tree's own: what is offered there is not looked at.
      pages: Pages of the key.

    Attributes:
      values, first, pages: As given.
      starts: For each component, the page from which on it is offered up to the end of the key.

    Raises:
      ArgumentError: An array is missing or too short, or offers nothing at the end of the key: that could never be a
        stopping point.
    """

    __slots__ = ("first", "pages", "starts", "values")

    def __init__(self, components: Sequence[Component], values: Sequence[np.ndarray], first: int, pages: int):
        if len(values) != len(components):
            raise ArgumentError(f"values: expected one array a component ({len(components)}), got {len(values)}")
        self.values = values
        self.first = first
        self.pages = pages
        if len(values[0]) < pages:
            raise ArgumentError(f"values of {components[0].name}: the key needs {pages}, got {len(values[0])}")
        starts = self.starts = [first]
        for i in range(1, len(components)):
            starts.append(_start_of(components[i], values[i], first, pages))


def _start_of(component: Component, values: np.ndarray, first: int, pages: int) -> int:
    """The page from which on `values` are offered for a further component."""
    start = first
    if not component.spans:
        if not len(values) or not values[0]:
            start = pages
    elif len(values) < pages:
        raise ArgumentError(f"values of {component.name}: the key needs {pages}, got {len(values)}")
    elif first < pages:
        part = values[first:pages]
        if not part.item(part.argmin()):  # ids are not negative, so the least one says whether there is a 0
            start += int(np.flatnonzero(part == 0)[-1]) + 1
    if start == pages > first:
        raise ArgumentError(
            f"values of {component.name}: nothing is offered at the end of the key, which could not be found then: "
            "cut the key where something is"
        )
    return start


def as_priority(priority: Any) -> int:
    """An integer of any kind as an int.

    Raises:
      ArgumentError: It is none.
    """
    if not isinstance(priority, (int, np.integer)):
        raise ArgumentError(f"priority must be an integer, got {priority!r}")
    return int(priority)
