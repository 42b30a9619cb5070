"""Every invariant of the tree, and a drawing of it when one breaks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxcache.errors import BrokenInvariantError
from jaxcache.index.media import digests_of, with_media
from jaxcache.index.node import Node, Root
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.policies.lru import LRU
from jaxcache.index.tree import RadixTree


def check(tree: RadixTree) -> None:
    """Verifies the whole structure. O(nodes and their values): for tests, idle time and after a suspicion.

    Raises:
      BrokenInvariantError: names the rule and the node, and draws the tree.
    """
    for problem in problems(tree):
        raise BrokenInvariantError(f"{problem}\n{draw(tree)}")


def problems(tree: RadixTree) -> Iterator[str]:
    """What is wrong with the tree, one sentence each; nothing when all is well."""
    count = len(tree.components)
    evictable, protected = [0] * count, [0] * count
    unlocked: list[set[Node]] = [set() for _ in range(count)]
    cached: list[set[Node]] = [set() for _ in range(count)]
    for namespace, root in tree.roots.items():
        if root.namespace != namespace or root.parent is not None or root.key or not root.children:
            yield f"root of {namespace!r}: it must be empty, parentless, under its own name and have children"
    for node in tree.nodes():
        yield from _node_problems(tree, node)
        for i, slot in enumerate((node, *node.others)):
            if slot.value is not None:
                yield from _value_problems(tree, node, i, slot.value)
                cached[i].add(node)
                if slot.locks:
                    protected[i] += len(slot.value)
                else:
                    evictable[i] += len(slot.value)
                    unlocked[i].add(node)
    if evictable != tree.evictable or protected != tree.protected:
        yield f"counters: evictable {tree.evictable} protected {tree.protected}, recounted {evictable} {protected}"
    for i, policy in enumerate(tree.policies):
        if set(policy) != unlocked[i]:
            yield f"policy of {tree.components[i].name}: it must hold exactly the unlocked nodes with a value"
        for problem in policy.problems(cached[i]):
            yield f"policy of {tree.components[i].name}: {problem}"
        yield from _surplus_problems(tree, i, cached[i], unlocked[i])
    if isinstance(tree.policies[0], LRU):
        yield from _order_problems(tree.policies[0])


def _surplus_problems(tree: RadixTree, i: int, cached: set[Node], unlocked: set[Node]) -> Iterator[str]:
    """Every node whose value is more than the resume points need has to be a candidate for eviction."""
    name, candidates = tree.components[i].name, tree.resume.candidates[i] or {}
    if not candidates.keys() <= cached:
        yield f"surplus of {name}: a candidate must be cached"
    if any(node in unlocked or node not in cached for node in tree.resume.waiting[i]):
        yield f"surplus of {name}: what waits must be locked"
    for node in unlocked - candidates.keys():
        if tree.resume.needed_from(i, node) > node.start:
            yield f"{node}: its surplus of {name} must be a candidate"


def _node_problems(tree: RadixTree, node: Node) -> Iterator[str]:
    page_bytes = tree.element_bytes * tree.page_size
    parent = node.parent
    if parent is None:
        return
    if not node.key or len(node.key) % page_bytes:
        yield f"{node}: its key has {len(node.key)} bytes, it must be whole pages and not empty"
    if parent.children.get(node.name(page_bytes)) is not node:
        yield f"{node}: its parent does not list it under its first page"
    if node.start != parent.end or tree.element_bytes * node.tokens != len(node.key):
        yield f"{node}: it must start where its parent ends, at {parent.end}, and be as long as its key"
    locks = [node.locks, *[slot.locks for slot in node.others]]
    if node.value is None:
        yield f"{node}: the first component's value is missing"
    if min(locks) < 0 or locks[0] != max(locks):
        yield f"{node}: locks {locks} must not be negative, and the first component's is the highest"
    if not node.children and any(slot.value is None for slot in node.others):
        yield f"{node}: a leaf must have a value of every component"
    end_here = node.locks - sum([child.locks for child in node.children.values()])
    if not 0 <= end_here <= min(locks):
        yield f"{node}: {end_here} of its locks {locks} end here, which must be locks of every component"
    if node.hashes is not None:
        prior = namespace_seed(parent.namespace) if isinstance(parent, Root) else (parent.hashes or [b""])[-1]
        if node.media:
            prior = with_media(prior, node.media)
        if list(node.hashes) != page_hashes(node.key, page_bytes, prior):
            yield f"{node}: its page hashes do not continue its parent's"


def _value_problems(tree: RadixTree, node: Node, i: int, value: np.ndarray) -> Iterator[str]:
    component = tree.components[i]
    count = node.tokens // tree.page_size if component.spans else 1
    if len(value) != count:
        yield f"{node}: {component.name} has {len(value)} values, it must have {count}"
    if i and np.count_nonzero(value) != len(value):
        yield f"{node}: {component.name} has id 0, which is nothing"
    if value.base is not None or value.dtype != np.int32 or value.flags.writeable:
        yield f"{node}: {component.name} must own a read-only int32 array"


def _order_problems(policy: LRU) -> Iterator[str]:
    """The first component's recency order: what makes its oldest node a leaf."""
    seen: set[Node] = set()
    for node in policy:
        seen.add(node)
        if node.parent in seen:
            yield f"{node}: younger than its parent in the recency order"


def draw(tree: RadixTree, max_nodes: int = 200) -> str:
    """The tree as text: one node a line, with its tokens, page ids and locks."""
    lines: list[str] = []
    for namespace, root in sorted(tree.roots.items()):
        lines.append(f"namespace {namespace!r}")
        todo = [(child, 1) for child in reversed(root.children.values())]
        while todo:
            node, depth = todo.pop()
            lines.append("  " * depth + describe(tree, node))
            todo += [(child, depth + 1) for child in reversed(node.children.values())]
    if len(lines) > max_nodes:
        lines[max_nodes:] = [f"... {len(lines) - max_nodes} more nodes"]
    return "\n".join(lines) or "(empty)"


def describe(tree: RadixTree, node: Node) -> str:
    """One node in one line."""
    tokens = node.token_ids
    shown = " ".join(map(str, tokens[:8])) + (" ..." if len(tokens) > 8 else "")
    parts = [f"[{node.start}:{node.end}] {shown}"]
    parts += [f"media={digest.hex()[:8]}" for digest in digests_of(node.media)]
    for i, component in enumerate(tree.components):
        slot = node.slot(i)
        if slot.value is None:
            what = "-"
        else:
            what = " ".join(map(str, slot.value[:8])) + (" ..." if len(slot.value) > 8 else "")
        parts.append(f"{component.name}={what}" + (f" locks={slot.locks}" if slot.locks else ""))
    return "  ".join(parts)
