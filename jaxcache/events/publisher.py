"""Publishes what happens to cached blocks, for routers: ZeroMQ, in the format of SGLang and vLLM.

    engine's thread            publisher's thread                           consumers
    publish(events) ──queue──► number, hash, encode ──PUB──► [topic, seq, batch]
                                      └─► replay buffer ──ROUTER──► what a consumer missed

The caller is never kept waiting: to publish is to put a list into a bounded queue. What does not fit is dropped, and
leaves a gap in the numbers that consumers see.

Needs msgspec and pyzmq, extra `events`. Nothing listens until a publisher is made, and then on loopback unless told
otherwise: events hold what users wrote.

A Unix socket (ipc://) can be opened by its owner only (0600). Any user of the machine can connect to loopback, and to
an abstract ipc://@ address.

Source: SGLang 0.5.23 disaggregation/kv_events.py, ZmqEventPublisher; vLLM 0.33 distributed/kv_events.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcache.arguments import as_count
from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.events.answers import Answers, ReplayBuffer, prepare_router
from jaxcache.events.events import AllBlocksCleared, EventBatch, EventQueue, KVCacheEvent
from jaxcache.events.wire import MAX_EVENTS, encode_batch

try:
    import zmq
except ImportError as error:
    raise UnsupportedError("publishing events needs pyzmq: pip install 'jaxcache[events]'") from error

GATHER_S, AWAKE_S, ASLEEP_S = 1e-3, 1e-4, 1e-3
ANSWER_S = 5e-4
"""Once there is something to publish, the thread waits for so long: to wake it costs the engine's thread a microsecond.
Then it works for so long at a time, and lets others run for so long in between: only one of them holds the interpreter.
Sending answers leaves it to others most of the time, and goes on for as long as the last number says.
"""


@dataclass(frozen=True)
class KVEventsConfig:
    """Where and how events are published.

    Attributes:
      endpoint: Of the PUB socket: tcp:// or ipc://. A port of `*` takes any that is free. Of several data parallel
        ranks, each takes the port its rank above this one.
      replay_endpoint: Of the ROUTER socket that consumers ask for what they missed; None for none.
      topic: Before every message; consumers can subscribe to it.
      bind: Whether to listen at `endpoint`, or to connect to a consumer that does.
      max_queue_blocks: Blocks whose events may wait for the publisher's thread.
      buffer_steps: Batches kept for replay.
      buffer_bytes: Bytes of them.
      hwm: Batches kept in memory for a consumer that does not read, before it misses some.
      with_token_ids: Whether to publish tokens. Consumers that go by names of blocks need none.

    Raises:
      ArgumentError: An endpoint is no tcp:// or ipc:// address, or a bound is not positive.
    """

    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    bind: bool = True
    max_queue_blocks: int = 1 << 20
    buffer_steps: int = 10_000
    buffer_bytes: int = 64 << 20
    hwm: int = 1_000
    with_token_ids: bool = True

    def __post_init__(self):
        for name, endpoint in (("endpoint", self.endpoint), ("replay_endpoint", self.replay_endpoint)):
            if endpoint is not None and not endpoint.startswith(("tcp://", "ipc://")):
                raise ArgumentError(f"{name} must be a tcp:// or ipc:// address, got {endpoint!r}")
        for name in ("max_queue_blocks", "buffer_steps", "buffer_bytes", "hwm"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be a positive integer, got {value!r}")


class ZmqEventPublisher:
    """Publishes batches of events from a thread of its own. Use as a context manager, or call `shutdown`.

    The first batch says that nothing is cached. Numbers begin with the time, in microseconds: a publisher that
    restarts has higher ones than the one before, so that its consumers notice.

    Args:
      config: See `KVEventsConfig`.
      data_parallel_rank: Which cache of several.

    Raises:
      ArgumentError: An address cannot be used.
    """

    def __init__(self, config: KVEventsConfig | None = None, data_parallel_rank: int = 0):
        rank = as_count("data_parallel_rank", data_parallel_rank)
        self._sender = _Sender(config or KVEventsConfig(), rank)
        self._lock = threading.Lock()
        self._next_seq = time.time_ns() // 1000
        self._last_ts = 0.0
        self._is_behind = True  # consumers do not know yet what is cached
        self._pid = os.getpid()
        self._refused = self._made_up_for = 0
        self.publish([AllBlocksCleared()])
        self._thread = threading.Thread(target=self._sender.run, name="jaxcache-events", daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _close, self._sender, self._thread)

    @property
    def endpoint(self) -> str:
        """Where it publishes, with the port that was taken."""
        return self._sender.endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Where it answers, with the port that was taken."""
        return self._sender.replay_endpoint

    def publish(self, events: Sequence[KVCacheEvent]) -> bool:
        """Publishes `events` as one batch; none at all are no batch. Thread-safe.

        Costs some microseconds, whatever it is about, and never waits for anybody. `publish_from` is the same for the
        events of a cache, and makes up for what was dropped.

        Args:
          events: Not to be changed afterwards.

        Returns:
          False if there was no room, or after `shutdown`: the batch is dropped, and its number with it.

        Raises:
          UnsupportedError: In a process that was forked from the publisher's.
        """
        return self._publish(events, sum(map(len, events)))

    def _publish(self, events: Sequence[KVCacheEvent], blocks: int) -> bool:
        """Publishes events about so many blocks."""
        if os.getpid() != self._pid:
            raise UnsupportedError("this publisher belongs to the process before the fork: make one in this process")
        if not events:
            return True
        with self._lock:
            self._last_ts = max(self._last_ts, time.time())
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            if self._sender.accept(seq, self._last_ts, events, blocks or 1):
                return True
            self._refused += 1
            self._is_behind = True
            return False

    @property
    def dropped(self) -> int:
        """Batches that found no room, or that could not be encoded."""
        return self._refused + self._sender.unencodable

    def publish_from(self, queue: EventQueue) -> bool:
        """Publishes what waits in a cache's queue (`RadixCache.events`): call it once a step.

        The first time, and when there is room again after a batch was dropped, it says all that is cached.

        Returns:
          False if there was no room.

        Raises:
          UnsupportedError: See `publish`.
        """
        blocks, events = queue.num_blocks, queue.take()
        if self._is_behind or self._sender.unencodable > self._made_up_for:
            if self.dropped and self._sender.is_busy:
                return False
            self._is_behind, self._made_up_for = False, self._sender.unencodable
            events = queue.snapshot()
            blocks = sum(map(len, events))
        if len(events) <= MAX_EVENTS:
            return self._publish(events, blocks)
        parts = [events[start : start + MAX_EVENTS] for start in range(0, len(events), MAX_EVENTS)]
        return all(self.publish(part) for part in parts)  # once one is dropped, everything is listed again

    def shutdown(self) -> None:
        """Sends what waits, for at most a second, and ends. The thread is joined and the addresses are free."""
        self._close()

    def __enter__(self) -> ZmqEventPublisher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


