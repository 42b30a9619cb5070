"""Caches of every flavour, and what tests do with them."""

from __future__ import annotations

from typing import Any

from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.index.key import RadixKey
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.request import Request, RequestState
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool


def make_swa_cache(window, page_size=1, size=32, size_swa=24, rows=4, **options):
    allocator = SWATokenToKVPoolAllocator(size, size_swa, page_size)
    return SWARadixCache(ReqToTokenPool(rows, size, page_size), allocator, window, page_size, **options)


def make_mamba_cache(page_size=1, size=64, num_states=8, rows=4, window=None, **options):
    if window is not None:
        allocator: Any = SWATokenToKVPoolAllocator(size, size, page_size)
    else:
        allocator = TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
    table = HybridReqToTokenPool(rows, size, page_size)
    return MambaRadixCache(table, allocator, StateAllocator(num_states), page_size, window, **options)


def put(cache, tokens, without_window=0, space=None):
    """Inserts tokens under fresh pages, and a fresh state; frees what the tree did not take. Returns what was there."""
    allocator = cache.token_to_kv_pool_allocator
    count = len(tokens) // cache.page_size
    pages = allocator.alloc_pages(count, without_window) if without_window else allocator.alloc_pages(count)
    state = cache.state_allocator.alloc_track_slot() if isinstance(cache, MambaRadixCache) else 0
    present = cache.insert_pages(RadixKey(tokens, space), pages, state)
    allocator.release(pages[: present // cache.page_size], PageState.PRIVATE)
    if state and cache.state_allocator.owner_of([state])[0] == PageState.PRIVATE:
        cache.state_allocator.free_track_slot(state)
    return present


def prefill(cache, tokens, **options):
    """A running request with all of `tokens` computed, as a scheduler would leave it."""
    request = Request("r", tokens, **options)
    table, allocator = cache.req_to_token_pool, cache.token_to_kv_pool_allocator
    found = cache.match_prefix(request.key[: len(tokens) - 1])
    request.lock = cache.inc_lock_ref(found)
    (row,) = table.alloc(1)
    request.enter(table, row)
    request.state = RequestState.RUNNING
    fresh = allocator.alloc_pages(-(-len(tokens) // cache.page_size) - len(found.pages))
    table.write_pages(row, 0, found.pages)
    table.write_pages(row, len(found.pages), fresh)
    request.kv_len, request.num_pages = len(tokens), len(found.pages) + len(fresh)
    if isinstance(cache, MambaRadixCache):
        table.set_state(row, cache.state_allocator.alloc_track_slot(), found.state)
        table.copied([row])
        assert table.state_from[row] == NO_COPY
    return request


def save(cache, request, length=None):
    """A snapshot of a request's working state."""
    state = cache.state_allocator.alloc_track_slot()
    cache.req_to_token_pool.set_saved(request.req_pool_idx, state, request.kv_len if length is None else length)
    return state


def sizes(cache):
    allocator = cache.token_to_kv_pool_allocator
    full = cache.full_evictable_size(), cache.full_protected_size(), allocator.full_available_size()
    return full, (cache.swa_evictable_size(), cache.swa_protected_size(), allocator.swa_available_size())
