"""What happened to cached blocks, as records. A block is one page of tokens, named by its chained hash.

Names do not depend on how the tree is cut into nodes: a split is no event, and equal tokens behind different prefixes
or in different namespaces have different names.

Source: SGLang 0.5.2 disaggregation/kv_events.py; vLLM distributed/kv_events.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxcache.index.node import Node, Root


@dataclass(frozen=True)
class BlockStored:
    """Blocks became available.

    Attributes:
      block_hashes: 64-bit names (the first 8 bytes of the chained SHA-256, signed), in order.
      parent_block_hash: Name of the block before the first one; None at the start of a sequence.
      token_ids: Tokens of all the blocks.
      block_size: Tokens a block.
      namespace: Encoded namespace; empty for the default one.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    namespace: bytes = b""


@dataclass(frozen=True)
class BlockRemoved:
    """Blocks are no longer available."""

    block_hashes: list[int]


@dataclass(frozen=True)
class AllBlocksCleared:
    """Nothing is available any more."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


def block_name(digest: bytes) -> int:
    """64-bit name of a page digest."""
    return int.from_bytes(digest[:8], "big", signed=True)


def stored(leaf: Node, block_size: int) -> BlockStored:
    """The event of a node that joined a tree that keeps hashes."""
    parent = leaf.parent
    root = parent
    while root.parent is not None:
        root = root.parent
    return BlockStored(
        block_hashes=[block_name(digest) for digest in leaf.hashes or ()],
        parent_block_hash=block_name(parent.hashes[-1]) if parent is not None and parent.hashes else None,
        token_ids=np.frombuffer(leaf.key, "<i4").tolist(),
        block_size=block_size,
        namespace=root.namespace if isinstance(root, Root) else b"",
    )


def removed(nodes: Sequence[Node]) -> BlockRemoved:
    """The event of nodes that left a tree that keeps hashes."""
    return BlockRemoved([block_name(digest) for node in nodes for digest in node.hashes or ()])
