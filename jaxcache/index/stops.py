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
from jaxcache.index.node import EMPTY_IDS, Node


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
      no_windows: An empty array for each window.
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
        self.no_windows = [EMPTY_IDS] * len(self.windows)
        self.reaches = [component.reach for component in components]

    def usable(self, path: list[Node], found: int) -> int:
        """Longest prefix length within the `found` tokens of `path` that satisfies every component.

        From the end upwards: where a stop fails because something is missing in a node, all those before it, up to the
        start of that node, fail for the same reason.
        """
        at, length, state = len(path) - 1, found, self.state
        while at >= 0:
            missing = -1
            if state and (path[at].end != length or path[at].others[state - 1].value is None):
                missing = at
            else:
                for i in self.windows:
                    missing, stop = at, length - self.reaches[i]
                    while missing >= 0 and path[missing].others[i - 1].value is not None:
                        missing = missing - 1 if path[missing].start > stop else -1
                    if missing >= 0:
                        break
            if missing < 0:
                return length
            at, length = missing - 1, path[missing].start
        return 0

    def begin(self, i: int, length: int, page_size: int) -> int:
        """Where the pages of window `i` begin that a stop at `length` needs."""
        return int(max(length - self.reaches[i], 0)) // page_size * page_size

    def state_at(self, path: list[Node]) -> int:
        """Id of the state at the end of `path`; 0 if no component keeps states."""
        return int(path[-1].others[self.state - 1].value[0]) if path and self.state else 0
