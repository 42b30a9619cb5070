"""Does the tree slow down as it grows? Evictions, lookups and inserts in a small and in a large tree."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.index.key import RadixKey
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator

PAGE_SIZE = 16
EVICTED_PAGES = 1_000
_OWN_PAGES = 3
_CHATS_A_PROMPT = 50


class Forest:
    """A cache full of chats: a system prompt of one page, shared by 50 chats, and three pages of each chat's own.

    Args:
      nodes: Tree nodes to fill the cache with; one in 51 is a system prompt.
    """

    def __init__(self, nodes: int):
        self.chats = max(nodes * _CHATS_A_PROMPT // (_CHATS_A_PROMPT + 1), 1)
        pages = self.chats * _OWN_PAGES + self.chats // _CHATS_A_PROMPT + 2 * EVICTED_PAGES
        self.allocator = PagedTokenToKVPoolAllocator(pages * PAGE_SIZE, PAGE_SIZE)
        self.cache = RadixCache(None, self.allocator, PAGE_SIZE)
        self.next_chat = 0
        for _ in range(self.chats):
            self.insert(self.next_key())

    def next_key(self) -> RadixKey:
        """The key of a chat that never was."""
        self.next_chat += 1
        return self.key(self.next_chat)

    def key(self, chat: int) -> RadixKey:
        """Every page of it is filled with one number: 0 .. for system prompts, negative for chats."""
        prompt = chat % (self.chats // _CHATS_A_PROMPT + 1)
        pages = np.array([prompt] + [-chat] * _OWN_PAGES, np.int32)
        return RadixKey(pages.repeat(PAGE_SIZE))

    def insert(self, key: RadixKey) -> float:
        """Seconds that caching `key` took, eviction apart."""
        pages = key.length // PAGE_SIZE
        if self.allocator.available_size() < pages * PAGE_SIZE:
            self.cache.evict(pages * PAGE_SIZE)
        fresh = self.allocator.alloc_pages(pages)
        start = time.perf_counter()
        present = self.cache.insert_pages(key, fresh)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        if present:
            self.allocator.release(fresh[: present // PAGE_SIZE], PageState.PRIVATE)  # type: ignore[index]
        return seconds

    def match(self, key: RadixKey) -> float:
        """Seconds that a lookup took."""
        start = time.perf_counter()
        self.cache.match_prefix(key)
        return time.perf_counter() - start

    def evict(self) -> float:
        """Seconds that evicting 1,000 pages took; they are filled again afterwards."""
        start = time.perf_counter()
        self.cache.evict(EVICTED_PAGES * PAGE_SIZE)
        seconds = time.perf_counter() - start
        for _ in range(-(-EVICTED_PAGES // _OWN_PAGES)):
            self.insert(self.next_key())
        return seconds


def measure_scale(sizes: tuple[int, ...], operations: int, evictions: int) -> list[dict[str, float]]:
    """One row a tree size, times in microseconds.

    Args:
      sizes: Nodes of each tree.
      operations: Lookups and inserts to time in each, with the garbage collector on.
      evictions: Evictions of 1,000 pages to time in each; the trees take turns.
    """
    rows, forests = [], []
    for nodes in sizes:
        gc.collect()
        tracked = len(gc.get_objects())
        forest = Forest(nodes)
        gc.collect()
        count = sum(1 for _ in forest.cache.tree.nodes())
        forests.append(forest)
        rows.append({"nodes": count, "gc_objects_per_node": (len(gc.get_objects()) - tracked) / count})
    seconds = [[forest.evict() for forest in forests] for _ in range(evictions)]
    for i, (row, forest) in enumerate(zip(rows, forests, strict=True)):
        row[f"evict_{EVICTED_PAGES}_pages_us"] = 1e6 * float(np.median([turn[i] for turn in seconds]))
        row |= _latencies(forest, operations)
    return rows


def _latencies(forest: Forest, operations: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    last = forest.next_chat
    known = rng.integers(last - forest.chats // 2, last, operations, endpoint=True).tolist()
    return _spread("match", lambda i: forest.match(forest.key(known[i])), operations) | _spread(
        "insert", lambda i: forest.insert(forest.next_key()), operations
    )


def _spread(name: str, once: Callable[[int], float], operations: int) -> dict[str, float]:
    micros = 1e6 * np.array([once(i) for i in range(operations)])
    row = {f"{name}_p{q}_us": float(np.percentile(micros, q)) for q in (50, 99, 99.9)}
    return row | {f"{name}_max_us": float(micros.max())}
