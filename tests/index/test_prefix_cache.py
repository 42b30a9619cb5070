"""The caches without requests, driven as pymllm's runner drives them, over real allocators that check every owner.

What a slot holds is modelled as the tokens up to it: whatever a match returns must hold exactly the tokens looked up,
for full attention, in the window, and in the state.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

import jaxcache.index
from jaxcache.compat.pymllm import MambaRadixCache, RadixCache
from jaxcache.compat.pymllm_base import BasePrefixCache, ChunkCache, EvictResult, InsertResult, MatchResult
from jaxcache.errors import ArgumentError, OwnershipError, ReceiptError
from jaxcache.index.check import check
from jaxcache.index.key import RadixKey
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator

WINDOW, ROOM = 6, 48


class Runner:
    """A runner with no model: match, lock, allocate, "compute", insert, free duplicates, unlock; evict when short."""

    def __init__(self, seed, page_size, flavour):
        self.rng = random.Random(seed)
        self.page_size, self.flavour = page_size, flavour
        self.gone = []
        self.states = StateAllocator(8)
        if flavour == "window":
            self.pool = SWATokenToKVPoolAllocator(ROOM, ROOM, page_size)
            self.cache = RadixCache(page_size, WINDOW, self.pool, self.gone.append)
        else:
            size = ROOM // page_size * page_size
            self.pool = TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
            if flavour == "state":
                self.cache = MambaRadixCache(page_size, self.pool, self.states, self.gone.append)
            else:
                self.cache = RadixCache(page_size, None, self.pool, self.gone.append)
        self.content, self.window_content, self.state_content = {}, {}, {}
        self.recent = [()]
        self.running = []

    def some_tokens(self):
        base = self.rng.choice(self.recent)
        tail = tuple(self.rng.randrange(3) for _ in range(self.rng.randint(0, 2 * self.page_size + 2)))
        return base[: self.rng.randint(0, len(base))] + tail

    def key(self, tokens, space):
        return RadixKey(list(tokens), space)

    def check_match(self, found, tokens, space):
        assert found.prefix_len == len(found.indices) <= len(tokens)
        for i, slot in enumerate(found.indices.tolist()):
            assert self.content[slot] == (space, tokens[: i + 1])
            if self.flavour == "window" and i >= found.prefix_len - WINDOW:
                (window,) = self.pool.translate_loc_from_full_to_swa([slot]).tolist()
                assert window and self.window_content[window] == (space, tokens[: i + 1])
        if self.flavour == "state":
            assert (found.mamba_value == 0) is (found.prefix_len == 0)
            if found.mamba_value:
                assert self.state_content[found.mamba_value] == (space, tokens[: found.prefix_len])

    def take(self, num_tokens):
        """Slots for so many tokens, of whole pages; evicts what is short. None if that is not enough."""
        pages = -(-num_tokens // self.page_size)
        slots = self.pool.alloc(pages * self.page_size)
        for _ in range(3):
            if slots is not None:
                return slots
            if self.flavour == "window":
                self.cache.evict(pages * self.page_size, pages * self.page_size)
            else:
                self.cache.evict(pages * self.page_size)
            slots = self.pool.alloc(pages * self.page_size)
        return slots

    def start(self):
        tokens, space = self.some_tokens(), self.rng.choice([None, None, "tenant"])
        found = self.cache.match_prefix(self.key(tokens, space))
        self.check_match(found, tokens, space)
        lock = self.cache.inc_lock_ref(found.last_node)
        fresh = self.take(len(tokens) - found.prefix_len) if len(tokens) > found.prefix_len else np.empty(0, np.int32)
        if fresh is None:
            self.cache.dec_lock_ref(lock)
            return
        own = found.prefix_len
        slots = np.concatenate([found.indices, fresh])
        for i in range(own, len(tokens)):
            self.content[int(slots[i])] = (space, tokens[: i + 1])
            if self.flavour == "window":
                (window,) = self.pool.translate_loc_from_full_to_swa([slots[i]]).tolist()
                self.window_content[window] = (space, tokens[: i + 1])
        self.running.append((tokens, space, slots, own, lock))

    def finish(self):
        if not self.running:
            return
        tokens, space, slots, own, lock = self.running.pop(self.rng.randrange(len(self.running)))
        length = len(tokens) // self.page_size * self.page_size
        if self.flavour == "state":
            prefix = self.insert_with_state(tokens, space, slots, own, length)
        else:
            prefix = self.insert(tokens, space, slots, own, length)
        keep = max(own, prefix)
        if keep > own:
            self.pool.free(slots[own:keep])
        if len(slots) > max(length, keep):
            self.pool.free(slots[max(length, keep) :])
        self.cache.dec_lock_ref(lock)
        self.recent = [*self.recent[-15:], tokens]

    def insert(self, tokens, space, slots, own, length):
        gone = 0
        if self.flavour == "window" and length > own and self.rng.random() < 0.5:  # what left the window is given back
            gone = self.rng.randrange(own, length) // self.page_size * self.page_size
            if gone > own:
                self.pool.free_swa(slots[own:gone])
        options = {"prev_prefix_len": own, "swa_evicted_seqlen": gone} if self.flavour == "window" else {}
        if not length or length <= own:
            return own
        return self.cache.insert(self.key(tokens, space), slots, **options).prefix_len

    def insert_with_state(self, tokens, space, slots, own, length):
        saved = self.states.alloc_track_slot() if length else None
        if saved is None and length:
            self.cache.evict(0, mamba_num=1)
            saved = self.states.alloc_track_slot()
        if saved is None:
            if length > own:
                self.pool.free(slots[own:length])
            return length
        self.state_content[saved] = (space, tokens[:length])
        result = self.cache.insert(self.key(tokens[:length], space), slots, mamba_value=saved)
        if result.mamba_exist:
            self.states.free_track_slot(saved)
        return result.prefix_len

    def evict(self):
        before = self.cache.evictable_size()
        amount = self.rng.randint(1, 12)
        if self.flavour == "window":
            result = self.cache.evict(*self.rng.choice([(amount, 0), (0, amount), (amount, amount)]))
        elif self.flavour == "state":
            result = self.cache.evict(amount, mamba_num=self.rng.randint(0, 1))
        else:
            result = self.cache.evict(amount)
        assert result.full_evicted == before - self.cache.evictable_size()

    def run(self, steps):
        for _ in range(steps):
            self.rng.choices([self.start, self.finish, self.evict], [5, 5, 1])[0]()
            check(self.cache.tree)
            assert self.cache.total_size() == self.cache.evictable_size() + self.cache.protected_size()
            assert min(self.cache.tree.evictable + self.cache.tree.protected) >= 0
        while self.running:
            self.finish()
        nodes = set(self.cache.tree.nodes())
        assert not nodes & set(self.gone)
        self.cache.evict(10**6)
        assert nodes <= set(self.gone) and self.cache.total_size() == 0
        assert self.pool.available_size() == self.pool.size
        assert self.states.available_size() == self.states.size


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("flavour", ["full", "window", "state"])
def test_what_a_match_returns_holds_the_tokens_looked_up(flavour, page_size):
    for seed in range(10):
        Runner(seed, page_size, flavour).run(150)


def test_sizes_of_windows_and_states():
    windows = RadixCache(2, 4)
    windows.insert(list(range(1, 9)))
    assert (windows.swa_evictable_size(), windows.swa_protected_size(), windows.supports_swa) == (8, 0, True)
    receipt = windows.inc_lock_ref(windows.match_prefix(list(range(1, 9))).last_node)
    assert (windows.evictable_size(), windows.protected_size(), windows.swa_protected_size()) == (0, 8, 8)
    windows.dec_lock_ref(receipt)
    plain = RadixCache()
    assert (plain.supports_swa, plain.swa_evictable_size(), plain.swa_protected_size()) == (False, 0, 0)
    states = MambaRadixCache(2)
    result = states.insert([1, 2], mamba_value=7)
    assert (states.mamba_evictable_size(), states.mamba_protected_size()) == (1, 0)
    states.inc_lock_ref(result.last_node)
    assert (states.mamba_evictable_size(), states.mamba_protected_size()) == (0, 1)


def test_an_eviction_says_what_went():
    cache = RadixCache(1, 2)
    cache.insert([1, 2, 3, 4])
    cache.insert([1, 2, 5, 6])
    assert cache.evict(0) == EvictResult()
    assert cache.evict(1, 2) == EvictResult(2, 2)  # a leaf is enough for both
    cache.insert([1, 2, 3, 4])
    cache.match_prefix([1, 2, 5, 6])
    assert cache.evict(0, 1) == EvictResult(2, 2)  # a leaf, which is the one used longest ago
    receipt = cache.inc_lock_ref(cache.match_prefix([1, 2, 5, 6]).last_node)
    assert cache.evict(0, 1) == EvictResult(0, 2)  # what 1 and 2 have for the window, and that alone
    cache.dec_lock_ref(receipt)
    assert cache.evict(1) == EvictResult(4, 2)
    states = MambaRadixCache(1)
    states.insert([1], mamba_value=1)
    states.insert([1, 2], mamba_value=2)
    assert states.evict(0, mamba_num=1) == EvictResult(0, 0, 1)
    assert states.evict(10) == EvictResult(2, 0, 1)


def test_states_say_where_to_go_on_from_and_how_far_others_have_come():
    cache = MambaRadixCache(2)
    cache.insert([1, 2, 3, 4], mamba_value=1)
    cache.insert([1, 2, 3, 4, 5, 6, 7, 8], mamba_value=2)
    found = cache.match_prefix([1, 2, 3, 4, 5, 6, 9, 9])
    assert (found.prefix_len, found.mamba_branching_seqlen, found.mamba_value) == (4, 6, 1)
    assert cache.match_prefix([1, 2, 3, 4]).mamba_branching_seqlen is None
    assert cache.insert([1, 2, 3, 4], mamba_value=3).mamba_exist
    assert not cache.insert([1, 2, 3, 4, 5, 6], mamba_value=4).mamba_exist
    assert cache.match_prefix([1, 2, 3, 4, 5, 6, 9, 9]).mamba_value == 4


def test_node_hashes_and_drawing(capsys):
    cache = RadixCache(2)
    node = cache.insert([1, 2, 3, 4]).last_node.node
    assert [len(digest) for digest in cache.compute_node_hash(node)] == [64, 64]
    cache.pretty_print()
    assert "[0:4] 1 2 3 4" in capsys.readouterr().out


def test_nothing_is_freed_without_pools_and_reset_frees_nothing():
    gone = []
    cache = RadixCache(1, None, None, gone.append)
    cache.insert([1, 2])
    cache.evict(1)
    assert len(gone) == 1
    pool = TokenToKVPoolAllocator(8)
    cache = RadixCache(1, token_to_kv_pool_allocator=pool)
    cache.insert([1, 2], pool.alloc(2))
    receipt = cache.inc_lock_ref(cache.match_prefix([1]).last_node)
    cache.reset()
    assert (pool.available_size(), cache.total_size()) == (6, 0)
    with pytest.raises(ReceiptError):
        cache.dec_lock_ref(receipt)


def test_what_a_cache_does_not_keep_is_refused():
    for cache, amounts in [
        (RadixCache(), {"swa_num_tokens": 1}),
        (RadixCache(1, 4), {"mamba_num": 1}),
        (MambaRadixCache(), {"swa_num_tokens": 1}),
    ]:
        with pytest.raises(ArgumentError, match="this cache keeps n"):
            cache.evict(1, **amounts)
    for size in (0, -1, 1.5, "2"):
        with pytest.raises(ArgumentError, match="sliding_window_size"):
            RadixCache(1, size)
    for state in (0, -1, 1.5, "1"):
        with pytest.raises(ArgumentError, match="mamba_value"):
            MambaRadixCache(1).insert([1], mamba_value=state)
    for tokens in ([], [1], [1, 2, 3]):
        with pytest.raises(ArgumentError, match="whole pages"):
            MambaRadixCache(2).insert(tokens, mamba_value=1)
    with pytest.raises(ArgumentError, match="the key needs 2 slots"):
        RadixCache(2).insert([1, 2], np.array([2], np.int32))


def test_results_have_the_documented_defaults():
    nothing = np.empty(0, np.int32)
    found = MatchResult(nothing)
    assert found.indices is nothing
    assert (found.last_node, found.prefix_len, found.mamba_branching_seqlen, found.mamba_value) == (None, 0, None, 0)
    inserted = InsertResult()
    assert (inserted.prefix_len, inserted.last_node, inserted.mamba_exist) == (0, None, False)
    assert EvictResult() == EvictResult(0, 0, 0)


def test_the_names_are_in_the_index():
    names = "BasePrefixCache ChunkCache EvictResult InsertResult MambaRadixCache MatchResult RadixCache RadixKey"
    for name in f"{names} hash_bytes hash_to_int64 hash_token_ids".split():
        assert getattr(jaxcache.index, name).__name__ == name
    assert jaxcache.index.ChunkCache is ChunkCache and issubclass(ChunkCache, BasePrefixCache)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = jaxcache.index.Nothing


@pytest.mark.parametrize("kind", [RadixCache, MambaRadixCache, ChunkCache])
def test_every_cache_takes_every_argument_of_an_insert_and_locks_nothing(kind):
    cache = kind()
    options = {"prev_prefix_len": 0, "swa_evicted_seqlen": 0, "mamba_value": 1, "chunked": True}
    assert cache.insert([1, 2], **options).prefix_len == 0
    assert cache.insert([1, 2], None, **options).prefix_len == (0 if kind is ChunkCache else 2)
    assert cache.inc_lock_ref(None) is None
    cache.dec_lock_ref(None)
    cache.dec_lock_ref(None, None, chunked=True)
    assert cache.protected_size() == 0
    assert isinstance(cache, BasePrefixCache)


@pytest.mark.parametrize("cache", [RadixCache(), RadixCache(1, 4), MambaRadixCache()])
def test_a_receipt_is_given_back_alone_or_behind_its_node(cache):
    cache.insert([1, 2], mamba_value=1)
    node = cache.match_prefix([1, 2]).last_node
    for give_back in (
        lambda receipt: cache.dec_lock_ref(receipt),
        lambda receipt: cache.dec_lock_ref(node, receipt),
        lambda receipt: cache.dec_lock_ref(node, swa_boundary_id=receipt),
    ):
        receipt = cache.inc_lock_ref(node)
        assert cache.protected_size() == 2
        give_back(receipt)
        assert cache.protected_size() == 0
        with pytest.raises(ReceiptError, match="given back already"):
            give_back(receipt)
    with pytest.raises(ArgumentError, match="what a lock returned"):
        cache.dec_lock_ref(node)


def test_a_cache_that_keeps_nothing():
    pool = TokenToKVPoolAllocator(8)
    cache = ChunkCache(pool, page_size=1)
    slots = pool.alloc(2)
    result = cache.insert([1, 2], slots)
    assert (result.prefix_len, result.last_node) == (0, None)
    found = cache.match_prefix([1, 2])
    assert (found.prefix_len, len(found.indices), found.last_node) == (0, 0, None)
    assert cache.evict(5) == EvictResult()
    cache.reset()
    cache.pretty_print()
    assert (cache.total_size(), cache.evictable_size(), pool.available_size()) == (0, 0, 6)


def test_without_a_state_nothing_is_taken():
    """In pymllm it was cached, and found, though nothing could be resumed from it."""
    pool, states = TokenToKVPoolAllocator(16), StateAllocator(4)
    cache = MambaRadixCache(1, pool, states)
    first, state = pool.alloc(2), states.alloc_track_slot()
    cache.insert([1, 2], first, mamba_value=state)
    mine = pool.alloc(4)
    result = cache.insert([1, 2, 3, 4], mine)
    assert (result.prefix_len, result.mamba_exist, cache.total_size()) == (2, False, 2)
    receipt = cache.inc_lock_ref(result.last_node)
    assert cache.protected_size() == 2
    pool.free(mine)  # all of them are still the caller's
    cache.dec_lock_ref(receipt)
    assert cache.insert([7, 8]).prefix_len == 0
    check(cache.tree)


def test_a_window_has_the_id_of_its_page():
    """It was one more, so that page 0, which no pool gives out, could be told from a hole."""
    pool = SWATokenToKVPoolAllocator(16, 16, 2)
    cache = RadixCache(2, 2, pool)
    slots = pool.alloc(8)
    cache.insert(list(range(8)), slots)
    (node,) = cache.tree.nodes()
    assert node.value.tolist() == node.slot(1).value.tolist() == (slots[::2] // 2).tolist()
    freed = []
    pool.free_swa = lambda slots: freed.append(slots.tolist())
    cache.evict(0, 8)
    assert freed == [slots.tolist()]


def test_windows_move_between_private_pages_only():
    pool = SWATokenToKVPoolAllocator(16, 16, 2)
    source, target = pool.alloc(4), pool.alloc(4)
    with pytest.raises(ArgumentError, match="must have no window page"):
        pool.move_swa(source, target)
    for slots in (source[:3], source[::-1].copy(), source + 1):
        with pytest.raises(ArgumentError, match="source must be whole pages"):
            pool.move_swa(slots, target)
    pool.free_swa(target)
    windows = pool.translate_loc_from_full_to_swa(source).tolist()
    pool.move_swa(source, target)
    assert pool.translate_loc_from_full_to_swa(target).tolist() == windows
    assert pool.translate_loc_from_full_to_swa(source).tolist() == [0] * 4
    pool.check()
    with pytest.raises(OwnershipError):
        pool.move_windows(target[::2] // 2, source[::2] // 2)  # the tree's targets only
    pool.free(source)
    pool.free(target)
    pool.check()
    assert pool.available_size() == 16
