"""Events that were refused too late, that stopped the publisher, or that a consumer took for something else."""

from __future__ import annotations

import socket
import stat
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError
from jaxcache.events import answers
from jaxcache.events.answers import ReplayBuffer
from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from jaxcache.events.publisher import KVEventsConfig, ZmqEventPublisher
from jaxcache.events.subscriber import ZmqEventSubscriber
from jaxcache.events.wire import decode_batch, encode_batch
from tests.support.waiting import wait_until

ANY = "tcp://127.0.0.1:*"
MANY = 10_000_000


def store(*names):
    return BlockStored(names, None, [0] * len(names), 1)


def batch(ts, *events):
    return EventBatch(ts, events)


# ---- what arrives ----------------------------------------------------------------------------------------------------

EMPTY_ARRAYS = b"\xdd" + MANY.to_bytes(4, "big") + b"\x90" * MANY
ONE = msgspec.msgpack.encode(1.0)
STORED_WITH = b"\x92" + ONE + b"\x91\x9a\xabBlockStored\x90\xc0\x90\x01\xc0\xc0\xc0\xc0"  # extra keys follow


@pytest.mark.parametrize(
    "payload",
    [
        b"\x93" + ONE + EMPTY_ARRAYS + b"\xc0",
        b"\x82\xa2ts" + ONE + b"\xa6events" + EMPTY_ARRAYS,
        b"\x92" + ONE + b"\x91\x93\xacBlockRemoved" + EMPTY_ARRAYS + b"\xc0",
        b"\x92" + ONE + b"\x91\x95\xabBlockStored\x90\xc0" + EMPTY_ARRAYS + b"\x01",
        b"\x92" + EMPTY_ARRAYS + b"\x90",
        STORED_WITH + EMPTY_ARRAYS,
        STORED_WITH + b"\x91" + EMPTY_ARRAYS,
        STORED_WITH + b"\x91\x91" + EMPTY_ARRAYS,
    ],
    ids=["events", "events of a map", "names", "tokens", "time", "extra keys", "keys of a block", "pair in them"],
)
def test_ten_million_empty_arrays_are_refused_before_they_are_made(payload):
    """It took 4 seconds, and a gigabyte, to find that they are no events."""
    started = time.process_time()
    with pytest.raises(ArgumentError, match="payload"):
        decode_batch(payload)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("ts", [float("nan"), float("inf")])
def test_a_time_that_ends_all_comparisons_is_refused(ts):
    with pytest.raises(ArgumentError, match="time of a batch must be finite"):
        decode_batch(msgspec.msgpack.encode([ts, []]))


@pytest.mark.parametrize("seq", [2**64 - 1, 2**64, -1])
def test_the_number_that_ends_a_replay_is_none_of_a_batch(seq):
    """`catch_up` then asked from 2**64 on: OverflowError, from then on and always."""
    consumer = EventConsumer(lambda start: [(start, batch(2.0, store(2))), (seq, batch(3.0, store(3)))])
    consumer.receive(0, batch(1.0, store(1)))
    with pytest.raises(ArgumentError, match="seq must be in"):
        consumer.receive(seq, batch(2.0, store(2)))
    assert (consumer.next_seq, consumer.blocks()) == (1, {1})
    with pytest.raises(ArgumentError, match="seq must be in"):
        consumer.catch_up()
    assert (consumer.next_seq, consumer.blocks()) == (2, {1, 2})


def test_the_greatest_number_of_a_batch_can_be_followed_by_a_question():
    with ZmqEventSubscriber(ANY.replace("*", "1"), ANY.replace("*", "1"), replay_timeout_s=0.05) as subscriber:
        consumer = EventConsumer(subscriber.replay)
        consumer.receive(2**64 - 2, batch(1.0, AllBlocksCleared()))
        consumer.catch_up()
        assert consumer.next_seq == 2**64 - 1


