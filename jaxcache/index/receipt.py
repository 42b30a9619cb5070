"""What is asked of a receipt before it is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.errors import ArgumentError, ReceiptError
from jaxcache.index.key import RadixKey
from jaxcache.index.node import Receipt, Root

if TYPE_CHECKING:
    from jaxcache.index.tree import RadixTree


def require_live(receipt: Receipt, tree: RadixTree, epoch: int) -> None:
    """O(1).

    Args:
      receipt: What a lock returned.
      tree: Whose it has to be.
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
    """One memory compare a node.

    Raises:
      ArgumentError: The lock is not on a prefix of `key`.
    """
    node = held.node
    while node is not None and node.parent is not None:
        if not key.packed.startswith(node.key, key.element_bytes * node.start):
            raise ArgumentError("held: the lock is on other tokens than those of the key: give this key's receipt")
        node = node.parent
    if isinstance(node, Root) and node.namespace != key.namespace:
        raise ArgumentError("held: the lock is in another namespace than the key: give this key's receipt")
