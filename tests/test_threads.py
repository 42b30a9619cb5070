"""Which thread may call: the first that changes something, until it hands over or has ended."""

from __future__ import annotations

import sys
import threading

import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ThreadError
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.request import Request
from tests.support.loop_managers import make_config


def host_manager():
    return init_memory_pool_and_cache(make_config(4, True, False), host_only=True)


def computed(manager, rid, tokens):
    """A running request whose prompt is computed."""
    request = Request(rid, tokens)
    assert manager.admit(request) is not None
    plan = manager.extend([(request, request.num_tokens - request.kv_len)])
    manager.host_batch(plan)
    manager.commit(plan)
    return request


def elsewhere(call):
    """What a call returns or raises in another thread, which has ended then."""
    out = []

    def run():
        try:
            out.append(call())
        except ThreadError as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return out[0]


def test_other_threads_are_refused_and_change_nothing():
    manager = host_manager()
    manager.finish(computed(manager, "a", range(20)))
    running, waiting = computed(manager, "b", range(11)), Request("c", range(8))
    match = manager.cache.match_prefix([1, 2])
    before, cache = fingerprint(manager), manager.cache
    for call in (
        lambda: cache.match_prefix(range(20)),
        lambda: cache.inc_lock_ref(match),
        lambda: cache.dec_lock_ref(running.lock),
        lambda: cache.explain(range(20)),
        lambda: cache.insert_pages(range(4), [1]),
        lambda: cache.evict(4),
        lambda: cache.make_room(4),
        lambda: cache.drop(None),
        lambda: cache.draw(),
        lambda: cache.check(),
        lambda: cache.reset(),
        lambda: cache.cache_unfinished_req(running),
        lambda: cache.drop_out_of_window(running),
        lambda: manager.room_for(waiting),
        lambda: manager.admit(waiting),
        lambda: manager.extend([(running, 1)]),
        lambda: manager.decode([running]),
        lambda: manager.decode_loop([running], 2),
        lambda: manager.finish(running),
        lambda: manager.abort(running),
        lambda: manager.retract(running),
        lambda: manager.check_memory(),
        lambda: manager.hand_over(),
        lambda: manager.reset(),
        lambda: manager.reset(force=True),
        lambda: manager.release_memory(),
    ):
        assert "made the first change" in str(elsewhere(call))
        assert fingerprint(manager) == before
    for read in (manager.get_token_info, manager.get_swa_token_info, cache.take_events, cache.evictable_size):
        assert elsewhere(read) == read()


def test_a_manager_is_handed_over():
    manager = host_manager()  # whoever makes it owns nothing
    request = computed(manager, "a", range(9))
    manager.hand_over()
    hold, is_owner = threading.Event(), threading.Event()

    def engine():
        manager.finish(request)
        is_owner.set()
        hold.wait(10)

    thread = threading.Thread(target=engine)
    thread.start()
    assert is_owner.wait(10)
    with pytest.raises(ThreadError, match=r"evict_values: called from thread .* hand_over\(\) there first"):
        manager.cache.evict(4)
    hold.set()
    thread.join()
    assert manager.cache.evict(4) == 8  # its owner has ended


def test_a_cache_alone_has_an_owner_too():
    cache = RadixCache(None, None, 1)
    assert elsewhere(lambda: cache.insert([1, 2, 3])) == 0  # and that thread has ended
    assert cache.match_prefix([1, 2, 3]).prefix_len == 3
    assert isinstance(elsewhere(lambda: cache.match_prefix([1])), ThreadError)
    cache.guard.hand_over()
    assert elsewhere(lambda: cache.match_prefix([1]).prefix_len) == 1


def test_sizes_are_those_between_two_calls():
    manager, seen, told, plans, is_over = host_manager(), set(), set(), [], threading.Event()

    def watch():
        while not is_over.is_set():
            told.add((manager.get_token_info(), manager.get_swa_token_info()))

    def look():
        seen.add((manager.get_token_info(), manager.get_swa_token_info()))

    look()
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=watch)
    try:
        sys.setswitchinterval(1e-6)
        thread.start()
        for i in range(60):
            request = Request("a", [i] * 21)
            for call in (
                lambda request=request: manager.admit(request),
                lambda request=request: plans.append(manager.extend([(request, 21)])),
                lambda: manager.commit(plans.pop()),
                lambda request=request: manager.finish(request),
                lambda: manager.cache.evict(21),
            ):
                call()
                look()
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert len(told) > 1
    full, swa = {a for a, _ in told}, {b for _, b in told}
    assert full <= {a for a, _ in seen} and swa <= {b for _, b in seen}
