"""Publisher and subscriber over real sockets on loopback: the frames, replay, bounds, and that nobody waits."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.events import publisher as publisher_module
from jaxcache.events.answers import END_SEQ
from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import AllBlocksCleared, BlockStored
from jaxcache.events.publisher import KVEventsConfig, ZmqEventPublisher
from jaxcache.events.subscriber import ZmqEventSubscriber
from jaxcache.events.wire import encode_batch
from jaxcache.index.key import RadixKey

ANY = "tcp://127.0.0.1:*"
ROOT = Path(__file__).parents[2]


def config(**options):
    return KVEventsConfig(**{"endpoint": ANY, "replay_endpoint": ANY} | options)


def store(*names):
    return BlockStored(names, None, [0] * len(names), 1)


class Raw:
    """Plain sockets, as somebody else's consumer has them."""

    def __init__(self, publisher):
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.connect(publisher.endpoint)
        self.sub.setsockopt(zmq.SUBSCRIBE, b"")
        if publisher.replay_endpoint:
            self.dealer = self.context.socket(zmq.DEALER)
            self.dealer.connect(publisher.replay_endpoint)
        self.wait_until_subscribed(publisher)

    def wait_until_subscribed(self, publisher):
        """A subscription takes a while to arrive: markers are sent until one comes back."""
        while not self.sub.poll(10):
            publisher.publish([AllBlocksCleared()])

    def receive(self):
        """The next message that is no marker."""
        while True:
            assert self.sub.poll(5000), "nothing arrived"
            frames = self.sub.recv_multipart()
            if msgspec.msgpack.decode(frames[2])[1] != [{"type": "AllBlocksCleared"}]:
                return frames

    def replay(self, start):
        self.dealer.send_multipart((b"", start.to_bytes(8, "big")))
        answer = []
        while not answer or answer[-1][2] != END_SEQ:
            assert self.dealer.poll(5000), "the answer does not end"
            answer.append(self.dealer.recv_multipart())
        return answer

    def close(self):
        self.context.destroy(linger=0)


@pytest.fixture
def pair():
    with ZmqEventPublisher(config(topic="kv@worker")) as publisher:
        raw = Raw(publisher)
        yield publisher, raw
        raw.close()


def follow(publisher, consumer, subscriber, seconds=10.0):
    """Receives until the consumer has all that was published."""
    deadline = time.monotonic() + seconds
    while consumer.next_seq < publisher._next_seq and time.monotonic() < deadline:
        for message in subscriber.receive(timeout_s=0.05):
            consumer.receive(*message)
        if consumer.next_seq < publisher._next_seq:
            consumer.catch_up()


def test_frames(pair):
    publisher, raw = pair
    assert publisher.publish([store(1, 2)]) and publisher.publish([store(3)])
    first, second = raw.receive(), raw.receive()
    assert [frames[0] for frames in (first, second)] == [b"kv@worker"] * 2
    seqs = [int.from_bytes(frames[1], "big") for frames in (first, second)]
    assert len(first[1]) == 8 and seqs[1] == seqs[0] + 1
    ts, events, rank = msgspec.msgpack.decode(first[2])
    assert events[0]["block_hashes"] == [1, 2] and rank == 0
    assert abs(ts - time.time()) < 60


def test_replay_frames(pair):
    publisher, raw = pair
    publisher.publish([store(1)])
    publisher.publish([store(2)])
    live = [raw.receive(), raw.receive()]
    start = int.from_bytes(live[0][1], "big")
    assert raw.replay(start) == [*([b"", *frames] for frames in live), [b"", b"", END_SEQ, b""]]
    assert raw.replay(start + 1) == [[b"", *live[1]], [b"", b"", END_SEQ, b""]]
    assert raw.replay(start + 2) == [[b"", b"", END_SEQ, b""]]
    everything = raw.replay(0)
    assert msgspec.msgpack.decode(everything[0][3])[1] == [{"type": "AllBlocksCleared"}]
    assert END_SEQ == b"\xff" * 8


