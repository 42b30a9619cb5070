"""Who is evicted next: the policies by name, and those that go by last use alone."""

from __future__ import annotations

import enum
import heapq
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jaxcache.index.eviction import EvictionPolicy
from jaxcache.index.node import Node


class LRU(EvictionPolicy):
    """Least recently used first, O(1) an operation.

    A touch moves a path to the young end, its deepest node first. Every node is then younger than all below it, so the
    oldest is always a leaf and nothing has to be searched.
    """

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
        for node in reversed(path):
            if node in order:
                order.move_to_end(node)

    remove = discard
    hit = touch

    def split(self, upper: Node, lower: Node) -> None:
        """Nothing to do: the upper half is added or locked next."""

    def exposed(self, node: Node) -> None:
        """Nothing to do: the order needs no leaves."""

    def victim(self) -> Node | None:
        """The oldest node. O(1)."""
        for node in self._order:
            return node
        return None

    def __iter__(self) -> Iterator[Node]:
        return iter(self._order)

    def __contains__(self, node: Node) -> bool:
        return node in self._order

    def __len__(self) -> int:
        return len(self._order)


class Ranked(EvictionPolicy):
    """Lowest rank first: a heap of candidates whose outdated entries are skipped. O(log n) an operation, amortised.

    A subclass says what the rank of a node is; equal ranks go by last use.
    """

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._clock = 0
        self._stamp: dict[Node, int] = {}
        self._heap: list[tuple[float, int, int, Node]] = []
        self._pushes = 0

    @abstractmethod
    def rank(self, node: Node) -> float:
        """The rank of `node` now; it may change only when the node is touched."""

    def add(self, node: Node) -> None:
        """See `EvictionPolicy.add`."""
        self._renew(node)

    def discard(self, node: Node) -> None:
        """See `EvictionPolicy.discard`. O(1): its heap entry dies with its stamp."""
        del self._stamp[node]

    def touch(self, path: Sequence[Node]) -> None:
        """See `EvictionPolicy.touch`."""
        for node in reversed(path):
            if node in self._stamp:
                self._renew(node)

    def split(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.split`."""

    def exposed(self, node: Node) -> None:
        """See `EvictionPolicy.exposed`."""
        if self.leaves_only:
            self._push(node)

    def victim(self) -> Node | None:
        """See `EvictionPolicy.victim`."""
        heap = self._heap
        while heap and not self._is_current(heap[0]):
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def _renew(self, node: Node) -> None:
        self._clock += 1
        self._stamp[node] = self._clock
        if not (self.leaves_only and node.children):
            self._push(node)

    def _push(self, node: Node) -> None:
        self._pushes += 1  # unique, so that two entries never compare their nodes
        heapq.heappush(self._heap, (self.rank(node), self._stamp[node], self._pushes, node))
        if len(self._heap) > 2 * len(self._stamp) + 64:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def _is_current(self, entry: tuple[float, int, int, Node]) -> bool:
        _, stamp, _, node = entry
        return self._stamp.get(node) == stamp and not (self.leaves_only and node.children)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._stamp)

    def __contains__(self, node: Node) -> bool:
        return node in self._stamp

    def __len__(self) -> int:
        return len(self._stamp)


class Priority(Ranked):
    """Lowest request priority first, then least recently used. A node has the highest priority inserted through it."""

    def rank(self, node: Node) -> float:
        """The node's priority."""
        return node.priority


class Policy(enum.Enum):
    """Eviction policies by name."""

    LRU = "lru"
    PRIORITY = "priority"

    def build(self, leaves_only: bool) -> EvictionPolicy:
        """A new, empty policy of this kind."""
        return _POLICIES[self](leaves_only)


_POLICIES: dict[Policy, type[EvictionPolicy]] = {Policy.LRU: LRU, Policy.PRIORITY: Priority}
