"""SWARadixCache on its own: the golden sequence of the original, holes and their healing, what a request may free."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import ArgumentError, BrokenInvariantError, OwnershipError
from jaxcache.index.key import RadixKey
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from tests.caches.flavours import make_swa_cache, prefill, put, sizes


def test_golden_sequence():
    cache = make_swa_cache(4)
    assert put(cache, [1, 2, 3, 4, 5, 6]) == 0
    assert sizes(cache) == ((6, 0, 26), (6, 0, 18))
    assert put(cache, [1, 2, 3, 7, 8, 9]) == 3
    assert sizes(cache) == ((9, 0, 23), (9, 0, 15))
    cache.evict(0, 2)  # the leaf 4 5 6 was used longest ago
    assert sizes(cache) == ((6, 0, 26), (6, 0, 18))
    assert put(cache, [1, 2, 3, 7, 8, 9, 10]) == 6
    assert sizes(cache) == ((7, 0, 25), (7, 0, 17))
    found = cache.match_prefix([1, 2, 3, 7, 8, 9, 10])
    lock = cache.inc_lock_ref(found)
    assert (found.prefix_len, sizes(cache)) == (7, ((0, 7, 25), (3, 4, 17)))
    assert cache.evict(3) == 0
    assert sizes(cache) == ((0, 7, 25), (3, 4, 17))
    cache.dec_lock_ref(lock)
    assert sizes(cache) == ((7, 0, 25), (7, 0, 17))
    cache.evict(0, 3)
    assert sizes(cache) == ((7, 0, 25), (4, 0, 20))
    tokens = [1, 2, 3, 7, 8, 9, 10]
    assert [cache.match_prefix(tokens[:n]).prefix_len for n in (7, 6, 3)] == [7, 0, 0]
    assert put(cache, [1, 2, 3, 7, 8, 50]) == 5
    assert sizes(cache) == ((8, 0, 24), (8, 0, 16))
    assert cache.match_prefix([1, 2, 3]).prefix_len == 3  # healed


def test_the_eviction_orders_hold_what_the_counters_say():
    cache = make_swa_cache(4)
    put(cache, [1, 2, 3, 4, 5, 6])
    put(cache, [1, 2, 3, 7, 8, 9, 10])
    cache.evict(0, 3)
    cache.evict(0, 3)
    for evictable in ((7, 4), (0, 0)):
        assert (cache.full_lru_list_evictable_size(), cache.swa_lru_list_evictable_size()) == evictable
        assert (cache.full_evictable_size(), cache.swa_evictable_size()) == evictable
        cache.sanity_check()
        cache.inc_lock_ref(cache.match_prefix([1, 2, 3, 7, 8, 9, 10]))
    cache.tree.evictable[1] += 1
    assert cache.swa_lru_list_evictable_size() != cache.swa_evictable_size()
    with pytest.raises(BrokenInvariantError, match="counters"):
        cache.sanity_check()


def live(cache, tokens):
    """For each token of a cached prefix, whether its window is there."""
    pages = cache.tree.find(RadixKey(tokens))[0]
    windows = cache.token_to_kv_pool_allocator.window_pages(np.concatenate([node.value for node in pages]))
    return np.repeat(windows > 0, cache.page_size).tolist()


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_path_loses_its_windows_from_the_root_on(page_size):
    cache = make_swa_cache(4, page_size, size=64, size_swa=64)
    for end in (8, 16, 24):
        put(cache, list(range(end)))
    tokens = list(range(24))
    cache.match_prefix(tokens)
    cache.evict(0, 1)
    assert live(cache, tokens) == [False] * 8 + [True] * 16
    assert (cache.match_prefix(tokens).prefix_len, cache.full_evictable_size()) == (24, 24)
    cache.evict(0, 1)
    assert live(cache, tokens) == [False] * 16 + [True] * 8
    assert [cache.match_prefix(tokens[:n]).prefix_len for n in (24, 20, 19, 8)] == [24, 20, page_size == 1 and 0, 0]
    cache.evict(0, 1)  # a leaf cannot do without: it goes as a whole, and then nothing needs what is above it
    assert (cache.full_evictable_size(), cache.swa_evictable_size()) == (0, 0)


def test_a_hole_is_filled_by_whoever_computes_it_again():
    cache = make_swa_cache(4, size=64, size_swa=64)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, list(range(8)))
    put(cache, list(range(12)))
    cache.evict(0, 1)
    pages = cache.tree.find(RadixKey(list(range(8))))[0][0].value.copy()
    fresh = allocator.alloc_pages(8)
    windows = allocator.window_pages(fresh)
    assert cache.insert_pages(list(range(8)), fresh) == 8
    assert allocator.window_pages(pages).tolist() == windows.tolist()  # on the pages that were there
    assert allocator.window_pages(fresh).tolist() == [0] * 8
    allocator.free(fresh)  # duplicates, as after every insert
    assert cache.match_prefix(list(range(8))).pages.tolist() == pages.tolist()
    cache.check()


def test_pages_without_windows_make_a_leaf_that_begins_as_a_hole():
    cache = make_swa_cache(3, size=64, size_swa=64)
    put(cache, list(range(10)), without_window=4)
    assert live(cache, list(range(10))) == [False] * 4 + [True] * 6
    assert [cache.match_prefix(list(range(n))).prefix_len for n in (10, 7, 6)] == [10, 7, 0]
    assert (cache.full_evictable_size(), cache.swa_evictable_size()) == (10, 6)
    cache.check()


def test_a_prefix_without_its_last_window_is_refused():
    cache = make_swa_cache(3)
    fresh = cache.token_to_kv_pool_allocator.alloc_pages(4)
    cache.token_to_kv_pool_allocator.free_swa(fresh[-1:])
    with pytest.raises(ArgumentError, match="nothing is offered at the end"):
        cache.insert_pages([1, 2, 3, 4], fresh)
    assert cache.total_size() == 0
    cache.check()


def test_windows_before_a_gap_are_of_no_use():
    cache = make_swa_cache(2, size=64, size_swa=64)
    allocator = cache.token_to_kv_pool_allocator
    pages = allocator.alloc_pages(6)
    allocator.free_windows(pages[2:3], PageState.PRIVATE)
    assert cache.insert_pages(list(range(6)), pages) == 0
    assert live(cache, list(range(6))) == [False] * 3 + [True] * 3
    assert allocator.swa_available_size() == 61
    cache.check()


def test_what_goes_with_a_leaf_counts_for_each_side():
    cache = make_swa_cache(2, size=64, size_swa=64)
    for token in (1, 2, 3):
        put(cache, [token] * 4)
    assert cache.evict(4, 4) == 4
    assert (cache.full_evictable_size(), cache.swa_evictable_size()) == (8, 8)
    assert cache.evict(4, 5) == 8  # one leaf is not enough
    assert (cache.full_evictable_size(), cache.swa_evictable_size()) == (0, 0)


def test_of_what_went_with_a_leaf_no_more_is_evicted():
    cache = make_swa_cache(2, size=64, size_swa=64)
    for token in (1, 2, 3):
        put(cache, [token] * 4)
    assert cache.evict(4, 8) == 8  # the first leaf for the pages, and the second for what is short of the windows
    assert cache.match_prefix([3] * 4).prefix_len == 4


def test_whoever_fills_a_hole_must_own_the_pages():
    cache = make_swa_cache(2)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, [1, 2])
    put(cache, [1, 2, 3, 4])
    cache.evict(0, 1)
    assert live(cache, [1, 2, 3, 4]) == [False, False, True, True]
    other = cache.tree.find(RadixKey([1, 2, 3, 4]))[0][1].value
    twice = np.repeat(allocator.alloc_pages(1), 2)
    for pages in (other, twice):
        with pytest.raises(OwnershipError):
            cache.insert_pages([1, 2], pages)
        assert live(cache, [1, 2, 3, 4]) == [False, False, True, True]
    allocator.free(twice[:1])
    cache.check()


def test_room_is_made_on_both_sides_or_on_none():
    cache = make_swa_cache(2, 2, size=16, size_swa=8)  # 8 pages, 4 windows
    put(cache, list(range(6)), without_window=1)  # 3 pages, 2 windows
    assert cache.make_room(5, without_window=3)
    assert cache.full_evictable_size() == 6  # nothing was short
    lock = cache.inc_lock_ref(cache.match_prefix(list(range(6))))
    assert not cache.make_room(6)
    assert not cache.make_room(4)  # 5 pages are free, but 2 windows only
    cache.dec_lock_ref(lock)
    assert cache.make_room(4)  # the windows of the leaf are its life
    assert cache.total_size() == 0
    assert not cache.make_room(9)
    assert not cache.make_room(8)
    assert cache.make_room(8, without_window=4)


def test_a_running_request_frees_what_it_will_never_attend():
    cache = make_swa_cache(6, 4, size=128, size_swa=128)
    allocator = cache.token_to_kv_pool_allocator
    request = prefill(cache, list(range(30)))
    cache.drop_out_of_window(request)
    # 28 tokens are whole pages; a stop there needs token 22 on, which is in the page that starts at 20.
    windows = allocator.window_pages(cache.req_to_token_pool.row_pages(request.req_pool_idx, 0, 8))
    assert (windows > 0).tolist() == [False] * 5 + [True] * 3
    assert request.evicted_seqlen_local == 20
    before = allocator.debug_print()
    cache.drop_out_of_window(request)
    assert allocator.debug_print() == before
    cache.cache_unfinished_req(request)
    assert cache.match_prefix(list(range(30))).prefix_len == 28
    assert cache.match_prefix(list(range(27))).prefix_len == 0
    cache.cache_finished_req(request)
    assert request.evicted_seqlen_local == 0
    cache.check()


def test_pairs_end_before_the_last_token_and_so_do_windows():
    cache = make_swa_cache(1, 4, size=64, size_swa=64, is_eagle=True)
    request = prefill(cache, list(range(8)))
    cache.drop_out_of_window(request)  # the next stop is after 4 tokens, not 8
    assert request.evicted_seqlen_local == 0
    cache.cache_unfinished_req(request)
    assert request.protected_len == 4
    assert cache.match_prefix(list(range(8))).prefix_len == 4
    cache.cache_finished_req(request)
    cache.check()


def test_the_trees_window_pages_are_not_a_requests_to_free():
    cache = make_swa_cache(2, 2, size=64, size_swa=64)
    put(cache, list(range(8)))
    request = prefill(cache, list(range(20)))
    cache.drop_out_of_window(request)
    assert live(cache, list(range(8))) == [True] * 8
    cache.cache_finished_req(request)
    cache.check()


def test_an_infinite_window_is_kept_whole():
    cache = make_swa_cache(math.inf, 2, size=64, size_swa=64)
    request = prefill(cache, list(range(20)))
    cache.drop_out_of_window(request)
    cache.cache_finished_req(request)
    assert live(cache, list(range(20))) == [True] * 20


def test_the_parts_must_fit():
    full = PagedTokenToKVPoolAllocator(16, 2)
    with pytest.raises(ArgumentError, match="need a SWATokenToKVPoolAllocator"):
        SWARadixCache(None, full, 4, 2)  # type: ignore[arg-type]
    both = SWATokenToKVPoolAllocator(16, 16, 2)
    for window in (0, -1, 2.5, None, "4"):
        with pytest.raises(ArgumentError, match="sliding_window_size must be"):
            SWARadixCache(None, both, window, 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="page_size is 4"):
        SWARadixCache(None, both, 4, 4)


def test_check_sees_a_window_page_that_the_tree_lost():
    cache = make_swa_cache(4)
    put(cache, [1, 2, 3])
    cache.token_to_kv_pool_allocator.free_windows([2], PageState.TREE)
    with pytest.raises(Exception, match="window pages are not those that its pages have"):
        cache.check()