def test_what_is_no_request_is_ignored(pair):
    _, raw = pair
    for frames in ((b"",), (b"", b"123"), (b"", b"12345678", b"more"), (b"x",)):
        raw.dealer.send_multipart(frames)
    assert len(raw.replay(2**63)) == 1


def test_nothing_is_no_batch(pair):
    publisher, _ = pair
    before = publisher._next_seq
    assert publisher.publish([])
    assert publisher._next_seq == before


def test_times_never_go_back(pair, monkeypatch):
    publisher, raw = pair
    publisher.publish([store(1)])
    monkeypatch.setattr(time, "time", lambda: 1.0)
    publisher.publish([store(2)])
    first, second = (msgspec.msgpack.decode(raw.receive()[2])[0] for _ in range(2))
    assert second == first


def test_a_publisher_that_begins_anew_begins_with_a_higher_number():
    with ZmqEventPublisher(config()) as old:
        for _ in range(100):
            old.publish([store(1)])
        last = old._next_seq
    with ZmqEventPublisher(config()) as new:
        assert new._next_seq > last


def test_a_consumer_knows_the_cache_also_when_it_joins_late():
    rng = random.Random(0)
    cache = RadixCache(None, None, 2, enable_kv_cache_events=True)
    with (
        ZmqEventPublisher(config()) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as early,
    ):
        consumers = [(EventConsumer(early.replay), early)]
        for step in range(400):
            cache.insert(RadixKey([rng.randint(0, 2) for _ in range(rng.randint(2, 20))], rng.choice([None, "a"])))
            if step % 3 == 0:
                cache.evict(rng.randint(1, 20))
            assert publisher.publish_from(cache.events)
            if step == 200:
                late = ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint)
                consumers.append((EventConsumer(late.replay), late))
        for consumer, subscriber in consumers:
            follow(publisher, consumer, subscriber)
            assert consumer.is_complete and not consumer.losses and not subscriber.malformed
            assert consumer.blocks() == {name for node in cache.tree.nodes() for name in node.hashes.names()}
        late.close()


def test_nobody_waits_and_what_was_dropped_is_seen_and_made_up_for(monkeypatch):
    hold = threading.Event()
    monkeypatch.setattr(publisher_module, "encode_batch", lambda *args: hold.wait(30) and encode_batch(*args))
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    with (
        ZmqEventPublisher(config(max_queue_blocks=20)) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
    ):
        taken = []
        for token in range(30):
            cache.insert([token])
            started = time.monotonic()
            taken.append(publisher.publish_from(cache.events))
            assert time.monotonic() - started < 1.0
        assert taken == [True] * 19 + [False] * 11  # and the one that says that nothing is cached
        assert publisher.dropped == 1  # then it waits for room
        hold.set()
        consumer = EventConsumer(subscriber.replay)
        deadline = time.monotonic() + 10
        while not publisher.publish_from(cache.events):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        follow(publisher, consumer, subscriber)
        assert consumer.is_complete
        assert consumer.blocks() == {name for node in cache.tree.nodes() for name in node.hashes.names()}


def test_what_was_cached_before_there_was_a_publisher_is_told():
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.insert([1, 2])
    cache.take_events()
    with (
        ZmqEventPublisher(config()) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
    ):
        cache.insert([1, 3])
        assert publisher.publish_from(cache.events)
        consumer = EventConsumer(subscriber.replay)
        follow(publisher, consumer, subscriber)
        assert consumer.is_complete
        assert consumer.blocks() == {name for node in cache.tree.nodes() for name in node.hashes.names()}
        cache.evict(1)
        assert publisher.publish_from(cache.events)
        assert publisher.publish_from(cache.events)  # nothing new is no batch
        follow(publisher, consumer, subscriber)
        assert len(consumer.blocks()) == 2


