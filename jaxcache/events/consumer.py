"""The other end of the event stream: which blocks a cache holds, as a router knows it.

    next  arrives    what happens
    7     7          applied
    7     5          a repetition: ignored
    7     9, then 8  a gap: both are kept, and what is missing is asked for
    7     7          applied, and 8 and 9 after it
    10    3          a repetition if 3 was applied and says the same time; else a publisher that restarted

What cannot be had any more makes the consumer forget all it knew: from then on it knows less than there is, never more,
and `is_complete` is False until the publisher has listed everything again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Set

from jaxcache.errors import ArgumentError
from jaxcache.events.events import AllBlocksCleared, BlockStored, EventBatch, StorageMedium
from jaxcache.index.hashing import hashes_of
from jaxcache.index.key import RadixKey

Replay = Callable[[int], Iterable[tuple[int, EventBatch]]]
"""Asks a publisher for what it still has from a sequence number on: numbers and batches, in order."""

MAX_SEQ = 2**64 - 2
"""The number above it ends a replay."""
_REMEMBERED = 10_000  # batches of a life, as many as a publisher keeps
_LIVES = 4


class _Life:
    """Numbers and times of what was applied of one life of a publisher. In a life, both only grow."""

    def __init__(self) -> None:
        self._seqs: list[int] = []
        self._times: list[float] = []
        self._until = float("inf")

    @property
    def last_ts(self) -> float:
        return self._times[-1] if self._times else float("-inf")

    def applied(self, seq: int, ts: float) -> None:
        self._seqs.append(seq)
        self._times.append(max(ts, self.last_ts))
        if len(self._seqs) > 2 * _REMEMBERED:
            del self._seqs[:_REMEMBERED], self._times[:_REMEMBERED]

    def ended(self, ts: float) -> None:
        """The next life began at that time, by whatever clock it has."""
        self._until = ts

    def has(self, seq: int, ts: float) -> bool:
        """Whether this batch was applied."""
        i = bisect_left(self._seqs, seq)
        return i < len(self._seqs) and (self._seqs[i], self._times[i]) == (seq, ts)

    def explains(self, seq: int, ts: float) -> bool:
        """Whether this batch was applied, or can be one that was missing between or after those that were."""
        i = bisect_left(self._seqs, seq)
        if i < len(self._seqs) and self._seqs[i] == seq:
            return self._times[i] == ts
        return i > 0 and self._times[i - 1] <= ts <= (self._times[i] if i < len(self._times) else self._until)


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
      restarts: How often the publisher restarted with a lower number or an earlier time.
    """

    def __init__(self, replay: Replay | None = None, max_pending: int = 64):
        self._replay = replay
        self._max_pending = max_pending
        self._pending: dict[int, EventBatch] = {}
        self._blocks: dict[StorageMedium, set[int]] = {medium: set() for medium in StorageMedium}
        self._lives = deque([_Life()], maxlen=_LIVES)
        self.next_seq = 0
        self.is_complete = True
        self.gaps = self.losses = self.repeated = self.restarts = 0

    # ---- what arrives --------------------------------------------------------------------------------------------

    def receive(self, seq: int, batch: EventBatch) -> None:
        """Takes a batch, in whatever order they arrive and however often.

        Numbers and times of one publisher only grow. So a lower number with a later time, or a lower number or an
        earlier time that none of what was applied explains, is of a publisher that restarted, whose clock may have
        been set back: all is forgotten, and asked for. One that restarted and is ahead of the old one in both looks
        like a gap; so `ZmqEventPublisher` never begins with a lower number unless its clock does.

        Raises:
          ArgumentError: `seq` is no sequence number.
        """
        _require_seq(seq)
        life = self._lives[-1]
        is_known = seq in self._pending or any(past.has(seq, batch.ts) for past in self._lives)
        is_old = seq < self.next_seq or batch.ts < life.last_ts
        if (
            is_old
            and not is_known
            and (batch.ts > life.last_ts or not any(past.explains(seq, batch.ts) for past in self._lives))
        ):
            self._restart(batch.ts)
            is_old = False
        if is_old or is_known:
            self.repeated += 1  # or a straggler of an earlier life
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

    def _restart(self, ts: float) -> None:
        """A publisher that restarted begins at that time."""
        self.restarts += 1
        self._lives[-1].ended(ts)
        self._lives.append(_Life())
        self._pending.clear()
        self._forget(0)
        self.is_complete = True  # it knows all of a cache that begins empty

    def catch_up(self) -> None:
        """Asks for everything from `next_seq` on: at a start, and when nothing has arrived for long.

        Raises:
          ArgumentError: The answer has something else than a sequence number; what came before it is applied.
        """
        if self._replay is None:
            return
        for seq, batch in self._replay(self.next_seq):
            _require_seq(seq)
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
            self._lives[-1].applied(seq, following.ts)
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


def _require_seq(seq: int) -> None:
    if not 0 <= seq <= MAX_SEQ:
        raise ArgumentError(f"seq must be in [0, 2**64 - 2], got {seq}: the number above that ends a replay")


def _says_all(batch: EventBatch) -> bool:
    return any(isinstance(event, AllBlocksCleared) for event in batch.events)
