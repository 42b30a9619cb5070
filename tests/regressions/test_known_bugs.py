"""Bugs that other systems had, as named tests: accounting (A), tree and locks (B), identity of what is cached (C).

Each test is named after the public thread or advisory in its docstring. Those of window pools, storage tiers and media
come with what they concern.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import DoubleFreeError, OwnershipError, ReceiptError, RequestStateError
from jaxcache.index.check import check
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.tree import RadixTree
from jaxcache.pages.allocator import PageState
from jaxcache.request import Request
from tests.model.manager_driver import assert_contents, small_manager, write_step
from tests.support.radix_caches import make_cache, prefill, sizes


def array(*values):
    return np.array(values, np.int32)


def prefilled(manager, tokens, rid="r"):
    request = Request(rid, tokens)
    assert manager.admit(request) is not None
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    return request


def conserved(manager, num_pages):
    """Free, cached and private pages of a running manager, which must be all there are."""
    manager.check_memory()
    counts = [manager.allocator.count(state) for state in (PageState.FREE, PageState.TREE, PageState.PRIVATE)]
    assert sum(counts) == num_pages
    return counts


# ---- A: who owns what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
def test_a1_nothing_is_lost_at_any_step_of_a_life(page_size):
    """sgl-project/sglang#11970: the pool leaked, and it was noticed when idle."""
    num_pages = 48 // page_size
    manager = small_manager(page_size, num_pages)
    request = Request("r", list(range(11)))
    manager.admit(request)
    conserved(manager, num_pages)
    for count in (3, 1, 7):
        plan = manager.extend([(request, count)])
        conserved(manager, num_pages)
        manager.run(write_step, plan)
        conserved(manager, num_pages)
    for token in range(6):
        request.output_ids.append(token)
        manager.run(write_step, manager.decode([request]))
        conserved(manager, num_pages)
    manager.retract(request)
    conserved(manager, num_pages)
    manager.admit(request)
    conserved(manager, num_pages)
    manager.finish(request)
    assert conserved(manager, num_pages)[2] == 0


def test_a2_a_partial_page_is_freed_as_a_page():
    """sgl-project/sglang#7130: pages used in part were freed token by token."""
    cache = make_cache(page_size=4)
    request = prefill(cache, list(range(6)))
    cache.cache_finished_req(request)
    assert sizes(cache) == (4, 0, 4, 60)


def test_a3_one_release_and_a_second_is_refused():
    """sgl-project/sglang-jax PR 982: a finished request's slot was freed by two paths."""
    manager = small_manager()
    request = prefilled(manager, list(range(6)))
    request.output_ids.append(1)
    plan = manager.decode([request])
    manager.finish(request)
    before = manager.allocator.free_pages.tolist()
    for again in (lambda: manager.finish(request), lambda: manager.cancel(plan), lambda: manager.run(write_step, plan)):
        with pytest.raises(RequestStateError):
            again()
    assert manager.allocator.free_pages.tolist() == before


def test_a4_a_shared_page_counts_once():
    """sgl-project/sglang#35270: evictable_size counted shared pages twice."""
    cache = make_cache(page_size=4)
    first, second = prefill(cache, list(range(9))), prefill(cache, [*range(8), 50])
    for request in (first, second):
        cache.cache_unfinished_req(request)
    assert sizes(cache) == (0, 8, 8, 64 - 8 - 4 - 4)
    cache.cache_finished_req(first)
    assert sizes(cache) == (0, 8, 8, 64 - 8 - 4)
    cache.cache_finished_req(second)
    assert sizes(cache) == (8, 0, 8, 64 - 8)


def test_a5_pages_of_a_step_that_never_ran_are_released_too():
    """sgl-project/sglang PR 13826: over-allocated length was not recorded, so it was never released."""
    manager = small_manager()
    request = Request("r", list(range(30)))
    manager.admit(request)
    manager.extend([(request, 30)])
    assert manager.allocator.count(PageState.PRIVATE) == 8
    manager.finish(request)
    assert conserved(manager, 16) == [16, 0, 0]


def test_a11_what_was_not_computed_is_not_published():
    """NVIDIA/TensorRT-LLM PR 15018 and vllm PR 56525: blocks were reusable before anything was in them."""
    manager = small_manager()
    request = Request("r", list(range(20)))
    manager.admit(request)
    manager.run(write_step, manager.extend([(request, 9)]))
    manager.extend([(request, 11)])
    manager.abort(request)
    assert manager.cache.match_prefix(list(range(20))).prefix_len == 8


