"""Events: what they say, what they cost, and the queue they wait in."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError
from jaxcache.events.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventQueue,
    StorageMedium,
    block_name,
)
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.tree import RadixTree
from tests.observe.event_driver import NO_FAULTS, Life
from tests.support.counting import count_calls


def names(tokens, page_size=1, space=None):
    seed = namespace_seed(Namespace(extra_key=space).encode())
    return [block_name(digest) for digest in page_hashes(np.array(tokens, "<i4").tobytes(), 4 * page_size, seed)]


def cache_of(*keys, page_size=1):
    cache = RadixCache(None, None, page_size, enable_kv_cache_events=True)
    for key in keys:
        cache.insert(key)
    return cache


def test_an_event_equals_one_with_the_same_contents():
    event = BlockStored([1, 2], 3, [4, 5], 1, b"n", StorageMedium.CPU)
    assert event == BlockStored([1, 2], 3, [4, 5], 1, b"n", StorageMedium.CPU)
    others = [
        BlockStored([1, 9], 3, [4, 5], 1, b"n", StorageMedium.CPU),
        BlockStored([1, 2], None, [4, 5], 1, b"n", StorageMedium.CPU),
        BlockStored([1, 2], 3, [4, 9], 1, b"n", StorageMedium.CPU),
        BlockStored([1, 2], 3, [4, 5], 2, b"n", StorageMedium.CPU),
        BlockStored([1, 2], 3, [4, 5], 1, b"", StorageMedium.CPU),
        BlockStored([1, 2], 3, [4, 5], 1, b"n"),
        BlockRemoved([1, 2]),
    ]
    assert all(event != other for other in others)
    assert BlockRemoved([1]) == BlockRemoved([1]) != BlockRemoved([1], StorageMedium.CPU)
    assert repr(event) == "BlockStored([1, 2], 3, [4, 5], 1, b'n', <StorageMedium.CPU: 'CPU_PINNED'>, None)"
    assert repr(BlockRemoved([1])) == "BlockRemoved([1], <StorageMedium.GPU: 'GPU'>)"


def test_recording_hashes_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "jaxcache.index.page_hashes.page_hashes", lambda *args: calls.append(args) or page_hashes(*args)
    )
    cache = cache_of(range(8), [0, 1, 2, 9], page_size=2)
    cache.evict(2)
    events = cache.take_events()
    assert not calls
    assert [event.block_hashes for event in events] == [
        names(range(8), 2),
        names([0, 1, 2, 9], 2)[1:],
        names(range(8), 2)[1:],
    ]
    assert events[1].parent_block_hash == names([0, 1], 2)[0]
    assert calls


def test_recording_costs_the_same_for_any_number_of_tokens():
    def cost(pages):
        cache = cache_of()
        keys = [RadixKey(np.full(pages, i, np.int32)) for i in range(2)]
        value = np.arange(pages, dtype=np.int32)
        cache.insert_pages(keys[0], value)
        return count_calls(lambda: cache.insert_pages(keys[1], value))

    assert cost(1) == cost(1000)


def test_an_event_says_what_was_when_it_was_recorded():
    cache = cache_of([1, 2, 3, 4], [1, 2, 9], [1, 5])  # splits what was said to be stored
    cache.evict(100)
    events = cache.take_events()
    assert events[0] == BlockStored(names([1, 2, 3, 4]), None, [1, 2, 3, 4], 1)
    assert events[1] == BlockStored(names([1, 2, 9])[2:], names([1, 2])[1], [9], 1)
    assert events[2] == BlockStored(names([1, 5])[1:], names([1])[0], [5], 1)
    gone = [name for event in events[3:] for name in event.block_hashes]
    assert sorted(gone) == sorted(names([1, 2, 3, 4]) + names([1, 2, 9])[2:] + names([1, 5])[1:])


def test_tombstones_and_what_heals_them_are_no_events():
    tree = RadixTree(1, (FULL, Component("window", 2)), with_hashes=True)
    queue = EventQueue(tree)

    def insert(tokens):
        inserted = tree.insert(RadixKey(tokens), [np.array(tokens, np.int32)] * 2)
        for node in inserted.added:
            queue.stored(node, b"")

    def evict(amount, component):
        gone = tree.evict(amount, component)
        queue.removed(gone)
        return gone

    insert([1, 2, 3, 4])
    insert([1, 2, 8, 9])
    queue.take()
    lock = tree.lock(tree.match(RadixKey([1, 2, 3, 4])))
    other = tree.lock(tree.match(RadixKey([1, 2, 8, 9])))
    assert evict(10, 1).values[1].tolist() == [1, 2]  # the window of 1 and 2 alone
    assert queue.take() == []
    tree.unlock(lock)
    tree.unlock(other)
    assert tree.match(RadixKey([1, 2])).length == 0
    insert([1, 2, 8, 9])
    assert tree.match(RadixKey([1, 2])).length == 2  # healed
    assert queue.take() == []
    evict(1, 0)
    assert [type(event) for event in queue.take()] == [BlockRemoved]


def test_a_queue_that_overflows_says_the_tree_anew():
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.events.max_blocks = 10
    cache.insert(list(range(10)))
    assert cache.events.overflows == 0
    cache.insert([*range(9), 99])
    assert cache.events.overflows == 1
    cache.insert(RadixKey([5], "tenant"))
    assert cache.events.num_blocks == 12
    first, *rest = cache.take_events()
    assert first == AllBlocksCleared()
    said = {name: event.parent_block_hash for event in rest for name in event.block_hashes}
    assert set(said) == {*names(range(10)), names([*range(9), 99])[-1], *names([5], space="tenant")}
    known = set()
    for event in rest:  # parents first
        assert event.parent_block_hash in {None, *known}
        known.update(event.block_hashes)
    assert cache.take_events() == []
    cache.evict(1)
    assert cache.events.num_blocks == 1
    assert len(cache.take_events()) == 1
    assert cache.events.overflows == 1 and cache.events.num_blocks == 0


def test_untaken_events_are_bounded():
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.events.max_blocks = 1000
    for i in range(2000):
        cache.insert([i, i])
        cache.evict(2)
        cache.reset()
        assert len(cache.events._waiting) <= 1000
    assert cache.take_events() == [AllBlocksCleared()]


def test_a_snapshot_takes_nothing_from_the_queue():
    cache = cache_of([1, 2])
    assert cache.events.snapshot() == [AllBlocksCleared(), BlockStored(names([1, 2]), None, [1, 2], 1)]
    assert cache.take_events() == [BlockStored(names([1, 2]), None, [1, 2], 1)]


def test_a_tree_without_hashes_has_no_events():
    with pytest.raises(ArgumentError, match="with_hashes=True"):
        EventQueue(RadixTree(1))


@pytest.mark.parametrize("seed", range(3))
def test_a_small_queue_tells_the_same(seed):
    life = Life(seed, (FULL,), 2, NO_FAULTS, queue_blocks=60).run(10_000)
    assert life.queue.overflows > 3
    assert life.checked == 26
