"""Wrong use that once changed something before it was refused, raised an untyped error, or was answered wrongly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, OwnershipError
from jaxcache.index.check import check
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool

SIZES = {"size": 16, "page_size": 4, "dtype": jnp.float32, "layer_num": 2, "start_layer": 4}


def mha(**sizes):
    return MHATokenToKVPool.create(MHAConfig(**(SIZES | {"head_num": 1, "head_dim": 6} | sizes)))


def mla(**sizes):
    return MLATokenToKVPool.create(MLAConfig(**(SIZES | {"kv_lora_rank": 4, "qk_rope_head_dim": 2} | sizes)))


def array(*values):
    return np.array(values, np.int32)


# ---- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", [TokenToKVPoolAllocator(4), PagedTokenToKVPoolAllocator(16, 4)])
@pytest.mark.parametrize("page", [*range(-20, 1), 5, 6, 2**31 - 1, -(2**31)])
def test_no_page_outside_the_pool_stands_for_one_inside(allocator, page):
    """-6 of 4 pages read the state of page 4, was counted as free, and then ended in an IndexError."""
    allocator.clear()
    allocator.alloc_pages(4)
    before = allocator.available_size(), allocator.states.tolist(), allocator.free_pages.tolist()
    for attempt in (
        lambda: allocator.release([page], PageState.PRIVATE),
        lambda: allocator.release([1, page], PageState.PRIVATE),
        lambda: allocator.release([page, 1], PageState.PRIVATE),
        lambda: allocator.transfer([page], PageState.PRIVATE, PageState.TREE),
        lambda: allocator.owner_of([page] if page else [-1]),
    ):
        with pytest.raises(OwnershipError):
            attempt()
    slot = page * allocator.page_size
    if -(2**31) <= slot < 2**31:
        with pytest.raises(OwnershipError):
            allocator.free([slot])
    assert before == (allocator.available_size(), allocator.states.tolist(), allocator.free_pages.tolist())


# ---- keys and namespaces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "rule"), [(2**32 + 4, "must fit int32"), (-4, r"must be in \[0, 2\*\*31\)")])
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_slot_that_does_not_fit_is_not_taken_for_another(slot, rule, page_size):
    """With pages of one slot, 2**32 + 4 was cached as slot 4, which the request owned."""
    allocator = PagedTokenToKVPoolAllocator(8, page_size) if page_size > 1 else TokenToKVPoolAllocator(8)
    mine = allocator.alloc(8)
    cache = RadixCache(None, allocator, page_size)
    with pytest.raises(ArgumentError, match=rule):
        cache.insert(list(range(page_size)), np.arange(slot, slot + page_size))
    assert (allocator.owner_of(mine // page_size) == PageState.PRIVATE).all()
    assert cache.total_size() == 0


@pytest.mark.parametrize("amount", [-1, 1.5, "1", None])
def test_amounts_to_evict_are_integers(amount):
    """1.5 tokens were evicted, and "1" was a TypeError."""
    rule = "not be negative" if amount == -1 else "be an integer"
    cache = RadixCache(None, None, 1)
    cache.insert([1, 2, 3])
    for name in ("num_tokens", "swa_num_tokens", "mamba_num"):
        with pytest.raises(ArgumentError, match=f"{name} must {rule}"):
            cache.evict(**({"num_tokens": 0} | {name: amount}))
    for name in ("pages", "states", "without_window"):
        with pytest.raises(ArgumentError, match=f"{name} must {rule}"):
            cache.make_room(**({"pages": 0} | {name: amount}))
    assert cache.total_size() == 3


def test_a_key_is_not_packed_again_without_its_namespace():
    """A key is iterable, so packing it once more gave the same tokens in the default namespace: anybody's KV."""
    key = RadixKey([1, 2, 3], extra_key="tenant")
    for attempt in (lambda: RadixKey(key), lambda: RadixKey([0]).extended(key)):
        with pytest.raises(ArgumentError, match="namespace"):
            attempt()


def test_every_text_is_a_namespace_of_its_own():
    """Half of a surrogate pair, as in a salt cut from UTF-16, ended in a UnicodeEncodeError."""
    texts = ["", "\ud800", "\udfff", "\ud800\udfff", "\U000103ff", "?", "\ufffd"]
    assert len({Namespace(cache_salt=text).encode() for text in texts}) == len(texts)
    for media in ("ab", b"ab", None):
        with pytest.raises(ArgumentError, match="media must be a tuple"):
            Namespace(media=media).encode()


# ---- the tree ----------------------------------------------------------------------------------------------------


