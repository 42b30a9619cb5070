"""Policies of two queues: SLRU and S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.policies.ghosts import Ghosts
from jaxcache.index.policies.ranked import Candidates, Ranked, Record, Recorded
from jaxcache.state_dict import Columns, StateDict

_PROTECTED_SHARE = 0.8
_SMALL_SHARE = 0.1
_MOST_CHANCES = 3


class SLRU(Ranked):
    """Segmented LRU: what was never found goes first, so that a scan cannot flush what is in use. O(log n).

    A node is on probation until a lookup finds it, then protected. Protected nodes may fill 80 % of the cache; beyond
    that, those used longest ago are on probation again, as if just used.

    Source: Karedla, Love and Wherry, Caching strategies to improve disk system performance, 1994.
    """

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._protected: OrderedDict[Node, None] = OrderedDict()
        self._protected_tokens = 0
        self._tokens = 0

    def rank(self, node: Node, record: Record) -> float:
        """1 for a protected node, 0 for one on probation."""
        return float(node in self._protected)

    def _new(self, node: Node) -> Record:
        self._tokens += node.tokens
        return super()._new(node)

    def split(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.split`. The upper half was found; the lower one stays where it was."""
        if lower in self._protected:
            self._protected_tokens -= upper.tokens  # which `_found` is about to count
        super().split(upper, lower)

    def cut(self, upper: Node, lower: Node) -> None:
        """See `EvictionPolicy.cut`. Both halves are protected, or neither."""
        super().cut(upper, lower)
        if lower in self._protected:
            self._protected[upper] = None

    def _found(self, node: Node, record: Any) -> None:
        super()._found(node, record)
        if node not in self._protected:
            self._protected[node] = None
            self._protected_tokens += record.tokens

    def _used(self, node: Node, record: Any) -> None:
        super()._used(node, record)
        if node in self._protected:
            self._protected.move_to_end(node)

    def _renew(self, node: Node, record: Any) -> None:
        super()._renew(node, record)
        while self._protected_tokens > _PROTECTED_SHARE * self._tokens:
            oldest, _ = self._protected.popitem(last=False)
            demoted = self._records[oldest]
            self._protected_tokens -= demoted.tokens
            super()._renew(oldest, demoted)

    def remove(self, node: Node) -> None:
        """See `EvictionPolicy.remove`."""
        tokens = self._records[node].tokens
        super().remove(node)
        self._tokens -= tokens
        if node in self._protected:
            del self._protected[node]
            self._protected_tokens -= tokens

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """See `EvictionPolicy.state_dict`."""
        protected = np.array([number[node] for node in self._protected], np.int64)
        return super().state_dict(number) | {"protected": protected}

    def _restore_more(self, books: Columns, nodes: Sequence[Node]) -> None:
        protected = [nodes[i] for i in books.distinct("protected", len(nodes) - 1).tolist()]
        self._protected.update(dict.fromkeys(protected))
        self._protected_tokens = sum(self._records[node].tokens for node in protected if node in self._records)
        self._tokens = sum(record.tokens for record in self._records.values())

    def problems(self, cached: Set[Node]) -> Iterator[str]:
        """See `EvictionPolicy.problems`."""
        yield from super().problems(cached)
        if self._tokens != sum(record.tokens for record in self._records.values()):
            yield "it miscounts what it knows"
        if not self._protected.keys() <= self._records.keys():
            yield "what it protects must be known"
        elif self._protected_tokens != sum(self._records[node].tokens for node in self._protected):
            yield "it miscounts what is protected"


class _Queued(Record):
    """What S3-FIFO knows of a node; `used` is when it joined its queue.

    Attributes:
      chances: Times it may be passed over; a lookup adds one.
      is_small: Whether it is in the small queue.
    """

    __slots__ = ("chances", "is_small")
    counts: ClassVar[tuple[str, ...]] = (*Record.counts, "chances", "is_small")

    def __init__(self, born: int, tokens: int, is_small: bool):
        super().__init__(born, tokens)
        self.is_small = is_small
        self.chances = 0


