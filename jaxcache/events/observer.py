"""What a cache tells whoever watches it, as it happens. Nobody does by default, and then it costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheObserver(Protocol):
    """Somebody to tell: `cache.observer = observer`. Called on the thread that drives the cache: it must be quick."""

    def admitted(self, tokens: int, found: int) -> None:
        """A request of so many tokens starts to run; so many of them were found in the cache."""

    def matched(self, seconds: float) -> None:
        """A lookup took so long."""

    def inserted(self, tokens: int, seconds: float) -> None:
        """So many tokens came into the tree, in so long."""

    def evicted(self, amounts: Sequence[int], seconds: float) -> None:
        """So much was let go, in so long: tokens, or states, of each component in the order of the tree's."""
