"""The other end of the event stream: which blocks a cache holds, as a router knows it.

    next  arrives    what happens
    7     7          applied
    7     5          a repetition: ignored
    7     9, then 8  a gap: both are kept, and what is missing is asked for
    7     7          applied, and 8 and 9 after it

What cannot be had any more makes the consumer forget all it knew: from then on it knows less than there is, never more,
and `is_complete` is False until the publisher has listed everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from jaxcache.events.events import AllBlocksCleared, BlockStored, EventBatch, StorageMedium
from jaxcache.index.hashing import hashes_of
from jaxcache.index.key import RadixKey

Replay = Callable[[int], Iterable[tuple[int, EventBatch]]]
"""Asks a publisher for what it still has from a sequence number on: numbers and batches, in order."""


class EventConsumer:
    """The blocks of one cache, rebuilt from what its publisher sends. Not thread-safe.

    Args:
      replay: Where to ask for what is missing. None: a gap is filled only by what arrives late.
      max_pending: Batches kept while an earlier one is missing; with more of them it counts as lost.

    Attributes:
      next_seq: The sequence number that is applied next.
      is_complete: Whether it knows every block as of that number.
      gaps: How often something was missing.
      losses: How often it could not be had, so that everything was forgotten.
      repeated: Batches that arrived though they had been applied or kept, or had become void.
      restarts: How often the publisher restarted with a lower number.
    """

    def __init__(self, replay: Replay | None = None, max_pending: int = 64):
        self._replay = replay
        self._max_pending = max_pending
        self._pending: dict[int, EventBatch] = {}
        self._blocks: dict[StorageMedium, set[int]] = {medium: set() for medium in StorageMedium}
        self._last_ts = float("-inf")
        self.next_seq = 0
        self.is_complete = True
        self.gaps = self.losses = self.repeated = self.restarts = 0

    # ---- what arrives --------------------------------------------------------------------------------------------

    def receive(self, seq: int, batch: EventBatch) -> None:
        """Takes a batch, in whatever order they arrive and however often.

        A lower number with a later time than all that was applied is a publisher that restarted. One that restarted
        and is ahead of the old one already looks like a gap; so `ZmqEventPublisher` never begins with a lower number.
        """
        if seq < self.next_seq and batch.ts > self._last_ts:
            self.restarts += 1
            self._pending.clear()
            self._forget(0)
            self.is_complete = True  # it knows all of a cache that begins empty
        if seq < self.next_seq or seq in self._pending or batch.ts < self._last_ts:
            self.repeated += 1  # or a straggler from before the publisher restarted: times never go back
        elif seq == self.next_seq or _says_all(batch):
            self._apply(seq, batch)
        else:
            self._pending[seq] = batch
            is_new = len(self._pending) == 1
            self.gaps += is_new
            if is_new or len(self._pending) > self._max_pending:
                self.catch_up()
            if len(self._pending) > self._max_pending:
                self._give_up()

    def catch_up(self) -> None:
        """Asks for everything from `next_seq` on: at a start, and when nothing has arrived for long."""
        if self._replay is None:
            return
        for seq, batch in self._replay(self.next_seq):
            if seq > self.next_seq and not _says_all(batch):  # the publisher has no longer what comes before
                self._pending[seq] = batch
                self._give_up()
            elif seq >= self.next_seq:
                self._apply(seq, batch)

    def _apply(self, seq: int, batch: EventBatch) -> None:
        """Applies a batch that is next, or says all, and then those kept that follow it."""
        for old in [kept for kept in self._pending if kept <= seq]:
            del self._pending[old]
        following: EventBatch | None = batch
        while following is not None:
            for event in following.events:
                if isinstance(event, AllBlocksCleared):
                    self._forget(seq)
                    self.is_complete = True
                elif isinstance(event, BlockStored):
                    self._blocks[event.medium].update(event.block_hashes)
                else:
                    self._blocks[event.medium].difference_update(event.block_hashes)
            self._last_ts = max(self._last_ts, following.ts)
            seq += 1
            following = self._pending.pop(seq, None)
        self.next_seq = seq

    def _give_up(self) -> None:
        """Applies what is kept, after forgetting the state that it should have been applied to."""
        while self._pending:
            self.losses += 1
            seq = min(self._pending)
            self._forget(seq)
            self._apply(seq, self._pending[seq])

    def _forget(self, next_seq: int) -> None:
        for blocks in self._blocks.values():
            blocks.clear()
        self.next_seq = next_seq
        self.is_complete = False

    # ---- what is known -------------------------------------------------------------------------------------------

    def blocks(self, medium: StorageMedium = StorageMedium.GPU) -> Set[int]:
        """Names of the blocks there. Not to be changed."""
        return self._blocks[medium]

    def prefix_len(self, key: RadixKey, page_size: int, medium: StorageMedium = StorageMedium.GPU) -> int:
        """Tokens at the start of `key` whose blocks are there: what a lookup in that cache would find.

        A cache with windows or states may find less. O(tokens of the key), to hash them.
        """
        blocks = self._blocks[medium]
        found = 0
        for hashes in hashes_of(key, page_size):
            for name in hashes.names():
                if name not in blocks:
                    return found
                found += page_size
        return found


def _says_all(batch: EventBatch) -> bool:
    return any(isinstance(event, AllBlocksCleared) for event in batch.events)
