"""More bugs that other systems had, as named tests: accounting (A), tree and locks (B), identity of what is cached (C).

Those of `test_known_bugs.py` concern every cache; these need windows, states, pairs, host copies or events to happen.
"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxcache.errors import ArgumentError, CacheError, OwnershipError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.pages.allocator import PageState
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.request import Request
from tests.caches.content import ContentLife, Shape
from tests.caches.flavours import make_mamba_cache, make_swa_cache, prefill, put, save
from tests.model.manager_driver import assert_contents, small_manager, write_step
from tests.support.radix_caches import make_cache

TOKENS = list(range(12))


# ---- A: who owns what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_swa_cache, make_mamba_cache], ids=["window", "state"])
def test_a10_what_cannot_be_claimed_changes_no_counter(make):
    """NVIDIA/TensorRT-LLM PR 12834 and #11879: a block was moved before it was claimed, and counters went below 0."""
    cache = make(2, size=64, size_swa=64) if make is make_swa_cache else make(size=64)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, TOKENS[:4])
    pages = allocator.alloc_pages(12)
    allocator.release(pages[10:11], PageState.PRIVATE)  # one of those that the tree lacks is nobody's
    state = 0 if make is make_swa_cache else cache.state_allocator.alloc_track_slot()
    before = cache.tree.evictable.copy(), cache.tree.protected.copy(), allocator.states.tolist()
    with pytest.raises(CacheError):
        cache.insert_pages(TOKENS, pages, state)
    assert (cache.tree.evictable, cache.tree.protected, allocator.states.tolist()) == before
    assert cache.match_prefix(TOKENS).prefix_len == 4
    cache.check()


@pytest.mark.parametrize("who", ["request", "tree"])
def test_a15_a_state_has_one_who_frees_it(who):
    """sgl-project/sglang#13483: a prefetch's host pages were freed by two threads, and given to two requests."""
    cache = make_mamba_cache()
    states = cache.state_allocator
    request = prefill(cache, TOKENS)
    state = save(cache, request)
    cache.cache_unfinished_req(request)  # the snapshot is the tree's
    if who == "tree":
        cache.cache_finished_req(request)
        cache.evict(0, 0, 100)
    free = states.available_size()
    with pytest.raises(OwnershipError):  # a double free is one
        states.free_track_slot(state)
    assert states.available_size() == free
    taken = states.alloc_pages(free).tolist()
    assert len(set(taken)) == free and (state in taken) == (who == "tree")


@pytest.mark.parametrize("window", [None, 3])
def test_a18_eviction_frees_nothing_that_somebody_reads(window):
    """vllm#37076: pages in use were said to be handed out under eviction. Here a freed page is poisoned at once."""
    life = ContentLife(Shape(page_size=2, window=window, num_pages=24, num_windows=24, num_rows=2))
    for seed in (0, 100):
        assert life.admit(bytes(range(seed, seed + 8)))
        life.compute(-1, 8, 0, save=False, share=True, drop=True)
    for i in range(30):
        life.insert(bytes([200 + i % 7] * 6), b"")
        life.compute(i % 2, 1, i % 2, save=False, share=i % 5 == 0, drop=True)
        life.evict(1, 1, 0)
        life.check()
    life.wind_down()


# ---- B: tree, locks, recency -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_swa_cache, make_mamba_cache], ids=["window", "window+state"])
def test_b5_dropping_out_of_window_is_no_silent_nothing(make):
    """sgl-project/sglang PR 28161: a hasattr made the early release of windows do nothing on one of the caches."""
    cache = make(2, size=64, size_swa=64) if make is make_swa_cache else make(window=2)
    request = prefill(cache, TOKENS)
    before = cache.token_to_kv_pool_allocator.swa_available_size()
    cache.drop_out_of_window(request)
    assert cache.token_to_kv_pool_allocator.swa_available_size() == before + 10
    cache.cache_finished_req(request)
    cache.check()


@pytest.mark.parametrize("is_eagle", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 9])
@pytest.mark.parametrize("hole", [0, 2, 4])
def test_b8_b9_what_was_inserted_is_found(window, hole, is_eagle):
    """sgl-project/sglang PR 29349 and PR 40681: an insert followed tokens and a match validity, or pairs were counted
    as tokens; nodes that nobody could find and nobody had locked named the slots of a running request."""
    cache = make_swa_cache(window, 2, size=64, size_swa=64, is_eagle=is_eagle)
    for end in (4, 8):
        put(cache, TOKENS[: end + is_eagle])
    cache.evict(0, hole)
    for end in (5, 9, 12):
        request = prefill(cache, TOKENS[:end])
        cache.cache_unfinished_req(request)
        expected = (end - is_eagle) // 2 * 2
        assert request.protected_len == expected
        assert cache.match_prefix(TOKENS[:end]).prefix_len == expected
        cache.check()
        cache.cache_finished_req(request)
    assert cache.total_size() == expected  # one path


