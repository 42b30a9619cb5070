"""Policies that give every node a rank, lowest first: priority, LFU, FIFO, FILO, MRU; and what the others build on.

A policy remembers a `Record` of every node it was ever given, until the node leaves the tree, locked or not. Hits
are counted there, so a lock loses none of them, and neither does a split.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar, Self

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.policies.base import EvictionPolicy
from jaxcache.state_dict import Columns, StateDict


class Record:
    """What a policy knows of one node.

    Attributes:
      born: When the node was first added; the halves of a split keep it.
      used: When it was last used. No two nodes that may be evicted share one, and it changes with every use.
      hits: Lookups that found it.
      tokens: Tokens it had when its value was filled in; a split divides them with the value.
    """

    __slots__ = ("born", "hits", "tokens", "used")
    counts: ClassVar[tuple[str, ...]] = ("born", "hits", "tokens", "used")  # attributes that are whole numbers
    amounts: ClassVar[tuple[str, ...]] = ()  # those that are not

    def __init__(self, born: int, tokens: int, hits: int = 0):
        self.born = born
        self.tokens = tokens
        self.used = born
        self.hits = hits

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A record with these attributes."""
        record = cls.__new__(cls)
        for name in cls.counts + cls.amounts:
            setattr(record, name, values[name])
        return record


