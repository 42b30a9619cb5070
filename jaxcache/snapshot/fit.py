"""A snapshot for a manager of other sizes or of another policy: what fits is loaded, the most valuable prefixes first.

    saved books ──► the saved tree ──evict what does not fit──► new ids, new free lists ──► books of the new manager
                    (saved policy)   (in the saved order)
    rows in files, in the order of the saved ids ──► the row of each one in the new pool, 0 where it was left out

Sizes may differ, the eviction policy and `need_sort`: engines size pools from the memory that is free when they start.
Whatever would make the content wrong may not (`jaxcache.snapshot.manifest`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.components.base import TreeComponent
from jaxcache.errors import ArgumentError, SnapshotError
from jaxcache.index.saved import restore_tree, saved_tree, with_policy
from jaxcache.index.tree import RadixTree
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager
from jaxcache.pages.allocator import PageState
from jaxcache.slots import page_slots
from jaxcache.state_dict import Columns, StateDict, prefixed

if TYPE_CHECKING:
    from jaxtyping import Int32

_BOOKS_OF = {"full": "pages", "window": "pages.window", "state": "states"}
"""Where the books of each component's allocator stand."""
_MAY_DIFFER = frozenset({"size", "num_states", "policy", "need_sort"})


@dataclass(frozen=True)
class Loaded:
    """What a load brought back.

    Attributes:
      saved_tokens: Tokens of the prefixes in the snapshot.
      tokens: Those that were loaded.
      saved_values: By component, pages or states in the snapshot.
      values: Those that were loaded.
    """

    saved_tokens: int
    tokens: int
    saved_values: Mapping[str, int]
    values: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        """Whether nothing was left out."""
        return self.saved_values == self.values


@dataclass(frozen=True)
class Fitted:
    """StateDict for a new manager, and where the rows of the files go.

    Attributes:
      books: Its state dict.
      rows: For each stack of the pool, the row of each saved row, in the order of the files; 0 for those left out.
      loaded: How much that is.
    """

    books: StateDict
    rows: Mapping[str, Int32[np.ndarray, " saved_rows"]]
    loaded: Loaded


def as_saved(config: MemoryConfig, theirs: Mapping[str, Any]) -> MemoryConfig:
    """`config` with the sizes, the policy and the `need_sort` of a snapshot's fingerprint.

    Raises:
      SnapshotError: Those are not sizes of such a config.
    """
    try:
        return _resized("config", config, theirs)
    except (ArgumentError, ValueError, TypeError) as error:
        raise SnapshotError(f"manifest: its sizes are not those of such a cache: {error}") from error


def _resized(name: str, config: Any, theirs: Mapping[str, Any]) -> Any:
    """A record, and the records within it, with their values of the fields that may differ."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, full_name = getattr(config, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            changes[field.name] = _resized(full_name, value, theirs)
        elif field.name in _MAY_DIFFER and full_name in theirs:
            changes[field.name] = type(value)(theirs[full_name])
    return dataclasses.replace(config, **changes) if changes else config


def fitted(books: StateDict, saved: MemoryConfig, manager: MemoryManager, empty: StateDict) -> Fitted:
    """What of a snapshot fits a new manager.

    Args:
      books: The state dict in the snapshot.
      saved: The config it was made with.
      manager: New; read, not changed.
      empty: Its state dict.

    Raises:
      SnapshotError: These are not the books of a cache with the saved config.

    Cost: O(pages and nodes); twice that of a load without changes.
    """
    columns, mine = Columns(books), manager.cache.tree
    tree = RadixTree(mine.page_size, mine.components, saved.policy, element_bytes=mine.element_bytes)
    restore_tree(tree, columns.part("tree"))
    parts = manager.cache.tree_components
    before = _counts(tree, parts)
    for i, part in enumerate(parts):
        tree.evict(max(0, tree.evictable[i] - part.size()), i)
    ids = [_renumbered(tree, i, part.size()) for i, part in enumerate(parts)]
    new = dict(empty)
    for part, (old, _) in zip(parts, ids, strict=True):
        new |= _with_owned(empty, _BOOKS_OF[part.name], len(old))
    for i in range(1, len(parts)):
        if mine.components[i].spans:
            new["pages.full_to_window"] = _window_map(tree, i, len(empty["pages.full_to_window"]))
    rows: dict[str, Any] = {}
    for part, (old, _) in zip(parts, ids, strict=True):
        page_size = mine.page_size if part.component.spans else 1
        targets = _targets(columns.part(_BOOKS_OF[part.name]), old, page_size)
        rows |= dict.fromkeys(part.stack_names, targets)
    after = _counts(tree, parts)
    if saved.policy is not manager.config.policy:
        other = RadixTree(mine.page_size, mine.components, manager.config.policy, element_bytes=mine.element_bytes)
        new_tree = with_policy(tree, other)
    else:
        new_tree = saved_tree(tree)
    new = {name: array for name, array in new.items() if not name.startswith("tree.")} | prefixed("tree", new_tree)
    saved_tokens, tokens = (counts[parts[0].name] * mine.page_size for counts in (before, after))
    return Fitted(new, rows, Loaded(saved_tokens, tokens, before, after))


def _counts(tree: RadixTree, parts: tuple[TreeComponent, ...]) -> dict[str, int]:
    return {part.name: count for part, count in zip(parts, tree.evictable, strict=True)}


def _renumbered(tree: RadixTree, i: int, size: int) -> tuple[np.ndarray, int]:
    """The ids of a component in the tree, ascending, which get the numbers from 1 on in this order."""
    values = [node.slot(i).value for node in tree.nodes() if node.slot(i).value is not None]
    old = np.sort(np.concatenate([np.empty(0, np.int32), *values]))
    if len(np.unique(old)) < len(old) or len(old) > size or (len(old) and old[0] < 1):
        raise SnapshotError(f"tree.value.{i}: a page or state stands in the tree twice, or is none")
    for node in tree.nodes():
        slot = node.slot(i)
        if slot.value is not None:
            slot.value = (np.searchsorted(old, slot.value) + 1).astype(np.int32)
    return old, len(old)


def _with_owned(empty: StateDict, name: str, count: int) -> StateDict:
    """The books of an allocator whose first ids, 1 to `count`, are the tree's."""
    states, free = empty[f"{name}.states"].copy(), empty[f"{name}.free"]
    states[1 : count + 1] = PageState.TREE
    return {f"{name}.states": states, f"{name}.free": free[free > count]}


def _window_map(tree: RadixTree, i: int, length: int) -> np.ndarray:
    """The window page of each full page, which the tree holds side by side."""
    full_to_window = np.zeros(length, np.int32)
    for node in tree.nodes():
        windows = node.slot(i).value
        if windows is not None:
            full_to_window[node.value] = windows
    return full_to_window


def _targets(saved: Columns, old: np.ndarray, page_size: int) -> np.ndarray:
    """The new row of each row in use, in the order in which files have them; 0 for those that were left out."""
    states = saved.ints("states", high=PageState.SINK)
    used = np.flatnonzero(~np.isin(states, (PageState.FREE, PageState.SINK))).astype(np.int32)
    place = np.searchsorted(old, used)
    is_kept = place < len(old)
    is_kept[is_kept] = old[place[is_kept]] == used[is_kept]
    if is_kept.sum() != len(old):
        raise SnapshotError("states: the tree holds a page or state that no file has rows for")
    slots = page_slots((place + 1).astype(np.int32), page_size)
    return np.where(np.repeat(is_kept, page_size), slots, 0).astype(np.int32)