def test_b17_the_last_lock_given_back_makes_room():
    """sgl-project/mini-sglang PR 45: a count that reached nought raised, so nothing could ever be evicted."""
    cache = make_swa_cache(2, size=64, size_swa=64)
    put(cache, TOKENS)
    locks = [cache.inc_lock_ref(cache.match_prefix(TOKENS)) for _ in range(3)]
    for left in (2, 1, 0):
        assert cache.evict(100, 100) == 0
        cache.dec_lock_ref(locks[left])
    assert {node.locks for node in cache.tree.nodes()} == {0}
    assert cache.evict(100, 100) == 12


@pytest.mark.parametrize("first", [(0, 100), (100, 0)], ids=["windows", "pages"])
def test_b18_b23_whatever_is_evicted_takes_along_what_leads_nowhere(first):
    """taco-project/FlexKV PR 195, sgl-project/sglang PR 23391: holes above an evicted leaf stayed, or the walk up to
    them met a lock and raised."""
    cache = make_swa_cache(2, size=64, size_swa=64)
    for end in (4, 8, 12):
        put(cache, TOKENS[:end])
    lock = cache.inc_lock_ref(cache.match_prefix(TOKENS[:4]))
    cache.evict(0, 1)
    assert [node.others[0].value is None for node in cache.tree.nodes()] == [False, True, False]  # only locked above
    cache.evict(*first)
    assert cache.total_size() == 4
    assert cache.match_prefix(TOKENS).prefix_len == 4
    cache.check()
    cache.dec_lock_ref(lock)
    cache.evict(*first)
    assert cache.total_size() == 0


# ---- C: what is the same, and what only looks so -----------------------------------------------------------------


def computed(manager, tokens, **options):
    request = Request("r", tokens, **options)
    assert manager.admit(request) is not None
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    return request


def test_c8_a_row_that_another_adapter_had_says_nothing_of_it():
    """ggml-org/llama.cpp#26207: the cache of a slot was gone on with under another adapter."""
    manager = small_manager(max_running=1)
    for tag, adapter in enumerate(("a", "b", None)):
        request = computed(manager, list(range(10)), tag=tag, extra_key=Namespace(lora_id=adapter))
        assert (request.req_pool_idx, request.cached_tokens) == (0, 0)
        assert_contents(manager, [request])
        manager.finish(request)


def test_c13_a_copy_on_the_host_belongs_to_its_request():
    """sgl-project/sglang#37160: the salt was dropped on the way to another tier."""
    manager = small_manager()
    kept = computed(manager, list(range(10)), tag=1, extra_key=Namespace(cache_salt="a"))
    manager.retract(kept, offload=True)
    manager.cache.evict(100)
    other = computed(manager, list(range(10)), tag=2, extra_key=Namespace(cache_salt="b"))
    assert other.cached_tokens == 0
    assert manager.admit(kept) == 9
    assert_contents(manager, [kept, other])
    manager.finish(kept)
    assert manager.cache.match_prefix(RadixKey(list(range(10)), Namespace(cache_salt="b"))).prefix_len == 8


def test_c14_blocks_of_equal_tokens_under_other_salts_have_other_names():
    """sgl-project/sglang#26747: keys of the storage tier ignored the salt."""
    cache = make_cache(page_size=4, enable_kv_cache_events=True)
    spaces = [None, Namespace(cache_salt="a"), Namespace(cache_salt="b"), Namespace(lora_id="a"), Namespace("a")]
    for space in spaces:
        cache.insert(RadixKey(TOKENS[:8], space), cache.token_to_kv_pool_allocator.alloc(8))
    names = [name for event in cache.take_events() for name in event.block_hashes]
    assert len(names) == len(set(names)) == 2 * len(spaces)


@pytest.mark.parametrize("other", [{"dtype": jnp.float16}, {"layer_num": 3}, {"head_num": 1, "head_dim": 4}])
def test_c18_c20_c23_rows_of_another_dtype_or_layout_are_not_loaded(other):
    """sgl-project/sglang#33268, pegaflow PR 367, LMCache#4463: bytes of one layout were read as another."""
    sides = {"size": 8, "page_size": 4, "dtype": jnp.bfloat16, "layer_num": 2, "head_num": 2, "head_dim": 2}
    theirs = MHATokenToKVPool.create(MHAConfig(**sides | other)).get_cpu_copy([1, 2])
    pool = MHATokenToKVPool.create(MHAConfig(**sides))
    with pytest.raises(ArgumentError, match="same layers, rows and dtype"):
        pool.load_cpu_copy(theirs, [1, 2])
    assert not pool.is_stale


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_c22_a_draft_models_rows_are_found_only_where_the_next_token_is_the_same(page_size):
    """sgl-project/sglang PR 10846 and PR 19897: a prefix was found whose draft rows were of another next token."""
    cache = make_cache(page_size, is_eagle=True)
    for last in (50, 8):
        cache.cache_finished_req(prefill(cache, [*range(8), last]))
    here, there = (cache.match_prefix([*range(8), last, 9]) for last in (50, 8))
    assert here.prefix_len == there.prefix_len == 8
    assert (here.pages == there.pages).tolist() == [True] * (8 // page_size - 1) + [False]
    assert cache.match_prefix([*range(7), 60, 61]).prefix_len == 6 // page_size * page_size
