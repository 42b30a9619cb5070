"""Oracle for the tree: a dict of prefixes. No nodes, no splits, no recency.

Written from the rules: what is cached is, for each component, a map from a whole-page prefix to one value. A stopping
point is usable when the last `reach` tokens before it are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Prefix = tuple[bytes, tuple[int, ...]]


@dataclass
class PrefixModel:
    """`live[c][namespace, tokens]` is the value component `c` caches for the last page of `tokens`."""

    page_size: int
    components: tuple
    live: list[dict[Prefix, int]] = field(default_factory=list)

    def __post_init__(self):
        self.live = [{} for _ in self.components]

    def _usable(self, space: bytes, tokens: tuple[int, ...], length: int) -> bool:
        if length == 0:
            return True
        for component, live in zip(self.components, self.live, strict=True):
            if not component.spans:
                if (space, tokens[:length]) not in live:
                    return False
                continue
            first = 0 if component.reach == math.inf else max(0, length - int(component.reach))
            for end in range(self.page_size, length + 1, self.page_size):
                if end > first and (space, tokens[:end]) not in live:
                    return False
        return True

    def match(self, space: bytes, tokens: tuple[int, ...]) -> int:
        ends = range(0, len(tokens) + 1, self.page_size)
        return max(end for end in ends if self._usable(space, tokens, end))

    def pages(self, space: bytes, tokens: tuple[int, ...], length: int) -> list[int]:
        return [self.live[0][space, tokens[:end]] for end in range(self.page_size, length + 1, self.page_size)]

    def insert(self, space: bytes, tokens: tuple[int, ...], values: list[list[int]], owned: int) -> list[list[int]]:
        """Offers values; returns, for each component, those that were not needed."""
        spare: list[list[int]] = [[] for _ in self.components]
        length = len(tokens) // self.page_size * self.page_size
        for i, component in enumerate(self.components):
            if component.spans:
                ends = range(self.page_size, length + 1, self.page_size)
                offers = [(end, value) for end, value in zip(ends, values[i], strict=False) if end > owned]
            else:
                offers = [(length, values[i][0])] if values[i] else []
            for end, value in offers:
                if end and (space, tokens[:end]) not in self.live[i]:
                    self.live[i][space, tokens[:end]] = value
                else:
                    spare[i].append(value)
        return spare

    def forget(self, freed: list[list[int]], held: list[set[int]]) -> None:
        for i, values in enumerate(freed):
            where = {value: prefix for prefix, value in self.live[i].items()}
            for value in values:
                assert value in where, f"component {i} let go of {value}, which it does not hold"
                assert value not in held[i], f"component {i} let go of {value} while it was locked"
                del self.live[i][where.pop(value)]

    def protected_by(self, space: bytes, tokens: tuple[int, ...], length: int) -> list[set[int]]:
        """Values a lock at `length` must keep: what makes that point usable."""
        keep: list[set[int]] = []
        for component, live in zip(self.components, self.live, strict=True):
            if not component.spans:
                keep.append({live[space, tokens[:length]]} if length else set())
                continue
            first = 0 if component.reach == math.inf else max(0, length - int(component.reach))
            ends = [end for end in range(self.page_size, length + 1, self.page_size) if end > first]
            keep.append({live[space, tokens[:end]] for end in ends})
        return keep
