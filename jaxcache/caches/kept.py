"""The memory that a tree keeps: it changes its owner as the tree takes it, and is freed as the tree gives it up.

The tree decides, the components execute: pages that the tree takes change their owner, pages that it does not take or
gives up go back to the allocator. Nothing is freed in the middle of a walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.components.base import TreeComponent
from jaxcache.components.full import FullPages
from jaxcache.errors import ArgumentError
from jaxcache.events.events import EventQueue
from jaxcache.index.key import RadixKey
from jaxcache.index.node import Eviction, Insertion
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree

if TYPE_CHECKING:
    from jaxtyping import Int32


class KeptMemory:
    """A tree with its components, by keys, pages and values.

    Args:
      tree: The index.
      full: The component of full pages.
      further: The other components, in the tree's order.
      events: Told of what is kept and no longer kept; or None.
    """

    __slots__ = ("_all", "_full", "_further", "_tree", "events")

    def __init__(self, tree: RadixTree, full: FullPages, further: tuple[TreeComponent, ...], events: EventQueue | None):
        self._tree, self._full, self._further, self.events = tree, full, further, events
        self._all: tuple[TreeComponent, ...] = (full, *further)

    def values_with(self, state: int) -> list[int]:
        """For each further component what stands for a whole prefix: `state`, or 0 where there is an id a page."""
        return [0 if part.component.spans else state for part in self._further]

    def require_insertable(self, key: RadixKey, pages: Int32[np.ndarray, " pages"], state: int) -> list[int]:
        """`values_with` the state, which can be kept with the pages.

        Raises:
          ArgumentError, OwnershipError: It cannot.
        """
        values = self.values_with(state)
        if state and state not in values:
            raise ArgumentError(f"state: this cache keeps none, got {state}: use a MambaRadixCache")
        size = self._tree.page_size
        whole = pages[: key.length // size]
        for component, value in zip(self._further, values, strict=True):
            component.require_insertable(key.length, size, whole, value)
        return values

    def insert(
        self,
        key: RadixKey,
        pages: Int32[np.ndarray, " pages"],
        values: Sequence[int],
        held: Receipt | None = None,
        priority: int = 0,
    ) -> Insertion:
        """Offers the tree pages and what goes with them.

        Args:
          key: Tokens; cut to whole pages.
          pages: Full pages.
          values: For each further component what stands for the whole prefix; see `TreeComponent.candidates`.
          held: The caller's lock on a prefix of `key`.
          priority: That of the request.
        """
        offered = [pages]
        if self._further:
            offered += [part.candidates(pages, value) for part, value in zip(self._further, values, strict=True)]
        inserted = self._tree.insert(key, offered, held, priority, self._full.claim)
        if self._further:
            for component, value, spare in zip(self._further, values, inserted.spare[1:], strict=True):
                component.adopt(pages, value, inserted, spare)
        if self.events is not None:
            for node in inserted.added:
                self.events.stored(node, key.namespace)
        return inserted

    def evict(self, amounts: Sequence[int]) -> list[int]:
        """Frees at least so many values of each component, as far as there are any; returns how many of each."""
        freed = [0] * len(amounts)
        for i, amount in enumerate(amounts):
            if freed[i] < amount:
                gone = self._tree.evict(amount - freed[i], i)
                self.free(gone)
                freed = [count + len(values) for count, values in zip(freed, gone.values, strict=True)]
        return freed

    def free(self, gone: Eviction) -> None:
        """Frees evicted values; full pages last, since freeing one also frees its window page."""
        for i, component in enumerate(self._further, 1):
            if len(gone.values[i]):
                component.free(gone.values[i])
        if len(gone.values[0]):
            self._full.free(gone.values[0])
        if self.events is not None:
            self.events.removed(gone)

    def shortage(self, amounts: Mapping[str, int]) -> list[int] | None:
        """What has to be evicted of each component, for so many of its values to be there; None if that cannot suffice.

        Args:
          amounts: By name of a component; of others 0.
        """
        short = [amounts.get(component.name, 0) - component.available() for component in self._all]
        if any(amount > most for amount, most in zip(short, self._tree.evictable, strict=True)):
            return None
        return [max(amount, 0) for amount in short]

    def usage(self, name: str) -> tuple[int, int, int]:
        """(size, available, evictable) of one component, in its values. Raises ArgumentError if there is none."""
        for component, evictable in zip(self._all, self._tree.evictable, strict=True):
            if component.name == name:
                return component.size(), component.available(), evictable
        raise ArgumentError(f"name must be one of {[part.name for part in self._all]}, got {name!r}")

    def count(self, name: str, counts: Sequence[int]) -> int:
        """Of a count for each component that of one; 0 without it."""
        return dict(zip([component.name for component in self._all], counts, strict=True)).get(name, 0)