def test_a_batch_larger_than_the_queue_is_taken_when_nothing_else_waits():
    with ZmqEventPublisher(config(max_queue_blocks=2)) as publisher:
        deadline = time.monotonic() + 10
        while not publisher.publish([store(*range(100))]):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(("bound", "kept"), [({"buffer_steps": 3}, 3), ({"buffer_bytes": 250}, 2)])
def test_the_replay_buffer_is_bounded(bound, kept):
    with ZmqEventPublisher(config(**bound)) as publisher:
        raw = Raw(publisher)
        for i in range(20):
            publisher.publish([store(i)])
        for _ in range(20):
            raw.receive()
        names = [msgspec.msgpack.decode(frames[3])[1][0]["block_hashes"] for frames in raw.replay(0)[:-1]]
        assert names == [[i] for i in range(20 - kept, 20)]
        raw.close()


def test_a_long_replay_arrives_whole():
    with (
        ZmqEventPublisher(config()) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
    ):
        for i in range(5000):
            while not publisher.publish([store(i)]):
                time.sleep(0.01)
        while publisher._sender.is_busy:
            time.sleep(0.01)
        seqs = [seq for seq, _ in subscriber.replay(0)]
        assert len(seqs) == 5001
        assert seqs == list(range(seqs[0], seqs[0] + 5001))


def test_tokens_can_be_left_out():
    with ZmqEventPublisher(config(with_token_ids=False)) as publisher:
        raw = Raw(publisher)
        publisher.publish([store(1)])
        assert msgspec.msgpack.decode(raw.receive()[2])[1][0]["token_ids"] == []
        raw.close()


