"""Resume points: where the next request goes on, and which windows and states they do not need.

    tokens     0 ........ 128 ........ 256 ........ 384      three turns of a chat, in a window of 32
    window     .........   .........    ......xxxx           x: what the end of the leaf needs; the rest is surplus
    state          1           2            3                1 and 2 are surplus

A chat is resumed at the end of its leaf, a shared prompt at the end of a node with several children. What such a point
needs makes a prefix usable, so the surplus of all nodes is evicted before any of it. That holds while lookups do end at
the ends of leaves; where more of them end in the middle, the policy alone decides.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.stops import Stops
from jaxcache.state_dict import Books, Columns

_MEMORY = 1 << 20
"""Tokens of lookups that are remembered, half of them when there are more."""


class ResumePoints:
    """Of one tree, for each further component, the nodes that may have surplus.

    A node is a candidate from when its surplus may have grown (it is new, unlocked or filled, its parent is no longer a
    leaf, or has lost all but one child) until it is examined, at an eviction. So the surplus costs nothing before.

    Args:
      stops: Of the tree.
      page_size: Of the tree.

    Attributes:
      candidates: For each component, the nodes to examine, in the order in which they became candidates; none for the
        first component and for those of infinite reach.
      ends: Tokens of lookups that ended at the end of a leaf.
      elsewhere: Tokens of lookups that ended neither there nor at the end of a branch.
    """

    __slots__ = ("_page_size", "_reach", "_reaches", "_state", "candidates", "elsewhere", "ends")

    def __init__(self, stops: Stops, page_size: int):
        self._reach = {i: int(stops.reaches[i]) for i in stops.further if stops.reaches[i] != math.inf}
        self._reaches = tuple(self._reach.items())
        self._state = stops.state
        self._page_size = page_size
        self.candidates: list[OrderedDict[Node, None]] = [OrderedDict() for _ in stops.reaches]
        self.ends = self.elsewhere = 0

    @property
    def are_used(self) -> bool:
        """Whether at least half of what was looked up lately ended at a leaf's end."""
        return self.ends >= self.elsewhere

    def looked_up(self, node: Node, found: int) -> None:
        """A lookup found `found` tokens, whatever of them is usable; the last one is in `node`. O(1).

        The end of a branch says nothing: it is young where many come by.
        """
        if node.end != found or len(node.children) == 1:
            self.elsewhere += found
        elif not node.children:
            self.ends += found
        if self.ends + self.elsewhere > _MEMORY:
            self.ends //= 2
            self.elsewhere //= 2

    # ---- what may have become surplus ------------------------------------------------------------------------------

    def added(self, leaf: Node) -> None:
        """`leaf` is new, with its values."""
        for i, reach in self._reaches:
            if i != self._state and leaf.end - leaf.start > reach and leaf.others[i - 1].value is not None:
                self.candidates[i][leaf] = None

    def passed(self, node: Node) -> None:
        """`node` was a resume point and has one child now: what only it needed is surplus. O(nodes in reach)."""
        for i, reach in self._reaches:
            begin, step = node.end - reach, node
            while step.parent is not None and step.end > begin:
                if step.others[i - 1].value is not None:
                    self.candidates[i][step] = None
                step = step.parent

    def changed(self, i: int, node: Node) -> None:
        """Component `i` of `node` was filled or unlocked."""
        if i in self._reach:
            self.candidates[i][node] = None

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` was cut off the front of `lower`."""
        for i, _ in self._reaches:
            if lower in self.candidates[i] and i != self._state:
                self.candidates[i][upper] = None

    def removed(self, i: int, node: Node) -> None:
        """`node` has no value of component `i` any more."""
        self.candidates[i].pop(node, None)

    # ---- what is surplus -------------------------------------------------------------------------------------------

    def next_candidate(self, i: int) -> Node | None:
        """The next node to examine for component `i`, which is a candidate no longer; None if there is none."""
        return self.candidates[i].popitem(last=False)[0] if self.candidates[i] else None

    def needed_from(self, i: int, node: Node) -> int:
        """Where what resume points need of component `i` begins in `node`: its start if that is all, its end if none.

        Cost: O(nodes within reach below it).
        """
        if i not in self._reach:
            return node.start
        below, reach = node, self._reach[i]
        while len(below.children) == 1 and below.end - reach < node.end:
            (below,) = below.children.values()
        if len(below.children) == 1 or (i == self._state and below is not node):
            return node.end
        if i == self._state:
            return node.start
        begin = max(below.end - reach, 0) // self._page_size * self._page_size
        return min(max(begin, node.start), node.end)

    # ---- snapshots -------------------------------------------------------------------------------------------------

    def state_dict(self, number: Mapping[Node, int]) -> Books:
        """All that it knows, with numbers for nodes. O(candidates)."""
        books: Books = {"lookups": np.array([self.ends, self.elsewhere], np.int64)}
        for i, candidates in enumerate(self.candidates):
            books[f"candidates.{i}"] = np.array([number[node] for node in candidates], np.int64)
        return books

    def load_state_dict(self, books: Columns, nodes: Sequence[Node]) -> None:
        """Knows what the one with these arrays knew, of the nodes with these numbers. It must be new.

        Raises:
          SnapshotError: The arrays are not those of such a tree.
        """
        self.ends, self.elsewhere = books.ints("lookups", 2, high=_MEMORY).tolist()
        for i, candidates in enumerate(self.candidates):
            candidates.update({nodes[n]: None for n in books.distinct(f"candidates.{i}", len(nodes) - 1).tolist()})