class _Sender:
    """What the publisher's thread does. It knows no publisher, so that one that is forgotten can end."""

    LINGER_MS = 1000

    def __init__(self, config: KVEventsConfig, rank: int):
        self._config = config
        self._rank = rank
        self._topic = config.topic.encode()
        self._waiting: deque[tuple[int, float, Sequence[KVCacheEvent], int]] = deque()
        self._waiting_blocks = 0
        self._lock = threading.Lock()
        self._buffer = ReplayBuffer(config.buffer_steps, config.buffer_bytes)
        self._answers: Answers | None = None
        self.unencodable = 0
        self._closed_at: float | None = None
        self._awake_since = 0.0
        with contextlib.ExitStack() as undo:
            self._context = zmq.Context()
            undo.callback(self._context.destroy, linger=0)
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set_hwm(config.hwm)
            self.endpoint = self._open(undo, self._pub, "endpoint", config.endpoint, rank, config.bind)
            self._router: zmq.Socket | None = None
            self.replay_endpoint: str | None = None
            if config.replay_endpoint is not None:
                self._router = self._context.socket(zmq.ROUTER)
                prepare_router(self._router)
                self._answers = Answers(self._router, self._topic, self._buffer)
                self.replay_endpoint = self._open(
                    undo, self._router, "replay_endpoint", config.replay_endpoint, rank, True
                )
            self._undo = undo.pop_all()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def _open(
        self, undo: contextlib.ExitStack, zmq_socket: zmq.Socket, name: str, endpoint: str, rank: int, bind: bool
    ) -> str:
        """Binds or connects a socket. Returns its address, with the port that was taken."""
        zmq_socket.linger = self.LINGER_MS
        address = _of_rank(endpoint, rank)
        path = address.removeprefix("ipc://")
        try:
            if bind and path != address and path != "*" and not path.startswith("@"):
                zmq_socket.setsockopt(zmq.USE_FD, _listening(path))
                undo.callback(Path(path).unlink, missing_ok=True)
            (zmq_socket.bind if bind else zmq_socket.connect)(address)
        except (zmq.ZMQError, OSError) as error:
            raise ArgumentError(f"{name}: {address} cannot be used: {error}") from error
        return zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT)

    # ---- called by the engine's thread -----------------------------------------------------------------------------

    def accept(self, seq: int, ts: float, events: Sequence[KVCacheEvent], blocks: int) -> bool:
        """Takes a batch about so many blocks if there is room for it, or if nothing else waits."""
        with self._lock:
            if self._closed_at is not None:
                return False
            if self._waiting_blocks and self._waiting_blocks + blocks > self._config.max_queue_blocks:
                return False
            self._waiting_blocks += blocks
            self._waiting.append((seq, ts, events, blocks))
            if len(self._waiting) == 1:
                self._wake()
        return True

    @property
    def is_busy(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    def close(self) -> None:
        """Ends `run` once what waits is sent, or a second has passed."""
        with self._lock:
            if self._closed_at is None:
                self._closed_at = time.monotonic()
                self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: then it is awake
            os.write(self._wake_writer, b"\0")

    # ---- the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Sends and answers until it is closed."""
        try:
            poller = zmq.Poller()
            poller.register(self._wake_reader, zmq.POLLIN)
            if self._router is not None:
                poller.register(self._router, zmq.POLLIN)
            while self._closed_at is None:
                poller.poll(self._wait_ms())
                with contextlib.suppress(BlockingIOError):  # it was the other one
                    os.read(self._wake_reader, 4096)
                if self._waiting and self._closed_at is None:
                    time.sleep(GATHER_S)
                self._send_waiting()
                self._answer()
        finally:
            with self._lock:
                self._closed_at = self._closed_at or time.monotonic()
            self._context.destroy(linger=self.LINGER_MS)
            self._undo.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _wait_ms(self) -> int | None:
        """How long to wait for something to do; None for as long as it takes."""
        return round(1e3 * ASLEEP_S) if self._answers is not None and self._answers.are_under_way else None

    def _answer(self) -> None:
        if self._answers is not None:
            self._answers.go_on(ANSWER_S)
            self._let_others_run()

    def _send_waiting(self) -> None:
        while self._waiting and (self._closed_at is None or time.monotonic() < self._closed_at + self.LINGER_MS / 1e3):
            seq, ts, events, blocks = self._waiting[0]
            self._send(seq, EventBatch(ts, events, self._rank))
            with self._lock:
                self._waiting.popleft()
                self._waiting_blocks -= blocks
            self._answer()
            self._let_others_run()

    def _send(self, seq: int, batch: EventBatch) -> None:
        """Sends and keeps a batch. One that cannot be encoded is a gap; then `publish_from` lists everything again."""
        try:
            payload = encode_batch(batch, self._config.with_token_ids, self._let_others_run)
        except ArgumentError:
            self.unencodable += 1
            return
        self._pub.send_multipart((self._topic, seq.to_bytes(8, "big"), payload))
        self._buffer.keep(seq, payload)

    def _let_others_run(self) -> None:
        """Sleeps, if it was awake for long: who works holds the interpreter, and the engine waits for it."""
        if self._closed_at is None and time.perf_counter() - self._awake_since > AWAKE_S:
            time.sleep(ASLEEP_S)
            self._awake_since = time.perf_counter()


def _close(sender: _Sender, thread: threading.Thread) -> None:
    sender.close()
    thread.join()


def _listening(path: str) -> int:
    """File descriptor of a listening Unix socket that only its owner can open: the mode is set before it has a name.

    Raises:
      OSError: It cannot be made, or the path exists and is not the socket of a process that has ended.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        os.fchmod(listener.fileno(), 0o600)
        if Path(path).is_socket() and listener.connect_ex(path) == errno.ECONNREFUSED:
            Path(path).unlink()  # of a process that was killed
        listener.bind(path)
        listener.listen()
        return listener.detach()


def _of_rank(endpoint: str, rank: int) -> str:
    """The address for that rank: its port is the rank above the one given; an ipc path gets it as its end."""
    if not rank:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}"
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}" if port.isdigit() else endpoint
