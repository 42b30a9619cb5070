"""How a key is inserted: walk, split where it leaves the tree, fill holes, add what is missing.

offered   7 8 9 10 11 12      pages of the key; the tree has the first four of them, as a b c d
path      a b | c d           split after d, if a node goes on there
spare     7 8 9 10            not taken: still the caller's
added     11 12               a new leaf, in two parts where a further component is offered for the end only
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.key import RadixKey
from jaxcache.index.media import marks_of
from jaxcache.index.node import EMPTY_IDS, Insertion, Node, Root, owned, path_to
from jaxcache.index.nodes import Nodes
from jaxcache.index.offer import Offer, as_priority
from jaxcache.index.page_hashes import PageHashes
from jaxcache.index.receipt import Receipt, require_live, require_prefix

_NO_MARKS: dict[int, bytes] = {}


def insert(
    tree: Nodes,
    key: RadixKey,
    values: Sequence[np.ndarray],
    held: Receipt | None,
    priority: int,
    claim: Callable[[np.ndarray], None] | None,
) -> Insertion:
    """See `RadixTree.insert`."""
    if type(priority) is not int:
        priority = as_priority(priority)
    page_size = tree.page_size
    pages = key.length // page_size
    first, node, path = _start(tree, key, pages, held)
    offer = Offer(tree.components, values, first, pages)
    present = tree.walk(key, pages * tree.page_bytes, node, first * tree.page_bytes, path) // tree.page_bytes
    if claim is not None and present < pages:
        claim(values[0][present:pages])
    if path:
        node = path[-1]
        if node.end != present * page_size:
            node = path[-1] = tree.split(node, present * page_size)
    kept = [step.value for step in path]
    spare = [values[0][first:present]]
    if priority or tree.has_priorities:
        _raise_priorities(tree, node, priority)
    healed = [] if tree.is_single else _insert_others(tree, node, path, offer, present, spare, held)
    added: list[Node] = []
    if present < pages:
        added = _add_leaves(tree, key, node, offer, present, priority)
        node = added[-1]
    tree.policies[0].touch(path)
    end = node if pages else None
    return Insertion(end, added, healed, pages * page_size, present * page_size, kept, tuple(spare))


def _start(tree: Nodes, key: RadixKey, pages: int, held: Receipt | None) -> tuple[int, Node, list[Node]]:
    """Where the walk starts: the pages that the tree owns already, the node there, and an empty path."""
    if key.element_bytes != tree.element_bytes:
        tree.refuse(key)
    if held is not None:
        require_live(held, tree, tree.epoch)
        if held.length > pages * tree.page_size:
            raise ArgumentError(
                f"held: the lock covers {held.length} tokens, the key has {pages * tree.page_size} in whole pages"
            )
        require_prefix(held, key)
        if held.node is not None:
            return held.length // tree.page_size, held.node, []
    root = tree.roots.get(key.namespace)
    if root is None:
        root = Root(key.namespace)  # joins the tree with its first leaf
    return 0, root, []


def _raise_priorities(tree: Nodes, node: Node, priority: int) -> None:
    tree.has_priorities = True
    for step in path_to(node):
        step.priority = max(step.priority, priority)


def _add_leaves(tree: Nodes, key: RadixKey, parent: Node, offer: Offer, page: int, priority: int) -> list[Node]:
    """Adds the pages of `key` from `page` on: one leaf, cut where the offer of a component starts, or media do."""
    added: list[Node] = []
    values, starts, pages = offer.values, offer.starts, offer.pages
    candidates: Any = tree.resume.candidates
    marks = marks_of(key.media, tree.page_size) if key.media else _NO_MARKS
    ends = [pages]
    if marks or max(starts) > page:
        cuts = {*starts, *[start // tree.page_size for start in marks]}
        ends = sorted({pages, *[cut for cut in cuts if page < cut < pages]})
    for end in ends:
        packed = key.packed[page * tree.page_bytes : end * tree.page_bytes]
        media = marks.get(page * tree.page_size, b"") if marks else b""
        leaf = Node(packed, page * tree.page_size, end * tree.page_size, parent, tree.new_slots(), media)
        leaf.priority = priority
        if tree.with_hashes:
            prior = parent.hashes
            leaf.hashes = PageHashes(packed, tree.page_bytes, key.namespace if prior is None else prior, media)
        if isinstance(parent, Root):
            tree.roots[parent.namespace] = parent
        parent.children[packed[: tree.page_bytes] + media] = leaf
        added.append(leaf)
        tree.changes += 1
        for i in tree.stops.spanning:
            if starts[i] <= page:
                (leaf.others[i - 1] if i else leaf).value = owned(values[i][page:end])
                tree.evictable[i] += end - page
                tree.policies[i].add(leaf)
                if candidates[i] is not None:
                    candidates[i][leaf] = None
        if not tree.is_single and len(parent.children) == 1:
            tree.resume.passed(parent)
        parent, page = leaf, end
    if i := tree.stops.state:
        parent.others[i - 1].value = owned(values[i][:1])
        tree.evictable[i] += 1
        tree.policies[i].add(parent)
    if len(added) > 1:
        tree.policies[0].touch(added)
    return added


# ---- further components at the nodes that are there already --------------------------------------------------------


def _insert_others(
    tree: Nodes, node: Node, path: list[Node], offer: Offer, present: int, spare: list[np.ndarray], held: Receipt | None
) -> list[Node]:
    """Gives the nodes of `path`, which ends with `node`, what they lack; returns those that had holes.

    What is not needed is appended to `spare`.
    """
    healed: list[Node] = []
    if path or max(offer.starts) > offer.first:
        healed = _heal(tree, path, offer, present, spare)
    else:  # nothing to heal, nothing to spare
        spare += tree.stops.no_windows
    if tree.stops.state:
        spare.insert(tree.stops.state, EMPTY_IDS if present < offer.pages else _save(tree, node, offer))
    if used := path_to(node) if held is not None and any(held.since) else path:  # not all above is locked
        for policy in tree.policies[1:]:
            policy.touch(used)
    return healed


def _heal(tree: Nodes, path: list[Node], offer: Offer, present: int, spare: list[np.ndarray]) -> list[Node]:
    """Fills the holes along `path`, cut where the offer begins; returns them. What is not needed is spare."""
    healed: list[Node] = []
    page_size, first = tree.page_size, offer.first
    for i in tree.stops.windows:
        start = offer.starts[i]
        rest, begin = offer.values[i][first : max(start, present)], start * page_size
        holes = [n for n in path if n.others[i - 1].value is None and n.end > begin]
        if holes and holes[0].start < begin:
            path.insert(path.index(holes[0]), tree.split(holes[0], begin))
        if holes or start > first:
            rest = rest.copy()
            for node in holes:
                part = rest[node.start // page_size - first : node.end // page_size - first]
                tree.fill(i, node, part)
                part[:] = 0
            rest = rest[rest != 0]
            healed += holes
        spare.append(rest)
    return healed


def _save(tree: Nodes, node: Node, offer: Offer) -> np.ndarray:
    """Gives `node`, the end of a key, its state, if it has none yet; returns what was not needed."""
    i = tree.stops.state
    state = offer.values[i][:1]
    if not len(state) or not state[0]:
        return EMPTY_IDS
    if node.parent is None or node.others[i - 1].value is not None:
        return state
    tree.fill(i, node, state)
    return EMPTY_IDS
