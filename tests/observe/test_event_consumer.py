"""The consumer: each rule by itself, then against a tree under random operations and faults of every kind."""

from __future__ import annotations

import pytest

from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, StorageMedium
from jaxcache.index.key import RadixKey
from jaxcache.index.page_hashes import PageHashes
from tests.observe.event_driver import DEAF, HARSH, HEALABLE, MIXES, NO_FAULTS, Life


def batch(seq, *events, ts=None):
    return EventBatch(float(seq) if ts is None else ts, events)


def store(*names, medium=StorageMedium.GPU):
    return BlockStored(names, None, [0] * len(names), 1, medium=medium)


STREAM = [batch(0, store(0)), batch(1, store(1)), batch(2, BlockRemoved([0])), batch(3, store(3)), batch(4, store(4))]


def feed(consumer, *order):
    for seq in order:
        consumer.receive(seq, STREAM[seq])
    return set(consumer.blocks())


def test_in_order():
    consumer = EventConsumer()
    assert feed(consumer, 0, 1, 2, 3, 4) == {1, 3, 4}
    assert consumer.is_complete and consumer.next_seq == 5
    assert (consumer.gaps, consumer.losses, consumer.repeated, consumer.restarts) == (0, 0, 0, 0)


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (4, 3, 2, 1, 0), (0, 2, 4, 1, 3), (0, 3, 2, 1, 4)])
def test_late_arrivals_fill_a_gap(order):
    consumer = EventConsumer()
    assert feed(consumer, *order) == {1, 3, 4}
    assert consumer.is_complete and not consumer.losses


def test_what_waits_is_not_applied():
    consumer = EventConsumer()
    assert feed(consumer, 0, 2, 3) == {0}
    assert (consumer.gaps, consumer.next_seq) == (1, 1)


def test_repetitions_change_nothing():
    consumer = EventConsumer()
    assert feed(consumer, 0, 0, 1, 2, 0, 1, 4, 4, 3, 2) == {1, 3, 4}
    assert consumer.repeated == 5


def test_a_gap_is_filled_by_replay_and_what_it_repeats_is_ignored():
    asked = []

    def replay(start):
        asked.append(start)
        return list(enumerate(STREAM))[start:]

    consumer = EventConsumer(replay)
    assert feed(consumer, 0, 3) == {1, 3, 4}
    assert asked == [1]
    assert feed(consumer, 4, 1, 2) == {1, 3, 4}
    assert (consumer.gaps, consumer.losses, consumer.repeated) == (1, 0, 3)


def test_what_the_publisher_has_no_longer_is_lost_and_all_is_forgotten():
    consumer = EventConsumer(lambda start: list(enumerate(STREAM))[3:])
    feed(consumer, 0, 1)
    assert feed(consumer, 4) == {3, 4}  # less than there is: 1 is not known any more
    assert not consumer.is_complete
    assert (consumer.gaps, consumer.losses) == (1, 1)
    consumer.receive(5, batch(5, AllBlocksCleared(), store(1, 3, 4, 5)))
    assert consumer.is_complete
    assert consumer.blocks() == {1, 3, 4, 5}


def test_a_removal_that_was_lost_leaves_no_block_behind():
    consumer = EventConsumer(max_pending=2)
    feed(consumer, 0)
    assert feed(consumer, 3, 4) == {0}
    consumer.receive(5, batch(5, store(5)))
    assert consumer.blocks() == {3, 4, 5}
    assert not consumer.is_complete


def test_two_losses_at_once_forget_twice():
    consumer = EventConsumer(max_pending=2)
    consumer.receive(1, batch(1, store(1)))
    consumer.receive(3, batch(3, store(3)))
    consumer.receive(5, batch(5, store(5)))
    assert consumer.blocks() == {5}
    assert (consumer.losses, consumer.next_seq) == (3, 6)


def test_no_more_is_kept_than_asked_for():
    for max_pending in (0, 1, 5):
        consumer = EventConsumer(max_pending=max_pending)
        for seq in range(1, max_pending + 1):
            consumer.receive(seq, batch(seq, store(seq)))
        assert consumer.next_seq == 0
        consumer.receive(max_pending + 1, batch(max_pending + 1))
        assert consumer.next_seq == max_pending + 2


