"""What happened to cached blocks, as records. A block is one page of tokens, named by its chained hash.

Names do not depend on how the tree is cut into nodes: a split is no event, and equal tokens behind different prefixes
or in different namespaces have different names.

Source: SGLang 0.5.2 disaggregation/kv_events.py; vLLM distributed/kv_events.py.
"""

from __future__ import annotations

from dataclasses import dataclass


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
