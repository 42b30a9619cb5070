"""Receives what a publisher of events sends: ours, SGLang's or vLLM's.

    with ZmqEventSubscriber("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558") as subscriber:
        consumer = EventConsumer(subscriber.replay)
        consumer.catch_up()
        while True:
            for seq, batch in subscriber.receive(timeout_s=1.0):
                consumer.receive(seq, batch)

Needs msgspec and pyzmq, extra `events`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.events.answers import END_SEQ
from jaxcache.events.events import EventBatch
from jaxcache.events.wire import decode_batch

try:
    import zmq
except ImportError as error:
    raise UnsupportedError("receiving events needs pyzmq: pip install 'jaxcache[events]'") from error

Message = tuple[int, EventBatch]


class ZmqEventSubscriber:
    """Two ends of a publisher's sockets. For one thread. Use as a context manager, or call `close`.

    Args:
      endpoint: Where batches are published.
      replay_endpoint: Where to ask for what was missed; None if nothing answers.
      topic: Only messages whose topic begins with it.
      replay_timeout_s: How long to wait for each batch of a replay.
      max_message_bytes: A longer message ends the connection, which ZeroMQ makes again.

    Attributes:
      malformed: Messages that were no batch of events; for a consumer they are a gap.

    Raises:
      ArgumentError: An address cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        topic: str = "",
        replay_timeout_s: float = 1.0,
        max_message_bytes: int = 1 << 28,
    ):
        self._replay_endpoint = replay_endpoint
        self._replay_timeout_ms = int(1000 * replay_timeout_s)
        self._max_message_bytes = max_message_bytes
        self.malformed = 0
        self._context = zmq.Context()
        self._sub = self._connected(zmq.SUB, endpoint, hwm=10_000)
        self._sub.setsockopt_string(zmq.SUBSCRIBE, topic)

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        """The messages that are there, waiting for the first one at most so long."""
        deadline = time.monotonic() + timeout_s
        while self._sub.poll(max(0, round(1000 * (deadline - time.monotonic())))):
            message = self._message(self._sub.recv_multipart())
            if message is not None:
                deadline = 0.0
                yield message

    def replay(self, start: int) -> Iterator[Message]:
        """What the publisher still has from that sequence number on, in order; nothing if it does not answer.

        The stream that `EventConsumer` heals itself with.
        """
        if self._replay_endpoint is None:
            return
        # A socket of its own for each, so that no answer to an earlier request comes in between. Not a REQ, which takes
        # only the first message of an answer.
        dealer = self._connected(zmq.DEALER, self._replay_endpoint, hwm=0)
        try:
            dealer.send_multipart((b"", start.to_bytes(8, "big")))
            while dealer.poll(self._replay_timeout_ms):
                frames = dealer.recv_multipart()
                if END_SEQ in frames[-2:]:
                    return
                message = self._message(frames)
                if message is not None:
                    yield message
        finally:
            dealer.close()

    def close(self) -> None:
        """Ends the connections."""
        self._context.destroy(linger=0)

    def __enter__(self) -> ZmqEventSubscriber:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _message(self, frames: list[bytes]) -> Message | None:
        """Live [topic, seq, payload], replayed ["", topic, seq, payload], of older releases ["", seq, payload]."""
        try:
            if len(frames) < 2 or len(frames[-2]) != 8 or frames[-2] == END_SEQ:
                raise ArgumentError("frames: the last two are a sequence number of 8 bytes and a batch")
            return int.from_bytes(frames[-2], "big"), decode_batch(frames[-1])
        except ArgumentError:
            self.malformed += 1
            return None

    def _connected(self, kind: int, endpoint: str, hwm: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.setsockopt(zmq.RCVHWM, hwm)
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_message_bytes)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ArgumentError(f"endpoint: {endpoint} cannot be used: {error}") from error
        return socket
