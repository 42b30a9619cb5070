"""The replay endpoint of a publisher: the batches it still has, and answers to consumers that missed some.

    [client, "", start] ──► one answer a client ──► [client, "", topic, seq, batch] ... [client, "", "", END_SEQ, ""]

An answer is sent a few messages at a time, between the publisher's batches, and only as fast as its client reads: a
request neither delays other consumers nor fills the publisher's memory.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from jaxcache.errors import UnsupportedError

try:
    import zmq
except ImportError as error:
    raise UnsupportedError("publishing events needs pyzmq: pip install 'jaxcache[events]'") from error

END_SEQ = (-1).to_bytes(8, "big", signed=True)
"""Sequence number after the last batch of a replay."""

MAX_CLIENTS = 16
"""Answered at the same time; the requests of others wait at their end of the connection."""
MAX_UNREAD = 16
"""Messages of an answer that a client has not taken yet."""
STALLED_S = 2.0
"""An answer that its client does not read for this long is broken off, without END_SEQ."""


class ReplayBuffer:
    """The latest batches, bounded by number and by bytes."""

    def __init__(self, max_batches: int, max_bytes: int):
        self._max_batches, self._max_bytes = max_batches, max_bytes
        self._batches: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._first = 0  # the place of the first one: places count from the first batch ever kept

    def keep(self, seq: int, payload: bytes) -> None:
        """Adds a batch; its number must be higher than all before. Drops the oldest beyond the bounds."""
        self._batches.append((seq, payload))
        self._bytes += len(payload)
        while len(self._batches) > self._max_batches or self._bytes > self._max_bytes:
            self._bytes -= len(self._batches.popleft()[1])
            self._first += 1

    def place_of(self, start: int) -> int:
        """The place of the first batch whose number is at least `start`."""
        return self._first + sum(1 for _ in itertools.takewhile(lambda batch: batch[0] < start, self._batches))

    def at(self, place: int) -> tuple[int, int, bytes] | None:
        """Place, number and bytes of the first remaining batch at or after a place; None after the last."""
        place = max(place, self._first)
        return (place, *self._batches[place - self._first]) if place < self._first + len(self._batches) else None


@dataclass
class _Answer:
    """How far an answer is.

    Attributes:
      place: Of its next batch in the buffer.
      moved_at: When something of it could be sent last.
    """

    place: int
    moved_at: float


class Answers:
    """The answers of a ROUTER socket. For the thread that sends the batches.

    Args:
      router: Of the replay endpoint, see `prepare_router`.
      topic: Before every message.
      buffer: What can be replayed.
    """

    def __init__(self, router: zmq.Socket, topic: bytes, buffer: ReplayBuffer):
        self._router, self._topic, self._buffer = router, topic, buffer
        self._answers: dict[bytes, _Answer] = {}

    @property
    def are_under_way(self) -> bool:
        """Whether some are not complete: call `go_on` again soon."""
        return bool(self._answers)

    def go_on(self, seconds: float) -> None:
        """Receives requests and sends answers, one message of each in turn, for about `seconds`."""
        until = time.perf_counter() + seconds
        for client, start in self._requests():
            self._answers[client] = _Answer(self._buffer.place_of(start), time.monotonic())  # one that asks again
        blocked: set[bytes] = set()
        while len(blocked) < len(self._answers):
            for client in [client for client in self._answers if client not in blocked]:
                if not self._send_next(client, self._answers[client]):
                    blocked.add(client)
                if time.perf_counter() > until:
                    return

    def _requests(self) -> Iterator[tuple[bytes, int]]:
        """Requests that have arrived, while there is room for more answers."""
        for _ in range(MAX_CLIENTS):
            if len(self._answers) >= MAX_CLIENTS or not self._router.poll(0):
                return
            request = self._router.recv_multipart()
            if len(request) == 3 and len(request[2]) == 8:  # anything else gets no answer
                yield request[0], int.from_bytes(request[2], "big")

    def _send_next(self, client: bytes, answer: _Answer) -> bool:
        """Sends the next message of an answer, or its end. Returns False if the client has not read enough yet."""
        batch = self._buffer.at(answer.place)
        place, frames = answer.place, (b"", END_SEQ, b"")
        if batch is not None:
            place, seq, payload = batch
            frames = (self._topic, seq.to_bytes(8, "big"), payload)
        now = time.monotonic()
        try:
            self._router.send_multipart((client, b"", *frames), zmq.NOBLOCK)
        except zmq.Again:
            if now - answer.moved_at < STALLED_S:
                return False
            batch = None
        except zmq.ZMQError:  # the client is gone
            batch = None
        if batch is None:
            del self._answers[client]
        else:
            answer.place, answer.moved_at = place + 1, now
        return True


def prepare_router(router: zmq.Socket) -> None:
    """Configures a ROUTER socket for `Answers`, before it is bound: sending to a full client raises."""
    router.set_hwm(MAX_UNREAD)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
