"""Sharp edges of pymllm's prefix caches, S-44 to S-55: each stays fixed."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.index import MambaRadixCache, RadixCache, RadixKey
from jaxcache.index.check import check
from jaxcache.pages.token import TokenToKVPoolAllocator


def both(page_size=1, **options):
    return [RadixCache(page_size, **options), RadixCache(page_size, 4, **options)]


@pytest.mark.parametrize("window", [None, 4])
def test_s44_what_can_be_evicted_is_counted_and_so_the_runner_evicts_it(window):
    """There, a child took its parent out of the count, and evicting the child never gave it back: 0, then negative."""
    pool = TokenToKVPoolAllocator(8)
    cache = RadixCache(1, None, pool) if window is None else RadixCache(1, window)
    cache.insert([1, 2], pool.alloc(2))
    cache.insert([1, 2, 3, 4], np.concatenate([[1, 2], pool.alloc(2)]))
    assert (cache.evictable_size(), cache.protected_size(), cache.total_size()) == (4, 0, 4)
    receipt = cache.inc_lock_ref(cache.match_prefix([1, 2]).last_node)
    assert (cache.evictable_size(), cache.protected_size()) == (2, 2)
    assert cache.evict(100).full_evicted == 2
    assert (cache.evictable_size(), cache.protected_size()) == (0, 2)
    cache.dec_lock_ref(receipt)
    assert (cache.evictable_size(), cache.protected_size()) == (2, 0)
    assert cache.evict(100).full_evicted == 2
    assert (cache.evictable_size(), cache.protected_size(), cache.total_size()) == (0, 0, 0)
    if window is None:
        assert pool.available_size() == 8


@pytest.mark.parametrize("page_size", [2, 4])
def test_s46_keys_are_cut_to_whole_pages_and_no_prefix_is_longer_than_its_key(page_size):
    for cache in both(page_size):
        tokens = list(range(1, 3 * page_size))  # two pages and a part of one
        assert cache.insert(tokens).prefix_len == 0
        assert cache.total_size() == 2 * page_size
        for length in range(len(tokens) + 1):
            assert cache.insert(tokens[:length]).prefix_len == length // page_size * page_size
            assert cache.match_prefix(tokens[:length]).prefix_len == length // page_size * page_size
        assert all(len(node.key) % (4 * page_size) == 0 for node in cache.tree.nodes())
    with pytest.raises(ArgumentError, match="whole pages"):  # a state stands for the whole key
        MambaRadixCache(page_size).insert(tokens, mamba_value=1)


def test_s40_every_size_is_asked_of_every_cache_in_the_same_way():
    """To ask a cache with states for its windows, as whoever drives either does, was an AttributeError."""
    for cache in (*both(), MambaRadixCache()):
        cache.insert([1, 2, 3], **({"mamba_value": 7} if isinstance(cache, MambaRadixCache) else {}))
        cache.inc_lock_ref(cache.match_prefix([1, 2, 3]).last_node)
        cache.insert([1, 2, 3, 4, 5], **({"mamba_value": 8} if isinstance(cache, MambaRadixCache) else {}))
        windows = 1 if isinstance(cache, RadixCache) and cache.supports_swa else 0
        states = 1 if isinstance(cache, MambaRadixCache) else 0
        assert (cache.evictable_size(), cache.protected_size(), cache.total_size()) == (2, 3, 5)
        assert (cache.swa_evictable_size(), cache.swa_protected_size()) == (2 * windows, 3 * windows)
        assert (cache.mamba_evictable_size(), cache.mamba_protected_size()) == (states, states)


@pytest.mark.parametrize("amount", [-1, 1.5, "1", None])
def test_what_is_no_amount_is_refused(amount):
    """1.5 tokens were evicted, and "1" was a TypeError."""
    rule = "not be negative" if amount == -1 else "be an integer"
    for cache in (*both(), MambaRadixCache()):
        cache.insert([1, 2, 3], **({"mamba_value": 7} if isinstance(cache, MambaRadixCache) else {}))
        for name in ("num_tokens", "swa_num_tokens", "mamba_num"):
            with pytest.raises(ArgumentError, match=f"{name} must {rule}"):
                cache.evict(**({"num_tokens": 0} | {name: amount}))
        assert cache.total_size() == 3
    for name in ("prev_prefix_len", "swa_evicted_seqlen"):
        with pytest.raises(ArgumentError, match=f"{name} must {rule}"):
            RadixCache(1, 4).insert([1, 2, 3], **{name: amount})


def test_s47_one_signature_for_both_caches():
    for name in ("match_prefix", "evict", "inc_lock_ref", "dec_lock_ref", "reset"):
        plain, states = (inspect.signature(getattr(kind, name)) for kind in (RadixCache, MambaRadixCache))
        assert plain.parameters.keys() == states.parameters.keys()
    for cache in (RadixCache(1, 4), MambaRadixCache()):
        receipt = cache.inc_lock_ref(cache.match_prefix([1]).last_node)
        cache.dec_lock_ref(receipt)  # positionally


def test_s48_a_lookup_is_a_use_also_where_there_are_windows():
    for cache in both():
        for tokens in ([1, 1], [2, 2], [3, 3]):
            cache.insert(tokens)
        cache.match_prefix([1, 1])
        cache.evict(2)
        assert [cache.match_prefix([t, t]).prefix_len for t in (1, 2, 3)] == [2, 0, 2]


@pytest.mark.parametrize("amounts", [{"num_tokens": 1}, {"num_tokens": 0, "mamba_num": 1}], ids=["slots", "states"])
def test_s48_inserting_is_a_use_of_what_was_there_also_where_there_are_states(amounts):
    cache = MambaRadixCache()
    for i, token in enumerate((1, 2, 3)):
        cache.insert([token, token], mamba_value=i + 1)
    cache.insert([1, 1, 5], mamba_value=4)
    cache.evict(**amounts)
    assert [cache.match_prefix(tokens).prefix_len for tokens in ([1, 1, 5], [1, 1], [2, 2], [3, 3])] == [3, 2, 0, 2]


def test_s50_a_node_has_the_same_hashes_whoever_was_asked_before():
    for order in ([0, 1], [1, 0]):
        cache = RadixCache(2)
        nodes = [cache.insert(list(range(end))).last_node.node for end in (4, 8)]
        found = {i: cache.compute_node_hash(nodes[i]) for i in order}
        whole = RadixCache(2)
        assert found[0] + found[1] == whole.compute_node_hash(whole.insert(list(range(8))).last_node.node)


def test_s54_an_insert_goes_on_below_the_upper_half():
    """There, it went on below the lower half: the suffix was found behind another prefix, and not behind its own."""
    for cache in [*both(), RadixCache(1, 1)]:
        cache.insert([1, 2, 3, 4])
        assert cache.insert([1, 2, 9, 9]).prefix_len == 2
        assert cache.match_prefix([1, 2, 9, 9]).prefix_len == 4
        assert cache.match_prefix([1, 2, 3, 4, 9, 9]).prefix_len == 4
        assert cache.match_prefix([1, 2, 9, 9]).indices.tolist() == [1, 2, 9, 9]
        check(cache.tree)


def test_s55_evicting_states_ends_and_counts_states():
    """There, a node without a state was looked at for ever, and states were counted in tokens."""
    cache = MambaRadixCache()
    for i in range(4):
        cache.insert([i, *range(10)], mamba_value=2 * i + 1)
        cache.insert([i, *range(20)], mamba_value=2 * i + 2)
        cache.insert([i, *range(10), 99], mamba_value=50 + i)
    assert cache.mamba_evictable_size() == 12
    assert cache.evict(0, mamba_num=4).mamba_evicted == 4
    assert cache.mamba_evictable_size() == 8
    gone = cache.evict(0, mamba_num=100)
    assert (gone.mamba_evicted, cache.mamba_evictable_size(), cache.total_size()) == (8, 0, 0)
    check(cache.tree)


def test_s52_a_namespace_is_part_of_every_key():
    for cache in [*both(), MambaRadixCache()]:
        options = {"mamba_value": 1} if isinstance(cache, MambaRadixCache) else {}
        cache.insert(RadixKey([1, 2], "image a"), **options)
        assert cache.match_prefix(RadixKey([1, 2], "image a")).prefix_len == 2
        assert cache.match_prefix(RadixKey([1, 2], "image b")).prefix_len == 0
        assert cache.match_prefix([1, 2]).prefix_len == 0