def test_a_negative_priority_goes_before_none():
    """It counted as 0, so the last one used among both stayed."""
    tree = RadixTree(1, policy=Policy.PRIORITY)
    for token, priority in ((1, -5), (2, 0), (3, -1)):
        tree.insert(RadixKey([token]), (array(token),), priority=priority)
    tree.match(RadixKey([1]))
    assert [tree.evict(1).values[0].tolist() for _ in range(3)] == [[1], [3], [2]]


def test_a_request_without_priority_raises_a_negative_one():
    tree = RadixTree(1, policy=Policy.PRIORITY)
    tree.insert(RadixKey([1]), (array(1),), priority=-5)
    tree.insert(RadixKey([2]), (array(2),), priority=-1)
    tree.insert(RadixKey([1]), (array(9),))
    assert tree.evict(1).values[0].tolist() == [2]
    check(tree)


def test_a_priority_that_is_no_integer_moves_no_page():
    """It ended in a TypeError, after the tree had taken the pages."""
    tree = RadixTree(1, policy=Policy.PRIORITY)
    claimed = []
    for priority in ("high", None, 1.5):
        with pytest.raises(ArgumentError, match="priority must be an integer"):
            tree.insert(RadixKey([1]), (array(1),), priority=priority, claim=claimed.append)
    assert not claimed
    assert len(tree) == 0
    tree.insert(RadixKey([1]), (array(1),), priority=np.int64(3), claim=claimed.append)
    assert len(claimed) == 1


def test_locks_and_receipts_of_another_type_are_refused():
    cache = RadixCache(None, None, 4)
    with pytest.raises(ArgumentError, match="receipt must be what a lock returned, got NoneType"):
        cache.dec_lock_ref(None)
    with pytest.raises(ArgumentError, match="receipt must be"):
        cache.dec_lock_ref(cache.match_prefix([1, 2, 3, 4]).last_device_node)
    with pytest.raises(ArgumentError, match="where must be a match or an insertion, got NoneType"):
        cache.inc_lock_ref(None)


@pytest.mark.parametrize("page_size", [0, -1, 1.5, 16.0, "16", None])
def test_a_tree_has_a_whole_number_of_tokens_a_page(page_size):
    with pytest.raises(ArgumentError, match="page_size must be an integer"):
        RadixTree(page_size)


def test_a_policy_is_no_string():
    with pytest.raises(ArgumentError, match="policy must be a Policy, got 'lru'"):
        RadixCache(None, None, 4, policy="lru")


# ---- pools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mha, mla])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_traced_layer_of_another_stage_reads_as_zeros(make, jitted):
    """The nearest layer was read instead: a pipeline stage would have attended to the KV of the wrong one."""
    pool = make()
    rows = [np.stack([np.full((1, *row), layer, np.float32) for layer in (4, 5)]) for row in pool.config.row_shapes]
    pool = pool.set_all_layers([4], *rows)
    read = (lambda pool, layer: pool.get_key_buffer(layer), lambda pool, layer: pool.get_value_buffer(layer))
    for get in map(jax.jit, read) if jitted else read:
        for layer in range(2, 9):
            expected = layer if layer in (4, 5) else 0
            assert (np.asarray(get(pool, jnp.int32(layer)))[4] == expected).all(), layer


@pytest.mark.parametrize("wrong", [None, [[[1.0] * 6]], 1.0])
def test_rows_that_are_no_arrays_are_refused_and_consume_nothing(wrong):
    keys, latent = mha(), mla()
    rows = np.ones((1, 1, 6), np.float32)
    for attempt in (
        lambda: keys.set_kv_buffer(4, [4], wrong, rows),
        lambda: keys.set_kv_buffer(4, [4], rows, wrong),
        lambda: keys.set_all_layers([4], wrong, wrong),
        lambda: latent.set_kv_buffer(4, [4], wrong),
        lambda: latent.set_mla_kv_buffer(4, [4], wrong, wrong),
        lambda: latent.set_kv_buffer(4, [4], np.array(1, np.float32)),
        lambda: keys.set_kv_buffer(None, [4], rows, rows),
        lambda: keys.gather([4], "4"),
        lambda: keys.load_cpu_copy(wrong, [4]),
    ):
        with pytest.raises(ArgumentError):
            attempt()
    assert not keys.is_stale
    assert not latent.is_stale


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", "16"), ("size", 16.0), ("layer_num", 2.0), ("head_dim", None), ("start_layer", 1.0), ("dtype", "nope")],
)
def test_sizes_of_another_type_are_refused(field, value):
    with pytest.raises(ArgumentError, match=field):
        mha(**{field: value})
