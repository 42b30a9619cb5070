"""Resume points: where the next request goes on, and which windows and states they do not need.

    tokens     0 ........ 128 ........ 256 ........ 384      three turns of a chat, in a window of 32
    window     .........   .........    ......xxxx           x: what the end of the leaf needs; the rest is surplus
    state          1           2            3                1 and 2 are surplus

A chat is resumed at the end of its leaf, a shared prompt at the end of a node with several children. What such a point
needs makes a prefix usable, so the surplus of all nodes is evicted before any of it. That is known of requests only: it
holds once a lookup was locked, and while what requests found ends at the ends of leaves. Where many of them resume from
the middle, and where there are no requests, the policy alone decides.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.stops import Stops
from jaxcache.state_dict import Columns, StateDict

_MEMORY = 1 << 20
"""Tokens of lookups that are remembered, half of them when there are more."""


class ResumePoints:
    """Of one tree, for each further component, the nodes that may have surplus.

    A node is a candidate from when its surplus may have grown (it is new or filled, it is no longer a leaf, or has lost
    all but one child) until it is examined, at an eviction. So the surplus costs next to nothing before. What is
    surplus does not depend on locks: a node that is locked when it is examined waits until it is not.

    Args:
      stops: Of the tree.
      page_size: Of the tree.

    Attributes:
      candidates: For each component, the nodes to examine, in the order in which they became candidates; None for the
        first component and for those of infinite reach, which have no surplus. The tree adds and removes nodes itself.
      waiting: For each component, the locked nodes that were examined.
      has_requests: Whether a lookup was ever locked.
      ends: Tokens that requests found up to the end of a leaf.
      elsewhere: Tokens that requests found up to neither that nor a branch.
    """

    __slots__ = (
        *("_page_size", "_reach", "_reaches", "_state", "_windows"),
        *("candidates", "elsewhere", "ends", "has_requests", "waiting"),
    )

    def __init__(self, stops: Stops, page_size: int):
        self._reach = {i: int(stops.reaches[i]) for i in stops.further if stops.reaches[i] != math.inf}
        self._reaches = tuple(self._reach.items())
        self._state = stops.state
        self._page_size = page_size
        self._windows = [i for i in stops.windows if i in self._reach]
        self.candidates: list[OrderedDict[Node, None] | None] = [
            OrderedDict() if i in self._reach else None for i in range(len(stops.reaches))
        ]
        self.waiting: list[dict[Node, None]] = [{} for _ in stops.reaches]
        self.has_requests = False
        self.ends = self.elsewhere = 0

    def are_used(self) -> bool:
        """Whether there are requests, and at least two thirds of what they found lately ended at a leaf's end."""
        while self.ends + self.elsewhere > _MEMORY:
            self.ends //= 2
            self.elsewhere //= 2
        return self.has_requests and self.ends >= 2 * self.elsewhere

    def went_on(self, node: Node | None, length: int, found: int) -> None:
        """A request goes on after `length` tokens, which end in `node`; `found` are cached, usable or not. O(1).

        The end of a branch says nothing: it is young where many come by.
        """
        self.has_requests = True
        if node is None or found != length or node.end != length or len(node.children) == 1:
            self.elsewhere += found
        elif not node.children:
            self.ends += found

    # ---- what may have become surplus ------------------------------------------------------------------------------

    def passed(self, node: Node) -> None:
        """`node` was a resume point and has one child now: what only it needed is surplus. O(nodes in reach)."""
        for i, reach in self._reaches:
            candidates: OrderedDict[Node, None] = self.candidates[i]  # pyright: ignore[reportAssignmentType]
            begin, step = node.end - reach, node
            while step.end > begin and step.parent is not None:
                if step.others[i - 1].value is not None:
                    candidates[step] = None
                step = step.parent

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` was cut off the front of `lower`."""
        for i in self._windows:
            for nodes in (self.candidates[i], self.waiting[i]):
                if nodes and lower in nodes:
                    nodes[upper] = None

    def released(self, i: int, nodes: Sequence[Node]) -> None:
        """Component `i` of these nodes is no longer locked."""
        waiting, candidates = self.waiting[i], self.candidates[i]
        for node in nodes:
            if node in waiting and candidates is not None:
                del waiting[node]
                candidates[node] = None

    # ---- what is surplus -------------------------------------------------------------------------------------------

    def next_candidate(self, i: int) -> Node | None:
        """The next node to examine for component `i`, which is a candidate no longer; None if there is none.

        It is not locked.
        """
        candidates = self.candidates[i]
        while candidates:
            node, _ = candidates.popitem(last=False)
            if not node.others[i - 1].locks:
                return node
            self.waiting[i][node] = None
        return None

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

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """All that it knows, with numbers for nodes. O(candidates)."""
        books: StateDict = {"lookups": np.array([self.ends, self.elsewhere, self.has_requests], np.int64)}
        for i in self._reach:
            books[f"candidates.{i}"] = np.array([number[node] for node in self.candidates[i] or ()], np.int64)
        return books

    def load_state_dict(self, books: Columns, nodes: Sequence[Node]) -> None:
        """Knows what the one with these books knew, of the nodes with these numbers. It must be new.

        Raises:
          SnapshotError: These are no books of such a tree.
        """
        self.ends, self.elsewhere, has_requests = books.ints("lookups", 3, high=_MEMORY).tolist()
        self.has_requests = bool(has_requests)
        for i in self._reach:
            numbers = books.distinct(f"candidates.{i}", len(nodes) - 1).tolist()
            self.candidates[i] = OrderedDict((nodes[n], None) for n in numbers)
