"""The observer of a cache: notified of lookups, inserts and evictions. None by default, at no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheObserver(Protocol):
    """Set as `cache.observer = observer`. Called on the thread that drives the cache: it must be quick."""

    def admitted(self, tokens: int, found: int) -> None:
        """A request of so many tokens runs for the first time; so many of them were found in the cache.

        Called again, with 0 tokens, for what is found later: what others have computed by the time a step is planned.
        """

    def resumed(self, found: int, loaded: int) -> None:
        """A request goes on: so many tokens were found in the cache again, so many more come from a host copy.

        Called once for each later admission of a request, and for the first one if that loads a host copy (`found` is 0
        then, as `admitted` has said it); and, as `admitted`, for what is found later.
        """

    def matched(self, seconds: float) -> None:
        """A lookup was made: elapsed seconds."""

    def inserted(self, tokens: int, seconds: float) -> None:
        """Tokens that an insert added to the tree, and elapsed seconds."""

    def evicted(self, amounts: Sequence[int], seconds: float) -> None:
        """Evicted amounts per component of the tree, in its order (tokens, or states), and elapsed seconds."""