class Candidates:
    """A heap whose outdated entries are skipped: O(log n) an operation, amortised, and never much larger than needed.

    Args:
      is_current: Whether an entry pushed for a node at a certain use still stands.
    """

    def __init__(self, is_current: Callable[[Node, int], bool]):
        self._is_current = is_current
        self._heap: list[tuple[Any, int, Node, int]] = []
        self._pushes = 0
        self._kept = 0

    def push(self, rank: Any, node: Node, used: int) -> None:
        """Enters `node` as it is since its use `used`."""
        self._pushes += 1  # unique, so that two entries never compare their nodes
        heapq.heappush(self._heap, (rank, self._pushes, node, used))
        if len(self._heap) > 2 * self._kept + 64:
            self._heap = list(
                {entry[2]: entry for entry in self._heap if self._is_current(entry[2], entry[3])}.values()
            )
            heapq.heapify(self._heap)
            self._kept = len(self._heap)

    def first(self) -> Node | None:
        """The node of the lowest rank; None when there is none."""
        heap = self._heap
        while heap and not self._is_current(heap[0][2], heap[0][3]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None


class Recorded(EvictionPolicy):
    """Keeps the records. A subclass says what a use does (`_used`) and where a node waits to be chosen (`_enter`)."""

    record_type: ClassVar[type[Record]] = Record

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._records: dict[Node, Any] = {}
        self._evictable: dict[Node, None] = {}  # a set in order: what is iterated must not depend on addresses
        self._clock = 0

    # What a subclass may change.

    def _new(self, node: Node) -> Record:
        """A record for `node`, which is new."""
        return Record(self._clock, node.tokens)

    def _halve(self, upper: Node, record: Any) -> Record:
        """A record for `upper`, cut off the front of a node with `record`: that is how it was found."""
        half = Record(record.born, upper.tokens, record.hits)
        half.used = record.used
        return half

    def _found(self, node: Node, record: Any) -> None:
        """A lookup found `node`."""
        record.hits += 1

    def _used(self, node: Node, record: Any) -> None:
        """`node` was used; it may be locked."""
        self._clock += 1
        record.used = self._clock

    @abstractmethod
    def _enter(self, node: Node, record: Any) -> None:
        """`node` may be chosen from now on, or its place has changed."""

    # What the tree tells.

    def add(self, node: Node) -> None:
        """See `EvictionPolicy.add`."""
        record = self._records.get(node)
        if record is None:
            record = self._records[node] = self._new(node)
        self._evictable[node] = None
        self._renew(node, record)

    def discard(self, node: Node) -> None:
        """See `EvictionPolicy.discard`. O(1): the node's entries die with it."""
        del self._evictable[node]

    def remove(self, node: Node) -> None:
        """See `EvictionPolicy.remove`."""
        del self._evictable[node]
        del self._records[node]

    def touch(self, path: Sequence[Node]) -> None:
        """See `EvictionPolicy.touch`."""
        for node in self.in_order_of_use(path):
            record = self._records.get(node)
            if record is not None:
                self._renew(node, record)

    def hit(self, path: Sequence[Node]) -> None:
        """See `EvictionPolicy.hit`. Counted for locked nodes too."""
        for node in self.in_order_of_use(path):
            record = self._records.get(node)
            if record is not None:
                self._found(node, record)
                self._renew(node, record)

    def split(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.split`."""
        record = self._records.get(lower)
        if record is not None:
            half = self._records[upper] = self._halve(upper, record)
            record.tokens -= half.tokens
            self._found(upper, half)
            self._used(upper, half)

    def cut(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.cut`."""
        record = self._records.get(lower)
        if record is not None:
            half = self._records[upper] = self._halve(upper, record)
            record.tokens -= half.tokens
            self._clock += 1
            half.used = self._clock  # no two nodes share one

    def exposed(self, node: Node) -> None:
        """See `EvictionPolicy.exposed`."""
        if self.leaves_only:
            self._enter(node, self._records[node])

    def _renew(self, node: Node, record: Any) -> None:
        self._used(node, record)
        if node in self._evictable and not (self.leaves_only and node.children):
            self._enter(node, record)

    def _is_current(self, node: Node, used: int) -> bool:
        if node not in self._evictable or (self.leaves_only and node.children):
            return False
        return self._records[node].used == used

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """See `EvictionPolicy.state_dict`."""
        records = [self._records[node] for node in self._evictable]
        books = {"order": np.array([number[node] for node in self._evictable], np.int64)}
        for names, dtype in ((self.record_type.counts, np.int64), (self.record_type.amounts, np.float64)):
            books |= {name: np.array([getattr(record, name) for record in records], dtype) for name in names}
        return books | {"clock": np.array([self._clock])}

    def load_state_dict(self, books: Columns, nodes: Sequence[Node]) -> None:
        """See `EvictionPolicy.load_state_dict`."""
        order = books.distinct("order", len(nodes) - 1).tolist()
        self._clock = books.number("clock")
        columns = {name: books.ints(name, len(order)).tolist() for name in self.record_type.counts}
        columns |= {name: books.floats(name, len(order)).tolist() for name in self.record_type.amounts}
        books.ints("used", len(order), high=self._clock)
        for i, values in zip(order, zip(*columns.values(), strict=True), strict=True):
            self._records[nodes[i]] = self.record_type.of(dict(zip(columns, values, strict=True)))
            self._evictable[nodes[i]] = None
        self._restore_more(books, nodes)
        for node, record in self._records.items():
            if not (self.leaves_only and node.children):
                self._enter(node, record)

    def _restore_more(self, books: Columns, nodes: Sequence[Node]) -> None:
        """What a subclass knows besides, before the nodes are entered."""

    def hits(self, node: Node) -> int:
        """Lookups that found `node`, which has a value here."""
        return self._records[node].hits

    def problems(self, cached: Set[Node]) -> Iterator[str]:
        """See `EvictionPolicy.problems`."""
        if not self._evictable.keys() <= self._records.keys() <= cached:
            yield "it must remember what may be evicted, and only what is cached"
        if len({self._records[node].used for node in self._evictable}) < len(self._evictable):
            yield "two nodes were used at the same time"

    def __iter__(self) -> Iterator[Node]:
        return iter(self._evictable)

    def __contains__(self, node: Node) -> bool:
        return node in self._evictable

    def __len__(self) -> int:
        return len(self._evictable)


class Ranked(Recorded):
    """Lowest rank first, among equals the one used longest ago. O(log n) an operation, amortised."""

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._candidates = Candidates(self._is_current)

    @abstractmethod
    def rank(self, node: Node, record: Record) -> float:
        """The rank of `node` now; it may change only when the node is used."""

    def _enter(self, node: Node, record: Any) -> None:
        self._candidates.push((self.rank(node, record), record.used), node, record.used)

    def victim(self) -> Node | None:
        """See `EvictionPolicy.victim`."""
        return self._candidates.first()


class Priority(Ranked):
    """Lowest request priority first, then least recently used. A node has the highest priority inserted through it."""

    def rank(self, node: Node, record: Record) -> float:
        """The node's priority."""
        return node.priority


class LFU(Ranked):
    """Least often found first, then least recently used. Every lookup counts.

    Source: SGLang evict_policy.py (LFUStrategy), where a plain RadixCache counts no hits.
    """

    def rank(self, node: Node, record: Record) -> float:
        """Lookups that found the node."""
        return record.hits


class FIFO(Ranked):
    """Cached first, evicted first, whatever was used since."""

    def rank(self, node: Node, record: Record) -> float:
        """When the node was cached."""
        return record.born


class FILO(Ranked):
    """Cached last, evicted first."""

    def rank(self, node: Node, record: Record) -> float:
        """When the node was cached, backwards."""
        return -record.born


class MRU(Ranked):
    """Most recently used first."""

    def rank(self, node: Node, record: Record) -> float:
        """When the node was last used, backwards."""
        return -record.used
