"""Prefix caches that know no requests: keys and slots come in, slots go out. pymllm's classes, over the one tree.

    caller                            cache                                pools, where there are any
    match_prefix(key)            ->   slots of the longest prefix
    inc_lock_ref(last_node)      ->   a receipt: it stays
    insert(key, slots)           ->   what was there already
      free(slots[own:prefix_len])                                          the caller's duplicates go back
    evict(num_tokens)            ->   how much of what went          ->    free, free_swa, free_track_slot
    dec_lock_ref(receipt)

The caller does what SGLang's caches do for a request (`jaxcache.RadixCache`): it frees its duplicates and reads the
cache's slots from then on. To the pools, all slots are the caller's own.

Source: pymllm mem_cache: base_prefix_cache.py, radix_cache.py, mamba_radix_cache.py, without their sharp edges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.arguments import require_amounts
from jaxcache.index.check import draw
from jaxcache.index.component import FULL, Component
from jaxcache.index.hashing import compute_node_hash
from jaxcache.index.key import RadixKey, as_key
from jaxcache.index.node import Eviction, Insertion, Match, Node, joined
from jaxcache.index.receipt import Receipt
from jaxcache.index.slots import expand_pages, slots_to_pages
from jaxcache.index.tree import RadixTree

if TYPE_CHECKING:
    from jaxtyping import Int32

NodeCallback = Callable[[Node], None]


class SlotPool(Protocol):
    """Where slots go back to."""

    def free(self, free_index: np.ndarray) -> None:
        """Takes slots back, with what their tokens have for window layers."""


class WindowPool(SlotPool, Protocol):
    """Where slots go back to whose tokens have KV for window layers beside the other."""

    def free_swa(self, free_index: np.ndarray) -> None:
        """Takes back what these slots have for window layers, and that only."""

    def move_swa(self, source: np.ndarray, target: np.ndarray) -> None:
        """Gives what `source` slots have for window layers to `target` slots, which have nothing."""


class StatePool(Protocol):
    """Where states go back to."""

    def free_track_slot(self, slot: int) -> None:
        """Takes a state back."""


@dataclass(frozen=True, eq=False)
class MatchResult:
    """What a lookup found.

    Attributes:
      indices: int32 slot of each token found.
      last_node: The position, for `inc_lock_ref`.
      prefix_len: Tokens found.
      mamba_branching_seqlen: Tokens whose slots are cached, where that is further than states allow to go on from: a
        snapshot saved there will be of use. Else None.
      mamba_value: The state saved after `prefix_len` tokens; 0 if there is none. To be copied, not to be written to.
    """

    indices: Int32[np.ndarray, " prefix_len"]
    last_node: Match
    prefix_len: int
    mamba_branching_seqlen: int | None = None
    mamba_value: int = 0


@dataclass(frozen=True, eq=False)
class InsertResult:
    """What an insert did.

    Attributes:
      prefix_len: Tokens that were cached before; the caller frees its own slots for them.
      last_node: The end of the key, for `inc_lock_ref`.
      mamba_exist: Whether the end of the key had a state before; the caller frees its own then.
    """

    prefix_len: int
    last_node: Insertion
    mamba_exist: bool = False


@dataclass(frozen=True)
class EvictResult:
    """What an eviction let go.

    Attributes:
      full_evicted: Tokens.
      swa_evicted: Tokens that are of no use to window layers any more; those that went altogether are among them.
      mamba_evicted: States.
    """

    full_evicted: int = 0
    swa_evicted: int = 0
    mamba_evicted: int = 0


class BasePrefixCache(ABC):
    """What both caches do: make a `RadixCache` or a `MambaRadixCache`.

    Attributes:
      page_size: Tokens a page. Keys are cut to whole pages here.
      tree: The index, for looking at.
      pool: Where slots go back to; None if nobody takes them.
      on_node_evict: Called with each node that has left the tree, after what it held was freed.
    """

    def __init__(
        self, page_size: int, further: Sequence[Component], pool: SlotPool | None, on_node_evict: NodeCallback | None
    ):
        self.tree = RadixTree(page_size, [FULL, *further])
        self.page_size = self.tree.page_size
        self.pool = pool
        self.on_node_evict = on_node_evict

    def reset(self) -> None:
        """Forgets everything. Frees nothing: clear the pools with it. Receipts given out before are refused."""
        self.tree.reset()

    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key` that can be gone on from, in whole pages. Counts as a use of it."""
        found = self.tree.match(as_key(key))
        return MatchResult(expand_pages(found.pages, self.page_size), found, found.length)

    @abstractmethod
    def insert(
        self,
        key: RadixKey | np.ndarray | Sequence[int],
        value: Int32[np.ndarray, " slots"] | None = None,
        **kwargs: int,
    ) -> InsertResult:
        """Caches `key` under the slots in `value`, as far as it is not cached."""

    @abstractmethod
    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        """Lets go of at least so many tokens, in whole unlocked leaves, unless fewer are evictable.

        Then, if that did not let go of as much of them: of what `swa_num_tokens` tokens have for window layers, and of
        `mamba_num` states, in whatever nodes they are. Cost: O(evicted).

        Raises:
          ArgumentError: The cache keeps no windows, or no states, and is asked for some; or a number is none.
        """

    def _evict(self, *amounts: int) -> list[int]:
        """Lets go of values of each component and frees them; returns how many of each went."""
        before = self.tree.evictable.copy()
        for i, (most, amount) in enumerate(zip(before, amounts, strict=True)):
            short = amount - (most - self.tree.evictable[i])  # what went with the leaves counts
            if short > 0:
                gone = self.tree.evict(short, i)
                self._free(gone)
                if self.on_node_evict is not None:
                    for node in gone.nodes:
                        self.on_node_evict(node)
        return [most - left for most, left in zip(before, self.tree.evictable, strict=True)]

    def _free(self, gone: Eviction) -> None:
        """Gives what the tree let go to the pools."""
        if self.pool is not None and len(gone.values[0]):
            self.pool.free(expand_pages(gone.values[0], self.page_size))

    def _pages_of(self, key: RadixKey, value: Int32[np.ndarray, " slots"] | None) -> np.ndarray:
        """Page ids of the slots of a key; the tokens themselves where there are no slots."""
        if value is None:
            return key.token_ids[:: self.page_size]
        return slots_to_pages(value, key.length // self.page_size, self.page_size)

    def inc_lock_ref(self, node: Match | Insertion) -> Receipt:
        """Protects what a match or an insert found: hand it the `last_node` of the result.

        Raises:
          ReceiptError: It is no longer there: match again.
        """
        return self.tree.lock(node)

    def dec_lock_ref(self, receipt: Receipt) -> None:
        """Takes a receipt back, exactly once.

        Raises:
          ReceiptError: It was given back before, is foreign, or from before a reset. Nothing changes.
        """
        self.tree.unlock(receipt)

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers. O(1)."""
        return self.tree.evictable[0] * self.page_size

    def protected_size(self) -> int:
        """Cached tokens that a lock covers. O(1)."""
        return self.tree.protected[0] * self.page_size

    def swa_evictable_size(self) -> int:
        """Cached tokens with something for window layers that no lock covers; 0 without windows. O(1)."""
        return 0

    def swa_protected_size(self) -> int:
        """Cached tokens with something for window layers that a lock covers; 0 without windows. O(1)."""
        return 0

    def mamba_evictable_size(self) -> int:
        """Cached states that no lock covers; 0 without states. O(1)."""
        return 0

    def mamba_protected_size(self) -> int:
        """Cached states that a lock covers; 0 without states. O(1)."""
        return 0

    def total_size(self) -> int:
        """Cached tokens. O(1)."""
        return len(self.tree) * self.page_size

    def compute_node_hash(self, node: Node) -> list[str]:
        """A SHA-256 hex digest for each page of a node, chained from the start of its sequence, always.

        Raises:
          ArgumentError: The node has left the tree.

        Cost: hashes the node's pages and those before it, once.
        """
        return [digest.hex() for digest in compute_node_hash(node, self.tree.element_bytes * self.page_size)]

    def pretty_print(self) -> None:
        """Prints the tree."""
        print(draw(self.tree))


class RadixCache(BasePrefixCache):
    """A prefix cache for full attention and, if asked, sliding windows beside it.

    Args:
      page_size: Tokens a page, >= 1.
      sliding_window_size: Tokens before a position that its window layers attend to; None without such layers.
      token_to_kv_pool_allocator: Where slots go back to; with windows it must be a `WindowPool`. None: nowhere.
      on_node_evict: See `BasePrefixCache`.

    Attributes:
      sliding_window_size: As given.

    Raises:
      ArgumentError: `page_size` or `sliding_window_size` is no positive integer.
    """

    def __init__(
        self,
        page_size: int = 1,
        sliding_window_size: int | None = None,
        token_to_kv_pool_allocator: WindowPool | SlotPool | None = None,
        on_node_evict: NodeCallback | None = None,
    ):
        if sliding_window_size is not None and not (isinstance(sliding_window_size, int) and sliding_window_size >= 1):
            raise ArgumentError(f"sliding_window_size must be a positive integer or None, got {sliding_window_size!r}")
        further = [] if sliding_window_size is None else [Component("window", sliding_window_size)]
        super().__init__(page_size, further, token_to_kv_pool_allocator, on_node_evict)
        self.sliding_window_size = sliding_window_size
        self._windows: Any = token_to_kv_pool_allocator if further else None  # a WindowPool, as the caller promised

    @property
    def supports_swa(self) -> bool:
        """Whether it was told of a window."""
        return self.sliding_window_size is not None

    def insert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        key: RadixKey | np.ndarray | Sequence[int],
        value: Int32[np.ndarray, " slots"] | None = None,
        *,
        prev_prefix_len: int = 0,
        swa_evicted_seqlen: int = 0,
    ) -> InsertResult:
        """Caches `key` under the slots in `value`, as far as it is not cached.

        For `prefix_len` tokens the cache keeps the slots it had, and the caller frees its own. Where it had nothing for
        the window layers any more, it now has what the caller's slots had.

        Args:
          key: Tokens, cut to whole pages.
          value: int32 slot of each token, whole pages. None uses tokens as page ids, for tests without a pool.
          prev_prefix_len: Tokens whose slots the caller has from this cache: nothing changes for them.
          swa_evicted_seqlen: Tokens at the start for which the caller's slots have nothing for window layers any more.

        Raises:
          ArgumentError: `value` is too short, not made of whole pages, or has nothing for window layers at its end, or
            a length is none.
        """
        require_amounts(prev_prefix_len=prev_prefix_len, swa_evicted_seqlen=swa_evicted_seqlen)
        key = as_key(key)
        pages = self._pages_of(key, value)
        if not self.supports_swa:
            inserted = self.tree.insert(key, (pages,))
            return InsertResult(inserted.present, inserted)
        # What a page has for window layers goes by the page's name, and that is the cache's own page where it has one.
        # 0 says that nothing is offered, so names begin with 1.
        path, found, _ = self.tree.find(key)
        known = joined([node.value for node in path])[: found // self.page_size]
        names = np.concatenate([known, pages[len(known) :]]) + 1
        names[: -(-max(prev_prefix_len, swa_evicted_seqlen) // self.page_size)] = 0
        inserted = self.tree.insert(key, (pages, names))
        if self._windows is not None:
            for node in inserted.healed:
                mine = pages[node.start // self.page_size : node.end // self.page_size]
                self._windows.move_swa(expand_pages(mine, self.page_size), expand_pages(node.value, self.page_size))
        return InsertResult(inserted.present, inserted)

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        """See `BasePrefixCache.evict`."""
        require_amounts(num_tokens=num_tokens, swa_num_tokens=swa_num_tokens, mamba_num=mamba_num)
        if mamba_num or (swa_num_tokens and not self.supports_swa):
            raise ArgumentError("swa_num_tokens, mamba_num: this cache keeps neither windows nor states of that kind")
        amounts = (num_tokens, swa_num_tokens) if self.supports_swa else (num_tokens,)
        gone = self._evict(*(-(-amount // self.page_size) for amount in amounts))
        return EvictResult(*(count * self.page_size for count in gone))

    def _free(self, gone: Eviction) -> None:
        if self._windows is not None and len(gone.values[1]):
            self._windows.free_swa(expand_pages(gone.values[1] - 1, self.page_size))
        super()._free(gone)

    def swa_evictable_size(self) -> int:
        """See `BasePrefixCache.swa_evictable_size`."""
        return self.tree.evictable[1] * self.page_size if self.supports_swa else 0

    def swa_protected_size(self) -> int:
        """See `BasePrefixCache.swa_protected_size`."""
        return self.tree.protected[1] * self.page_size if self.supports_swa else 0


class MambaRadixCache(BasePrefixCache):
    """A prefix cache with a recurrent state beside the KV: a prefix can be gone on from only where one was saved.

    Args:
      page_size: Tokens a page, >= 1.
      token_to_kv_pool_allocator: Where slots go back to; None: nowhere.
      mamba_pool: Where states go back to; None: nowhere.
      on_node_evict: See `BasePrefixCache`.

    Attributes:
      mamba_pool: As given.

    Raises:
      ArgumentError: `page_size` is no positive integer.
    """

    def __init__(
        self,
        page_size: int = 1,
        token_to_kv_pool_allocator: SlotPool | None = None,
        mamba_pool: StatePool | None = None,
        on_node_evict: NodeCallback | None = None,
    ):
        super().__init__(page_size, [Component("state", 1, spans=False)], token_to_kv_pool_allocator, on_node_evict)
        self.mamba_pool = mamba_pool

    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key` at whose end a state was saved. Counts as a use of it."""
        found = self.tree.match(as_key(key))
        further = found.structural_length if found.structural_length > found.length else None
        return MatchResult(expand_pages(found.pages, self.page_size), found, found.length, further, found.state)

    def insert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        key: RadixKey | np.ndarray | Sequence[int],
        value: Int32[np.ndarray, " slots"] | None = None,
        *,
        mamba_value: int,
    ) -> InsertResult:
        """Caches `key` under the slots in `value`, as far as it is not cached, and the state saved at its end.

        Args:
          key: Tokens, whole pages.
          value: int32 slot of each token. None uses tokens as page ids, for tests without a pool.
          mamba_value: The state after all of them. The cache's from now on, unless it had one (`mamba_exist`).

        Raises:
          ArgumentError: The key is not whole pages, `value` is too short or not whole pages, or there is no state.
        """
        key = as_key(key)
        if key.length % self.page_size or not key.length:
            raise ArgumentError(
                f"key: a state stands for all its {key.length} tokens, which must be whole pages of {self.page_size}: "
                "save one where a page ends"
            )
        if not isinstance(mamba_value, (int, np.integer)) or mamba_value < 1:
            raise ArgumentError(f"mamba_value must be the id of a state, 1 or more, got {mamba_value!r}")
        inserted = self.tree.insert(key, (self._pages_of(key, value), np.array([mamba_value], np.int32)))
        return InsertResult(inserted.present, inserted, bool(len(inserted.spare[1])))

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        """See `BasePrefixCache.evict`."""
        require_amounts(num_tokens=num_tokens, swa_num_tokens=swa_num_tokens, mamba_num=mamba_num)
        if swa_num_tokens:
            raise ArgumentError("swa_num_tokens: this cache keeps no windows; states are counted by mamba_num")
        pages, states = self._evict(-(-num_tokens // self.page_size), mamba_num)
        return EvictResult(pages * self.page_size, 0, states)

    def _free(self, gone: Eviction) -> None:
        if self.mamba_pool is not None:
            for state in gone.values[1].tolist():
                self.mamba_pool.free_track_slot(state)
        super()._free(gone)

    def mamba_evictable_size(self) -> int:
        """See `BasePrefixCache.mamba_evictable_size`."""
        return self.tree.evictable[1]

    def mamba_protected_size(self) -> int:
        """See `BasePrefixCache.mamba_protected_size`."""
        return self.tree.protected[1]
