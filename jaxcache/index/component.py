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


@dataclass(frozen=True)
class Component:
    """What one kind of cached state asks of the tree.

    Attributes:
      name: Shown in drawings and errors.
      reach: Tokens that must be present right before a stopping point; inf asks for all of them.
      spans: True if it has one value a page, which a split divides; False if it has one value at the end of a node,
        which a split leaves with the lower half.
    """

    name: str
    reach: float = math.inf
    spans: bool = True


FULL = Component("full")
