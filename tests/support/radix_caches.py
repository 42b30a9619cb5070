"""A small RadixCache with its allocator and table, and requests in it as a scheduler would leave them."""

from __future__ import annotations

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.request import Request, RequestState
from jaxcache.tables.request_table import ReqToTokenPool


def make_cache(page_size=1, size=64, rows=4, **options):
    allocator = TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
    table = ReqToTokenPool(rows, size, page_size)
    return RadixCache(table, allocator, page_size, **options)


def prefill(cache, tokens, slots=None, **options):
    """A running request with all of `tokens` computed, as a scheduler would leave it."""
    request = Request("r", tokens, **options)
    found = cache.match_prefix(request.key[: len(tokens) - 1])
    request.lock = cache.inc_lock_ref(found)
    (row,) = cache.req_to_token_pool.alloc(1)
    request.enter(cache.req_to_token_pool, row)
    request.state, request.kv_len = RequestState.RUNNING, len(tokens)
    fresh = cache.token_to_kv_pool_allocator.alloc_pages(-(-len(tokens) // cache.page_size) - len(found.pages))
    pages = np.concatenate([found.pages, fresh])
    cache.req_to_token_pool.write_pages(request.req_pool_idx, 0, pages)
    request.num_pages = len(pages)
    return request


def slots_of(cache, request):
    return cache.req_to_token_pool.req_to_token[request.req_pool_idx, : request.kv_len].tolist()


def sizes(cache):
    available = cache.token_to_kv_pool_allocator.available_size()
    return cache.evictable_size(), cache.protected_size(), cache.total_size(), available