def test_a_subscriber_counts_it_as_malformed():
    context = zmq.Context()
    pub = context.socket(zmq.PUB)
    pub.bind(ANY)
    with ZmqEventSubscriber(pub.getsockopt_string(zmq.LAST_ENDPOINT)) as subscriber:
        payload = encode_batch(batch(1.0, store(1)))
        deadline = time.monotonic() + 10
        while not subscriber.malformed and time.monotonic() < deadline:
            pub.send_multipart((b"", b"\xff" * 8, payload))
            assert list(subscriber.receive(timeout_s=0.05)) == []
        assert subscriber.malformed
    context.destroy(linger=0)


# ---- a publisher whose clock went back ------------------------------------------------------------------------------


def test_a_restart_after_the_clock_stepped_back_is_no_repetition():
    """Lower numbers with earlier times were taken for repetitions, and the old cache's blocks were believed."""
    consumer = EventConsumer()
    for seq in range(1000, 1005):
        consumer.receive(seq, batch(float(seq), AllBlocksCleared() if seq == 1000 else store(seq)))
    consumer.receive(900, batch(900.0, AllBlocksCleared()))
    assert not consumer.blocks() and consumer.is_complete
    consumer.receive(901, batch(901.0, store(1)))
    assert consumer.blocks() == {1}
    assert (consumer.restarts, consumer.repeated, consumer.next_seq) == (1, 0, 902)


def test_a_restart_that_is_ahead_in_numbers_and_behind_in_time_is_one():
    """As of our publisher: it numbers by microseconds, so an hour's life is far behind a clock a second back."""
    consumer = EventConsumer()
    for i in range(5):
        consumer.receive(1000 + i, batch(1000.0 + i, AllBlocksCleared() if not i else store(i)))
    consumer.receive(5000, batch(1002.0, AllBlocksCleared()))
    consumer.receive(5001, batch(1002.5, store(77)))
    assert consumer.blocks() == {77} and consumer.is_complete
    assert (consumer.restarts, consumer.repeated) == (1, 0)


def test_a_restart_whose_beginning_was_missed_is_asked_for():
    first, second = batch(900.0, AllBlocksCleared(), store(1)), batch(901.0, store(2))
    consumer = EventConsumer(lambda start: [m for m in ((900, first), (901, second)) if m[0] >= start])
    for seq in range(1000, 1005):
        consumer.receive(seq, batch(float(seq), AllBlocksCleared() if seq == 1000 else store(seq)))
    consumer.receive(901, second)
    assert consumer.blocks() == {1, 2} and consumer.is_complete
    deaf = EventConsumer(max_pending=2)
    for seq in range(1000, 1005):
        deaf.receive(seq, batch(float(seq), AllBlocksCleared() if seq == 1000 else store(seq)))
    deaf.receive(901, second)
    assert not deaf.blocks()  # less than there is, never what there is no more


def test_repetitions_and_stragglers_of_every_life_stay_what_they_are():
    consumer = EventConsumer()
    lives = [range(1000, 1005), range(900, 905), range(800, 805)]
    for seqs in lives:
        for seq in seqs:
            consumer.receive(seq, batch(float(seq), AllBlocksCleared() if seq == seqs[0] else store(seq)))
    for seqs in lives:
        for seq in seqs:
            consumer.receive(seq, batch(float(seq), AllBlocksCleared() if seq == seqs[0] else store(seq)))
    assert consumer.blocks() == {801, 802, 803, 804}
    assert (consumer.repeated, consumer.next_seq) == (15, 805)


def test_stragglers_of_an_earlier_life_are_told_by_their_time():
    consumer = EventConsumer(max_pending=0)
    for seq in (0, 1, 4):
        consumer.receive(seq, batch(float(seq), store(seq)))
    consumer.receive(0, batch(10.0, store(100)))
    for seq in (2, 3, 4, 5):
        consumer.receive(seq, batch(float(seq), store(seq)))
    assert (consumer.blocks(), consumer.restarts, consumer.repeated) == ({100}, 1, 4)


