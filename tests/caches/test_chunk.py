"""Caches that share nothing: requests own all they have until they end, and local layers give up what they left."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.chunk import ChunkCache, SWAChunkCache
from jaxcache.errors import ArgumentError
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.tables.request_table import ReqToTokenPool
from tests.caches.flavours import prefill


def chunk_cache(page_size=4, size=64):
    return ChunkCache(ReqToTokenPool(4, size, page_size), PagedTokenToKVPoolAllocator(size, page_size), page_size)


def swa_chunk_cache(page_size=4, size=64, **options):
    allocator = SWATokenToKVPoolAllocator(size, size, page_size)
    return SWAChunkCache(ReqToTokenPool(4, size, page_size), allocator, page_size, **options)


def live(cache, request):
    pages = cache.req_to_token_pool.row_pages(request.req_pool_idx, 0, request.num_pages)
    return (cache.token_to_kv_pool_allocator.window_pages(pages) > 0).tolist()


@pytest.mark.parametrize("make", [chunk_cache, swa_chunk_cache])
@pytest.mark.parametrize("outputs", [0, 1, 5])
def test_nothing_is_found_and_all_is_freed(make, outputs):
    cache = make()
    request = prefill(cache, list(range(10)))
    request.output_ids += [1] * outputs
    cache.cache_unfinished_req(request, chunked=True)
    found = cache.match_prefix(list(range(10)))
    assert (found.prefix_len, len(found.device_indices)) == (0, 0)
    assert cache.insert(list(range(4)), np.arange(4, 8, dtype=np.int32)) == 0
    assert cache.disable
    assert cache.evict(100, 100) == 0
    cache.dec_lock_ref(cache.inc_lock_ref(found))
    assert (cache.total_size(), cache.evictable_size(), cache.protected_size()) == (0, 0, 0)
    assert cache.make_room(13) and not cache.make_room(14)
    cache.cache_finished_req(request)
    assert cache.token_to_kv_pool_allocator.available_size() == 64
    assert cache.req_to_token_pool.available_size() == 4


def test_windows_of_chunks_that_are_over_go():
    cache = swa_chunk_cache()
    request = prefill(cache, list(range(30)))
    windows = cache.token_to_kv_pool_allocator.window
    for prelen, pages, evicted in [(7, 0, 0), (8, 2, 8), (15, 2, 8), (16, 4, 16), (30, 6, 24), (30, 6, 24)]:
        cache.evict_swa(request, prelen, 8)
        assert (live(cache, request), request.evicted_seqlen_local) == ([False] * pages + [True] * (8 - pages), evicted)
    assert windows.available_size() == 64 - 8
    cache.check()
    cache.cache_finished_req(request)
    assert windows.available_size() == 64
    again = prefill(cache, list(range(30)))
    assert again.evicted_seqlen_local == 0


@pytest.mark.parametrize("chunk", [1, 3, 5, 6, 7, 9])
def test_a_page_that_two_chunks_share_stays(chunk):
    cache = swa_chunk_cache()
    request = prefill(cache, list(range(30)))
    for prelen in range(31):
        cache.evict_swa(request, prelen, chunk)
        begin = prelen // chunk * chunk
        assert live(cache, request) == [4 * page + 4 > begin for page in range(8)]


def test_one_slot_a_page_is_the_original():
    cache = swa_chunk_cache(page_size=1)
    request = prefill(cache, list(range(30)))
    for prelen, expected in [(4, 0), (5, 5), (9, 5), (17, 15)]:
        cache.evict_swa(request, prelen, 5)
        assert request.evicted_seqlen_local == expected
        assert live(cache, request) == [False] * expected + [True] * (30 - expected)


def test_a_window_may_limit_attention_instead():
    cache = swa_chunk_cache(sliding_window_size=6)
    request = prefill(cache, list(range(30)))
    cache.drop_out_of_window(request)
    assert live(cache, request) == [False] * 5 + [True] * 3
    other = swa_chunk_cache()
    request = prefill(other, list(range(30)))
    other.drop_out_of_window(request)
    assert live(other, request) == [True] * 8


def test_what_was_not_computed_is_not_over():
    cache = swa_chunk_cache()
    request = prefill(cache, list(range(10)))
    for prelen, chunk in [(11, 4), (-1, 4), (8, 0), (8, -4), (8, 2.0)]:
        with pytest.raises(ArgumentError, match=r"attention_chunk_size|prelen"):
            cache.evict_swa(request, prelen, chunk)
    assert live(cache, request) == [True] * 3


def test_windows_need_an_allocator_of_windows():
    with pytest.raises(ArgumentError, match="need a SWATokenToKVPoolAllocator"):
        SWAChunkCache(ReqToTokenPool(4, 64, 4), PagedTokenToKVPoolAllocator(64, 4), 4)  # type: ignore[arg-type]
