"""How a lock is taken, narrowed and given back: what a stop needs is not evicted while its receipt is out.

tokens      0 ..... 100 ..... 200 ..... 250      locked at 250
full        +1       | +1      | +1              the path to the root
window 64   -        | +1      | +1              the nodes that the last 64 tokens are in
state       -        | -       | +1              the last node
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError, ReceiptError
from jaxcache.index.node import Insertion, Match, Node
from jaxcache.index.nodes import Nodes
from jaxcache.index.receipt import Receipt, require_live


def lock(tree: Nodes, where: Match | Insertion) -> Receipt:
    """See `RadixTree.lock`."""
    if isinstance(where, Insertion):
        node, length = where.node, where.length
        if node is not None and not (tree.holds(node) and node.is_whole):
            raise ReceiptError("where: the inserted prefix is not in this tree, or no longer: insert again")
    elif not isinstance(where, Match):
        raise ArgumentError(f"where must be a match or an insertion, got {type(where).__name__}: match first")
    else:
        length = where.length
        is_current = where.version == tree.changes and (not where.path or tree.holds(where.path[0]))
        path = where.path if is_current else _path_again(tree, where)
        node = path[-1] if path else None
        if not tree.is_single:
            tree.resume.went_on(node, length, where.structural_length)
        if node is not None and node.end != length:
            node = tree.split(node, length)
    return Receipt(tree, node, length, _hold(tree, node) if node else [], tree.epoch)


def unlock(tree: Nodes, receipt: Receipt) -> int:
    """See `RadixTree.unlock`."""
    require_live(receipt, tree, tree.epoch)
    receipt.held = False
    before = tree.evictable[0]
    if receipt.node is not None:
        _release(tree, receipt.node, receipt.since)
    return tree.evictable[0] - before


def narrow(tree: Nodes, receipt: Receipt, stop: int) -> None:
    """See `RadixTree.narrow`."""
    require_live(receipt, tree, tree.epoch)
    for i in tree.stops.windows if receipt.since else ():
        begin = min(tree.stops.begin(i, stop, tree.page_size), receipt.length - tree.page_size)
        if receipt.since[i] < begin:
            node: Any = receipt.node
            while node.start >= begin:
                node = node.parent
            if node.end > begin:
                node = tree.split(node, begin)
            _release(tree, node, [position if j == i else begin for j, position in enumerate(receipt.since)])
            receipt.since[i] = begin


def _path_again(tree: Nodes, match: Match) -> list[Node]:
    """The path of an outdated match, if all of it is still there."""
    if not match.length:
        return []
    path, _, length = tree.find(match.key[: match.length])
    is_same = length == match.length and np.array_equal(tree.values_to(path, length), match.pages)
    if is_same and tree.stops.state_at(path) == match.state:  # not evicted and cached again since
        return path
    raise ReceiptError("where: the matched prefix is not in this tree, or no longer: match again")


def _hold(tree: Nodes, bottom: Node) -> list[int]:
    """Locks what a stop at the end of `bottom` needs; returns where that begins, for each component."""
    since: list[int] = []
    for i, reach in enumerate(tree.stops.reaches):
        node, stop, count, discard = bottom, bottom.end - reach, 0, tree.policies[i].discard
        while True:
            slot = node.others[i - 1] if i else node
            slot.locks = locks = slot.locks + 1
            if locks == 1:
                value = slot.value
                if value is not None:
                    discard(node)
                    count += len(value)
            start = node.start
            if start <= stop or not start:
                break
            node = node.parent
        tree.evictable[i] -= count
        tree.protected[i] += count
        since.append(start)
    if tree.stops.state:
        since[tree.stops.state] = bottom.end - 1
    return since


def _release(tree: Nodes, bottom: Node, since: Sequence[int]) -> None:
    """Unlocks, for each component, the nodes from `bottom` up to the position in `since`."""
    for i, position in enumerate(since):
        node, freed, count = bottom, [], 0
        while node.end > position:
            slot = node.others[i - 1] if i else node
            slot.locks = locks = slot.locks - 1
            if not locks:
                value = slot.value
                if value is not None:
                    freed.append(node)
                    count += len(value)
            node = node.parent
        tree.evictable[i] += count
        tree.protected[i] -= count
        add = tree.policies[i].add
        for node in reversed(freed) if i else freed:  # see `EvictionPolicy`
            add(node)
        if tree.resume.waiting[i]:
            tree.resume.released(i, freed)
