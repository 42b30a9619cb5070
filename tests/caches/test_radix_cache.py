"""RadixCache on its own: golden sequences of the original, sizes, events, slots, the disabled mode, wrong use."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, OwnershipError, ReceiptError
from jaxcache.events.events import AllBlocksCleared, BlockRemoved, BlockStored, block_name
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.request import Request
from jaxcache.tables.request_table import ReqToTokenPool
from tests.support.radix_caches import make_cache, prefill, sizes, slots_of


def test_golden_sequence_of_slots_of_one_token():
    cache = make_cache()
    allocator = cache.token_to_kv_pool_allocator
    assert cache.insert([1, 2, 3, 4, 5], allocator.alloc(5)) == 0
    assert sizes(cache) == (5, 0, 5, 59)
    fresh = allocator.alloc(6)
    assert cache.insert([1, 2, 3, 9, 9, 9], fresh) == 3
    assert sizes(cache) == (8, 0, 8, 53)
    allocator.free(fresh[:3])
    assert sizes(cache) == (8, 0, 8, 56)
    found = cache.match_prefix([1, 2, 3, 4, 7])
    assert found.device_indices.tolist() == [1, 2, 3, 4]
    assert sizes(cache) == (8, 0, 8, 56)
    receipt = cache.inc_lock_ref(found)
    assert receipt.node.key == np.array([4], "<i4").tobytes()  # "4 5" was split
    assert sizes(cache) == (4, 4, 8, 56)
    assert cache.evict(4) == 4
    assert sizes(cache) == (0, 4, 4, 60)
    assert cache.dec_lock_ref(receipt) == 4
    assert sizes(cache) == (4, 0, 4, 60)
    assert cache.evict(1) == 1
    assert sizes(cache) == (3, 0, 3, 61)
    assert cache.evict(100) == 3
    assert sizes(cache) == (0, 0, 0, 64)


def test_golden_sequence_of_two_equal_prompts():
    cache = make_cache(page_size=4)
    prompt = list(range(100, 110))
    first, second = prefill(cache, prompt), prefill(cache, prompt)
    assert slots_of(cache, first) == list(range(4, 14))
    assert slots_of(cache, second) == list(range(16, 26))
    cache.cache_unfinished_req(first)
    assert slots_of(cache, first) == list(range(4, 14))
    assert sizes(cache) == (0, 8, 8, 40)
    cache.cache_unfinished_req(second)
    assert slots_of(cache, second) == [*range(4, 12), 24, 25]
    assert sizes(cache) == (0, 8, 8, 48)
    for request in (first, second):
        request.output_ids.append(7)
        cache.cache_finished_req(request)
    assert sizes(cache) == (8, 0, 8, 56)
    assert cache.req_to_token_pool.available_size() == 4


def test_a_finished_request_owns_nothing():
    cache = make_cache(page_size=4)
    request = prefill(cache, list(range(10)))
    cache.cache_finished_req(request)
    assert (request.req_pool_idx, request.num_pages, request.lock) == (None, 0, None)
    assert cache.match_prefix(list(range(10))).prefix_len == 8
    assert sizes(cache) == (8, 0, 8, 56)
    cache.check()


def test_a_chunk_is_shared_and_locked_at_once():
    cache = make_cache(page_size=4)
    request = prefill(cache, list(range(12)))
    request.kv_len = 6
    cache.cache_unfinished_req(request, chunked=True)
    assert request.lock.length == 4
    request.kv_len = 12
    cache.cache_unfinished_req(request, chunked=True)
    assert request.lock.length == 12
    assert cache.evict(100) == 0
    assert cache.match_prefix(list(range(12))).prefix_len == 12


@pytest.mark.parametrize("page_size", [1, 4])
def test_disabled_shares_nothing_and_frees_everything(page_size):
    cache = make_cache(page_size=page_size, disable=True)
    request = prefill(cache, list(range(10)))
    cache.cache_unfinished_req(request)
    assert cache.insert(list(range(8)), np.arange(page_size, 8 + page_size, dtype=np.int32)) == 0
    assert cache.match_prefix(list(range(10))).prefix_len == 0
    request.output_ids.append(1)
    cache.cache_finished_req(request)
    assert sizes(cache) == (0, 0, 0, 64)
    assert cache.evict(10) == 0
    assert cache.req_to_token_pool.available_size() == 4


def test_sizes_have_one_meaning_under_every_name():
    cache = make_cache(page_size=4)
    request = prefill(cache, list(range(8)))
    cache.cache_unfinished_req(request)
    cache.insert(list(range(50, 58)), cache.token_to_kv_pool_allocator.alloc(8))
    assert (cache.evictable_size(), cache.protected_size(), cache.total_size()) == (8, 8, 16)
    assert (cache.full_evictable_size(), cache.full_protected_size()) == (8, 8)
    assert (cache.swa_evictable_size(), cache.swa_protected_size()) == (0, 0)
    assert sorted(cache.all_values_flatten().tolist()) == list(range(4, 20))


def test_an_empty_cache_has_no_values():
    cache = make_cache()
    assert cache.all_values_flatten().tolist() == []
    assert cache.match_prefix([1]).device_indices.tolist() == []


def test_values_default_to_token_ids_where_there_is_no_allocator():
    cache = RadixCache(None, None, 2)
    assert cache.insert([6, 7, 8, 9, 1]) == 0
    assert cache.match_prefix([6, 7, 8, 9]).pages.tolist() == [6, 8]
    assert cache.evict(1) == 4


def test_pretty_print_shows_tokens_pages_and_locks(capsys):
    cache = make_cache(page_size=2)
    cache.insert(RadixKey([5, 6, 7, 8], "tenant"), cache.token_to_kv_pool_allocator.alloc(4))
    cache.inc_lock_ref(cache.match_prefix(RadixKey([5, 6], "tenant")))
    cache.pretty_print()
    shown = capsys.readouterr().out
    assert "tenant" in shown
    assert "[0:2] 5 6  full=1 locks=1" in shown
    assert "[2:4] 7 8  full=2" in shown


def test_namespaces_share_nothing():
    cache = make_cache(page_size=2)
    spaces = [None, "a", Namespace(lora_id="a"), Namespace(cache_salt="a"), Namespace(media=(b"aa",))]
    for space in spaces:
        key = RadixKey([1, 2], space)
        assert cache.match_prefix(key).prefix_len == 0
        cache.insert(key, cache.token_to_kv_pool_allocator.alloc(2))
        assert cache.match_prefix(key).prefix_len == 2
    assert cache.total_size() == 2 * len(spaces)


def names(tokens, page_size, space=None):
    seed = namespace_seed(Namespace(extra_key=space).encode())
    return [block_name(digest) for digest in page_hashes(np.array(tokens, "<i4").tobytes(), 4 * page_size, seed)]


def test_events_tell_what_is_resident():
    cache = make_cache(page_size=2, enable_kv_cache_events=True)
    allocator = cache.token_to_kv_pool_allocator
    cache.insert([1, 2, 3, 4, 5, 6], allocator.alloc(6))
    first = names([1, 2, 3, 4, 5, 6], 2)
    assert cache.take_events() == [BlockStored(first, None, [1, 2, 3, 4, 5, 6], 2)]
    cache.insert([1, 2, 3, 4, 9, 9], allocator.alloc(6))
    assert cache.take_events() == [BlockStored(names([1, 2, 3, 4, 9, 9], 2)[2:], first[1], [9, 9], 2)]
    cache.insert(RadixKey([1, 2], "t"), allocator.alloc(2))
    (stored,) = cache.take_events()
    assert stored == BlockStored(names([1, 2], 2, "t"), None, [1, 2], 2, Namespace(extra_key="t").encode())
    cache.evict(2)
    assert cache.take_events() == [BlockRemoved(first[2:])]
    cache.reset()
    assert cache.take_events() == [AllBlocksCleared()]
    assert cache.take_events() == []


def test_no_events_unless_asked():
    cache = make_cache()
    cache.insert([1, 2], cache.token_to_kv_pool_allocator.alloc(2))
    cache.evict(2)
    cache.reset()
    assert cache.take_events() == []


def test_insert_checks_slots_before_anything_changes():
    cache = make_cache(page_size=4)
    allocator = cache.token_to_kv_pool_allocator
    slots = allocator.alloc(8)
    for value, rule in [
        (slots[:7], "the key needs 8 slots, got 7"),
        (slots.astype(np.float32), "must hold integers"),
        (slots.reshape(2, 4), "one-dimensional"),
        (slots[::-1].copy(), "whole pages"),
        (slots + 1, "whole pages"),
    ]:
        with pytest.raises(ArgumentError, match=rule):
            cache.insert(list(range(8)), value)
    for owner in ([0, 1, 2, 3, 4, 5, 6, 7], [*slots[:4].tolist(), *slots[:4].tolist()], list(range(12, 20))):
        with pytest.raises(OwnershipError):
            cache.insert(list(range(8)), np.array(owner, np.int32))
    assert sizes(cache) == (0, 0, 0, 56)
    assert allocator.count(PageState.PRIVATE) == 2
    assert not cache.tree.roots
    assert cache.insert(list(range(8)), slots) == 0


@pytest.mark.parametrize(
    "tokens",
    [[1.5], ["a"], [2**31], [[1, 2]], np.zeros((2, 2), np.int32), np.array([0.5]), b"abc", bytearray(b"abc"), None],
)
def test_tokens_that_are_no_tokens(tokens):
    cache = make_cache()
    with pytest.raises(ArgumentError, match="token_ids"):
        cache.match_prefix(tokens)


def test_parts_must_agree_on_the_page_size():
    with pytest.raises(ArgumentError, match="page_size is 4, but that of allocator is 2"):
        RadixCache(None, PagedTokenToKVPoolAllocator(8, 2), 4)
    with pytest.raises(ArgumentError, match="page_size is 4, but that of req_to_token_pool is 1"):
        RadixCache(ReqToTokenPool(1, 8), None, 4)


def test_requests_need_a_row_a_table_and_an_allocator():
    with pytest.raises(ArgumentError, match="has no row"):
        make_cache().cache_finished_req(Request("x", [1]))
    with pytest.raises(ArgumentError, match="without a request table"):
        RadixCache(None, None, 1).cache_unfinished_req(Request("x", [1]))


def test_locks_of_another_cache_are_refused():
    ours, theirs = make_cache(), make_cache()
    ours.token_to_kv_pool_allocator.alloc(1)  # so that the same tokens have other slots
    for cache in (ours, theirs):
        cache.insert([1, 2, 3], cache.token_to_kv_pool_allocator.alloc(3))
    foreign = theirs.match_prefix([1, 2, 3])
    with pytest.raises(ReceiptError, match="not in this tree"):
        ours.inc_lock_ref(foreign)
    receipt = theirs.inc_lock_ref(foreign)
    with pytest.raises(ReceiptError, match="another tree"):
        ours.dec_lock_ref(receipt)
    assert ours.protected_size() == 0
    assert theirs.protected_size() == 3
    ours.check()
    ours.check()


def test_a_match_of_pages_that_were_replaced_is_refused():
    cache = make_cache(page_size=2)
    allocator = cache.token_to_kv_pool_allocator
    cache.insert([1, 2], allocator.alloc(2))
    found = cache.match_prefix([1, 2])
    cache.evict(2)
    spacer = allocator.alloc(2)
    cache.insert([1, 2], allocator.alloc(2))
    assert cache.match_prefix([1, 2]).pages.tolist() != found.pages.tolist()
    with pytest.raises(ReceiptError, match="match again"):
        cache.inc_lock_ref(found)
    allocator.free(spacer)
    cache.check()
