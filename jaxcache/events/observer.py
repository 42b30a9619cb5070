"""The observer of a cache: notified of lookups, inserts and evictions. None by default, at no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheObserver(Protocol):
    """Set as `cache.observer = observer`. Called on the thread that drives the cache: it must be quick."""

    def admitted(self, tokens: int, found: int) -> None:
        """A request was admitted: its tokens, and how many of them were cached."""

    def matched(self, seconds: float) -> None:
        """A lookup was made: elapsed seconds."""

    def inserted(self, tokens: int, seconds: float) -> None:
        """Tokens that an insert added to the tree, and elapsed seconds."""

    def evicted(self, amounts: Sequence[int], seconds: float) -> None:
        """Evicted amounts per component of the tree, in its order (tokens, or states), and elapsed seconds."""
