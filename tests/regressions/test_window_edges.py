"""Sharp edges of sliding windows in the systems before us, S-20, S-21, S-23, S-46, S-48, S-49 and S-54, and rows of the
reliability survey that windows can have: each stays fixed.
"""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.index.key import RadixKey
from jaxcache.pages.allocator import PageState
from tests.caches.content import ContentLife, Shape
from tests.caches.flavours import make_swa_cache, prefill, put, sizes


def windows_of(cache, tokens):
    path, _, _ = cache.tree.find(RadixKey(tokens))
    return cache.token_to_kv_pool_allocator.window_pages(np.concatenate([node.value for node in path]))


def row_of(cache, request, pages):
    return cache.req_to_token_pool.row_pages(request.req_pool_idx, 0, pages).tolist()


@pytest.mark.parametrize("window", range(1, 15))
def test_s20_live_runs_on_both_sides_of_a_hole_are_not_added_up(window):
    cache = make_swa_cache(window, size=64, size_swa=64)
    put(cache, list(range(6)))
    put(cache, list(range(20)), without_window=14)  # 6 live, 8 without windows, 6 live
    found = cache.match_prefix(list(range(20)))
    assert found.prefix_len == (20 if window <= 6 else 6)
    lock = cache.inc_lock_ref(found)
    assert cache.swa_protected_size() >= min(window, found.prefix_len)
    cache.check()
    cache.dec_lock_ref(lock)
    assert cache.swa_protected_size() == 0


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("how", ["finish", "unfinished"])
def test_s21_a_hole_is_filled_without_taking_pages_from_who_reads_them(page_size, how):
    window = 2 * page_size
    cache = make_swa_cache(window, page_size, size=64 * page_size, size_swa=64 * page_size)
    allocator = cache.token_to_kv_pool_allocator
    shared, tail = list(range(4 * page_size)), list(range(100, 100 + 3 * page_size))
    put(cache, shared)
    put(cache, shared + tail)
    reader = prefill(cache, [*shared, *tail, 7])
    assert reader.protected_len == 7 * page_size
    before = row_of(cache, reader, 8)
    cache.evict(0, 4 * page_size)  # of its prefix, the reader's lock covers the last window only
    assert windows_of(cache, shared).tolist() == [0] * 4
    writer = prefill(cache, [*shared, 8])
    assert writer.protected_len == 0
    fresh = allocator.window_pages(np.array(row_of(cache, writer, 4)))
    cache.cache_unfinished_req(writer) if how == "unfinished" else cache.cache_finished_req(writer)
    assert row_of(cache, reader, 8) == before
    assert (allocator.owner_of(before[:7]) == PageState.TREE).all()
    assert windows_of(cache, shared).tolist() == fresh.tolist()
    if how == "unfinished":
        assert row_of(cache, writer, 4) == before[:4]
    cache.check()


def test_s21_a_hole_is_filled_on_the_part_of_a_node_that_is_offered():
    """The request keeps reading its last window although its pages are now the tree's, of which some had no window."""
    cache = make_swa_cache(2, size=64, size_swa=64)
    put(cache, list(range(8)))
    put(cache, list(range(12)))
    cache.evict(0, 1)
    assert windows_of(cache, list(range(8))).tolist() == [0] * 8
    request = prefill(cache, list(range(7)))
    cache.drop_out_of_window(request)
    assert request.evicted_seqlen_local == 5
    cache.cache_unfinished_req(request)
    windows = cache.token_to_kv_pool_allocator.window_pages(row_of(cache, request, 7))
    assert (windows > 0).tolist() == [False] * 5 + [True] * 2
    assert cache.match_prefix(list(range(7))).prefix_len == 7
    cache.check()
    cache.cache_finished_req(request)
    cache.check()


def test_s23_the_order_of_use_is_no_matter_of_clocks(monkeypatch):
    """There, a node was dated 0.1 ms before its child: a path of 20,000 dated its first one before what had been used
    a second earlier, and the check of the lists, made when a server was idle, ended it."""
    for clock in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(f"time.{clock}", lambda: 0.0)
    cache = make_swa_cache(4, size=4096, size_swa=4096)
    for depth in range(1, 1500):
        put(cache, list(range(depth)))
    put(cache, [-1, -2, -3])
    assert sum(1 for _ in cache.tree.nodes()) == 1500
    cache.match_prefix(list(range(1499)))
    cache.sanity_check()
    assert cache.full_lru_list_evictable_size() == cache.full_evictable_size() == 1502
    assert cache.swa_lru_list_evictable_size() == cache.swa_evictable_size() == 1502
    cache.evict(1)
    assert cache.match_prefix([-1, -2, -3]).prefix_len == 0  # used before all of the path since: it went first
    assert cache.match_prefix(list(range(1499))).prefix_len == 1499
    cache.sanity_check()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7])
