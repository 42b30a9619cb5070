"""Who is evicted next: the policies by name, and LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.policies.base import EvictionPolicy
from jaxcache.state_dict import Columns, StateDict


class LRU(EvictionPolicy):
    """Least recently used first, O(1) an operation.

    A touch moves a path to the young end, in the first component its deepest node first. Every node is then younger
    than all below it, so the oldest is always a leaf and nothing has to be searched.
    """

    __slots__ = ("_order",)

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._order: OrderedDict[Node, None] = OrderedDict()

    def add(self, node: Node) -> None:
        """See `EvictionPolicy.add`. O(1)."""
        self._order[node] = None

    def discard(self, node: Node) -> None:
        """See `EvictionPolicy.discard`. O(1)."""
        del self._order[node]

    def touch(self, path: Sequence[Node]) -> None:
        """See `EvictionPolicy.touch`. O(len(path))."""
        order = self._order
        for node in self.in_order_of_use(path):
            if node in order:
                order.move_to_end(node)

    remove = discard
    hit = touch

    def split(self, upper: Node, lower: Node) -> None:
        """Nothing to do: the upper half is added or locked next."""

    def cut(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.cut`. What is above stays younger than what is below; the order of leaves stays."""
        above = upper if self.leaves_only and lower in self._order else None
        while above is not None and above.parent is not None:
            if above is upper or above in self._order:
                self._order[above] = None
                self._order.move_to_end(above)
            above = above.parent

    def exposed(self, node: Node) -> None:
        """Nothing to do: the order needs no leaves."""

    def victim(self) -> Node | None:
        """The oldest node. O(1)."""
        for node in self._order:
            return node
        return None

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """See `EvictionPolicy.state_dict`."""
        return {"order": np.array([number[node] for node in self._order], np.int64)}

    def load_state_dict(self, books: Columns, nodes: Sequence[Node]) -> None:
        """See `EvictionPolicy.load_state_dict`."""
        self._order.update({nodes[i]: None for i in books.distinct("order", len(nodes) - 1).tolist()})

    def __iter__(self) -> Iterator[Node]:
        return iter(self._order)

    def __contains__(self, node: Node) -> bool:
        return node in self._order

    def __len__(self) -> int:
        return len(self._order)
