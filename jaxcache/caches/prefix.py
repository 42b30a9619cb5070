"""PrefixCache: the one tree and its components, by keys and pages. It knows no requests.

What becomes of the memory that the tree takes and gives up stands in `jaxcache.caches.kept`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.arguments import as_count, as_int32, as_sequence, require_counts, require_kind
from jaxcache.caches.base import NONE_SPARED, MatchResult
from jaxcache.caches.check import check_cached
from jaxcache.caches.kept import KeptMemory
from jaxcache.components.base import MemoryComponent, TreeComponent
from jaxcache.components.full import FullPages
from jaxcache.errors import ArgumentError
from jaxcache.events.events import EventQueue, KVCacheEvent
from jaxcache.events.observer import CacheObserver
from jaxcache.guard import Guard, Told, exclusive
from jaxcache.index.check import draw as draw_tree
from jaxcache.index.explain import Explanation, explain
from jaxcache.index.key import BigramKey, Namespace, RadixKey, as_bigrams, as_key
from jaxcache.index.node import Insertion, Match, joined
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree
from jaxcache.slots import first_pages, page_slots

if TYPE_CHECKING:
    from jaxtyping import Int32


class PrefixCache:
    """Prefixes of token sequences, and the memory that is kept for them, component by component.

    Args:
      full: The component of full pages.
      page_size: Tokens a page; must be the allocator's.
      components: What else the tree holds with the pages, each by ids of its own.
      followers: What follows the full pages: the cache does nothing for them but to know them.
      disable: See `RadixCache`.
      enable_kv_cache_events: See `RadixCache`.
      policy: See `RadixCache`.
      is_eagle: See `RadixCache`.

    Attributes:
      full: As given.
      components: All of them, the full pages first.
      tree: The index, for looking at.
      observer: Notified of lookups, inserts and evictions, such as `CacheMetrics`; or None. What it raises breaks no
        call.
      guard: Who may call, see `jaxcache.guard`. A manager puts its own in the place of it.

    Threads: of one thread, the first that changes something; `guard.hand_over()` moves it. From any other, sizes and
    `take_events` can be read; everything else raises ThreadError. The tree itself checks no thread.
    """

    def __init__(
        self,
        full: FullPages,
        page_size: int,
        *,
        components: Sequence[TreeComponent] = (),
        followers: Sequence[MemoryComponent] = (),
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        policy: Policy = Policy.LRU,
        is_eagle: bool = False,
    ):
        self.page_size = page_size
        self.disable = disable
        self.enable_kv_cache_events = enable_kv_cache_events
        self.is_eagle = is_eagle
        self.full = full
        self._further = tuple(components)
        self._in_tree: tuple[TreeComponent, ...] = (full, *components)
        self.components: tuple[MemoryComponent, ...] = (*self._in_tree, *followers)
        self._as_key = as_bigrams if is_eagle else as_key
        self.tree = RadixTree(
            page_size,
            [component.component for component in self._in_tree],
            policy,
            with_hashes=enable_kv_cache_events,
            element_bytes=(BigramKey if is_eagle else RadixKey).element_bytes,
        )
        events = EventQueue(self.tree) if enable_kv_cache_events else None
        self._kept = KeptMemory(self.tree, full, self._further, events)
        self.observer: CacheObserver | None = None
        self.guard = self._own_guard = Guard(self._audit, "call reset(), and clear the allocators")

    # ---- looking up ----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every prefix and queues AllBlocksCleared. Frees no page: clear the allocators with it.

        Receipts given out before are refused from now on, so a request that runs can no longer be ended: end all first.
        `MemoryManager.reset` does all of it, and refuses while requests run.
        """
        is_own = self.guard is self._own_guard
        if is_own:
            self.guard.begin_anew("reset")
        else:
            self.guard.require_owner("reset")
        self.tree.reset()
        if self.events is not None:
            self.events.cleared()
        if is_own:
            self.guard.mend()

    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key`, in whole pages, that every component can be continued from.

        Changes nothing but recency.

        Cost: O(nodes on the path); no loop over tokens. Converting a Python list costs about 10 ns a token: pass a
        `RadixKey` that is kept.
        """
        guard = self.guard
        if guard.thread != get_ident():
            guard.look("match_prefix")
        started = time.perf_counter() if self.observer is not None else 0.0
        try:
            key = self._as_key(key)
            found = self.tree.match(key[:0] if self.disable else key)
        except BaseException as error:
            if not guard.turn & 1:  # else the call that made this one may undo it
                guard.failed("match_prefix", error)
            raise
        if self.observer is not None:
            seconds = time.perf_counter() - started
            with Told(self.observer):
                self.observer.matched(seconds)
        return MatchResult(found, self.page_size)

    @exclusive
    def inc_lock_ref(self, node: Match | MatchResult) -> Receipt:
        """Protects what a match found from eviction.

        Raises:
          ReceiptError: It is no longer there: match again.
        """
        return self.tree.lock(node.last_device_node if isinstance(node, MatchResult) else node)

    @exclusive
    def dec_lock_ref(self, receipt: Receipt) -> int:
        """Takes a receipt back, exactly once; returns the tokens that became evictable.

        Raises:
          ReceiptError: It was given back before, is foreign, or from before a reset. Nothing changes.
        """
        return self.tree.unlock(receipt) * self.page_size

    # ---- inserting -----------------------------------------------------------------------------------------------

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
        return self._insert_pages((key, pages, state))

    @exclusive  # of one parameter, as this is hot
    def _insert_pages(self, offer: tuple[RadixKey | np.ndarray | Sequence[int], np.ndarray, int]) -> int:
        key, pages, state = offer
        if self.disable:
            return 0
        key, pages = self._as_key(key), as_int32("pages", pages)
        values = self._kept.require_insertable(key, pages, state) if state or self._further else ()
        return self._insert(key, pages, values).present

    def _insert(
        self,
        key: RadixKey,
        pages: np.ndarray,
        values: Sequence[int],
        held: Receipt | None = None,
        priority: int = 0,
    ) -> Insertion:
        """Offers the tree pages and what goes with them: `KeptMemory.insert`."""
        started = time.perf_counter() if self.observer is not None else 0.0
        inserted = self._kept.insert(key, pages, values, held, priority)
        if self.observer is not None:
            seconds = time.perf_counter() - started
            with Told(self.observer):
                self.observer.inserted(inserted.length - inserted.present, seconds)
        return inserted

    # ---- evicting ------------------------------------------------------------------------------------------------

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> int:
        """Frees at least `num_tokens` tokens of the least valuable unlocked leaves; returns how many it freed.

        Then, if that did not free as much of them: window pages of `swa_num_tokens` tokens, and `mamba_num` states, in
        whatever nodes they are; what else is there stays, and is of use again once the hole is filled.

        Overshoots by less than one node. Cost: O(evicted).

        Raises:
          ArgumentError: A number is not an integer, or is negative.
        """
        require_counts(num_tokens=num_tokens, swa_num_tokens=swa_num_tokens, mamba_num=mamba_num)
        size = self.page_size
        wanted = {"full": -(-num_tokens // size), "window": -(-swa_num_tokens // size), "state": mamba_num}
        return self.evict_values([wanted.get(component.name, 0) for component in self._in_tree])

    @exclusive
    def evict_values(self, amounts: Sequence[int]) -> int:
        """Frees at least so many values of each component of the tree; returns the tokens freed. See `evict`.

        Values of further components that go with a leaf count.
        """
        amounts = self._amounts(amounts)
        started = time.perf_counter() if self.observer is not None else 0.0
        freed = self._kept.evict(amounts)
        size = self.page_size
        if self.observer is not None:
            counts = [n * size if part.spans else n for n, part in zip(freed, self.tree.components, strict=True)]
            seconds = time.perf_counter() - started
            with Told(self.observer):
                self.observer.evicted(counts, seconds)
        return freed[0] * size

    def _amounts(self, amounts: Sequence[int]) -> Sequence[int]:
        if len(as_sequence("amounts", amounts)) != len(self._in_tree):
            names = [part.name for part in self._in_tree]
            raise ArgumentError(f"amounts must be one number for each of {names}, got {len(amounts)}")
        return [as_count("amounts", amount) for amount in amounts]

    def make_room(self, pages: int, states: int = 0, *, without_window: int = 0) -> bool:
        """Whether so many pages and states can be taken now, after evicting what was short, of each only as much.

        If that cannot suffice for all of them, nothing is evicted.

        Args:
          pages: To be taken.
          states: To be taken.
          without_window: Of the pages, those that need no window page.

        Raises:
          ArgumentError: States are asked of a cache that keeps none; or a number is not an integer, or is negative.

        Cost: O(evicted).
        """
        require_counts(pages=pages, states=states, without_window=without_window)
        if states and states not in self._kept.values_with(states):
            raise ArgumentError(f"states: this cache keeps none, got {states}: use a MambaRadixCache")
        return self.make_room_for({"full": pages, "window": pages - without_window, "state": states})

    def make_room_for_pages(self, num_pages: int, spared: Mapping[str, int] = NONE_SPARED) -> bool:
        """`make_room_for` so many pages, with all that components keep with a page.

        Args:
          num_pages: To be taken.
          spared: By component, how many of them need nothing of it.
        """
        parts, num_pages = self._in_tree, as_count("num_pages", num_pages)
        require_kind("spared", spared, Mapping)
        return self.make_room_for({part.name: part.per_page * (num_pages - spared.get(part.name, 0)) for part in parts})

    @exclusive
    def make_room_for(self, amounts: Mapping[str, int]) -> bool:
        """Whether so many values of each component can be taken now, after evicting what was short, only as much.

        If that cannot suffice for all of them, nothing is evicted. Cost: O(evicted).

        Args:
          amounts: By name of a component; of others 0.
        """
        require_kind("amounts", amounts, Mapping)
        short = self._kept.shortage(amounts)
        if short is None:
            return False
        if any(short):
            self.evict_values(short)
        return True

    @exclusive
    def drop(self, extra_key: str | bytes | Namespace | None) -> int:
        """Forgets all that is cached in one namespace; returns the tokens freed. O(its nodes).

        Raises:
          LockedError: A lock covers some of it: end its requests first. Nothing changes.
        """
        gone = self.tree.drop(RadixKey(b"", extra_key).namespace)
        self._kept.free(gone)
        return len(gone.values[0]) * self.page_size

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers. O(1)."""
        return self.tree.evictable[0] * self.page_size

    def protected_size(self) -> int:
        """Cached tokens that a lock covers. O(1)."""
        return self.tree.protected[0] * self.page_size

    def swa_evictable_size(self) -> int:
        """Cached tokens with a window page that no lock covers; 0 without windows. O(1)."""
        return self._kept.count("window", self.tree.evictable) * self.page_size

    def swa_protected_size(self) -> int:
        """Cached tokens with a window page that a lock covers; 0 without windows. O(1)."""
        return self._kept.count("window", self.tree.protected) * self.page_size

    def mamba_evictable_size(self) -> int:
        """Cached states that no lock covers; 0 where none are kept. O(1)."""
        return self._kept.count("state", self.tree.evictable)

    def mamba_protected_size(self) -> int:
        """Cached states that a lock covers; 0 where none are kept. O(1)."""
        return self._kept.count("state", self.tree.protected)

    # ---- looking at ----------------------------------------------------------------------------------------------

    @property
    def events(self) -> EventQueue | None:
        """What waits for `take_events`; None unless they are enabled."""
        return self._kept.events

    @property
    def tree_components(self) -> tuple[TreeComponent, ...]:
        """Those of the components whose values the tree holds, in its order."""
        return self._in_tree

    def usage(self, name: str) -> tuple[int, int, int]:
        """(size, available, evictable) of one component of the tree, in its values.

        Raises:
          ArgumentError: There is no such component.
        """
        require_kind("name", name, str)
        return self._kept.usage(name)

    def rows_in_use(self) -> dict[str, Int32[np.ndarray, " rows"]]:
        """For each stack of the pool the rows that are not free, ascending. O(pages)."""
        return {name: part.rows_in_use() for part in self.components for name in part.stack_names}

    def all_values_flatten(self) -> Int32[np.ndarray, " slots"]:
        """Every cached slot, node by node. O(cached)."""
        return page_slots(joined([node.value for node in self.tree.nodes()]), self.page_size)

    def take_events(self) -> list[KVCacheEvent]:
        """Events since the last call, oldest first; empty unless they were enabled. See `EventQueue.take`."""
        return self.events.take() if self.events is not None else []

    @exclusive
    def explain(self, key: RadixKey | np.ndarray | Sequence[int]) -> Explanation:
        """Why a lookup of `key` stops where it does: `print(cache.explain(key))`. Changes nothing, not even recency.

        Cost: a lookup in every namespace and a look at the nodes evicted lately; milliseconds.
        """
        return explain(self.tree, self._as_key(key))

    @exclusive
    def draw(self) -> str:
        """The tree as text."""
        return draw_tree(self.tree)

    @exclusive
    def check(self) -> None:
        """Verifies the tree, and that the owners agree on what is the tree's, component by component. O(cached).

        Raises:
          BrokenInvariantError: with a drawing of the tree.
        """
        self._audit()

    def _audit(self) -> None:
        check_cached(self.tree, self._in_tree)
