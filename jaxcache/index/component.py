"""A cache flavour is the one tree with other components, and a component is two numbers.

| component | reach | spans | a stopping point is usable when ...         | a lock covers      | may be evicted |
|-----------|-------|-------|---------------------------------------------|--------------------|----------------|
| full      | inf   | yes   | every token before it is present            | the path to root   | leaves         |
| window    | W     | yes   | the last W tokens before it are present     | the last W tokens  | anywhere       |
| state     | 1     | no    | the state saved exactly there is present    | that node          | anywhere       |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxcache.errors import ArgumentError


@dataclass(frozen=True)
class Component:
    """What one kind of cached state asks of the tree.

    Attributes:
      name: Shown in drawings and errors.
      reach: Tokens that must be present right before a stopping point; inf asks for all of them.
      spans: True if it has one value a page, which a split divides; False if it has one value at the end of a node,
        which a split leaves with the lower half.

    Raises:
      ArgumentError: `reach` is less than a token, or not 1 where there is one value at the end of a node.
    """

    name: str
    reach: float = math.inf
    spans: bool = True

    def __post_init__(self):
        if not self.reach >= 1 or (not self.spans and self.reach != 1):
            raise ArgumentError(f"reach of {self.name} must be at least 1, and 1 for states; got {self.reach!r}")


FULL = Component("full")
