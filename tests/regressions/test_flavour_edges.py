"""Sharp edges that flavours had by not being one thing, S-10, S-40, S-44, S-47 and S-53: each stays fixed."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from jaxcache.caches.base import BasePrefixCache
from jaxcache.caches.chunk import ChunkCache, SWAChunkCache
from jaxcache.caches.lora_radix import LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.components.window import WindowPages
from jaxcache.errors import BrokenInvariantError
from jaxcache.index.key import RadixKey
from jaxcache.manager.audit import check_owners, check_readable
from jaxcache.pages.allocator import PageState
from tests.caches.content import Shape, make_cache
from tests.caches.flavours import make_mamba_cache, make_swa_cache, prefill, put, save

FLAVOURS = [RadixCache, SWARadixCache, MambaRadixCache, LoRARadixCache, ChunkCache, SWAChunkCache]
SHAPES = {
    "full": Shape(page_size=4),
    "window": Shape(page_size=4, window=6),
    "state": Shape(page_size=4, has_states=True),
    "window+state": Shape(page_size=4, window=6, has_states=True),
    "eagle": Shape(page_size=4, window=6, is_eagle=True),
    "disabled": Shape(page_size=4, window=6, has_states=True, disable=True),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@shapes
@pytest.mark.parametrize("outputs", [0, 1, 2])
def test_s10_a_disabled_cache_of_any_flavour_frees_all_of_a_request(shape, outputs):
    cache = make_cache(Shape(page_size=4, window=shape.window, has_states=shape.has_states, disable=True))
    request = prefill(cache, list(range(9)))
    request.output_ids += [1] * outputs
    cache.cache_finished_req(request)
    assert cache.make_room(shape.num_windows, int(shape.has_states) * shape.num_states)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_s40_every_flavour_has_the_signatures_of_the_base_class(flavour):
    for name, method in inspect.getmembers(BasePrefixCache, inspect.isfunction):
        if name.startswith("_"):
            continue
        ours, theirs = inspect.signature(getattr(flavour, name)), inspect.signature(method)
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), name


@shapes
def test_s47_one_runner_drives_every_flavour(shape):
    """Positional arguments throughout, and whatever a lock returned goes back."""
    cache = make_cache(shape)
    put(cache, list(range(8))) if not shape.disable and not shape.is_eagle else None
    found = cache.match_prefix(list(range(9)))
    lock = cache.inc_lock_ref(found)
    cache.dec_lock_ref(lock)
    cache.evict(4, 4, 1)
    assert cache.make_room(1)
    request = prefill(cache, list(range(13)))
    cache.cache_unfinished_req(request, True)
    cache.drop_out_of_window(request)
    cache.cache_finished_req(request)
    sizes = [cache.evictable_size(), cache.swa_evictable_size(), cache.mamba_evictable_size()]
    sizes += [cache.protected_size(), cache.swa_protected_size(), cache.mamba_protected_size()]
    assert min(sizes) >= 0 and sizes[3:] == [0, 0, 0]
    assert cache.total_size() == cache.full_evictable_size() + cache.full_protected_size()
    cache.check()
    cache.reset()
    assert cache.total_size() == 0


@pytest.mark.parametrize("make", [make_swa_cache, make_mamba_cache], ids=["window", "state"])
def test_s44_sizes_are_what_can_be_evicted(make):
    """The counter of a tree with inner nodes, which went to 0 with a full cache and below 0 when that was evicted."""
    cache = make(2, size=64, size_swa=64) if make is make_swa_cache else make(size=64)
    for end in (4, 8, 12):
        put(cache, list(range(end)))
    assert cache.evictable_size() == 12
    lock = cache.inc_lock_ref(cache.match_prefix(list(range(8))))
    assert (cache.evictable_size(), cache.protected_size()) == (4, 8)
    assert cache.evict(100) == 4
    assert (cache.evictable_size(), cache.protected_size()) == (0, 8)
    assert cache.dec_lock_ref(lock) == 8
    assert cache.evict(100) == 8
    assert (cache.evictable_size(), cache.swa_evictable_size(), cache.mamba_evictable_size()) == (0, 0, 0)


def running(*requests):
    return {request.req_pool_idx: request for request in requests}


def test_s53_the_audit_sees_a_window_page_that_nobody_has():
    cache = make_swa_cache(4, 2, size=64, size_swa=64)
    allocator, table = cache.token_to_kv_pool_allocator, cache.req_to_token_pool
    request = prefill(cache, list(range(10)))
    cache.drop_out_of_window(request)
    check_owners(running(request), table, cache.components)
    allocator.window.alloc_pages(1)  # behind the back of the allocator that owns it
    with pytest.raises(BrokenInvariantError, match="private window pages"):
        check_owners(running(request), table, cache.components)


def test_s53_the_audit_sees_a_state_that_no_row_has():
    cache = make_mamba_cache(page_size=2)
    table, states = cache.req_to_token_pool, cache.state_allocator
    request = prefill(cache, list(range(6)))
    save(cache, request)
    check_owners(running(request), table, cache.components)
    lost = states.alloc_track_slot()
    with pytest.raises(BrokenInvariantError, match="private states"):
        check_owners(running(request), table, cache.components)
    states.free_track_slot(lost)
    check_owners(running(request), table, cache.components)


def test_s53_the_audit_sees_a_state_that_is_copied_from_nowhere():
    cache = make_mamba_cache(page_size=2)
    table, states = cache.req_to_token_pool, cache.state_allocator
    (row,) = table.alloc(1)
    request = prefill(cache, list(range(6)))
    table.set_state(row, states.alloc_track_slot(), states.size)  # a state that is free
    other = prefill(make_mamba_cache(page_size=2, rows=1), [1, 2])
    other.kv_len = other.num_pages = 0
    rows = running(request) | {row: other}
    with pytest.raises(BrokenInvariantError, match="are to be copied"):
        check_owners(rows, table, cache.components)


def test_s53_the_audit_compares_pairs_where_keys_are_pairs():
    cache = make_cache(Shape(page_size=2, is_eagle=True))
    request = prefill(cache, list(range(7)))
    cache.cache_unfinished_req(request)
    assert request.protected_len == 6
    check_owners(running(request), cache.req_to_token_pool, cache.components)
    request._key = RadixKey(np.array([0, 1, 2, 3, 4, 9, 6], np.int32))
    with pytest.raises(BrokenInvariantError, match="are not the tree's pages"):
        check_owners(running(request), cache.req_to_token_pool, cache.components)


def test_the_audit_sees_a_hole_that_the_next_token_would_read_as_page_0():
    cache = make_swa_cache(4, 2, size=64, size_swa=64)
    allocator, table = cache.token_to_kv_pool_allocator, cache.req_to_token_pool
    request = prefill(cache, list(range(10)))
    cache.drop_out_of_window(request)
    check_readable(running(request), table, cache.components)
    check_readable(running(request), table, [WindowPages(allocator, 5)])  # tokens 6 .. 9 and the next one
    with pytest.raises(BrokenInvariantError, match="its next token, 10, attends to the window page of page"):
        check_readable(running(request), table, [WindowPages(allocator, 6)])
    allocator.free_windows(table.row_pages(request.req_pool_idx, 4, 5), PageState.PRIVATE)
    with pytest.raises(BrokenInvariantError, match="which is gone"):
        check_readable(running(request), table, cache.components)
