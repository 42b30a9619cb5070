"""The audit of a cache: its tree, and whether the owners of memory agree on what is the tree's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcache.components.base import TreeComponent
from jaxcache.errors import BrokenInvariantError
from jaxcache.index.check import check, draw
from jaxcache.index.node import joined
from jaxcache.index.tree import RadixTree


def check_cached(tree: RadixTree, components: Sequence[TreeComponent]) -> None:
    """Verifies the tree, and that the owners agree on what is the tree's, component by component. O(cached).

    Args:
      tree: The index of a cache.
      components: What it holds, in its order.

    Raises:
      BrokenInvariantError: with a drawing of the tree.
    """
    check(tree)
    nodes = list(tree.nodes())
    pages = joined([node.value for node in nodes])
    for i, component in enumerate(components):
        values = []
        for node in nodes:
            value = node.slot(i).value
            if value is not None:
                values.append(value)
            elif component.component.spans:
                values.append(np.zeros_like(node.value))
        for problem in component.problems(pages, joined(values)):
            raise BrokenInvariantError(f"{problem}\n{draw(tree)}")
