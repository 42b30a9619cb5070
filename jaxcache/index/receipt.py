"""Receipts: proof of a lock, and the checks of one that is given back."""

from __future__ import annotations

from jaxcache.errors import ArgumentError, ReceiptError
from jaxcache.index.key import RadixKey
from jaxcache.index.media import marks_of
from jaxcache.index.node import Node, Root
from jaxcache.index.nodes import Nodes


class Receipt:
    """Proof of a lock, to be given back exactly once.

    It keeps token positions, and a split leaves the old object at the lower end, so no split invalidates it.

    Attributes:
      tree: The tree that issued it.
      epoch: That of the tree at that time.
      node: Deepest protected node; None for a lock on nothing.
      length: Tokens protected.
      since: For each component, the token position the lock reaches back to.
      held: False once it was given back.
    """

    __slots__ = ("epoch", "held", "length", "node", "since", "tree")

    def __init__(self, tree: Nodes, node: Node | None, length: int, since: list[int], epoch: int):
        self.tree = tree
        self.node = node
        self.length = length
        self.since = since
        self.epoch = epoch
        self.held = True

    def __repr__(self) -> str:
        return f"Receipt(length={self.length}, held={self.held})"


def require_live(receipt: Receipt, tree: Nodes, epoch: int) -> None:
    """Checks a receipt before its lock is changed. O(1).

    Args:
      receipt: What a lock returned.
      tree: The tree that must have issued it.
      epoch: Of that tree: how often it was reset.

    Raises:
      ArgumentError: It is no receipt.
      ReceiptError: It was given back before, is another tree's, or is from before a reset.
    """
    if not isinstance(receipt, Receipt):
        raise ArgumentError(f"receipt must be what a lock returned, got {type(receipt).__name__}: keep that")
    if receipt.tree is not tree:
        raise ReceiptError("receipt: it was issued by another tree; give it back there")
    if receipt.epoch != epoch:
        raise ReceiptError("receipt: it is from before the last reset, which released every lock; drop it")
    if not receipt.held:
        raise ReceiptError("receipt: it was given back already; a receipt releases its lock once")


def require_prefix(held: Receipt, key: RadixKey) -> None:
    """Checks that a lock is on a prefix of `key`. One memory compare a node.

    Raises:
      ArgumentError: The lock is not on a prefix of `key`.
    """
    node = held.node
    media: dict[int, bytes] = {}
    while node is not None and node.parent is not None:
        if not key.packed.startswith(node.key, key.element_bytes * node.start):
            raise ArgumentError("held: the lock is on other tokens than those of the key: give this key's receipt")
        if node.media:
            media[node.start] = node.media
        node = node.parent
    if media or key.media:
        marks = marks_of(key.media, held.tree.page_size)
        if media != {start: mark for start, mark in marks.items() if start < held.length}:
            raise ArgumentError("held: the lock is on other media than those of the key: give this key's receipt")
    if isinstance(node, Root) and node.namespace != key.namespace:
        raise ArgumentError("held: the lock is in another namespace than the key: give this key's receipt")
