"""The adaptive policy: evicts what is least worth its room, as it learned from all that was used again or was not.

    what it is asked                 what it does
    which node goes?                 the one of the lowest Gittins index (`reuse.ReuseModel`) for its hits and its age
    what if the traffic changes?     it fades what it learned, and watches what LRU would have found
                                     (`reuse.ShadowLRU`): where that is more, indices have to differ by more to count
    what if nothing is known yet?    all indices are equal, and among equals the one used longest ago goes: LRU

An index does not change smoothly with age only because that is usual: after a use there may be a time in which nothing
is used again (a chat waits for its user), and in a loop what is oldest comes next. So for each class the oldest and
the youngest candidate are looked at. There is nothing to set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.policies.ghosts import Ghosts
from jaxcache.index.policies.ranked import Candidates, Record, Recorded
from jaxcache.index.policies.reuse import CLASSES, ReuseModel, ShadowLRU, bin_of
from jaxcache.state_dict import Columns, StateDict

_GHOST_SHARE = 4
_PERIODS = 16  # lessons while the cache is filled once
_SHORTEST_PERIOD = 64


class _Life(Record):
    """What is known of one node.

    Attributes:
      at: Tokens cached before its last use.
      seen: `ShadowLRU.now` at its last use.
    """

    __slots__ = ("at", "seen")
    counts: ClassVar[tuple[str, ...]] = (*Record.counts, "at")
    amounts: ClassVar[tuple[str, ...]] = ("seen",)

    def __init__(self, born: int, tokens: int, hits: int, at: int, seen: float):
        super().__init__(born, tokens, hits)
        self.at = at
        self.seen = seen


class Adaptive(Recorded):
    """See the module. O(log n) an operation, amortised; remembers four times as many tokens as are cached, as ghosts.

    Source: Gittins, Bandit processes and dynamic allocation indices, 1979; hit density as in Beckmann, Chen and Cidon,
    LHD: improving cache hit rate by maximizing hit density, NSDI 2018; ghosts as in Megiddo and Modha, ARC, FAST 2003.
    """

    record_type = _Life

    def __init__(self, leaves_only: bool):
        super().__init__(leaves_only)
        self._oldest = [Candidates(self._is_current) for _ in range(CLASSES)]
        self._youngest = [Candidates(self._is_current) for _ in range(CLASSES)]
        self._ghosts: Ghosts[tuple[int, int, float]] = Ghosts()
        self._model = ReuseModel()
        self._shadow = ShadowLRU()
        self._levels = self._model.levels(self._shadow.margin)
        self._tokens = 0
        self._now = 0
        self._next_lesson = 0

    def _new(self, node: Node) -> Record:
        fresh, hits = node.tokens, 0
        ghost = self._ghosts.take(node)
        self._tokens += fresh
        self._shadow.capacity = max(self._shadow.capacity, self._tokens)
        if ghost is not None:
            tokens, (hits, at, seen) = ghost
            again = min(tokens, fresh)
            self._model.found(hits, self._now - at, again)
            self._shadow.use(seen, again, is_ours=False)
            fresh, hits = fresh - again, hits + 1
        self._now += node.tokens
        self._shadow.now += fresh
        return _Life(self._clock, node.tokens, hits, self._now, self._shadow.now)

    def _halve(self, upper: Node, record: Any) -> Record:
        return _Life(record.born, upper.tokens, record.hits, record.at, record.seen)

    def _found(self, node: Node, record: Any) -> None:
        self._model.found(record.hits, self._now - record.at, record.tokens)
        self._shadow.use(record.seen, record.tokens, is_ours=True)
        super()._found(node, record)

    def _used(self, node: Node, record: Any) -> None:
        super()._used(node, record)
        record.at = self._now
        record.seen = self._shadow.now

    def _enter(self, node: Node, record: Any) -> None:
        kind = min(record.hits, CLASSES - 1)
        self._oldest[kind].push(record.used, node, record.used)
        self._youngest[kind].push(-record.used, node, record.used)

    def victim(self) -> Node | None:
        """See `EvictionPolicy.victim`."""
        if self._now >= self._next_lesson:
            self._learn()
        best = None
        lowest = (0.0, 0)
        for kind, levels in enumerate(self._levels):
            for candidates in (self._oldest[kind], self._youngest[kind]):
                node = candidates.first()
                if node is None:
                    break
                record = self._records[node]
                worth = (levels[bin_of(self._now - record.at)], record.used)
                if best is None or worth < lowest:
                    best, lowest = node, worth
        return best

    def _learn(self) -> None:
        period = max(self._shadow.capacity // _PERIODS, _SHORTEST_PERIOD)
        self._next_lesson = self._now + period
        self._shadow.compare(period)
        self._levels = self._model.levels(self._shadow.margin)

    def remove(self, node: Node) -> None:
        """See `EvictionPolicy.remove`."""
        record = self._records[node]
        super().remove(node)
        self._tokens -= record.tokens
        self._ghosts.put(node, record.tokens, (record.hits, record.at, record.seen))
        while (ghost := self._ghosts.expire(_GHOST_SHARE * self._shadow.capacity)) is not None:
            tokens, (hits, at, _) = ghost
            self._model.lost(hits, self._now - at, tokens)

    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """See `EvictionPolicy.state_dict`."""
        hits, at, seen = zip(*self._ghosts.notes(), strict=True) if len(self._ghosts) else ((), (), ())
        ghosts = {
            "ghost_hits": np.array(hits, np.int64),
            "ghost_at": np.array(at, np.int64),
            "ghost_seen": np.array(seen),
        }
        learned = self._model.state_dict() | self._shadow.state_dict() | {"levels": np.array(self._levels).ravel()}
        times = {"times": np.array([self._now, self._next_lesson])}
        return super().state_dict(number) | self._ghosts.state_dict() | ghosts | learned | times

    def _restore_more(self, books: Columns, nodes: Sequence[Node]) -> None:
        def notes(count: int) -> list[tuple[int, int, float]]:
            hits, at = (books.ints(name, count).tolist() for name in ("ghost_hits", "ghost_at"))
            return list(zip(hits, at, books.floats("ghost_seen", count).tolist(), strict=True))

        self._ghosts.load_state_dict(books, notes)
        self._model.load_state_dict(books)
        self._shadow.load_state_dict(books)
        levels = np.array(self._levels)
        self._levels = books.floats("levels", levels.size).reshape(levels.shape).tolist()
        self._now, self._next_lesson = books.ints("times", 2).tolist()
        self._tokens = sum(record.tokens for record in self._records.values())

    def problems(self, cached: Set[Node]) -> Iterator[str]:
        """See `EvictionPolicy.problems`."""
        yield from super().problems(cached)
        if self._tokens != sum(record.tokens for record in self._records.values()):
            yield "it miscounts what it knows"
        if self._ghosts.tokens > _GHOST_SHARE * self._shadow.capacity:
            yield "it remembers more than it may"
