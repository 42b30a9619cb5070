"""What was let go, remembered by a fingerprint for a while: how a policy learns that it let go too early."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from jaxcache.index.node import Node

_FINGERPRINT_BYTES = 64

_Note = TypeVar("_Note")


class Ghosts(Generic[_Note]):
    """The last nodes let go, oldest first, each with a note.

    A ghost is found by its first tokens and the place where they begin: a prefix that is cached again begins where it
    was cut. No token is kept. Two prefixes with the same 16 tokens at the same place are taken for each other, which
    costs a policy some precision and nothing else.

    Attributes:
      tokens: Tokens of all nodes remembered.
    """

    def __init__(self) -> None:
        self._notes: OrderedDict[tuple[int, int], tuple[int, _Note]] = OrderedDict()
        self.tokens = 0

    def put(self, node: Node, tokens: int, note: _Note) -> None:
        """Remembers `node`, which has `tokens`. O(1)."""
        place = _fingerprint(node)
        self.take(node)
        self._notes[place] = (tokens, note)
        self.tokens += tokens

    def take(self, node: Node) -> tuple[int, _Note] | None:
        """Tokens and note of what was let go where `node` begins, and forgets it. O(1)."""
        found = self._notes.pop(_fingerprint(node), None)
        if found is not None:
            self.tokens -= found[0]
        return found

    def expire(self, tokens: int) -> tuple[int, _Note] | None:
        """Forgets the oldest if more than `tokens` are remembered, and returns it. O(1)."""
        if self.tokens <= tokens:
            return None
        _, found = self._notes.popitem(last=False)
        self.tokens -= found[0]
        return found

    def __len__(self) -> int:
        return len(self._notes)


def _fingerprint(node: Node) -> tuple[int, int]:
    return node.start, hash(node.key[:_FINGERPRINT_BYTES])