def listening():
    """(address, port) of every TCP socket on which this process listens."""
    mine = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            mine.add(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(tuple(fields[1].split(":")))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc/net/tcp")
def test_nothing_listens_unless_asked_and_then_on_loopback_until_it_ends():
    before = listening()
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.insert([1])
    assert listening() == before
    with ZmqEventPublisher(config()):
        new = listening() - before
        assert len(new) == 2
        assert {address for address, _ in new} == {"0100007F"}
        assert "jaxcache-events" in {thread.name for thread in threading.enumerate()}
    assert listening() == before
    assert "jaxcache-events" not in {thread.name for thread in threading.enumerate()}
    assert KVEventsConfig().endpoint.startswith("tcp://127.0.0.1:") and KVEventsConfig().replay_endpoint is None


def test_the_end_is_the_end():
    publisher = ZmqEventPublisher(config())
    publisher.shutdown()
    publisher.shutdown()
    assert publisher.publish([store(1)]) is False
    assert publisher.dropped == 1


def test_what_waits_at_the_end_is_sent():
    publisher = ZmqEventPublisher(config())
    raw = Raw(publisher)
    for i in range(50):
        publisher.publish([store(i)])
    publisher.shutdown()
    assert [msgspec.msgpack.decode(raw.receive()[2])[1][0]["block_hashes"] for _ in range(50)] == [
        [i] for i in range(50)
    ]
    raw.close()


def test_one_that_is_forgotten_ends_too():
    publisher = ZmqEventPublisher(config())
    thread = publisher._thread
    del publisher
    thread.join(5)
    assert not thread.is_alive()


def test_a_process_that_forgets_its_publisher_ends():
    script = (
        "from jaxcache.events.publisher import *\n"
        f"publisher = ZmqEventPublisher(KVEventsConfig({ANY!r}))\n"
        "publisher.publish([AllBlocksCleared()])\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=60, capture_output=True)
    assert done.returncode == 0 and not done.stderr


def test_a_thread_that_fails_harms_nobody(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(publisher_module, "encode_batch", lambda *args: 1 // 0)
    publisher = ZmqEventPublisher(config())
    publisher._thread.join(5)
    assert failed[0].exc_type is ZeroDivisionError
    assert publisher.publish([store(1)]) is False
    publisher.shutdown()


def test_another_process_needs_a_publisher_of_its_own(monkeypatch):
    with ZmqEventPublisher(config()) as publisher:
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        with pytest.raises(UnsupportedError, match="fork"):
            publisher.publish([store(1)])
        monkeypatch.undo()


def test_an_address_in_use_is_refused_and_nothing_is_left_behind():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        threads = threading.active_count()
        for name in ("endpoint", "replay_endpoint"):
            with pytest.raises(ArgumentError, match=rf"{name}: tcp://127.0.0.1:{port} cannot be used"):
                ZmqEventPublisher(config(**{name: f"tcp://127.0.0.1:{port}"}))
        assert threading.active_count() == threads
    with pytest.raises(ArgumentError, match="cannot be used"):
        ZmqEventSubscriber("tcp://no port")


@pytest.mark.parametrize(
    "options",
    [{"endpoint": "127.0.0.1:5557"}, {"endpoint": "inproc://x"}, {"replay_endpoint": "udp://x"}, {"hwm": 0}]
    + [{name: value} for name in ("buffer_steps", "buffer_bytes", "max_queue_blocks") for value in (0, -1, 1.5)],
)
def test_configs_that_are_none(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        KVEventsConfig(**options)


def test_each_rank_has_its_own_address(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"ipc://{tmp_path}/events"
    with ZmqEventPublisher(KVEventsConfig(f"tcp://127.0.0.1:{port}", path), data_parallel_rank=2) as publisher:
        assert publisher.endpoint == f"tcp://127.0.0.1:{port + 2}"
        assert publisher.replay_endpoint == f"{path}_dp2"
        with ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
            (message,) = subscriber.replay(0)
            assert message[1].data_parallel_rank == 2


def test_a_publisher_can_connect_to_a_consumer_that_listens():
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    sub.bind(ANY)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    endpoint = sub.getsockopt_string(zmq.LAST_ENDPOINT)
    with ZmqEventPublisher(KVEventsConfig(endpoint, bind=False)) as publisher:
        while not sub.poll(10):
            publisher.publish([store(1)])
    context.destroy(linger=0)


def test_a_subscriber_counts_what_is_no_batch():
    context = zmq.Context()
    pub = context.socket(zmq.PUB)
    pub.bind(ANY)
    with ZmqEventSubscriber(pub.getsockopt_string(zmq.LAST_ENDPOINT)) as subscriber:
        deadline = time.monotonic() + 10
        while not subscriber.malformed and time.monotonic() < deadline:
            for frames in ((b"", b"short", b""), (b"one",), (b"", bytes(8), b"\xc1")):
                pub.send_multipart(frames)
            assert list(subscriber.receive(timeout_s=0.05)) == []
        assert subscriber.malformed
        assert list(subscriber.replay(0)) == []  # nobody to ask
    context.destroy(linger=0)


def test_a_publisher_that_does_not_answer_is_waited_for_no_longer_than_that():
    with ZmqEventSubscriber(ANY.replace("*", "1"), ANY.replace("*", "1"), replay_timeout_s=0.1) as subscriber:
        started = time.monotonic()
        assert list(subscriber.replay(0)) == []
        assert time.monotonic() - started < 5


def test_a_long_batch_is_worked_out_with_breaks(monkeypatch):
    """While it was hashed and encoded, for milliseconds, no other thread of the interpreter ran."""
    breaks = []
    monkeypatch.setattr(publisher_module, "AWAKE_S", 0.0)
    monkeypatch.setattr(publisher_module, "ASLEEP_S", 1e-6)
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.insert(list(range(6400)))
    with ZmqEventPublisher(config()) as publisher, ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint):
        sender = publisher._sender
        monkeypatch.setattr(sender, "_let_others_run", lambda: breaks.append(type(sender)._let_others_run(sender)))
        publisher.publish_from(cache.events)
        deadline = time.monotonic() + 10
        while sender.is_busy and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(breaks) >= 6400 // 32 + 6400 // 2048
