"""Sharp edges of cached recurrent states in the systems before us, S-45 and S-55, and rows of the reliability survey
about them: each stays fixed.
"""

from __future__ import annotations

import pytest

from jaxcache.errors import ArgumentError, OwnershipError
from jaxcache.index.key import RadixKey
from jaxcache.pages.allocator import PageState
from tests.caches.content import ContentLife, Shape
from tests.caches.flavours import make_mamba_cache, prefill, put


def states_along(cache, tokens):
    return [(node.end, node.others[-1].value is not None) for node in cache.tree.find(RadixKey(tokens))[0]]


def test_s45_a_split_leaves_the_state_with_the_end_it_stands_for():
    cache = make_mamba_cache()
    put(cache, list(range(6)))
    state = cache.match_prefix(list(range(6))).state
    lock = cache.inc_lock_ref(cache.match_prefix(list(range(6))))
    put(cache, [0, 1, 2, 9])
    assert states_along(cache, list(range(6))) == [(3, False), (6, True)]
    assert cache.match_prefix(list(range(6))).state == state
    assert cache.match_prefix(list(range(5))).prefix_len == 0
    assert cache.mamba_protected_size() == 1
    cache.dec_lock_ref(lock)
    assert (cache.mamba_protected_size(), cache.mamba_evictable_size()) == (0, 2)
    assert [node.locks for node in cache.tree.nodes()] == [0, 0, 0]
    cache.check()


def test_s55_eviction_of_states_ends_where_nodes_have_none():
    cache = make_mamba_cache(num_states=8)
    put(cache, [0, 1, 2, 3])
    put(cache, [0, 1, 9, 9])
    put(cache, [0, 1, 2, 3, 4, 5])
    lock = cache.inc_lock_ref(cache.match_prefix([0, 1, 9, 9]))
    cache.evict(0, 0, 100)
    assert (cache.mamba_evictable_size(), cache.mamba_protected_size(), cache.total_size()) == (0, 1, 4)
    cache.dec_lock_ref(lock)
    cache.evict(0, 0, 100)
    assert cache.total_size() == 0
    cache.check()


def test_1b_12_a_state_is_cached_only_at_its_own_position():
    cache = make_mamba_cache(page_size=4)
    request = prefill(cache, list(range(11)))
    state = cache.state_allocator.alloc_track_slot()
    cache.req_to_token_pool.set_saved(request.req_pool_idx, state, 4)
    cache.cache_unfinished_req(request)
    found = cache.match_prefix(list(range(11)))
    assert (found.prefix_len, found.state, request.protected_len) == (4, state, 4)
    with pytest.raises(ArgumentError, match="not whole pages"):
        cache.insert_pages(list(range(7)), cache.token_to_kv_pool_allocator.alloc_pages(1), state)


def test_1b_13_a_state_that_was_given_away_is_written_by_nobody():
    """The working state of a request that ended is the tree's; who finds it works on a copy."""
    life = ContentLife(Shape(page_size=2, has_states=True))
    life.admit(bytes(range(8)))
    life.compute(0, 8, 0, save=False, share=False, drop=False)
    working = int(life.table.state[life.running[0].req_pool_idx])
    life.finish(0)
    assert life.cache.match_prefix(list(range(8))).state == working
    for _ in range(2):
        life.admit(bytes(range(12)))
    assert working not in life.table.state
    for pick in (0, 1, 0):
        life.compute(pick, 2, 0, save=False, share=False, drop=False)
        life.check()
    life.wind_down()


def test_1b_14_a_state_that_no_step_has_filled_is_never_found():
    cache = make_mamba_cache(page_size=2)
    request = prefill(cache, list(range(4)))
    table, row = cache.req_to_token_pool, request.req_pool_idx
    cache.state_allocator.release(table.take_states(row), PageState.PRIVATE)
    table.set_state(row, cache.state_allocator.alloc_track_slot(), 0)  # planned, and aborted before it ran
    cache.cache_finished_req(request)
    assert cache.total_size() == 0
    assert cache.state_allocator.available_size() == cache.state_allocator.size


def test_1b_15_a_hit_has_a_state_of_exactly_that_depth():
    cache = make_mamba_cache(page_size=2)
    put(cache, list(range(12)))
    for end in range(13):
        found = cache.match_prefix(list(range(end)))
        assert (found.prefix_len, found.state > 0) == ((12, True) if end == 12 else (0, False))


def test_1b_19_a_prompt_that_comes_again_says_where_a_state_would_help():
    """A lookup leaves the last token to be computed, so the state at the end of a prompt is of no use to its twin."""
    life = ContentLife(Shape(page_size=4, has_states=True))
    tokens = bytes(range(16))
    life.admit(tokens)
    life.compute(0, 16, 0, save=True, share=True, drop=False)
    life.finish(0)
    key = RadixKey(list(tokens))
    found = life.cache.match_prefix(key[:15])
    assert (found.prefix_len, found.mamba_branching_seqlen) == (0, 12)
    life.admit(tokens)
    life.compute(0, found.mamba_branching_seqlen, 0, save=True, share=True, drop=False)
    life.finish(0)
    life.check()
    assert life.cache.match_prefix(key[:15]).prefix_len == 12
    life.wind_down()


def test_1a_17_a_request_that_cannot_run_takes_no_state():
    life = ContentLife(Shape(page_size=2, has_states=True, num_states=1, num_rows=2))
    assert life.admit(bytes(range(4)))
    assert not life.admit(bytes(range(4)))
    life.check()
    assert life.table.available_size() == 1
    life.wind_down()


def test_a_state_of_the_trees_cannot_be_cached_again():
    cache = make_mamba_cache()
    put(cache, [1, 2])
    pages = cache.token_to_kv_pool_allocator.alloc_pages(3)
    with pytest.raises(OwnershipError, match="state must be PRIVATE"):
        cache.insert_pages([4, 5, 6], pages, cache.match_prefix([1, 2]).state)
    cache.token_to_kv_pool_allocator.release(pages, PageState.PRIVATE)
    cache.check()
