"""What happened to cached blocks, as records. A block is one page of tokens, named by its chained hash.

    insert [1 2 3 4 | 5 6 7 8]    BlockStored([h0, h1], parent None)      page_size 4
    insert [1 2 3 4 | 9 9 9 9]    BlockStored([h2], parent h0)            h0 was there already
    evict  [5 6 7 8]              BlockRemoved([h1])

Names do not depend on how the tree is cut into nodes: a split is no event, and equal tokens behind different prefixes
or in different namespaces have different names. A block is there exactly while its full-attention KV is: windows and
states that come and go alone are no events, so a block that is there need not be a place to stop at.

To record an event hashes nothing: names are worked out when they are read, which may be on another thread.

Source: SGLang 0.5.23 disaggregation/kv_events.py, mem_cache/events.py; vLLM distributed/kv_events.py.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.media import digests_of
from jaxcache.index.node import Eviction, Node
from jaxcache.index.page_hashes import PageHashes
from jaxcache.index.tree import RadixTree

Blocks = PageHashes | Sequence[int] | Sequence[PageHashes]
"""Names of blocks, or what they are hashed from."""


class StorageMedium(enum.Enum):
    """Where a block is, under the names that SGLang publishes."""

    GPU = "GPU"
    CPU = "CPU_PINNED"
    DISK = "DISK"
    EXTERNAL = "EXTERNAL"


class BlockStored:
    """Blocks became available.

    Args:
      block_hashes: The blocks, in order.
      parent_block_hash: Name of the block before the first one, or the hashes that end with it; None at the start of a
        sequence.
      token_ids: Tokens of all the blocks, or the packed elements of a key.
      block_size: Tokens a block.
      namespace: Encoded namespace; empty for the default one.
      medium: Where they are.
      extra_keys: For each block the digests, in hexadecimal, of the images that start in it, or None; None where no
        block has any. Names depend on them, on where in the block they start and on their length.

    Attributes:
      extra_keys: As given.
      block_size: As given.
      namespace: As given.
      medium: As given.
    """

    __slots__ = ("_blocks", "_parent", "_tokens", "block_size", "extra_keys", "medium", "namespace")

    def __init__(
        self,
        block_hashes: Blocks,
        parent_block_hash: int | PageHashes | None,
        token_ids: Sequence[int] | bytes,
        block_size: int,
        namespace: bytes = b"",
        medium: StorageMedium = StorageMedium.GPU,
        extra_keys: Sequence[Sequence[str] | None] | None = None,
    ):
        self.extra_keys = extra_keys
        self._blocks = block_hashes
        self._parent = parent_block_hash
        self._tokens = token_ids
        self.block_size = block_size
        self.namespace = namespace
        self.medium = medium

    @property
    def block_hashes(self) -> list[int]:
        """64-bit names of the blocks (the first 8 bytes of the chained SHA-256, signed), in order."""
        return _names(self._blocks)

    @property
    def parent_block_hash(self) -> int | None:
        """Name of the block before the first one; None at the start of a sequence."""
        return block_name(self._parent[-1]) if isinstance(self._parent, PageHashes) else self._parent

    @property
    def token_ids(self) -> list[int]:
        """Tokens of all the blocks; where elements of a key are pairs, the first of each."""
        return [token for tokens in self.token_pieces() for token in tokens]

    def token_pieces(self, most: int = sys.maxsize) -> Iterator[list[int]]:
        """`token_ids`, at most so many at a time."""
        tokens: Sequence[int] | np.ndarray = self._tokens
        if isinstance(self._tokens, bytes):
            words = np.frombuffer(self._tokens, "<i4")
            tokens = words[:: len(words) // (len(self) * self.block_size)]
        for start in range(0, len(tokens), most):
            piece = tokens[start : start + most]
            yield piece.tolist() if isinstance(piece, np.ndarray) else list(piece)

    def work_out(self, pause: Callable[[], None]) -> None:
        """Hashes the names that are not worked out yet, see `PageHashes.work_out`."""
        _work_out(self._blocks, pause)

    def __len__(self) -> int:
        """Blocks."""
        return _count(self._blocks)

    def _fields(self) -> tuple:
        names = (self.block_hashes, self.parent_block_hash)
        return *names, self.token_ids, self.block_size, self.namespace, self.medium, self.extra_keys

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, BlockStored) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BlockStored({', '.join(map(repr, self._fields()))})"


class BlockRemoved:
    """Blocks are no longer available.

    Args:
      block_hashes: The blocks.
      medium: Where they were.

    Attributes:
      medium: As given.
    """

    __slots__ = ("_blocks", "medium")

    def __init__(self, block_hashes: Blocks, medium: StorageMedium = StorageMedium.GPU):
        self._blocks = block_hashes
        self.medium = medium

    @property
    def block_hashes(self) -> list[int]:
        """64-bit names of the blocks."""
        return _names(self._blocks)

    def work_out(self, pause: Callable[[], None]) -> None:
        """Hashes the names that are not worked out yet, see `PageHashes.work_out`."""
        _work_out(self._blocks, pause)

    def __len__(self) -> int:
        """Blocks."""
        return _count(self._blocks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockRemoved):
            return NotImplemented
        return (self.block_hashes, self.medium) == (other.block_hashes, other.medium)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BlockRemoved({self.block_hashes!r}, {self.medium!r})"


@dataclass(frozen=True)
class AllBlocksCleared:
    """Nothing is available any more, wherever it was."""

    def __len__(self) -> int:
        """Blocks."""
        return 0


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True)
class EventBatch:
    """What is published at once, and known by one sequence number.

    Attributes:
      ts: Seconds since 1970; never less than that of the batch before.
      events: In order.
      data_parallel_rank: Which cache of several.
    """

    ts: float
    events: Sequence[KVCacheEvent]
    data_parallel_rank: int | None = None


def block_name(digest: bytes) -> int:
    """64-bit name of a page digest."""
    return int.from_bytes(digest[:8], "big", signed=True)


def _work_out(blocks: Blocks, pause: Callable[[], None]) -> None:
    for run in (blocks,) if isinstance(blocks, PageHashes) else blocks:
        if isinstance(run, PageHashes):
            run.work_out(pause)


def _names(blocks: Blocks) -> list[int]:
    if isinstance(blocks, PageHashes):
        return blocks.names()
    return [name for block in blocks for name in (block.names() if isinstance(block, PageHashes) else (block,))]


def _count(blocks: Blocks) -> int:
    if isinstance(blocks, PageHashes):
        return len(blocks)
    return sum([len(block) if isinstance(block, PageHashes) else 1 for block in blocks])


class EventQueue:
    """Events that wait to be taken, oldest first.

    Bounded: if more blocks wait than it has room for, it forgets them all, and what is taken next lists again what is
    in the tree. So a reader never misses anything, and one that never reads costs no more than that.

    Args:
      tree: Must keep hashes.
      max_blocks: Blocks whose events may wait. One takes a page of tokens and about 100 bytes.

    Attributes:
      max_blocks: As given; may be set.
      overflows: How often it forgot.

    Raises:
      ArgumentError: The tree keeps no hashes.
    """

    __slots__ = ("_block_size", "_blocks", "_tree", "_waiting", "max_blocks", "overflows")

    def __init__(self, tree: RadixTree, max_blocks: int = 1 << 20):
        if not tree.with_hashes:
            raise ArgumentError("tree: it keeps no hashes to name blocks with: make it with with_hashes=True")
        self._tree = tree
        self._block_size = tree.page_size
        self.max_blocks = max_blocks
        self._waiting: list[KVCacheEvent] = []
        self._blocks = 0  # more than fit, once some were forgotten
        self.overflows = 0

    def stored(self, node: Node, namespace: bytes) -> None:
        """A node joined the tree, in the namespace of that encoding. O(1)."""
        blocks = len(node.value)
        self._blocks += blocks
        if self._blocks > self.max_blocks:
            self._forget(blocks)
            return
        hashes: Any = node.hashes  # they are there: the tree keeps them
        event = BlockStored(hashes, node.parent.hashes, node.key, self._block_size, namespace)
        if node.media:
            event.extra_keys = [[digest.hex() for digest in digests_of(node.media)], *[None] * (blocks - 1)]
        self._waiting.append(event)

    def removed(self, gone: Eviction) -> None:
        """Nodes left the tree. O(nodes)."""
        if not gone.nodes:
            return
        self._blocks += len(gone.values[0])
        if self._blocks <= self.max_blocks:
            hashes: list[Any] = [node.hashes for node in gone.nodes]  # they are there: the tree keeps them
            self._waiting.append(BlockRemoved(hashes))
        else:
            self._forget(len(gone.values[0]))

    def cleared(self) -> None:
        """The tree forgot everything; what was said before does not matter any more."""
        self._waiting.clear()
        self._waiting.append(AllBlocksCleared())
        self._blocks = 0

    def restate(self) -> None:
        """The tree was filled by other means, as from a snapshot: what is taken next lists again what is in it."""
        self._waiting.clear()
        self._blocks = self.max_blocks + 1

    def _forget(self, blocks: int) -> None:
        self.overflows += self._blocks - blocks <= self.max_blocks  # the first ones too many
        self._waiting.clear()

    @property
    def num_blocks(self) -> int:
        """Blocks that `take` will tell of. O(1)."""
        return self._blocks if self._blocks <= self.max_blocks else len(self._tree)

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call; if some were forgotten, `snapshot`."""
        events = self._waiting if self._blocks <= self.max_blocks else self.snapshot()
        self._waiting, self._blocks = [], 0
        return events

    def snapshot(self) -> list[KVCacheEvent]:
        """Events that make a consumer know the tree as it is, whatever it knew: all is cleared, then all is stored.

        Nothing is taken from the queue. O(nodes and their depth).
        """
        again = EventQueue(self._tree, sys.maxsize)
        again.cleared()
        for node in self._tree.nodes():
            root: Any = node
            while root.parent is not None:
                root = root.parent
            again.stored(node, root.namespace)
        return again.take()
