"""What the adaptive policy learns: when nodes are used again, and what LRU would have made of it."""

from __future__ import annotations

import numpy as np

from jaxcache.state_dict import Columns, StateDict

CLASSES = 6
_BINS = 32
_FINEST = 6  # ages below 2^6 tokens are one bin, every further bin is an octave
_FADE = 0.99
_PRIOR_TOKENS = 256
_WIDTHS = np.array([2.0**_FINEST] + [2.0 ** (_FINEST + i) for i in range(_BINS - 1)])
_LEAST_LEVEL = 2.0**-48
_MARGINS = (0.25, 0.5, 1.0, 2.0, 4.0, np.inf)  # octaves
_PATIENCE = 4
_TOLERANCE = 0.02
_SHADOW_FADE = 0.98


def bin_of(age: int) -> int:
    """The bin of an age in tokens."""
    return min((age >> _FINEST).bit_length(), _BINS - 1)


class ReuseModel:
    """How long after a use the next one comes, for nodes found 0, 1, 2, 3, 4 and more times. Weighted by tokens.

    A node counts once for each of its uses: as found again, or as lost when even its ghost has expired. What was
    evicted too early is found as a ghost, so what is learned does not depend on what was kept.
    """

    def __init__(self) -> None:
        self._found = np.zeros((CLASSES, _BINS))
        self._lost = np.zeros((CLASSES, _BINS))

    def found(self, hits: int, age: int, tokens: int) -> None:
        """A node that had been found `hits` times was found again, `age` tokens after its last use."""
        self._found[min(hits, CLASSES - 1), bin_of(age)] += tokens

    def lost(self, hits: int, age: int, tokens: int) -> None:
        """A node that had been found `hits` times was not asked for again within `age` tokens."""
        self._lost[min(hits, CLASSES - 1), bin_of(age)] += tokens

    def levels(self, margin: float) -> list[list[float]]:
        """How much a node is worth its room, by class and bin of its age; the old is forgotten slowly.

        The Gittins index: the best ratio, over all times to keep it, of the chance that it is found by then to the time
        that it is kept for. Levels are whole numbers of `margin` octaves, so that less than that makes no difference.
        """
        found, lost = self._with_prior()
        ends = found + lost
        left_after = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - ends
        time = np.cumsum((left_after + ends / 2) * _WIDTHS, axis=1)
        found = np.cumsum(found, axis=1)
        zero = np.zeros((CLASSES, 1))
        gain = found[:, None, :] - np.hstack([zero, found[:, :-1]])[:, :, None]
        cost = time[:, None, :] - np.hstack([zero, time[:, :-1]])[:, :, None]
        index = np.where(cost > 0, gain / np.where(cost > 0, cost, 1), 0).max(axis=2)
        self._found *= _FADE
        self._lost *= _FADE
        return np.floor(np.log2(np.maximum(index, _LEAST_LEVEL)) / margin).tolist()

    def state_dict(self) -> StateDict:
        """What was counted."""
        return {"found": self._found.ravel().copy(), "lost": self._lost.ravel().copy()}

    def load_state_dict(self, books: Columns) -> None:
        """Has counted what the model with these books did."""
        self._found, self._lost = (
            books.floats(name, CLASSES * _BINS).reshape(CLASSES, _BINS) for name in ("found", "lost")
        )

    def _with_prior(self) -> tuple[np.ndarray, np.ndarray]:
        """What was counted, and a little of the class below: a class of which nothing is known is like that."""
        found, lost = self._found.copy(), self._lost.copy()
        for kind in range(1, CLASSES):
            total = found[kind - 1].sum() + lost[kind - 1].sum()
            if total:
                found[kind] += found[kind - 1] * (_PRIOR_TOKENS / total)
                lost[kind] += lost[kind - 1] * (_PRIOR_TOKENS / total)
        return found, lost


class ShadowLRU:
    """How much LRU would find with the same room, and how much caution follows from that.

    LRU holds a node while fewer tokens than fit were used since. `now` counts them: all of what LRU would not find, and
    of what it would find the share that it would have to be moved up.

    Attributes:
      now: Tokens used so far, as above.
      capacity: Tokens that fit.
      margin: Octaves by which two indices have to differ to count; infinite makes LRU of any policy.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.capacity = 1
        self._ours = self._its = 0.0
        self._step = 1
        self._calm = 0

    @property
    def margin(self) -> float:
        """See the class."""
        return _MARGINS[self._step]

    def use(self, seen: float, tokens: int, is_ours: bool) -> None:
        """Something used when `now` was `seen` is used again; `is_ours` if it was cached here."""
        depth = self.now - seen
        if is_ours:
            self._ours += tokens
        if depth <= self.capacity:
            self._its += tokens
            self.now += tokens * depth / self.capacity
        else:
            self.now += tokens

    def compare(self, period: float) -> None:
        """More margin where LRU was better lately, less after some time in which it was not."""
        if self._its - self._ours > _TOLERANCE * max(self._its + self._ours, period):
            self._step = min(self._step + 1, len(_MARGINS) - 1)
            self._calm = 0
        else:
            self._calm += 1
            if self._calm >= _PATIENCE:
                self._step = max(self._step - 1, 0)
                self._calm = 0
        self._ours *= _SHADOW_FADE
        self._its *= _SHADOW_FADE

    def state_dict(self) -> StateDict:
        """All it knows."""
        measured = np.array([self.now, self._ours, self._its])
        return {"shadow_seen": measured, "shadow_counts": np.array([self.capacity, self._step, self._calm])}

    def load_state_dict(self, books: Columns) -> None:
        """Knows what the shadow with these books did."""
        self.now, self._ours, self._its = books.floats("shadow_seen", 3).tolist()
        self.capacity, step, self._calm = books.ints("shadow_counts", 3).tolist()
        self._step = min(step, len(_MARGINS) - 1)
