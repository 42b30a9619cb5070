"""Sharp edges of the systems before us, S-10 to S-17, S-34 and S-53: each stays fixed."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import BrokenInvariantError, ReceiptError
from jaxcache.events.events import BlockRemoved, BlockStored
from jaxcache.index.check import draw
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.pages.allocator import PageState
from jaxcache.request import Request
from tests.model.manager_driver import small_manager, write_step
from tests.support.counting import count_calls
from tests.support.radix_caches import make_cache, prefill


def cached(page_size, *sequences, policy=Policy.LRU):
    """A cache without allocator that holds these sequences; page ids count up."""
    cache = RadixCache(None, None, page_size, policy=policy)
    for i, tokens in enumerate(sequences):
        cache.insert_pages(RadixKey(tokens), np.arange(1, len(tokens) // page_size + 1, dtype=np.int32) + 1000 * i)
    return cache


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("outputs", [0, 1, 2])
def test_s10_a_disabled_cache_frees_every_slot_of_a_request_without_output(page_size, outputs):
    cache = make_cache(page_size, disable=True)
    request = prefill(cache, list(range(9)))
    request.output_ids += [1] * outputs
    cache.cache_finished_req(request)
    assert cache.token_to_kv_pool_allocator.available_size() == 64


def test_s11_looking_up_changes_no_structure():
    cache = cached(1, [1, 2, 3, 4, 5, 6, 7, 8])
    before = draw(cache.tree)
    for end in range(9):
        assert cache.match_prefix([*range(1, end + 1), 99]).prefix_len == end
    assert draw(cache.tree) == before
    assert len(list(cache.tree.nodes())) == 1


@pytest.mark.parametrize("page_size", [2, 4, 16])
def test_s12_a_match_is_whole_pages_and_never_longer_than_the_key(page_size):
    tokens = list(range(5 * page_size))
    cache = cached(page_size, tokens)
    for length in range(len(tokens) + 1):
        assert cache.match_prefix(tokens[:length]).prefix_len == length // page_size * page_size
        cut = [*tokens[:length], -1, *tokens[length:]]
        assert cache.match_prefix(cut).prefix_len == length // page_size * page_size
    unaligned = cached(page_size, tokens[: 2 * page_size + 1])
    assert unaligned.total_size() == 2 * page_size
    assert unaligned.match_prefix(tokens[: 2 * page_size + 1]).prefix_len == 2 * page_size


def test_s13_an_extra_unlock_is_refused_and_unprotects_nobody():
    cache = cached(1, [1, 2, 3])
    mine, yours = (cache.inc_lock_ref(cache.match_prefix([1, 2, 3])) for _ in range(2))
    assert cache.dec_lock_ref(mine) == 0
    with pytest.raises(ReceiptError, match="given back already"):
        cache.dec_lock_ref(mine)
    assert cache.evict(3) == 0
    assert cache.protected_size() == 3
    assert cache.dec_lock_ref(yours) == 3
    assert cache.evict(3) == 3


@pytest.mark.parametrize("policy", Policy)
def test_s14_eviction_costs_what_it_evicts_however_large_the_tree(policy):
    def cost(siblings):
        cache = cached(1, *([0, i] for i in range(1, siblings)), policy=policy)
        cache.evict(1)  # a first one, so that a heap has been looked at
        return count_calls(lambda: cache.evict(50))

    assert cost(20_000) <= 1.05 * cost(200)


def test_s14_only_the_shortage_is_evicted():
    manager = small_manager(page_size=4, num_pages=16)
    manager.warm_up(write_step)
    for tokens in ([1] * 24, [2] * 24):
        request = Request("old", tokens)
        manager.admit(request)
        manager.run(write_step, manager.extend([(request, 24)]))
        manager.finish(request)
    assert (manager.cache.evictable_size(), manager.allocator.available_size()) == (48, 16)
    request = Request("new", [3] * 20)
    manager.admit(request)
    assert manager.extend([(request, 20)]) is not None
    # 20 tokens need 4 more than are free; the oldest run has 24 of them, and no second one is touched.
    assert manager.cache.evictable_size() == 24


def test_s15_block_names_know_position_prefix_and_namespace():
    cache = RadixCache(None, None, 2, enable_kv_cache_events=True)
    page = [7, 7]
    keys = [
        RadixKey(page * 3),
        RadixKey([1, 2, *page]),
        RadixKey(page, "tenant"),
        RadixKey(page, Namespace(lora_id="tenant")),
    ]
    for key in keys:
        cache.insert(key, None)
    named = [name for event in cache.take_events() for name in event.block_hashes]
    assert len(set(named)) == len(named) == 3 + 2 + 1 + 1
    cache.evict(6)
    (removed,) = cache.take_events()
    assert removed == BlockRemoved(named[:3])
    cache.insert(keys[0], None)
    assert [event.block_hashes for event in cache.take_events()] == [named[:3]]


def test_s16_the_first_block_of_a_node_has_a_parent_and_a_split_is_no_event():
    cache = RadixCache(None, None, 1, enable_kv_cache_events=True)
    cache.insert([1, 2, 3, 4])
    (root,) = cache.take_events()
    assert root.parent_block_hash is None
    cache.inc_lock_ref(cache.match_prefix([1, 2]))
    assert len(list(cache.tree.nodes())) == 2
    assert cache.take_events() == []
    cache.insert([1, 2, 3, 9])
    assert cache.take_events() == [
        BlockStored([page_name([1, 2, 3, 9])], root.block_hashes[2], [9], 1),
    ]


def page_name(tokens):
    digest = page_hashes(np.array(tokens, "<i4").tobytes(), 4)[-1]
    return int.from_bytes(digest[:8], "big", signed=True)


BY_USE, BY_AGE, BY_AGE_BACKWARDS, BY_USE_BACKWARDS = [2, 3, 1], [1, 2, 3], [3, 2, 1], [1, 3, 2]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (Policy.LRU, BY_USE),
        (Policy.LFU, BY_USE),
        (Policy.SLRU, BY_USE),
        (Policy.PRIORITY, BY_USE),
        (Policy.S3FIFO, BY_USE),
        (Policy.ADAPTIVE, BY_USE),
        (Policy.FIFO, BY_AGE),
        (Policy.FILO, BY_AGE_BACKWARDS),
        (Policy.MRU, BY_USE_BACKWARDS),
    ],
)
def test_s17_every_policy_on_offer_keeps_what_it_needs_to_decide(policy, order):
    tree = RadixTree(1, policy=policy)
    for token in (1, 2, 3):
        tree.insert(RadixKey([token]), (np.array([token], np.int32),))
    tree.match(RadixKey([1]))
    assert [tree.evict(1).values[0].tolist() for _ in range(3)] == [[token] for token in order]


def test_s17_lfu_counts_every_lookup_also_of_what_is_locked_and_across_a_split():
    tree = RadixTree(1, policy=Policy.LFU)
    for tokens in ([1, 1], [2], [3]):
        tree.insert(RadixKey(tokens), (np.array(tokens, np.int32),))
    lock = tree.lock(tree.match(RadixKey([1, 1])))
    tree.match(RadixKey([1, 1]))
    tree.unlock(tree.lock(tree.match(RadixKey([1, 7]))))  # splits: the upper half has one hit more than the lower
    for token in (2, 2, 2, 3, 3, 3):
        tree.match(RadixKey([token]))
    tree.unlock(lock)
    assert [tree.policies[0].hits(node) for node in tree.nodes() if node.tokens == 1 and node.end == 2] == [2]
    order = [tree.evict(1).values[0].tolist() for _ in range(4)]
    assert order == [[1], [2], [3], [1]]  # 2 hits, then 3 each in order of use: the upper half was unlocked last


def test_s17_priority_goes_before_use():
    tree = RadixTree(1, policy=Policy.PRIORITY)
    for token, priority in ((1, 5), (2, 0), (3, 1)):
        tree.insert(RadixKey([token]), (np.array([token], np.int32),), priority=priority)
    tree.match(RadixKey([2]))
    assert [tree.evict(1).values[0].tolist() for _ in range(3)] == [[2], [3], [1]]


GOLDEN = {
    (1, 2, 3, 4): "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72",
    (5, 6, 7, 8): "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6",
}


def test_s34_chained_hashes_are_the_originals():
    tokens = np.arange(1, 9, dtype="<i4")
    assert [digest.hex() for digest in page_hashes(tokens.tobytes(), 16)] == list(GOLDEN.values())
    first = bytes.fromhex(GOLDEN[1, 2, 3, 4])
    assert page_hashes(tokens[4:].tobytes(), 16, first)[0].hex() == GOLDEN[5, 6, 7, 8]
    assert int.from_bytes(first[:8], "big", signed=True) == -3488128144981237669


def test_s34_hashing_costs_pages_not_tokens():
    def cost(page_size):
        packed = np.arange(4 * page_size, dtype="<i4").tobytes()
        return count_calls(lambda: page_hashes(packed, 4 * page_size))

    assert cost(4) == cost(4096)


def test_s34_the_default_namespace_adds_nothing_and_others_do():
    packed = np.arange(4, dtype="<i4").tobytes()
    assert namespace_seed(Namespace().encode()) == b""
    other = page_hashes(packed, 16, namespace_seed(Namespace(extra_key="a").encode()))
    assert other != page_hashes(packed, 16)


def test_s53_the_memory_check_sees_errors_that_cancel_out():
    manager = small_manager(page_size=4, num_pages=16)
    manager.warm_up(write_step)
    requests = [Request(str(i), [i] * 6) for i in range(2)]
    for request in requests:
        manager.admit(request)
        manager.run(write_step, manager.extend([(request, 6)]))
    manager.check_memory()  # at any time, running requests and all
    a, b = (request.req_pool_idx for request in requests)
    tail = manager.req_to_token_pool.row_pages(b, 1, 2).copy()
    # Both own page x now and nobody owns page y: one counted twice, one not at all.
    manager.req_to_token_pool.write_pages(b, 1, manager.req_to_token_pool.row_pages(a, 1, 2).copy())
    assert manager.allocator.count(PageState.PRIVATE) == 2
    with pytest.raises(BrokenInvariantError, match="private pages"):
        manager.check_memory()
    manager.req_to_token_pool.write_pages(b, 1, tail)
    manager.check_memory()
    # A row that is free and in use, and another that is neither: the number of free rows is right.
    manager.req_to_token_pool.alloc(1)
    manager.req_to_token_pool.free(a)
    assert manager.req_to_token_pool.available_size() == manager.config.max_running - 2
    with pytest.raises(BrokenInvariantError, match="rows"):
        manager.check_memory()
