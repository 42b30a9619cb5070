"""Where a lookup may stop, and how far back a lock there must reach: what the components ask of a path.

tokens     0 ........ 100 ........ 200 ........ 250        a path of three nodes
full       7 8 9 ...   | 1 2 ...    | 3 4 ...              there, or the node would not be
window 64  -           | 5 6 ...    | 7 8 ...              - a hole: 164 tokens and more are enough behind it
state      3           | -          | 4                    stops are at 100 and 250
both                                | 250                  at 100 the window is missing
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxcache.errors import ArgumentError
from jaxcache.index.component import Component
from jaxcache.index.node import Node


class Stops:
    """The rules of one tree.

    Args:
      components: See `RadixTree`.

    Attributes:
      further: Indices of the components but for the first.
      spanning: Indices of the components that have a value a page.
      windows: The same without the first.
      state: Index of the one that keeps states; 0 if none does.
      reaches: Of each component.
    """

    def __init__(self, components: Sequence[Component]):
        if not components or components[0].reach != math.inf or not components[0].spans:
            raise ArgumentError("components: the first one must span with infinite reach, it decides which nodes exist")
        states = [i for i, component in enumerate(components) if not component.spans]
        if len(states) > 1:
            raise ArgumentError("components: only one may keep states (spans=False); let one state hold all")
        self.further = range(1, len(components))
        self.spanning = [i for i, component in enumerate(components) if component.spans]
        self.windows = self.spanning[1:]
        self.state = states[0] if states else 0
        self.reaches = [component.reach for component in components]

    def usable(self, path: list[Node], found: int) -> int:
        """Longest prefix length within the `found` tokens of `path` that satisfies every component.

        From the end upwards: where a stop fails because something is missing in a node, all those before it, up to the
        start of that node, fail for the same reason.
        """
        at, length = len(path) - 1, found
        while at >= 0:
            missing = at
            if not self.state or (path[at].end == length and path[at].others[self.state - 1].value is not None):
                missing = self._hole(path, at, length)
                if missing < 0:
                    return length
            at, length = missing - 1, path[missing].start
        return 0

    def _hole(self, path: list[Node], last: int, length: int) -> int:
        """Deepest node of `path` in which a window lacks what a stop at `length`, in node `last`, needs; or -1."""
        for i in self.windows:
            reach = self.reaches[i]
            at = last
            while at >= 0 and path[at].end > length - reach:
                if path[at].others[i - 1].value is None:
                    return at
                at -= 1
        return -1

    def state_at(self, path: list[Node]) -> int:
        """Id of the state at the end of `path`; 0 if no component keeps states."""
        return int(path[-1].others[self.state - 1].value[0]) if path and self.state else 0