def test_a12_a_double_free_raises_and_hits_stay():
    """LMCache PR 993: double frees made the hit rate decay to nothing."""
    cache = make_cache(page_size=4)
    allocator = cache.token_to_kv_pool_allocator
    slots = allocator.alloc(8)
    cache.insert(list(range(4)), slots[:4])
    allocator.free(slots[4:])
    with pytest.raises(DoubleFreeError):
        allocator.free(slots[4:])
    with pytest.raises(OwnershipError):
        allocator.free(slots[:4])
    assert cache.match_prefix(list(range(4))).prefix_len == 4
    assert sizes(cache) == (4, 0, 4, 60)


def test_a13_a_page_with_a_reader_is_never_freed():
    """LMCache PR 3130: batched eviction bypassed the reference count of a reader."""
    manager = small_manager(num_pages=8)
    reader = prefilled(manager, list(range(9)), "reader")
    manager.finish(prefilled(manager, [50] * 12, "old"))
    other = Request("other", [60] * 30)
    manager.admit(other)
    assert manager.extend([(other, 30)]) is None
    assert manager.extend([(other, 20)]) is not None  # evicts all that it can
    assert manager.cache.match_prefix([50] * 12).prefix_len == 0
    assert_contents(manager, [reader])


def test_a14_locks_come_back_in_any_order():
    """LMCache#1756 and #1130: unmatched and reordered pins leaked."""
    for order in itertools.permutations(range(3)):
        cache = RadixCache(None, None, 1)
        cache.insert([1, 2, 3, 4])
        receipts = [cache.inc_lock_ref(cache.match_prefix([1, 2, 3, 4][:n])) for n in (2, 4, 3)]
        for i in order:
            cache.dec_lock_ref(receipts[i])
            cache.check()
        assert (cache.evictable_size(), cache.protected_size()) == (4, 0)


def test_a16_a_node_keeps_no_array_of_others_alive():
    """sgl-project/sglang PR 21624: nodes kept views of the free list, and memory grew."""
    cache = make_cache(page_size=2)
    slots = cache.token_to_kv_pool_allocator.alloc(12)
    cache.insert(list(range(12)), slots)
    cache.inc_lock_ref(cache.match_prefix(list(range(6))))
    values = [node.value for node in cache.tree.nodes()]
    assert len(values) == 2
    slots[:] = 0
    assert all(value.base is None and value.all() for value in values)


