"""Flavours that must not differ: the same calls to two caches give the same answers, page for page.

a window that reaches to infinity                   is full attention
one adapter                                         is no adapter
a state wherever a lookup can stop                  is no state
pages of p tokens, on keys of p equal tokens each   are pages of one token
"""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from jaxcache.caches.lora_radix import LoRAKey, LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator

PAGES = 40
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=10)
calls = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["insert", "match", "lock"]), tokens),
        st.tuples(st.sampled_from(["unlock", "evict"]), st.integers(0, 6)),
    ),
    max_size=40,
)


class Side:
    """One cache, called in pages: a key is one token a page, repeated as often as a page has tokens."""

    def __init__(self, cache: RadixCache, lora_id: str | None = None, every_stop: bool = False):
        self.cache = cache
        self.allocator: Any = cache.token_to_kv_pool_allocator
        self.lora_id = lora_id
        self.every_stop = every_stop
        self.locks: list[Any] = []

    def key(self, pages: list[int]) -> RadixKey:
        spread = np.repeat(np.array(pages, np.int32), self.cache.page_size)
        return LoRAKey(self.lora_id, spread) if self.lora_id is not None else RadixKey(spread)

    def insert(self, pages: list[int]) -> list[int | None]:
        ends = range(1, len(pages) + 1) if self.every_stop else [len(pages)]
        return [self.insert_one(pages[:end]) for end in ends]

    def insert_one(self, pages: list[int]) -> int | None:
        if not self.cache.make_room(len(pages)):
            return None
        fresh = self.allocator.alloc_pages(len(pages))
        states = self.cache.state_allocator if isinstance(self.cache, MambaRadixCache) else None
        state = states.alloc_track_slot() if states is not None else 0
        present = self.cache.insert_pages(self.key(pages), fresh, state) // self.cache.page_size
        self.allocator.release(fresh[:present], PageState.PRIVATE)
        if states is not None and states.owner_of([state])[0] == PageState.PRIVATE:
            states.free_track_slot(state)
        return present

    def match(self, pages: list[int]) -> list[int]:
        return self.cache.match_prefix(self.key(pages)).pages.tolist()

    def lock(self, pages: list[int]) -> int:
        self.locks.append(self.cache.inc_lock_ref(self.cache.match_prefix(self.key(pages))))
        return self.locks[-1].length // self.cache.page_size

    def unlock(self, pick: int) -> int | None:
        if not self.locks:
            return None
        return self.cache.dec_lock_ref(self.locks.pop(pick % len(self.locks))) // self.cache.page_size

    def evict(self, pages: int) -> int:
        return self.cache.evict(pages * self.cache.page_size) // self.cache.page_size

    def sizes(self) -> list[int]:
        cache, size = self.cache, self.cache.page_size
        self.cache.check()
        return [cache.evictable_size() // size, cache.protected_size() // size, self.allocator.count(PageState.FREE)]


def plain(page_size: int, policy: Policy, every_stop: bool = False) -> Side:
    size = PAGES * page_size
    allocator = TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
    return Side(RadixCache(None, allocator, page_size, policy=policy), every_stop=every_stop)


def windowed(page_size: int, policy: Policy) -> tuple[Side, Side]:
    size = PAGES * page_size
    cache = SWARadixCache(None, SWATokenToKVPoolAllocator(size, size, page_size), math.inf, page_size, policy=policy)
    return plain(page_size, policy), Side(cache)


def adapted(page_size: int, policy: Policy) -> tuple[Side, Side]:
    one = plain(page_size, policy)
    return one, Side(LoRARadixCache(None, plain(page_size, policy).allocator, page_size, policy=policy), lora_id="a")


def stateful(page_size: int, policy: Policy) -> tuple[Side, Side]:
    one, other = (plain(page_size, policy, every_stop=True) for _ in range(2))
    cache = MambaRadixCache(None, other.allocator, StateAllocator(PAGES + 1), page_size, policy=policy)
    return one, Side(cache, every_stop=True)


def paged(page_size: int, policy: Policy) -> tuple[Side, Side]:
    return plain(2, policy), plain(2 * page_size, policy)


def windowed_and_stateful(page_size: int, policy: Policy) -> tuple[Side, Side]:
    size = PAGES * page_size
    allocator = SWATokenToKVPoolAllocator(size, size, page_size)
    cache = MambaRadixCache(None, allocator, StateAllocator(PAGES + 1), page_size, math.inf, policy=policy)
    return plain(page_size, policy, every_stop=True), Side(cache, every_stop=True)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("make", [windowed, adapted, stateful, windowed_and_stateful, paged])
@settings(max_examples=60, deadline=None)
@given(story=calls, policy=st.sampled_from(Policy))
def test_two_caches_give_the_same_answers(make, page_size, story, policy):
    # Ages in octaves of tokens, and a tenth of all tokens: four times as many are other ones to these two.
    assume(not (make is paged and policy in (Policy.ADAPTIVE, Policy.S3FIFO)))
    one, other = make(page_size, policy)
    for name, argument in story:
        answers = [getattr(side, name)(argument) for side in (one, other)]
        assert answers[0] == answers[1], name
        assert one.sizes() == other.sizes()
