"""What was evicted, remembered by a fingerprint for a while: how a policy learns that it evicted too early."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from jaxcache.index.node import Node
from jaxcache.state_dict import Columns, StateDict

_FINGERPRINT_BYTES = 64

_Note = TypeVar("_Note")


class Ghosts(Generic[_Note]):
    """The last nodes evicted, oldest first, each with a note.

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
        """Tokens and note of what was evicted where `node` begins, and forgets it. O(1)."""
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

    def notes(self) -> list[_Note]:
        """The notes, oldest first."""
        return [note for _, note in self._notes.values()]

    def state_dict(self) -> StateDict:
        """What is remembered but for the notes, oldest first. O(ghosts)."""
        places = np.array(list(self._notes), np.int64).reshape(-1, 2)
        tokens = np.array([tokens for tokens, _ in self._notes.values()], np.int64)
        return {"ghost_start": places[:, 0].copy(), "ghost_print": places[:, 1].copy(), "ghost_tokens": tokens}

    def load_state_dict(self, books: Columns, notes: Callable[[int], Sequence[_Note]]) -> None:
        """Remembers what the ghosts with these books did; `notes` gives as many notes as there are. O(ghosts)."""
        starts = books.ints("ghost_start")
        count = len(starts)
        prints, tokens = books.ints("ghost_print", count), books.ints("ghost_tokens", count)
        places = zip(starts.tolist(), prints.tolist(), strict=True)
        self._notes = OrderedDict(zip(places, zip(tokens.tolist(), notes(count), strict=True), strict=True))
        self.tokens = sum(tokens for tokens, _ in self._notes.values())

    def __len__(self) -> int:
        return len(self._notes)


def _fingerprint(node: Node) -> tuple[int, int]:
    return node.start, zlib.crc32(node.key[:_FINGERPRINT_BYTES])  # the same in every process, unlike `hash`
