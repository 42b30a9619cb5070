"""A tree as arrays, and back: nodes numbered from the roots down, and for each what it holds.

    number       0          1          2          3                      a root is no node: its namespace stands apart
    parent      -1          0          0         -2                      -1: the first root, -2: the second one
    tokens      16         32         16         16                      keys and values lie one behind the other,
    pages.0      1 ........ 2 ........ 1 ........ 1                      a value is as long as the run, or 0: a hole
    state.1      0          0          1          1

Locks are not kept, as their holders are gone; nor is what was evicted lately (`explain`'s graves).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from jaxcache.errors import ArgumentError, LockedError, SnapshotError
from jaxcache.index.key import Namespace
from jaxcache.index.node import Node, Root, Slot, owned
from jaxcache.index.page_hashes import PageHashes
from jaxcache.index.policies.base import EvictionPolicy
from jaxcache.index.tree import RadixTree
from jaxcache.state_dict import Columns, StateDict, joined_bytes, prefixed

_MOST_PRIORITY = 2**63 - 1


def saved_tree(tree: RadixTree) -> StateDict:
    """All of a tree, with the order of eviction of each component. O(nodes and their values).

    Raises:
      LockedError: A lock covers some of it.
      SnapshotError: A priority does not fit 64 bits.
    """
    if any(tree.protected):
        raise LockedError(f"tree: locks cover {tree.protected[0]} of its pages: give every receipt back first")
    roots = list(tree.roots.values())
    nodes = _in_saved_order(tree)
    number = {node: i for i, node in enumerate(nodes)} | {root: -1 - i for i, root in enumerate(roots)}
    if any(abs(node.priority) > _MOST_PRIORITY for node in nodes):
        raise SnapshotError("tree: a priority does not fit 64 bits: use smaller ones for requests")
    books: StateDict = {
        "namespaces": joined_bytes([root.namespace for root in roots]),
        "namespace_bytes": np.array([len(root.namespace) for root in roots], np.int64),
        "parent": np.array([number[node.parent] for node in nodes], np.int64),
        "tokens": np.array([node.tokens for node in nodes], np.int64),
        "keys": joined_bytes([node.key for node in nodes]),
        "media": joined_bytes([node.media for node in nodes]),
        "media_bytes": np.array([len(node.media) for node in nodes], np.int64),
        "priority": np.array([node.priority for node in nodes], np.int64),
    }
    if not tree.is_single:
        books |= prefixed("resume", tree.resume.state_dict(number))
    for i, policy in enumerate(tree.policies):
        values = [node.slot(i).value for node in nodes]
        books[f"count.{i}"] = np.array([0 if value is None else len(value) for value in values], np.int64)
        books[f"value.{i}"] = np.concatenate([np.empty(0, np.int32), *[v for v in values if v is not None]])
        books |= prefixed(f"policy.{i}", policy.state_dict(number))
    return books


def restore_tree(tree: RadixTree, books: Columns) -> None:
    """Makes a new, empty tree what the tree with these books was. O(nodes and their values).

    Arrays of unknown origin may still contradict each other: `index.check` tells.

    Raises:
      SnapshotError: These are no books of a tree with these components, this page size and this policy. The tree is of
        no use then.
    """
    nodes = _restored_nodes(tree, books)
    if not tree.is_single:
        tree.resume.load_state_dict(books.part("resume"), nodes)
    for i, policy in enumerate(tree.policies):
        policy.load_state_dict(books.part(f"policy.{i}"), nodes)


def _restored_nodes(tree: RadixTree, books: Columns) -> list[Node]:
    """The nodes with their values, in the tree, which no policy knows yet."""
    nodes = _nodes(tree, _roots(books), books)
    for i in range(len(tree.components)):
        counts = books.ints(f"count.{i}", len(nodes))
        ends = np.cumsum(counts)
        values = books.ints(f"value.{i}", int(ends[-1]) if len(ends) else 0, high=2**31 - 1)
        for node, (start, end) in zip(nodes, pairwise([0, *ends.tolist()]), strict=True):
            if start != end:
                node.slot(i).value = owned(values[start:end])
    roots = [node.parent for node in nodes if isinstance(node.parent, Root)]
    tree.adopt({root.namespace: root for root in roots})
    return nodes


def with_policy(tree: RadixTree, other: RadixTree) -> StateDict:
    """The saved form of a tree under the policy of `other`, an empty tree: as if used in its order of eviction.

    The policies of `tree` are used up. O(nodes and their values).
    """
    number = {node: i for i, node in enumerate(_in_saved_order(tree))}
    saved = Columns(saved_tree(tree))
    nodes = _restored_nodes(other, saved)
    if not other.is_single:
        other.resume.load_state_dict(saved.part("resume"), nodes)
    for mine, theirs in zip(tree.policies, other.policies, strict=True):
        for node in _drained(mine):
            theirs.add(nodes[number[node]])
    return saved_tree(other)


def _drained(policy: EvictionPolicy) -> list[Node]:
    """The nodes of a policy in the order in which it would evict them."""
    order: list[Node] = []
    left: dict[Node, int] = {}
    while (node := policy.victim()) is not None:
        policy.remove(node)
        order.append(node)
        parent = node.parent
        left[parent] = left.get(parent, len(parent.children)) - 1
        if policy.leaves_only and not left[parent] and parent in policy:
            policy.exposed(parent)
    return order


def _in_saved_order(tree: RadixTree) -> list[Node]:
    """The nodes, parents first, children in their order."""
    todo: list[Node] = list(tree.roots.values())
    for node in todo:  # grows while it is walked
        todo.extend(node.children.values())
    return todo[len(tree.roots) :]


def _roots(books: Columns) -> list[Root]:
    roots = [Root(namespace) for namespace in books.strings("namespaces", books.ints("namespace_bytes"))]
    for root in roots:
        try:
            is_encoding = Namespace.decode(root.namespace).encode() == root.namespace
        except (ArgumentError, UnicodeDecodeError):
            is_encoding = False
        if not is_encoding:
            raise SnapshotError(f"namespaces: {root.namespace[:40]!r} is no encoding of a namespace")
    return roots


def _nodes(tree: RadixTree, roots: list[Root], books: Columns) -> list[Node]:
    """The nodes, without values, hung up below each other and the roots."""
    parents = books.ints("parent", low=-len(roots))
    count, page_size = len(parents), tree.page_size
    tokens = books.ints("tokens", count, low=1, high=2**31 - 1)
    if (parents >= np.arange(count)).any() or (tokens % page_size).any():
        raise SnapshotError(f"parent, tokens: a parent must come before its children, and have pages of {page_size}")
    keys = books.strings("keys", tokens * tree.element_bytes)
    media = books.strings("media", books.ints("media_bytes", count))
    priorities = books.ints("priority", count, low=-_MOST_PRIORITY)
    page_bytes = tree.element_bytes * page_size
    nodes: list[Node] = []
    for parent_number, size, key, mark, priority in zip(
        parents.tolist(), tokens.tolist(), keys, media, priorities.tolist(), strict=True
    ):
        parent = nodes[parent_number] if parent_number >= 0 else roots[-1 - parent_number]
        others = tuple(Slot() for _ in tree.components[1:])
        node = Node(key, parent.end, parent.end + size, parent, others, mark)
        node.priority = priority
        if tree.with_hashes:
            prior = parent.namespace if isinstance(parent, Root) else parent.hashes
            node.hashes = PageHashes(key, page_bytes, prior or b"", mark)
        if node.name(page_bytes) in parent.children:
            raise SnapshotError("keys: two nodes with one parent begin with the same page")
        parent.children[node.name(page_bytes)] = node
        nodes.append(node)
    return nodes
