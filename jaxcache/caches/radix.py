"""RadixCache: the one tree and a keeper a component, driven by requests.

The tree decides, the keepers execute: pages the tree takes change their owner, pages it does not take or lets go are
handed to the allocator. Nothing is freed in the middle of a walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.caches.base import BasePrefixCache, MatchResult, expand_pages
from jaxcache.caches.keepers import FullKeeper, Keeper
from jaxcache.errors import ArgumentError, BrokenInvariant
from jaxcache.index.check import check as check_tree
from jaxcache.index.check import draw as draw_tree
from jaxcache.index.explain import Explanation, explain
from jaxcache.index.key import RadixKey, as_key
from jaxcache.index.node import Eviction, Insertion, Match, Receipt, joined
from jaxcache.index.recency import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.observe.events import AllBlocksCleared, EventQueue, KVCacheEvent, removed, stored
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pools.requests import ReqToTokenPool
from jaxcache.request import Request

if TYPE_CHECKING:
    from jaxtyping import Int32


class RadixCache(BasePrefixCache):
    """Prefix cache for full attention.

    Args:
      req_to_token_pool: The request table. None for a cache that sees no requests (insert, match, evict, lock only).
      token_to_kv_pool_allocator: Owner of the pages. None for tests and simulations: nothing is checked or freed.
      page_size: Tokens a page; must be the allocator's.
      disable: Share nothing: every lookup misses, finished requests free their pages.
      enable_kv_cache_events: Keep page hashes and queue events for `take_events`.
      policy: Eviction order.

    Attributes:
      tree: The index, for looking at.
      events: What waits for `take_events`; None unless they are enabled.

    Raises:
      ArgumentError: The page sizes of cache, allocator and table differ.

    Source: SGLang 0.5.2 radix_cache.py; behaviour of each method as there, without its sharp edges.
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        policy: Policy = Policy.LRU,
    ):
        for name, part in (("req_to_token_pool", req_to_token_pool), ("allocator", token_to_kv_pool_allocator)):
            if part is not None and part.page_size != page_size:
                raise ArgumentError(
                    f"page_size is {page_size}, but that of {name} is {part.page_size}: use one for all"
                )
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator
        self.page_size = page_size
        self.disable = disable
        self.enable_kv_cache_events = enable_kv_cache_events
        self._full = FullKeeper(token_to_kv_pool_allocator)
        self._keepers: tuple[Keeper, ...] = (self._full,)
        components = [keeper.component for keeper in self._keepers]
        self.tree = RadixTree(page_size, components, policy, with_hashes=enable_kv_cache_events)
        self.events = EventQueue(self.tree) if enable_kv_cache_events else None

    # ---- lookup, insert, evict: no request needed -----------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every prefix and queues AllBlocksCleared. Frees no page: clear the allocator with it.

        Receipts given out before are refused from now on, so a request that runs can no longer be ended: end all first.
        """
        self.tree.reset()
        if self.events is not None:
            self.events.put(AllBlocksCleared())

    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key`, in whole pages. Changes nothing but recency.

        Cost: O(nodes on the path); no loop over tokens. Converting a Python list costs about 10 ns a token: pass a
        `RadixKey` that is kept.
        """
        key = as_key(key)
        return MatchResult(self.tree.match(key[:0] if self.disable else key), self.page_size)

    def insert(
        self, key: RadixKey | np.ndarray | Sequence[int], value: Int32[np.ndarray, " slots"] | None = None
    ) -> int:
        """Caches `key` under the slots in `value`; returns the tokens that were cached already.

        The tree keeps its own pages for those: the caller frees its duplicates, `value[:returned]`. The rest belongs to
        the tree from now on.

        Args:
          key: Tokens, cut to whole pages.
          value: int32 slot of each token, whole pages. None uses the token ids as page ids, for tests without an
            allocator.

        Raises:
          ArgumentError: `value` is too short, of a wrong dtype, or not made of whole pages.
          OwnershipError: A page is not privately owned. Nothing changes.
        """
        key = as_key(key)
        if value is None:
            pages = key.token_ids[:: self.page_size]
        else:
            pages = slots_to_pages(value, key.length // self.page_size, self.page_size)
        return self.insert_pages(key, pages)

    def insert_pages(self, key: RadixKey | np.ndarray | Sequence[int], pages: Int32[np.ndarray, " pages"]) -> int:
        """`insert` for page ids, one a page: the cheap form, with the same result and ownership."""
        if self.disable:
            return 0
        inserted = self.tree.insert(as_key(key), (pages,), claim=self._full.claim)
        self._tell(inserted)
        return inserted.present

    def evict(self, num_tokens: int) -> int:
        """Frees at least `num_tokens` tokens of the least valuable unlocked leaves; returns how many it freed.

        Overshoots by less than one node. Cost: O(evicted).
        """
        if num_tokens <= 0:
            return 0
        return len(self._evict(0, -(-num_tokens // self.page_size))[0]) * self.page_size

    def make_room(self, pages: int) -> bool:
        """Whether so many pages can be taken now, after evicting only what was short; what cannot suffice stays.

        Cost: O(evicted).
        """
        needs = (pages,)
        for keeper, need, evictable in zip(self._keepers, needs, self.tree.evictable, strict=True):
            if need > keeper.available() + evictable:
                return False
        for i, need in enumerate(needs):
            short = need - self._keepers[i].available()
            if short > 0:
                self._evict(i, short)
        return True

    def _evict(self, component: int, amount: int) -> Sequence[np.ndarray]:
        """Frees at least `amount` values of a component, or all there are; returns what went of each component."""
        gone = self.tree.evict(amount, component)
        self._free(gone)
        return gone.values

    def _free(self, gone: Eviction) -> None:
        for keeper, values in zip(self._keepers, gone.values, strict=False):
            if len(values):
                keeper.let_go(values)
        if self.events is not None and gone.nodes:
            self.events.put(removed(gone.nodes))

    def inc_lock_ref(self, node: Match | MatchResult) -> Receipt:
        """Protects what a match found from eviction.

        Raises:
          ReceiptError: It is no longer there: match again.
        """
        return self.tree.lock(node.last_device_node if isinstance(node, MatchResult) else node)

    def dec_lock_ref(self, receipt: Receipt) -> int:
        """Takes a receipt back, exactly once; returns the tokens that became evictable.

        Raises:
          ReceiptError: It was given back before, is foreign, or from before a reset. Nothing changes.
        """
        return self.tree.unlock(receipt) * self.page_size

    # ---- requests ------------------------------------------------------------------------------------------------

    def cache_unfinished_req(self, req: Request, chunked: bool = False) -> None:
        """Shares the whole pages a running request has computed, and locks them for it.

        Pages another request cached first are freed and the row points at the tree's instead. The tail page stays the
        request's own. Afterwards `req.lock` covers every whole page.

        Args:
          req: Running; `req.kv_len` tokens are computed.
          chunked: Accepted for SGLang's callers; a chunk is treated like any other stop.
        """
        if self.disable:
            return
        inserted = self._insert_computed(req)
        old, req.lock = req.lock, self.tree.lock(inserted)
        if old is not None:
            self.tree.unlock(old)

    def cache_finished_req(self, req: Request) -> None:
        """Shares what a request computed, frees the rest of its pages and its row, and releases its lock.

        Afterwards the request owns nothing; what it computed is evictable unless others lock it.
        """
        table, _ = self._parts()
        row = _row_of(req)
        shared = 0
        if not self.disable:
            self._insert_computed(req)
            shared = req.kv_len // self.page_size
        own_pages = table.row_pages(row, shared, req.num_pages)
        for keeper in self._keepers:
            keeper.leave(row, own_pages)
        table.free(row)
        req.leave()
        if req.lock is not None:
            self.tree.unlock(req.lock)
            req.lock = None

    def _insert_computed(self, req: Request) -> Insertion:
        """Offers the whole computed pages of `req` to the tree and settles who owns which page."""
        table, allocator = self._parts()
        row = _row_of(req)
        size = self.page_size
        pages = table.row_pages(row, 0, req.kv_len // size)
        inserted = self.tree.insert(req.computed_key, (pages,), req.lock, req.priority, self._full.claim)
        self._tell(inserted)
        duplicates = inserted.spare[0]
        if len(duplicates):
            allocator.release(duplicates.copy(), PageState.PRIVATE)
            table.write_pages(row, inserted.present // size - len(duplicates), inserted.kept)
        return inserted

    def _tell(self, inserted: Insertion) -> None:
        if self.events is not None and inserted.leaf is not None:
            self.events.put(stored(inserted.leaf, self.page_size))

    def _parts(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        if self.req_to_token_pool is None or self.token_to_kv_pool_allocator is None:
            raise ArgumentError("req: this cache was built without a request table or allocator; it takes no requests")
        return self.req_to_token_pool, self.token_to_kv_pool_allocator

    # ---- sizes, events, looking at -------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers. O(1)."""
        return self.tree.evictable[0] * self.page_size

    def protected_size(self) -> int:
        """Cached tokens that a lock covers. O(1)."""
        return self.tree.protected[0] * self.page_size

    def all_values_flatten(self) -> Int32[np.ndarray, " slots"]:
        """Every cached slot, node by node. O(cached)."""
        return expand_pages(joined([node.value for node in self.tree.nodes()]), self.page_size)

    def take_events(self) -> list[KVCacheEvent]:
        """Events since the last call, oldest first; empty unless they were enabled."""
        return self.events.take() if self.events is not None else []

    def explain(self, key: RadixKey | np.ndarray | Sequence[int]) -> Explanation:
        """Why a lookup of `key` stops where it does: `print(cache.explain(key))`. Changes nothing, not even recency.

        Cost: a lookup in every namespace and a look at the nodes let go lately; milliseconds.
        """
        return explain(self.tree, as_key(key))

    def draw(self) -> str:
        """The tree as text."""
        return draw_tree(self.tree)

    def check(self) -> None:
        """Verifies the tree, and that the allocator agrees on which pages it owns. O(cached).

        Raises:
          BrokenInvariant: with a drawing of the tree.
        """
        check_tree(self.tree)
        nodes = list(self.tree.nodes())
        pages = joined([node.value for node in nodes])
        for i, keeper in enumerate(self._keepers):
            values = pages if i == 0 else joined([node.slot(i).value for node in nodes])
            for problem in keeper.problems(pages, values):
                raise BrokenInvariant(f"{problem}\n{self.draw()}")


def slots_to_pages(
    slots: Int32[np.ndarray, " slots"], num_pages: int, page_size: int
) -> Int32[np.ndarray, " num_pages"]:
    """Page ids of the first `num_pages` pages of `slots`.

    Raises:
      ArgumentError: Not an integer vector, too short, or not made of whole pages.
    """
    slots = np.asarray(slots)
    if slots.ndim != 1 or slots.dtype.kind not in "iu":
        raise ArgumentError(f"value must be one-dimensional integer slots, got {slots.dtype} of shape {slots.shape}")
    if len(slots) < num_pages * page_size:
        raise ArgumentError(f"value: the key needs {num_pages * page_size} slots, got {len(slots)}")
    slots = slots[: num_pages * page_size]
    if page_size == 1:
        return slots.astype(np.int32, copy=False)
    rows = slots.reshape(num_pages, page_size)
    pages = (rows[:, 0] // page_size).astype(np.int32)
    if not np.array_equal(rows, pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)):
        raise ArgumentError(f"value must be whole pages: {page_size} consecutive slots from a multiple of {page_size}")
    return pages


def _row_of(req: Request) -> int:
    if req.req_pool_idx is None:
        raise ArgumentError(f"request {req.rid} has no row in the request table: it is {req.state.value}")
    return req.req_pool_idx