def test_s46_windows_are_cached_in_whole_pages(length):
    cache = make_swa_cache(2, 4)
    allocator = cache.token_to_kv_pool_allocator
    pages = allocator.alloc_pages(2)
    assert cache.insert_pages(list(range(length)), pages) == 0
    assert (cache.full_evictable_size(), cache.swa_evictable_size()) == (length // 4 * 4, length // 4 * 4)
    assert cache.match_prefix(list(range(8))).prefix_len == length // 4 * 4


def test_s48_a_lookup_is_a_use_of_windows_too():
    cache = make_swa_cache(2, size=64, size_swa=64)
    for token in (1, 2, 3):
        put(cache, [token] * 4)
    cache.match_prefix([1] * 4)
    for token in (2, 3, 1):
        cache.evict(0, 1)
        assert cache.match_prefix([token] * 4).prefix_len == 0
    assert cache.total_size() == 0


def test_s48_an_insert_is_a_use_of_windows_too():
    cache = make_swa_cache(2, size=64, size_swa=64)
    for token in (1, 2, 1):
        put(cache, [token] * 4)
    cache.evict(0, 1)
    assert cache.match_prefix([1] * 4).prefix_len == 4
    assert cache.match_prefix([2] * 4).prefix_len == 0


def test_s49_a_lock_taken_before_a_hole_is_filled_stays_balanced():
    cache = make_swa_cache(2, size=64, size_swa=64)
    put(cache, list(range(4)))
    put(cache, list(range(8)))
    cache.evict(0, 1)
    early = cache.inc_lock_ref(cache.match_prefix(list(range(8))))
    put(cache, list(range(4)))  # fills the hole above what the lock covers
    late = cache.inc_lock_ref(cache.match_prefix(list(range(4))))
    assert sizes(cache)[1][:2] == (0, 8)
    for lock, left in ((early, 4), (late, 0)):
        cache.dec_lock_ref(lock)
        assert cache.swa_protected_size() == left
        cache.check()
    assert sizes(cache)[0][:2] == (8, 0)


def test_s49_a_lock_survives_the_splits_of_what_it_covers():
    cache = make_swa_cache(6, size=64, size_swa=64)
    put(cache, list(range(12)))
    lock = cache.inc_lock_ref(cache.match_prefix(list(range(12))))
    assert cache.swa_protected_size() == 12  # of the one node
    for end in (2, 5, 7, 11):
        put(cache, [*range(end), 99])
        cache.check()
    assert cache.swa_protected_size() == 12
    cache.evict(0, 100)
    assert cache.match_prefix(list(range(12))).prefix_len == 12
    cache.dec_lock_ref(lock)
    assert (cache.swa_protected_size(), cache.full_protected_size()) == (0, 0)


def test_s54_a_new_branch_hangs_where_its_prefix_ends():
    cache = make_swa_cache(2, size=64, size_swa=64)
    put(cache, [1, 2, 3, 4])
    put(cache, [1, 2, 9, 9])
    assert cache.match_prefix([1, 2, 9, 9]).prefix_len == 4
    assert cache.match_prefix([1, 2, 3, 4, 9, 9]).prefix_len == 4
    assert cache.match_prefix([1, 2, 3, 4]).prefix_len == 4


def test_1b_06_a_window_smaller_than_a_page_leaves_no_leaf_without_one():
    cache = make_swa_cache(2, 8, size=128, size_swa=128)
    request = prefill(cache, list(range(20)))
    cache.drop_out_of_window(request)
    assert request.evicted_seqlen_local == 8  # a stop after 16 needs 14 and 15
    cache.cache_unfinished_req(request)
    assert cache.match_prefix(list(range(20))).prefix_len == 16
    assert cache.match_prefix(list(range(15))).prefix_len == 0
    cache.cache_finished_req(request)
    cache.check()
    cache.evict(0, 8)
    assert cache.total_size() == 0  # nothing is left that leads nowhere


def test_1b_07_a_window_that_a_request_gave_up_is_not_found_again():
    life = ContentLife(Shape(page_size=2, window=3, num_pages=32, num_windows=32))
    tokens = bytes(range(24))
    life.admit(tokens)
    for _ in range(6):
        life.compute(0, 4, 0, save=False, share=False, drop=True)
        life.check()
    life.share(0)
    life.check()
    found = [life.cache.match_prefix(list(tokens[:end])).prefix_len for end in (8, 16, 22, 24)]
    assert found == [0, 0, 0, 24]
    life.wind_down()


def test_1a_06_holes_are_filled_inside_a_free_group():
    cache = make_swa_cache(2, size=64, size_swa=64)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, list(range(4)))
    put(cache, list(range(8)))
    cache.evict(0, 1)
    writer = prefill(cache, list(range(5)))
    fresh = allocator.window_pages(row_of(cache, writer, 4))
    with allocator.free_group():
        cache.cache_finished_req(writer)
        assert windows_of(cache, list(range(4))).tolist() == fresh.tolist()
    assert windows_of(cache, list(range(4))).tolist() == fresh.tolist()
    assert (allocator.window.owner_of(fresh) == PageState.TREE).all()
    cache.check()


def test_1b_16_pages_that_filled_a_hole_are_not_freed_with_the_request():
    life = ContentLife(Shape(window=2, num_pages=64, num_windows=64))
    tokens = bytes(range(8))
    life.insert(tokens[:4], b"")
    life.insert(tokens, b"")
    life.evict(0, 1, 0)
    life.admit(tokens[:4] + bytes([99]))
    life.compute(0, 5, 0, save=False, share=True, drop=False)
    life.check()
    life.finish(0)
    life.check()
    assert life.cache.match_prefix(list(tokens[:4])).prefix_len == 4
    life.wind_down()


def test_1b_22_making_room_evicts_nothing_of_who_asks():
    life = ContentLife(Shape(page_size=2, window=4, num_pages=12, num_windows=12))
    life.admit(bytes(range(12)))
    life.compute(0, 12, 0, save=False, share=True, drop=False)
    life.insert(bytes(range(50, 58)), b"")
    assert life.compute(0, 10, 1, save=False, share=True, drop=True)
    life.check()
    assert not life.cache.make_room(12)
    life.check()
    life.wind_down()