def test_a_late_batch_that_was_given_up_is_no_restart():
    consumer = EventConsumer(max_pending=1)
    for seq in (0, 2, 3):
        consumer.receive(seq, batch(float(seq), store(seq)))
    assert consumer.blocks() == {2, 3}
    consumer.receive(1, batch(1.0, store(1)))
    assert consumer.blocks() == {2, 3} and not consumer.restarts


# ---- what is published ----------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    """They made the encoder raise, and the publisher's thread end."""
    plain = [BlockStored([1, -2], 3, [4, 5], 1), BlockRemoved([6])]
    of_numpy = [
        BlockStored(np.array([1, -2]), np.int64(3), np.array([4, 5], np.uint16), np.int32(1)),
        BlockRemoved([np.int64(6)]),
    ]
    assert encode_batch(EventBatch(np.float64(1.0), of_numpy, np.int64(2))) == encode_batch(EventBatch(1.0, plain, 2))
    pieces = [np.int32(token) for token in range(70)]
    assert encode_batch(batch(1.0, BlockStored([1] * 70, None, pieces, 1))) == encode_batch(
        batch(1.0, BlockStored([1] * 70, None, list(range(70)), 1))
    )


@pytest.mark.parametrize("names", [[2**70], [object()], ["\ud800"]], ids=["too large", "an object", "a surrogate"])
def test_what_cannot_be_encoded_is_a_gap_and_not_the_end(names):
    event = BlockRemoved(names)
    with pytest.raises(ArgumentError, match="cannot be encoded"):
        encode_batch(batch(1.0, event))
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.insert([1, 2])
    with (
        ZmqEventPublisher(KVEventsConfig(ANY, ANY)) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
    ):
        assert publisher.publish_from(cache.events)
        publisher.publish([event])
        wait_until(lambda: publisher.dropped == 1)
        cache.insert([1, 3])
        assert publisher.publish_from(cache.events)
        wait_until(lambda: not publisher._sender.is_busy)
        consumer = EventConsumer(subscriber.replay)
        consumer.catch_up()
        assert consumer.is_complete and len(consumer.blocks()) == 3


# ---- the replay endpoint --------------------------------------------------------------------------------------------


def dealers(context, publisher, count):
    """Clients of the replay endpoint that ask and never read."""
    made = [context.socket(zmq.DEALER) for _ in range(count)]
    for dealer in made:
        dealer.set_hwm(1)
        dealer.connect(publisher.replay_endpoint)
    return made


def fill(publisher, batches, blocks):
    event = store(*range(1 << 40, (1 << 40) + blocks))
    for _ in range(batches):
        wait_until(lambda: publisher.publish([event]))
        wait_until(lambda: not publisher._sender.is_busy)


def test_a_flood_of_questions_delays_no_batch_and_no_other_answer():
    """Each of them was answered whole before the next batch was sent: it waited 4 seconds."""
    context = zmq.Context()
    with (
        ZmqEventPublisher(KVEventsConfig(ANY, ANY)) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
    ):
        fill(publisher, 500, 100)
        (flood,) = dealers(context, publisher, 1)
        flood.set_hwm(0)
        for _ in range(2000):
            flood.send_multipart((b"", bytes(8)))
        worst = 0.0
        for _ in range(20):
            started = time.monotonic()
            fill(publisher, 1, 1)
            worst = max(worst, time.monotonic() - started)
        assert worst < 0.5
        assert len(list(subscriber.replay(0))) == 521
    context.destroy(linger=0)


class Reader:
    """A ROUTER socket whose clients asked at once and read everything."""

    def __init__(self, clients):
        self.requests = [[b"%d" % client, b"", bytes(8)] for client in range(clients)]
        self.sent = []

    def poll(self, timeout):
        return bool(self.requests)

    def recv_multipart(self):
        return self.requests.pop(0)

    def send_multipart(self, frames, flags):
        self.sent.append(frames[0])