class S3FIFO(Recorded):
    """Two queues, first in, first out: a small one for what is new, a main one for what was found. O(log n), amortised.

    What leaves the small queue without a hit is evicted, else it joins the main queue; what is at the head of the main
    queue goes round once for each hit, up to 3. What was evicted from the small queue and is cached again soon joins
    the main queue at once. As many tokens are remembered as are cached.

    Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.
    """

    record_type = _Queued

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._ghosts: Ghosts[None] = Ghosts()
        self._small, self._main = Candidates(self._is_current), Candidates(self._is_current)
        self._small_tokens = 0
        self._tokens = 0

    def _new(self, node: Node) -> Record:
        is_small = self._ghosts.take(node) is None
        self._tokens += node.tokens
        self._small_tokens += is_small * node.tokens
        self._clock += 1
        return _Queued(self._clock, node.tokens, is_small)

    def _halve(self, upper: Node, record: Any) -> Record:
        self._clock += 1
        half = _Queued(self._clock, upper.tokens, record.is_small)
        half.born, half.hits, half.chances = record.born, record.hits, record.chances
        return half

    def _found(self, node: Node, record: Any) -> None:
        super()._found(node, record)
        record.chances = min(record.chances + 1, _MOST_CHANCES)

    def _used(self, node: Node, record: Any) -> None:
        """Nothing: a place in a queue does not change with use."""

    def _renew(self, node: Node, record: Any) -> None:
        if node in self._evictable and not (self.leaves_only and node.children):
            self._enter(node, record)

    def _enter(self, node: Node, record: Any) -> None:
        queue = self._small if record.is_small else self._main
        queue.push(record.used, node, record.used)

    def touch(self, path: Sequence[Node]) -> None:
        """Nothing: only lookups count."""

    def hit(self, path: Sequence[Node]) -> None:
        """See `EvictionPolicy.hit`. No node changes its place."""
        for node in path:
            record = self._records.get(node)
            if record is not None:
                self._found(node, record)

    def victim(self) -> Node | None:
        """See `EvictionPolicy.victim`. Those passed over lose a chance or change their queue."""
        while True:
            is_small_full = self._small_tokens > _SMALL_SHARE * self._tokens
            first, second = (self._small, self._main) if is_small_full else (self._main, self._small)
            node = first.first() or second.first()
            if node is None:
                return None
            record = self._records[node]
            if not record.chances:
                return node
            self._clock += 1
            record.used = self._clock
            if record.is_small:
                record.is_small = False
                record.chances = 0
                self._small_tokens -= record.tokens
            else:
                record.chances -= 1
            self._enter(node, record)

    def remove(self, node: Node) -> None:
        """See `EvictionPolicy.remove`."""
        record = self._records[node]
        super().remove(node)
        self._tokens -= record.tokens
        if record.is_small:
            self._small_tokens -= record.tokens
            self._ghosts.put(node, record.tokens, None)
        while self._ghosts.expire(self._tokens):
            pass

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """See `EvictionPolicy.state_dict`."""
        return super().state_dict(number) | self._ghosts.state_dict()

    def _restore_more(self, books: Columns, nodes: Sequence[Node]) -> None:
        self._ghosts.load_state_dict(books, lambda count: [None] * count)
        self._tokens = sum(record.tokens for record in self._records.values())
        self._small_tokens = sum(record.tokens for record in self._records.values() if record.is_small)

    def problems(self, cached: Set[Node]) -> Iterator[str]:
        """See `EvictionPolicy.problems`."""
        yield from super().problems(cached)
        small = sum(record.tokens for record in self._records.values() if record.is_small)
        if (self._tokens, self._small_tokens) != (sum(r.tokens for r in self._records.values()), small):
            yield "it miscounts what it knows"
