"""RadixCache: the one tree and a keeper a component, driven by requests.

The tree decides, the keepers execute: pages the tree takes change their owner, pages it does not take or lets go are
handed to the allocator. Nothing is freed in the middle of a walk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from jaxcache.arguments import require_counts
from jaxcache.caches.base import BasePrefixCache, MatchResult
from jaxcache.components.base import Keeper
from jaxcache.components.full import FullKeeper
from jaxcache.components.state import StateKeeper
from jaxcache.components.window import WindowKeeper
from jaxcache.errors import ArgumentError, BrokenInvariant
from jaxcache.events.events import EventQueue, KVCacheEvent
from jaxcache.events.observer import CacheObserver
from jaxcache.index.check import check as check_tree
from jaxcache.index.check import draw as draw_tree
from jaxcache.index.explain import Explanation, explain
from jaxcache.index.key import BigramKey, Namespace, RadixKey, as_key
from jaxcache.index.node import Eviction, Insertion, Match, joined
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.request import Request
from jaxcache.slots import first_pages, page_slots
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class CacheOptions(TypedDict, total=False):
    """What every flavour can be told; see `RadixCache`."""

    disable: bool
    enable_kv_cache_events: bool
    policy: Policy
    is_eagle: bool


class RadixCache(BasePrefixCache):
    """Prefix cache for full attention; with further keepers, for models whose layers keep other things too.

    Args:
      req_to_token_pool: The request table. None for a cache that sees no requests (insert, match, evict, lock only).
      token_to_kv_pool_allocator: Owner of the pages. None for tests and simulations: nothing is checked or freed.
      page_size: Tokens a page; must be the allocator's.
      disable: Share nothing: every lookup misses, finished requests free their pages.
      enable_kv_cache_events: Keep page hashes and queue events for `take_events`.
      policy: Eviction order, the same for every component.
      is_eagle: Keys are pairs of neighbouring tokens, as the KV of an EAGLE draft model depends on both. The pair of a
        request's last token is not known, so its KV stays private.
      window: Keeps window pages: see `SWARadixCache`.
      states: Keeps states: see `MambaRadixCache`.

    Attributes:
      tree: The index, for looking at.
      events: What waits for `take_events`; None unless they are enabled.
      observer: Whom to tell of lookups, inserts and evictions, such as `CacheMetrics`; None for nobody.

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
        is_eagle: bool = False,
        *,
        window: WindowKeeper | None = None,
        states: StateKeeper | None = None,
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
        self.is_eagle = is_eagle
        self._as_key = _as_bigrams if is_eagle else as_key
        self._full = FullKeeper(token_to_kv_pool_allocator)
        self._window, self._states = window, states
        self._others: tuple[Keeper, ...] = tuple([keeper for keeper in (window, states) if keeper is not None])
        self._keepers: tuple[Keeper, ...] = (self._full, *self._others)
        self.tree = RadixTree(
            page_size,
            [keeper.component for keeper in self._keepers],
            policy,
            with_hashes=enable_kv_cache_events,
            element_bytes=(BigramKey if is_eagle else RadixKey).element_bytes,
        )
        self.events = EventQueue(self.tree) if enable_kv_cache_events else None
        self.observer: CacheObserver | None = None

    # ---- lookup, insert, evict: no request needed -----------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every prefix and queues AllBlocksCleared. Frees no page: clear the allocators with it.

        Receipts given out before are refused from now on, so a request that runs can no longer be ended: end all first.
        `MemoryManager.reset` does all of it, and refuses while requests run.
        """
        self.tree.reset()
        if self.events is not None:
            self.events.cleared()

    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key`, in whole pages, that every component can be continued from.

        Changes nothing but recency.

        Cost: O(nodes on the path); no loop over tokens. Converting a Python list costs about 10 ns a token: pass a
        `RadixKey` that is kept.
        """
        started = time.perf_counter() if self.observer is not None else 0.0
        key = self._as_key(key)
        found = self.tree.match(key[:0] if self.disable else key)
        if self.observer is not None:
            self.observer.matched(time.perf_counter() - started)
        return MatchResult(found, self.page_size)

    def insert(
        self,
        key: RadixKey | np.ndarray | Sequence[int],
        value: Int32[np.ndarray, " slots"] | None = None,
        state: int = 0,
    ) -> int:
        """Caches `key` under the slots in `value`; returns the tokens that were cached already.

        The tree keeps its own pages for those: the caller frees its duplicates, `value[:returned]`. The rest belongs to
        the tree from now on. Window pages of duplicates may be the tree's now; they are no longer the caller's.

        Args:
          key: Tokens, cut to whole pages.
          value: int32 slot of each token, whole pages. None uses the token ids as page ids, for tests without an
            allocator.
          state: What was saved after these tokens, where the cache keeps states. If there was one already, it is still
            the caller's: its owner is `PRIVATE` then.

        Raises:
          ArgumentError: `value` is too short, of a wrong dtype, or not made of whole pages; or a state is missing, has
            no place here, or does not stand for whole pages.
          OwnershipError: A page or the state is not privately owned. Nothing changes.
        """
        key = self._as_key(key)
        if value is None:
            pages = key.token_ids[:: self.page_size]
        else:
            pages = first_pages("value", value, key.length // self.page_size, self.page_size)
        return self.insert_pages(key, pages, state)

    def insert_pages(
        self, key: RadixKey | np.ndarray | Sequence[int], pages: Int32[np.ndarray, " pages"], state: int = 0
    ) -> int:
        """`insert` for page ids, one a page: the cheap form, with the same result and ownership."""
        if self.disable:
            return 0
        key = self._as_key(key)
        if state or self._others:
            self._require_stop(key, pages, state)
        return self._insert(key, pages, state).present

    def _require_stop(self, key: RadixKey, pages: np.ndarray, state: int) -> None:
        """Raises unless what else there is can be kept with the pages: a state at the end of `key`, windows."""
        if state and self._states is None:
            raise ArgumentError(f"state: this cache keeps none, got {state}: use a MambaRadixCache")
        if not state and self._states is not None:
            raise ArgumentError("state: this cache keeps one with every prefix, got none: give what was saved there")
        if state and key.length % self.page_size:
            raise ArgumentError(
                f"state: it stands for the {key.length} tokens of the key, which are not whole pages of "
                f"{self.page_size}: save one where a page ends"
            )
        if self._window is not None:
            self._window.require_private(pages[: key.length // self.page_size])

    def _insert(
        self, key: RadixKey, pages: np.ndarray, state: int, held: Receipt | None = None, priority: int = 0
    ) -> Insertion:
        started = time.perf_counter() if self.observer is not None else 0.0
        values = [pages]
        for keeper in self._others:
            values.append(keeper.offer(pages, state))
        inserted = self.tree.insert(key, values, held, priority, self._full.claim)
        for keeper in self._others:
            keeper.took(pages, state, inserted)
        if self.events is not None:
            for node in inserted.added:
                self.events.stored(node, key.namespace)
        if self.observer is not None:
            self.observer.inserted(inserted.length - inserted.present, time.perf_counter() - started)
        return inserted

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> int:
        """Frees at least `num_tokens` tokens of the least valuable unlocked leaves; returns how many it freed.

        Then, if that did not free as much of them: window pages of `swa_num_tokens` tokens, and `mamba_num` states, in
        whatever nodes they are; what else is there stays, and is of use again once the hole is filled.

        Overshoots by less than one node. Cost: O(evicted).

        Raises:
          ArgumentError: A number is no integer, or negative.
        """
        require_counts(num_tokens=num_tokens, swa_num_tokens=swa_num_tokens, mamba_num=mamba_num)
        started = time.perf_counter() if self.observer is not None else 0.0
        size = self.page_size
        if self._others:
            freed = self._evict_each(-(-num_tokens // size), -(-swa_num_tokens // size), mamba_num)
        else:
            gone = self.tree.evict(-(-num_tokens // size))
            self._free(gone)
            freed = [len(gone.values[0])]
        if self.observer is not None:
            amounts = [n * size if part.spans else n for n, part in zip(freed, self.tree.components, strict=True)]
            self.observer.evicted(amounts, time.perf_counter() - started)
        return freed[0] * size

    def _evict_each(self, pages: int, windows: int, states: int) -> list[int]:
        """Lets go of at least so much of each component; returns how much went. What goes with a leaf counts."""
        amounts = [pages]
        if self._window is not None:
            amounts.append(windows)
        if self._states is not None:
            amounts.append(states)
        freed = [0] * len(amounts)
        for i, amount in enumerate(amounts):
            if freed[i] < amount:
                gone = self.tree.evict(amount - freed[i], i)
                self._free(gone)
                freed = [count + len(values) for count, values in zip(freed, gone.values, strict=True)]
        return freed

    def make_room(self, pages: int, states: int = 0, *, without_window: int = 0) -> bool:
        """Whether so many pages and states can be taken now, after evicting what was short, of each only as much.

        If that cannot suffice for all of them, nothing is evicted.

        Args:
          pages: To be taken.
          states: To be taken.
          without_window: Of the pages, those that need no window page.

        Raises:
          ArgumentError: States are asked of a cache that keeps none; or a number is no integer, or negative.

        Cost: O(evicted).
        """
        require_counts(pages=pages, states=states, without_window=without_window)
        if states and self._states is None:
            raise ArgumentError(f"states: this cache keeps none, got {states}: use a MambaRadixCache")
        size = self.page_size
        short = [pages - self._full.available(), 0, 0]
        if self._window is not None:
            short[1] = pages - without_window - self._window.available()
        if self._states is not None:
            short[2] = states - self._states.available()
        most = self.evictable_size(), self.swa_evictable_size(), self.mamba_evictable_size()
        if short[0] * size > most[0] or short[1] * size > most[1] or short[2] > most[2]:
            return False
        if max(short) > 0:
            self.evict(max(short[0], 0) * size, max(short[1], 0) * size, max(short[2], 0))
        return True

    def _free(self, gone: Eviction) -> None:
        """Frees what the tree let go. Pages last, which would take window pages along that are still in the tree's."""
        for i, keeper in enumerate(self._others, 1):
            if len(gone.values[i]):
                keeper.let_go(gone.values[i])
        if len(gone.values[0]):
            self._full.let_go(gone.values[0])
        if self.events is not None:
            self.events.removed(gone)

    def drop(self, extra_key: str | bytes | Namespace | None) -> int:
        """Forgets all that is cached in one namespace; returns the tokens freed. O(its nodes).

        Raises:
          LockedError: A lock covers some of it: end its requests first. Nothing changes.
        """
        gone = self.tree.drop(RadixKey(b"", extra_key).namespace)
        self._free(gone)
        return len(gone.values[0]) * self.page_size

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
        """Shares what a running request has computed, up to its last whole page or its snapshot, and locks it for it.

        Pages another request cached first are freed and the row points at the tree's instead. What comes after stays
        the request's own. Afterwards `req.lock` covers all that is shared; where the cache keeps states and the request
        has saved none since, nothing changes.

        Args:
          req: Running; `req.kv_len` tokens are computed.
          chunked: Accepted for SGLang's callers; a chunk is treated like any other stop.
        """
        inserted = self._share(req)
        if inserted is None:
            return
        if self._states is not None:
            self._states.forget_snapshot(_row_of(req))
        old, req.lock = req.lock, self.tree.lock(inserted)
        if old is not None:
            self.tree.unlock(old)

    def cache_finished_req(self, req: Request) -> None:
        """Shares what a request computed, frees the rest of its pages and its row, and releases its lock.

        Where the cache keeps states, what is shared ends at its snapshot and, if the request ends where a page does, at
        its end. Afterwards the request owns nothing; what it computed is evictable unless others lock it.
        """
        table, _ = self._parts()
        row = _row_of(req)
        if self._states is not None:
            self.cache_unfinished_req(req)
            self._states.save_working(row, req.kv_len)
        inserted = self._share(req)
        shared = req.protected_len if inserted is None else inserted.length
        own_pages = table.row_pages(row, shared // self.page_size, req.num_pages)
        for keeper in self._keepers:
            keeper.leave(row, own_pages)
        table.free(row)
        req.leave()
        if req.lock is not None:
            self.tree.unlock(req.lock)
            req.lock = None

    def drop_out_of_window(self, req: Request, keep_snapshot: bool = True) -> None:
        """Frees the window pages of a running request that no later token attends, and no later stop needs.

        Its own are free then. Those in the tree that it locks become evictable.

        Args:
          req: Running.
          keep_snapshot: Keep the windows before its snapshot, without which that is of no use. Otherwise a snapshot
            that keeps any is freed too.

        Cost: O(nodes it locks in its window).
        """
        if self._window is None:
            return
        stop = max(req.kv_len - self.is_eagle, 0) // self.page_size * self.page_size
        if self._states is not None:
            state, length = self._states.snapshot(_row_of(req))
            if state and length < stop:
                if keep_snapshot:
                    stop = length
                else:
                    self._states.forget_snapshot(_row_of(req))
        if req.lock is not None:
            self.tree.narrow(req.lock, stop)
        if stop > self._window.component.reach:
            self._free_windows_before(req, int(stop - self._window.component.reach))

    def _free_windows_before(self, req: Request, length: int) -> None:
        """Frees the window pages of the request's own that lie within its first `length` tokens."""
        first = max(req.protected_len, req.evicted_seqlen_local) // self.page_size
        last = length // self.page_size
        if self._window is not None and first < last:
            table, _ = self._parts()
            self._window.free_private(table.row_pages(_row_of(req), first, last))
            req.evicted_seqlen_local = last * self.page_size

    def _share(self, req: Request) -> Insertion | None:
        """Offers to the tree what `req` computed, as far as it can be stopped at, and settles who owns which page.

        Returns:
          What the tree did; None if there is nothing to offer.
        """
        table, allocator = self._parts()
        row = _row_of(req)
        size = self.page_size
        if self.disable:
            return None
        key, state = self._as_key(req.computed_key), 0
        length = key.length
        if self._states is not None:
            state, length = self._states.snapshot(row)
            if not state:
                return None
        if not req.protected_len <= length <= key.length:
            return None
        pages = table.row_pages(row, 0, length // size)
        inserted = self._insert(key[:length], pages, state, req.lock, req.priority)
        duplicates = inserted.spare[0]
        if len(duplicates):
            allocator.release(duplicates.copy(), PageState.PRIVATE)
            table.write_pages(row, inserted.present // size - len(duplicates), inserted.kept)
        return inserted

    def _parts(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        if self.req_to_token_pool is None or self.token_to_kv_pool_allocator is None:
            raise ArgumentError("req: this cache was built without a request table or allocator; it takes no requests")
        return self.req_to_token_pool, self.token_to_kv_pool_allocator

    # ---- books ---------------------------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers. O(1)."""
        return self.tree.evictable[0] * self.page_size

    def protected_size(self) -> int:
        """Cached tokens that a lock covers. O(1)."""
        return self.tree.protected[0] * self.page_size

    def swa_evictable_size(self) -> int:
        """See `BasePrefixCache.swa_evictable_size`. O(1)."""
        return self.tree.evictable[1] * self.page_size if self._window is not None else 0

    def swa_protected_size(self) -> int:
        """See `BasePrefixCache.swa_protected_size`. O(1)."""
        return self.tree.protected[1] * self.page_size if self._window is not None else 0

    def mamba_evictable_size(self) -> int:
        """See `BasePrefixCache.mamba_evictable_size`. O(1)."""
        return self.tree.evictable[-1] if self._states is not None else 0

    def mamba_protected_size(self) -> int:
        """See `BasePrefixCache.mamba_protected_size`. O(1)."""
        return self.tree.protected[-1] if self._states is not None else 0

    def all_values_flatten(self) -> Int32[np.ndarray, " slots"]:
        """Every cached slot, node by node. O(cached)."""
        return page_slots(joined([node.value for node in self.tree.nodes()]), self.page_size)

    def take_events(self) -> list[KVCacheEvent]:
        """Events since the last call, oldest first; empty unless they were enabled. See `EventQueue.take`."""
        return self.events.take() if self.events is not None else []

    def explain(self, key: RadixKey | np.ndarray | Sequence[int]) -> Explanation:
        """Why a lookup of `key` stops where it does: `print(cache.explain(key))`. Changes nothing, not even recency.

        Cost: a lookup in every namespace and a look at the nodes let go lately; milliseconds.
        """
        return explain(self.tree, self._as_key(key))

    def draw(self) -> str:
        """The tree as text."""
        return draw_tree(self.tree)

    def check(self) -> None:
        """Verifies the tree, and that the owners agree on what is the tree's, component by component. O(cached).

        Raises:
          BrokenInvariant: with a drawing of the tree.
        """
        check_tree(self.tree)
        nodes = list(self.tree.nodes())
        pages = joined([node.value for node in nodes])
        for i, keeper in enumerate(self._keepers):
            values = []
            for node in nodes:
                value = node.slot(i).value
                if value is not None:
                    values.append(value)
                elif keeper.component.spans:
                    values.append(np.zeros_like(node.value))
            for problem in keeper.problems(pages, joined(values)):
                raise BrokenInvariant(f"{problem}\n{self.draw()}")


def _as_bigrams(token_ids: RadixKey | np.ndarray | Sequence[int]) -> RadixKey:
    return as_key(token_ids).bigrams()


def _row_of(req: Request) -> int:
    if req.req_pool_idx is None:
        raise ArgumentError(f"request {req.rid} has no row in the request table: it is {req.state.value}")
    return req.req_pool_idx
