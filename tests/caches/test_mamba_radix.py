"""MambaRadixCache on its own: a state stands for the tokens before it and for nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, BrokenInvariantError, OwnershipError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.tables.hybrid_table import HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool
from tests.caches.flavours import make_mamba_cache, prefill, put, save


def state_sizes(cache):
    return cache.mamba_evictable_size(), cache.mamba_protected_size(), cache.state_allocator.available_size()


def finish(cache, request):
    cache.cache_finished_req(request)
    cache.check()


def test_a_match_stops_where_a_state_was_saved():
    cache = make_mamba_cache(page_size=2)
    put(cache, list(range(4)))
    put(cache, list(range(10)))
    found = cache.match_prefix([*range(8), 99])
    assert (found.prefix_len, found.mamba_branching_seqlen) == (4, 8)
    assert cache.state_allocator.owner_of([found.state]).tolist() == [PageState.TREE]
    assert len(found.pages) == 2
    exact = cache.match_prefix(list(range(10)))
    assert (exact.prefix_len, exact.mamba_branching_seqlen) == (10, None)
    assert exact.state != found.state
    nothing = cache.match_prefix([7, 7, 7])
    assert (nothing.prefix_len, nothing.state, nothing.mamba_branching_seqlen) == (0, 0, None)


def test_sizes_are_states_not_tokens():
    cache = make_mamba_cache()
    put(cache, list(range(4)))
    put(cache, list(range(10)))
    assert state_sizes(cache) == (2, 0, 6)
    lock = cache.inc_lock_ref(cache.match_prefix(list(range(10))))
    assert state_sizes(cache) == (1, 1, 6)  # of states, a lock covers the one it is for; of pages, all
    assert (cache.evictable_size(), cache.protected_size()) == (0, 10)
    cache.evict(0, 0, 2)
    assert state_sizes(cache) == (0, 1, 7)
    cache.dec_lock_ref(lock)
    assert state_sizes(cache) == (1, 0, 7)
    cache.check()


def test_a_running_request_is_shared_up_to_its_snapshot():
    cache = make_mamba_cache(page_size=4)
    request = prefill(cache, list(range(10)))
    cache.cache_unfinished_req(request)
    assert (cache.total_size(), request.protected_len) == (0, 0)  # nothing was saved
    save(cache, request, 8)
    cache.cache_unfinished_req(request)
    assert (cache.total_size(), request.protected_len) == (8, 8)
    assert cache.req_to_token_pool.saved[request.req_pool_idx] == 0
    assert cache.match_prefix(list(range(10))).prefix_len == 8
    cache.cache_unfinished_req(request)  # nothing new
    assert (cache.total_size(), request.protected_len) == (8, 8)
    finish(cache, request)
    assert state_sizes(cache) == (1, 0, 7)


def test_the_state_at_the_end_of_a_request_is_its_working_state():
    cache = make_mamba_cache(page_size=4)
    request = prefill(cache, list(range(12)))
    working = int(cache.req_to_token_pool.state[request.req_pool_idx])
    save(cache, request, 8)
    finish(cache, request)
    assert cache.match_prefix(list(range(12))).state == working
    assert cache.match_prefix(list(range(11))).prefix_len == 8
    assert state_sizes(cache) == (2, 0, 6)


def test_a_request_that_ends_within_a_page_leaves_its_snapshot_only():
    cache = make_mamba_cache(page_size=4)
    request = prefill(cache, list(range(11)))
    finish(cache, request)
    assert (cache.total_size(), state_sizes(cache)) == (0, (0, 0, 8))
    request = prefill(cache, list(range(11)))
    save(cache, request, 4)
    finish(cache, request)
    assert (cache.total_size(), state_sizes(cache)) == (4, (1, 0, 7))


def test_a_working_state_that_was_never_filled_stands_for_nothing():
    cache = make_mamba_cache(page_size=4)
    put(cache, list(range(8)))
    request = prefill(cache, list(range(9)))
    table, row = cache.req_to_token_pool, request.req_pool_idx
    cache.state_allocator.release(table.take_states(row), PageState.PRIVATE)
    table.set_state(row, cache.state_allocator.alloc_track_slot(), cache.match_prefix(list(range(8))).state)
    request.kv_len = 8  # as admitted: no step has run
    cache.evict(0)
    finish(cache, request)
    assert state_sizes(cache) == (1, 0, 7)


def test_a_snapshot_that_somebody_else_saved_first_is_freed():
    cache = make_mamba_cache(page_size=4)
    first, second = (prefill(cache, list(range(9))) for _ in range(2))
    for request in (first, second):
        save(cache, request, 8)
    cache.cache_unfinished_req(first)
    state = cache.match_prefix(list(range(8))).state
    cache.cache_unfinished_req(second)
    assert cache.match_prefix(list(range(8))).state == state
    rows = [cache.req_to_token_pool.row_pages(r.req_pool_idx, 0, 2).tolist() for r in (first, second)]
    assert rows[0] == rows[1]
    assert state_sizes(cache) == (0, 1, 5)  # two working states beside it
    for request in (first, second):
        finish(cache, request)
    assert state_sizes(cache) == (1, 0, 7)


def test_a_state_that_is_in_the_way_goes_and_the_pages_stay():
    cache = make_mamba_cache()
    put(cache, list(range(4)))
    put(cache, list(range(10)))
    cache.match_prefix(list(range(10)))
    cache.evict(0, 0, 1)  # that of the inner node: leaves are the better stops, and were used last
    assert cache.total_size() == 10
    assert cache.match_prefix(list(range(4))).prefix_len == 0
    assert cache.match_prefix(list(range(10))).prefix_len == 10
    put(cache, list(range(4)))
    assert cache.match_prefix(list(range(4))).prefix_len == 4
    cache.check()


def test_what_leads_to_no_state_is_not_kept():
    cache = make_mamba_cache()
    put(cache, [0, 1, 2, 3, 4, 5])
    put(cache, [0, 1, 2, 9, 9, 9])  # splits at 3, where no state is
    assert cache.total_size() == 9
    cache.evict(1)
    assert cache.total_size() == 6
    cache.evict(1)
    assert (cache.total_size(), state_sizes(cache)) == (0, (0, 0, 8))


def test_room_for_states():
    cache = make_mamba_cache(num_states=4)
    for token in range(3):
        put(cache, [token, token])
    assert cache.make_room(0, 2)
    assert state_sizes(cache) == (2, 0, 2)
    locks = [cache.inc_lock_ref(cache.match_prefix([token, token])) for token in (1, 2)]
    assert not cache.make_room(1, 3)
    assert not cache.make_room(100, 1)
    assert state_sizes(cache) == (0, 2, 2)
    for lock in locks:
        cache.dec_lock_ref(lock)
    assert cache.make_room(1, 4)
    assert state_sizes(cache) == (0, 0, 4)


def test_insert_says_what_is_wrong_before_anything_changes():
    cache = make_mamba_cache(page_size=2)
    pages = cache.token_to_kv_pool_allocator.alloc_pages(2)
    state = cache.state_allocator.alloc_track_slot()
    cases = [
        (dict(key=[1, 2, 3, 4], state=0), ArgumentError, "keeps one with every prefix"),
        (dict(key=[1, 2, 3], state=state), ArgumentError, "not whole pages"),
        (dict(key=[1, 2, 3, 4], state=state + 1), OwnershipError, "state must be PRIVATE"),
        (dict(key=[1, 2, 3, 4], state=99), OwnershipError, "99"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            cache.insert_pages(arguments["key"], pages, arguments["state"])
        assert (cache.total_size(), state_sizes(cache)) == (0, (0, 0, 7))
        cache.check()
    put_slots = np.concatenate([page * 2 + np.arange(2, dtype=np.int32) for page in pages])
    assert cache.insert([1, 2, 3, 4], put_slots, state) == 0
    assert cache.match_prefix([1, 2, 3, 4]).state == state


def test_a_cache_without_states_takes_none():
    cache = make_mamba_cache(page_size=1)
    plain = RadixCache(None, TokenToKVPoolAllocator(8), 1)
    with pytest.raises(ArgumentError, match="this cache keeps none"):
        plain.insert([1], plain.token_to_kv_pool_allocator.alloc(1), state=1)
    with pytest.raises(ArgumentError, match="this cache keeps none"):
        plain.make_room(1, states=1)
    assert plain.match_prefix([1]).state == 0
    assert (plain.mamba_evictable_size(), plain.mamba_protected_size()) == (0, 0)
    assert cache.make_room(1, states=1)


def test_the_parts_must_fit():
    allocator = TokenToKVPoolAllocator(8)
    with pytest.raises(ArgumentError, match="need a HybridReqToTokenPool"):
        MambaRadixCache(ReqToTokenPool(1, 8), allocator, StateAllocator(2), 1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must be a StateAllocator"):
        MambaRadixCache(HybridReqToTokenPool(1, 8), allocator, allocator, 1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="need a SWATokenToKVPoolAllocator"):
        MambaRadixCache(HybridReqToTokenPool(1, 8), allocator, StateAllocator(2), 1, sliding_window_size=4)


def test_check_sees_a_state_that_nobody_has():
    cache = make_mamba_cache()
    put(cache, [1, 2, 3])
    cache.state_allocator.transfer([cache.state_allocator.alloc_track_slot()], PageState.PRIVATE, PageState.TREE)
    with pytest.raises(BrokenInvariantError, match="the tree holds 1 states"):
        cache.check()


@pytest.mark.parametrize("page_size", [1, 4])
def test_windows_and_states_together(page_size):
    cache = make_mamba_cache(page_size, size=256, num_states=16, window=2 * page_size)
    for pages in (3, 6, 9):
        put(cache, list(range(pages * page_size)))
    tokens = list(range(9 * page_size))
    cache.match_prefix(tokens)
    cache.evict(0, 0, 1)  # the state at 3 pages
    assert cache.match_prefix(tokens[: 5 * page_size]).prefix_len == 0
    cache.evict(0, 3 * page_size)  # a window
    found = cache.match_prefix(tokens[: 8 * page_size])
    assert (found.prefix_len, found.mamba_branching_seqlen) == (6 * page_size, 8 * page_size)
    assert cache.match_prefix(tokens).prefix_len == 9 * page_size
    cache.check()