def test_a17_an_admission_that_fails_loses_no_lock():
    """sgl-project/sglang PR 16067: taken in match, lost when scheduling then failed."""
    manager = small_manager(num_pages=6)
    request = prefilled(manager, list(range(13)))
    manager.retract(request, offload=True)
    manager.cache.evict(8)
    other = prefilled(manager, [7] * 17, "other")
    for _ in range(3):
        assert manager.admit(request) is None
        manager.check_memory()
        assert manager.cache.protected_size() == 16  # the other's alone
    manager.finish(other)
    assert manager.admit(request) == 12


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a19_no_more_is_taken_than_is_written(page_size):
    """sgl-project/sglang PR 20872: a step more was allocated than written."""
    manager = small_manager(page_size, 48 // page_size)
    request = Request("r", list(range(5)))
    manager.admit(request)
    manager.run(write_step, manager.extend([(request, 5)]))
    for token in range(12):
        request.output_ids.append(token)
        manager.run(write_step, manager.decode([request]))
        assert request.num_pages == -(-request.kv_len // page_size)


def test_a20_when_everything_is_locked_the_answer_is_none_and_retracting_helps():
    """sgl-project/sglang#27024: pinned KV without a cap or a safe release: hold and wait."""
    manager = small_manager(num_pages=8)
    requests = [prefilled(manager, [i] * 16, str(i)) for i in range(2)]
    for request in requests:
        request.output_ids.append(1)
    assert manager.decode(requests) is None
    manager.retract(requests[1])
    manager.run(write_step, manager.decode(requests[:1]))
    assert_contents(manager, requests[:1])


# ---- B: tree, locks, recency -------------------------------------------------------------------------------------


def test_b1_no_lock_without_receipt_and_no_count_below_nought():
    """UbiquitousLearning/mllm PR 656: dec without inc made a count of -1."""
    cache = RadixCache(None, None, 1)
    cache.insert([1, 2])
    receipt = cache.inc_lock_ref(cache.match_prefix([1, 2]))
    cache.dec_lock_ref(receipt)
    for _ in range(2):
        with pytest.raises(ReceiptError):
            cache.dec_lock_ref(receipt)
    assert [node.locks for node in cache.tree.nodes()] == [0]
    assert (cache.evictable_size(), cache.protected_size()) == (2, 0)


def test_b2_a_lock_survives_splits_of_what_it_covers():
    """sgl-project/sglang#24153: inc and dec disagreed about the path after a split."""
    cache = RadixCache(None, None, 1)
    cache.insert(list(range(8)))
    receipt = cache.inc_lock_ref(cache.match_prefix(list(range(8))))
    for cut in (5, 2, 7, 1):
        cache.insert([*range(cut), 99, cut])
    assert len(list(cache.tree.nodes())) == 9
    assert cache.protected_size() == 8
    cache.evict(100)
    assert cache.match_prefix(list(range(8))).prefix_len == 8
    assert cache.dec_lock_ref(receipt) == 8
    assert cache.protected_size() == 0
    cache.check()


def test_b3_a_value_that_came_after_the_lock_is_not_unlocked_by_it():
    """sgl-project/sglang PR 27147: a tombstone, revived between inc and dec, lost a lock it never had."""
    tree = RadixTree(1, (FULL, Component("window", 2)))
    tree.insert(RadixKey([1, 2]), (array(1, 2), array(11, 12)))
    long = RadixKey([1, 2, 3, 4])
    tree.insert(long, (array(1, 2, 3, 4), array(11, 12, 13, 14)))
    receipt = tree.lock(tree.match(long))
    assert tree.evict(2, component=1).values[1].tolist() == [11, 12]  # behind the window: a hole
    healed = tree.insert(RadixKey([1, 2]), (array(5, 6), array(15, 16)))
    assert healed.spare[1].tolist() == []
    check(tree)
    tree.unlock(receipt)
    check(tree)
    assert tree.protected == [0, 0]


def test_b4_a_locked_leaf_survives_eviction_of_the_other_component():
    """kvcache-ai/sglang#49: window eviction met a leaf whose other lock was held."""
    tree = RadixTree(1, (FULL, Component("window", 2)))
    key = RadixKey([1, 2, 3, 4])
    tree.insert(RadixKey([1, 2]), (array(1, 2), array(11, 12)))
    tree.insert(key, (array(1, 2, 3, 4), array(11, 12, 13, 14)))
    receipt = tree.lock(tree.match(key))
    assert tree.evict(100, component=1).values[1].tolist() == [11, 12]
    assert tree.evict(100).nodes == []
    assert tree.match(key).length == 4
    tree.unlock(receipt)
    check(tree)


@pytest.mark.parametrize("page_size", [2, 16, 64])
def test_b10_an_unaligned_key_makes_no_empty_node(page_size):
    """sgl-project/sglang PR 28692: a match that rounds to nothing created an empty node."""
    cache = RadixCache(None, None, page_size)
    tokens = list(range(3 * page_size))
    cache.insert(tokens)
    for length in (1, page_size - 1, page_size + 1, 2 * page_size - 1):
        receipt = cache.inc_lock_ref(cache.match_prefix([*tokens[:length], -1]))
        cache.insert([*tokens[:length], *[-2] * page_size])
        cache.check()
        cache.dec_lock_ref(receipt)
    assert all(node.key for node in cache.tree.nodes())


def test_b11_a_key_shorter_than_a_page_leaves_no_ghost():
    """sgl-project/sglang PR 31659: a node of length nought poisoned every lookup."""
    cache = RadixCache(None, None, 4)
    for tokens in ([], [1], [1, 2, 3]):
        assert cache.insert(RadixKey(tokens, "space")) == 0
        assert cache.match_prefix(RadixKey(tokens, "space")).prefix_len == 0
    cache.dec_lock_ref(cache.inc_lock_ref(cache.match_prefix([1])))
    assert not cache.tree.roots
    cache.check()


def test_b20_a_lock_covers_what_was_matched_and_no_more():
    """bytedance-iaas/sglang PR 508: a match inside a node locked all of it, and leaves stayed for ever."""
    cache = RadixCache(None, None, 1)
    cache.insert(list(range(10)))
    receipt = cache.inc_lock_ref(cache.match_prefix([0, 1, 2, 77]))
    assert (cache.evictable_size(), cache.protected_size()) == (7, 3)
    assert cache.evict(100) == 7
    cache.dec_lock_ref(receipt)
    assert cache.evict(100) == 3


def test_b21_a_page_that_is_written_has_one_owner():
    """Avarok atlas#1193: a partial page was shared with a second writer, who wrote over the first."""
    manager = small_manager()
    first = prefilled(manager, list(range(10)), "first")
    second = prefilled(manager, list(range(10)), "second")
    assert second.cached_tokens == 8
    for step in range(4):
        for i, request in enumerate((first, second)):
            request.output_ids.append(100 * i + step)
        manager.run(write_step, manager.decode([first, second]))
    assert_contents(manager, [first, second])


def test_b22_every_allocation_may_evict():
    """NVIDIA/TensorRT-LLM#17926: committing allocated, which evicted blocks of the request being committed."""
    manager = small_manager(num_pages=10)
    requests = [Request(str(i), [i] * 7) for i in range(4)]
    for i in range(24):
        request = requests[i % 4]
        if i >= 4:
            manager.finish(request)
            request = requests[i % 4] = Request(str(i), [i] * 7)
        manager.admit(request)
        manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
        assert_contents(manager, [r for r in requests if r.kv_len])


# ---- C: what is the same, and what only looks so -----------------------------------------------------------------


def test_c1_names_do_not_depend_on_the_interpreter():
    """CVE-2025-25183: the builtin hash, whose collisions can be predicted, was the identity of a block."""
    program = (
        "from jaxcache.index.page_hashes import *; from jaxcache.index.key import *;"
        "print(page_hashes(pack([1, 2, 3, 4]), 8, namespace_seed(Namespace(lora_id='x').encode()))[-1].hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    first = hashlib.sha256(b"jaxcache/namespace/1" + Namespace(lora_id="x").encode()).digest()
    for tokens in ([1, 2], [3, 4]):
        first = hashlib.sha256(first + np.array(tokens, "<i4").tobytes()).digest()
    assert found == {first.hex() + "\n"}


@pytest.mark.parametrize("page_size", [1, 2])
def test_c2_c3_c4_a_hit_is_a_comparison_of_tokens(page_size):
    """vllm PR 54727, Megatron-LM PR 4158, openvino.genai#3722: hashes that collide were taken for equal tokens."""
    cache = RadixCache(None, None, page_size)
    tokens = [5, 100, 7, 8]
    cache.insert(tokens)
    lookalikes = [
        [5 + 31, 100 - 1, 7, 8],  # collides in a polynomial rolling hash
        [100, 5, 7, 8],  # the same in another order
        [5 + 2**16, 100, 7, 8],  # the same in 16 bits
        [5 - 2**31, 100, 7, 8],
        [-5, 100, 7, 8],
    ]
    for other in lookalikes:
        assert cache.match_prefix(other).prefix_len == 0
    assert cache.match_prefix([5, 100, 7 + 31, 8 - 1]).prefix_len == 2
    assert cache.match_prefix(tokens).prefix_len == 4


def test_c5_fields_of_a_namespace_are_told_apart():
    """vllm#44701: lora "X" and salt "X" were the same key."""
    values = [None, "", "x", "l", b"x", "xl", "lt\x01\x00\x00\x00x"]
    spaces = [Namespace(*fields) for fields in itertools.product(values, repeat=3)]
    spaces += [Namespace(media=media) for media in ((b"xx",), (b"xx", b"xx"), (b"xxxx",), (b"xx", b"l" * 2))]
    encoded = {space.encode() for space in spaces}
    assert len(encoded) == len(spaces)
    assert len({namespace_seed(name) for name in encoded}) == len(spaces)


def test_c6_another_generation_of_an_adapter_hits_nothing():
    """vllm#30931: an adapter reloaded in place under its old name reused KV of the old weights."""
    cache = RadixCache(None, None, 1)
    cache.insert(RadixKey([1, 2], Namespace(lora_id="adapter@1")))
    assert cache.match_prefix(RadixKey([1, 2], Namespace(lora_id="adapter@2"))).prefix_len == 0
    assert cache.match_prefix(RadixKey([1, 2], Namespace(lora_id="adapter@1"))).prefix_len == 2


@pytest.mark.parametrize("field", ["extra_key", "lora_id", "cache_salt"])
def test_c7_c16_another_namespace_never_hits_and_the_same_one_does(field):
    """vllm#44250, ktransformers#2184: the salt or adapter was computed and never reached the cache."""
    manager = small_manager()
    for value, found in (("a", 0), ("b", 0), ("a", 8), ("b", 8)):
        request = Request(value, list(range(10)), extra_key=Namespace(**{field: value}))
        assert manager.admit(request) == found
        if not found:
            manager.run(write_step, manager.extend([(request, 10)]))
        manager.finish(request)


def test_c11_placeholders_of_other_images_are_other_tokens():
    """ROCm/ATOM PR 1358: all images had the same placeholder tokens, and so the same KV."""
    cache = RadixCache(None, None, 1)
    cache.insert(RadixKey([9, 9, 9], Namespace(media=(b"cat",))))
    assert cache.match_prefix(RadixKey([9, 9, 9], Namespace(media=(b"dog",)))).prefix_len == 0
    assert cache.match_prefix(RadixKey([9, 9, 9], Namespace(media=(b"cat",)))).prefix_len == 3


def test_c15_names_of_blocks_know_their_namespace():
    """sgl-project/sglang#24568: block hashes of events ignored the salt."""
    packed = np.arange(4, dtype="<i4").tobytes()
    seeds = [namespace_seed(space.encode()) for space in (Namespace(), Namespace(cache_salt="a"), Namespace("a"))]
    assert len({page_hashes(packed, 16, seed)[0] for seed in seeds}) == 3