def test_an_answer_is_sent_a_message_at_a_time_and_each_client_has_its_turn():
    buffer = ReplayBuffer(100, 1 << 20)
    for seq in range(100):
        buffer.keep(seq, b"x")
    router = Reader(clients=3)
    answering = answers.Answers(router, b"", buffer)  # type: ignore[arg-type]
    answering.go_on(0.0)
    assert router.sent == [b"0"]
    while answering.are_under_way:
        answering.go_on(1e-4)
    assert len(router.sent) == 3 * 101 + 1 - 1
    assert {router.sent.count(client) for client in (b"0", b"1", b"2")} == {101}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_clients_that_do_not_read_cost_no_memory_and_then_their_place(monkeypatch):
    """Whole answers were handed to ZeroMQ, for each question: 160 MB of one client."""
    monkeypatch.setattr(answers, "STALLED_S", 0.3)
    context = zmq.Context()
    with (
        ZmqEventPublisher(KVEventsConfig(ANY, ANY)) as publisher,
        ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint, replay_timeout_s=10.0) as subscriber,
    ):
        fill(publisher, 500, 3000)
        before = resident_bytes()
        idle = dealers(context, publisher, answers.MAX_CLIENTS)
        for dealer in 5 * idle:
            dealer.send_multipart((b"", bytes(8)))
        assert len(list(subscriber.replay(0))) == 501  # once they have lost their places
        # 30 kB a batch, 16 of them a client; and what the sockets hold.
        assert resident_bytes() - before < 60 << 20
    context.destroy(linger=0)


def test_a_consumer_that_does_not_read_is_kept_no_more_than_a_thousand_batches_for():
    assert KVEventsConfig().hwm == 1000


def test_the_replay_buffer_is_asked_by_place():
    buffer = ReplayBuffer(max_batches=3, max_bytes=100)
    assert buffer.at(0) is None and buffer.place_of(0) == 0
    for seq in (10, 12, 13, 17):
        buffer.keep(seq, b"x%d" % seq)
    assert [buffer.place_of(start) for start in (0, 12, 14, 18)] == [1, 1, 3, 4]
    assert buffer.at(0) == (1, 12, b"x12")  # what is gone is stepped over
    assert buffer.at(3) == (3, 17, b"x17") and buffer.at(4) is None
    buffer.keep(18, b"y" * 99)
    assert buffer.at(0) == (4, 18, b"y" * 99)


# ---- ipc ------------------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_its_owners(tmp_path):
    """It was made 0755, and anybody on the machine could read what users wrote."""
    paths = [tmp_path / "events", tmp_path / "replay"]
    with ZmqEventPublisher(KVEventsConfig(*(f"ipc://{path}" for path in paths))) as publisher:
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with ZmqEventSubscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
            wait_until(lambda: len(list(subscriber.replay(0))) == 1)
            wait_until(lambda: publisher.publish([store(1)]) and list(subscriber.receive(0.01)))
        with pytest.raises(ArgumentError, match="Address already in use"):
            ZmqEventPublisher(KVEventsConfig(f"ipc://{paths[0]}"))
    assert not any(path.exists() for path in paths)


def test_the_socket_of_a_killed_publisher_is_replaced_and_another_file_is_not(tmp_path):
    path = tmp_path / "events"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with ZmqEventPublisher(KVEventsConfig(f"ipc://{path}")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("notes")
    with pytest.raises(ArgumentError, match=r"endpoint: ipc://.* cannot be used"):
        ZmqEventPublisher(KVEventsConfig(f"ipc://{path}"))
    assert path.read_text() == "notes"
    with pytest.raises(ArgumentError, match="cannot be used"):
        ZmqEventPublisher(KVEventsConfig(f"ipc://{tmp_path}/{'x' * 200}"))