def test_all_cleared_ends_any_gap():
    consumer = EventConsumer()
    feed(consumer, 0, 2)
    consumer.receive(7, batch(7, store(6), AllBlocksCleared(), store(7)))
    assert consumer.is_complete and consumer.next_seq == 8
    assert consumer.blocks() == {7}
    assert not consumer.losses
    feed(consumer, 1, 3)
    assert consumer.repeated == 2 and consumer.blocks() == {7}


def test_who_joins_late_asks_and_if_that_is_too_late_knows_it():
    messages = list(enumerate(STREAM))
    consumer = EventConsumer(lambda start: messages[start:])
    consumer.catch_up()
    assert consumer.is_complete and consumer.blocks() == {1, 3, 4}
    consumer = EventConsumer(lambda start: messages[2:])
    consumer.catch_up()
    assert not consumer.is_complete and consumer.blocks() == {3, 4}
    consumer = EventConsumer()
    consumer.catch_up()
    assert consumer.next_seq == 0


def test_a_publisher_that_begins_anew_at_nought():
    consumer = EventConsumer()
    feed(consumer, 0, 1, 2, 3, 4)
    consumer.receive(0, batch(0, store(100), ts=10.0))
    assert consumer.blocks() == {100} and consumer.is_complete
    assert (consumer.restarts, consumer.next_seq) == (1, 1)
    feed(consumer, 1, 4)  # stragglers of the old one, in its own time
    assert consumer.blocks() == {100} and consumer.next_seq == 1
    consumer.receive(1, batch(1, store(101), ts=11.0))
    assert consumer.blocks() == {100, 101}


def test_what_waited_for_the_old_publisher_is_void():
    consumer = EventConsumer()
    feed(consumer, 0, 1, 3)
    for seq in range(3):
        consumer.receive(seq, batch(seq, store(100 + seq), ts=10.0 + seq))
    assert consumer.blocks() == {100, 101, 102} and consumer.next_seq == 3


def test_a_publisher_that_begins_anew_and_whose_beginning_was_lost():
    consumer = EventConsumer(max_pending=1)
    feed(consumer, 0, 1, 2, 3, 4)
    consumer.receive(1, batch(1, store(101), ts=11.0))
    assert consumer.blocks() == set()
    consumer.receive(2, batch(2, store(102), ts=12.0))
    assert consumer.blocks() == {101, 102}
    assert not consumer.is_complete


def test_media_are_kept_apart():
    consumer = EventConsumer()
    consumer.receive(0, batch(0, store(1, 2), store(1, medium=StorageMedium.CPU)))
    consumer.receive(1, batch(1, BlockRemoved([1])))
    assert consumer.blocks() == {2}
    assert consumer.blocks(StorageMedium.CPU) == {1}
    consumer.receive(2, batch(2, AllBlocksCleared()))
    assert not consumer.blocks() and not consumer.blocks(StorageMedium.CPU)


@pytest.mark.parametrize("space", [None, "tenant"])
def test_prefix_len_is_what_a_lookup_finds(space):
    key = RadixKey(list(range(10)), space)
    hashes = PageHashes(key.packed[:24], 8, key.namespace)
    consumer = EventConsumer()
    consumer.receive(0, batch(0, BlockStored(hashes, None, key.packed[:24], 2, key.namespace)))
    assert consumer.prefix_len(key, 2) == 6
    assert consumer.prefix_len(key[:5], 2) == 4
    assert consumer.prefix_len(key[:1], 2) == 0
    assert consumer.prefix_len(RadixKey(list(range(10)), "other"), 2) == 0
    assert consumer.prefix_len(key, 2, StorageMedium.CPU) == 0


@pytest.mark.parametrize("faults", [NO_FAULTS, HEALABLE, HARSH, DEAF], ids=["no faults", "healable", "harsh", "deaf"])
@pytest.mark.parametrize("mix", list(MIXES))
def test_the_consumer_knows_the_tree(mix, faults):
    lives = [Life(seed, MIXES[mix], (1, 2, 4)[seed], faults).run(6_000) for seed in range(3)]
    consumers = [life.channel.consumer for life in lives]
    losses = sum(consumer.losses for consumer in consumers)
    gaps = sum(consumer.gaps for consumer in consumers)
    repeated = sum(consumer.repeated for consumer in consumers)
    assert bool(gaps) is bool(repeated) is (faults is not NO_FAULTS)
    assert bool(losses) is (faults in (HARSH, DEAF))
    assert any(consumer.restarts for consumer in consumers) is (faults is HARSH)
    checked = [life.checked for life in lives]
    assert min(checked) > 3 if losses else checked == [16, 16, 16]
