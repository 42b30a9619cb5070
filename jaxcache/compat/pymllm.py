"""pymllm's prefix caches, which know no requests: keys and slots come in, slots go out. An adapter of the one tree.

    caller                            cache                                pools, where there are any
    match_prefix(key)            ->   slots of the longest prefix
    inc_lock_ref(last_node)      ->   a receipt: it is not evicted
    insert(key, slots)           ->   what was cached before
      free(slots[own:prefix_len])                                          the caller's duplicates go back
    evict(num_tokens)            ->   how much was evicted         ->    free, free_swa, free_track_slot
    dec_lock_ref(receipt)

The caller does what SGLang's caches do for a request (`jaxcache.RadixCache`): it frees its duplicates and reads the
cache's slots from then on. To the pools, all slots are the caller's own.

Source: pymllm mem_cache: radix_cache.py, mamba_radix_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxcache.arguments import require_counts
from jaxcache.compat.pymllm_base import BasePrefixCache, EvictResult, InsertResult, MatchResult, Tokens
from jaxcache.compat.pymllm_base import ChunkCache as ChunkCache
from jaxcache.errors import ArgumentError
from jaxcache.index.check import draw
from jaxcache.index.component import FULL, Component
from jaxcache.index.hashing import compute_node_hash
from jaxcache.index.key import RadixKey, as_key
from jaxcache.index.node import Eviction, Insertion, Match, Node, joined
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree
from jaxcache.slots import first_pages, page_slots

NodeCallback = Callable[[Node], None]


class SlotPool(Protocol):
    """Where slots are freed."""

    def free(self, free_index: np.ndarray) -> None:
        """Takes slots back, with what their tokens have for window layers."""


class WindowPool(SlotPool, Protocol):
    """A slot pool whose tokens also have KV in window layers. Page 0 belongs to no token."""

    def free_swa(self, free_index: np.ndarray) -> None:
        """Takes back what these slots have for window layers, and that only."""

    def move_swa(self, source: np.ndarray, target: np.ndarray) -> None:
        """Gives what `source` slots have for window layers to `target` slots, which have nothing."""


class StatePool(Protocol):
    """Where states are freed."""

    def free_track_slot(self, slot: int) -> None:
        """Takes a state back."""


class _TreeCache(BasePrefixCache):
    """A cache on the tree, with windows or states. The order of the tree's components: full, window, state.

    Attributes:
      page_size: Tokens a page. Keys are cut to whole pages here.
      tree: The index, for inspection.
      pool: Where slots are freed; None: nowhere.
      on_node_evict: Called with each node that was removed from the tree, after its values were freed.
    """

    def __init__(self, page_size: int, further: list[Component], pool: Any, on_node_evict: NodeCallback | None):
        self.tree = RadixTree(page_size, [FULL, *further])
        self.page_size = self.tree.page_size
        self.pool = pool
        self.on_node_evict = on_node_evict
        spans = [component.spans for component in self.tree.components[1:]]
        self._window = 1 if True in spans else 0
        self._state = 1 + spans.index(False) if False in spans else 0

    def reset(self) -> None:
        self.tree.reset()

    def match_prefix(self, key: Tokens) -> MatchResult:
        found = self.tree.match(as_key(key))
        branching = found.structural_length if self._state and found.structural_length > found.length else None
        return MatchResult(page_slots(found.pages, self.page_size), found, found.length, branching, found.state)

    def _insert(self, key: RadixKey, value: np.ndarray | None, gone: int = 0, state: int = 0) -> InsertResult:
        """Offers slots, windows but for the first `gone` tokens, and a state."""
        size = self.page_size
        pages = key.token_ids[::size] if value is None else first_pages("value", value, key.length // size, size)
        values = [pages]
        if self._window:
            values.append(self._windows_of(key, pages, gone))
        if self._state:
            values.append(np.array([state], np.int32))
        inserted = self.tree.insert(key, values)
        if self.pool is not None:
            for node in inserted.healed:  # the cache keeps its own pages, with the windows of the caller's
                mine = pages[node.start // size : node.end // size]
                self.pool.move_swa(page_slots(mine, size), page_slots(node.value, size))
        exists = bool(self._state and len(inserted.spare[self._state]))
        return InsertResult(inserted.present, inserted, exists)

    def _windows_of(self, key: RadixKey, pages: np.ndarray, gone: int) -> np.ndarray:
        """What is offered for the window layers: the page that will have it, the cache's own where there is one."""
        path, found, _ = self.tree.find(key)
        known = joined([node.value for node in path])[: found // self.page_size]
        windows = np.concatenate([known, pages[len(known) :]])
        if self.pool is None:
            windows[:] = 1  # nothing is freed, so any id will do; tokens that stand for pages may be 0
        windows[: -(-gone // self.page_size)] = 0
        return windows

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        require_counts(num_tokens=num_tokens, swa_num_tokens=swa_num_tokens, mamba_num=mamba_num)
        if (swa_num_tokens and not self._window) or (mamba_num and not self._state):
            raise ArgumentError("swa_num_tokens, mamba_num: this cache keeps neither windows nor states of that kind")
        size, tree = self.page_size, self.tree
        before = tree.evictable.copy()
        amounts = (
            [-(-num_tokens // size)] + [-(-swa_num_tokens // size)] * self._window + [mamba_num] * bool(self._state)
        )
        for i, amount in enumerate(amounts):
            short = amount - (before[i] - tree.evictable[i])  # what was evicted with the leaves counts
            if short > 0:
                evicted = tree.evict(short, i)
                self._free(evicted)
                for node in evicted.nodes if self.on_node_evict is not None else ():
                    self.on_node_evict(node)  # type: ignore[misc]
        full, *others = [most - left for most, left in zip(before, tree.evictable, strict=True)]
        windows, states = others[0] if self._window else 0, others[-1] if self._state else 0
        return EvictResult(full * size, windows * size, states)

    def _free(self, evicted: Eviction) -> None:
        """Gives what the tree evicted to the pools; slots last, as the pool frees their windows with them."""
        if self.pool is not None:
            if self._window and len(evicted.values[1]):
                self.pool.free_swa(page_slots(evicted.values[1], self.page_size))
            if len(evicted.values[0]):
                self.pool.free(page_slots(evicted.values[0], self.page_size))

    def inc_lock_ref(self, node: Match | Insertion | None) -> Receipt | None:
        return None if node is None else self.tree.lock(node)

    def dec_lock_ref(
        self, node: Receipt | Match | Insertion | None, swa_boundary_id: Receipt | None = None, **kwargs: Any
    ) -> None:
        receipt: Any = node if swa_boundary_id is None else swa_boundary_id
        if receipt is not None:
            self.tree.unlock(receipt)

    def evictable_size(self) -> int:
        return self.tree.evictable[0] * self.page_size

    def protected_size(self) -> int:
        return self.tree.protected[0] * self.page_size

    def swa_evictable_size(self) -> int:
        return self.tree.evictable[1] * self.page_size if self._window else 0

    def swa_protected_size(self) -> int:
        return self.tree.protected[1] * self.page_size if self._window else 0

    def mamba_evictable_size(self) -> int:
        return self.tree.evictable[self._state] if self._state else 0

    def mamba_protected_size(self) -> int:
        return self.tree.protected[self._state] if self._state else 0

    def compute_node_hash(self, node: Node) -> list[str]:
        """A SHA-256 hex digest for each page of a node, chained from the start of its sequence, always.

        Raises:
          ArgumentError: The node has left the tree.

        Cost: hashes the node's pages and those before it, once.
        """
        return [digest.hex() for digest in compute_node_hash(node, self.tree.page_bytes)]

    def pretty_print(self) -> None:
        print(draw(self.tree))


class RadixCache(_TreeCache):
    """A prefix cache for full attention and, if asked, sliding windows beside it.

    Args:
      page_size: Tokens a page, >= 1.
      sliding_window_size: Tokens before a position that its window layers attend to; None without such layers.
      token_to_kv_pool_allocator: Where slots are freed; with windows it must be a `WindowPool`. None: nowhere.
      on_node_evict: Called with each node that was removed from the tree, after its values were freed.

    Attributes:
      page_size: As given.
      sliding_window_size: As given.
      pool: The allocator.
      on_node_evict: As given.
      tree: The index, for inspection.

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

    @property
    def supports_swa(self) -> bool:
        """Whether it was told of a window."""
        return self.sliding_window_size is not None

    def insert(
        self,
        key: Tokens,
        value: np.ndarray | None = None,
        *,
        prev_prefix_len: int = 0,
        swa_evicted_seqlen: int = 0,
        **kwargs: Any,
    ) -> InsertResult:
        require_counts(prev_prefix_len=prev_prefix_len, swa_evicted_seqlen=swa_evicted_seqlen)
        return self._insert(as_key(key), value, max(prev_prefix_len, swa_evicted_seqlen))


class MambaRadixCache(_TreeCache):
    """A prefix cache with a recurrent state beside the KV: a prefix can be resumed from only where one was saved.

    Args:
      page_size: Tokens a page, >= 1.
      token_to_kv_pool_allocator: Where slots are freed; None: nowhere.
      mamba_pool: Where states are freed; None: nowhere.
      on_node_evict: As for `RadixCache`.

    Attributes:
      page_size: As given.
      pool: The allocator.
      mamba_pool: As given.
      on_node_evict: As given.
      tree: The index, for inspection.

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

    def insert(
        self, key: Tokens, value: np.ndarray | None = None, *, mamba_value: int | None = None, **kwargs: Any
    ) -> InsertResult:
        key = as_key(key)
        if mamba_value is None:  # nothing could be resumed from it
            found = self.match_prefix(key)
            return InsertResult(found.prefix_len, found.last_node)
        if not isinstance(mamba_value, (int, np.integer)) or mamba_value < 1:
            raise ArgumentError(f"mamba_value must be the id of a state, 1 or more, got {mamba_value!r}")
        if key.length % self.page_size or not key.length:
            raise ArgumentError(
                f"key: a state stands for all its {key.length} tokens, which must be whole pages of {self.page_size}: "
                "save one where a page ends"
            )
        return self._insert(key, value, state=int(mamba_value))

    def _free(self, evicted: Eviction) -> None:
        if self.mamba_pool is not None:
            for state in evicted.values[self._state].tolist():
                self.mamba_pool.free_track_slot(state)
        super()._free(evicted)
