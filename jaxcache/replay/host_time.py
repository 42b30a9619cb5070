"""Host time of a replay: what a manager's calls take is measured around them, a cache tells its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.events.observer import CacheObserver

NAMES = ("match", "admit", "plan", "insert", "evict")


class HostTimes:
    """A `CacheObserver` that keeps the host time of each call, and hands on what it is told.

    Attributes:
      evicted_tokens: Tokens evicted while it watched.
    """

    def __init__(self) -> None:
        self.evicted_tokens = 0
        self._ns: dict[str, list[int]] = {name: [] for name in NAMES}
        self._next: CacheObserver | None = None

    @contextmanager
    def watching(self, cache: RadixCache) -> Iterator[None]:
        """Observes `cache` while the block runs; an observer that it has keeps being told."""
        self._next = cache.observer
        cache.observer = self
        try:
            yield
        finally:
            cache.observer, self._next = self._next, None

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """The block is one call of `name`."""
        started = time.perf_counter_ns()
        yield
        self._ns[name].append(time.perf_counter_ns() - started)

    def summary(self) -> dict[str, dict[str, float]]:
        """p50 and p99 in microseconds, the total in seconds and the number of calls, by name."""
        return {
            name: {
                "p50": round(float(np.percentile(ns or [0], 50)) / 1e3, 2),
                "p99": round(float(np.percentile(ns or [0], 99)) / 1e3, 2),
                "total_s": round(sum(ns) / 1e9, 4),
                "calls": len(ns),
            }
            for name, ns in self._ns.items()
        }

    # ---- what the cache tells --------------------------------------------------------------------------------------

    def admitted(self, tokens: int, found: int) -> None:
        """See `CacheObserver.admitted`."""
        if self._next is not None:
            self._next.admitted(tokens, found)

    def resumed(self, found: int, loaded: int) -> None:
        """See `CacheObserver.resumed`."""
        if self._next is not None:
            self._next.resumed(found, loaded)

    def matched(self, seconds: float) -> None:
        """See `CacheObserver.matched`."""
        self._add("match", seconds)
        if self._next is not None:
            self._next.matched(seconds)

    def inserted(self, tokens: int, seconds: float) -> None:
        """See `CacheObserver.inserted`."""
        self._add("insert", seconds)
        if self._next is not None:
            self._next.inserted(tokens, seconds)

    def evicted(self, amounts: Sequence[int], seconds: float) -> None:
        """See `CacheObserver.evicted`."""
        self._add("evict", seconds)
        self.evicted_tokens += amounts[0]
        if self._next is not None:
            self._next.evicted(amounts, seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._ns[name].append(round(1e9 * seconds))
