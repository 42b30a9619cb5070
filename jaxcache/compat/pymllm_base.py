"""What pymllm's prefix caches have in common: results, the interface, and the cache that keeps nothing.

Source: pymllm mem_cache: base_prefix_cache.py, chunk_cache.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.index.key import RadixKey
from jaxcache.index.node import EMPTY_IDS, Insertion, Match
from jaxcache.index.receipt import Receipt

if TYPE_CHECKING:
    from jaxtyping import Int32

Tokens = RadixKey | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class MatchResult:
    """What a lookup found.

    Attributes:
      indices: int32 slot of each token found.
      last_node: The position, for `inc_lock_ref`; None in a cache that keeps nothing.
      prefix_len: Tokens found.
      mamba_branching_seqlen: Tokens whose slots are cached, where that is further than the last saved state: a state
        saved there will be found. Else None.
      mamba_value: The state saved after `prefix_len` tokens; 0 if there is none. To be copied, not to be written to.
    """

    indices: Int32[np.ndarray, " prefix_len"]
    last_node: Match | None = None
    prefix_len: int = 0
    mamba_branching_seqlen: int | None = None
    mamba_value: int = 0


@dataclass(frozen=True, eq=False)
class InsertResult:
    """What an insert did.

    Attributes:
      prefix_len: Tokens that were cached before; the caller frees its own slots for them.
      last_node: The end of what is cached of the key, for `inc_lock_ref`; None in a cache that keeps nothing.
      mamba_exist: Whether the end of the key had a state before; the caller frees its own then.
    """

    prefix_len: int = 0
    last_node: Match | Insertion | None = None
    mamba_exist: bool = False


@dataclass(frozen=True)
class EvictResult:
    """What an eviction freed.

    Attributes:
      full_evicted: Tokens.
      swa_evicted: Tokens whose part for window layers was freed, with or without the rest.
      mamba_evicted: States.
    """

    full_evicted: int = 0
    swa_evicted: int = 0
    mamba_evicted: int = 0


class BasePrefixCache(ABC):
    """What every cache offers. Sizes are in tokens, or states; 0 of what a cache does not keep. O(1)."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything. Frees nothing: clear the pools with it. Receipts given out before are refused."""

    @abstractmethod
    def match_prefix(self, key: Tokens) -> MatchResult:
        """The longest cached prefix of `key` that can be resumed from, in whole pages. Counts as a use of it."""

    @abstractmethod
    def insert(self, key: Tokens, value: Int32[np.ndarray, " slots"] | None = None, **kwargs: Any) -> InsertResult:
        """Caches `key` under the slots in `value`, as far as it is not cached. Unknown `kwargs` are ignored.

        For `prefix_len` tokens the cache keeps the slots it had, and the caller frees its own. Where a window was
        evicted, it now has what the caller's slots had.

        Args:
          key: Tokens, cut to whole pages; where states are kept, they must be whole pages.
          value: int32 slot of each token, whole pages. None uses tokens as page ids, for tests without a pool.
          **kwargs: prev_prefix_len: tokens whose slots the caller has from this cache: nothing changes for them.
            swa_evicted_seqlen: tokens at the start for which the caller's slots have nothing for window layers any
            more. mamba_value: the state after all of the tokens. It is the cache's from now on, unless there was one
            (`mamba_exist`). Without one a cache of states takes nothing: slots from `prefix_len` on stay the caller's.

        Raises:
          ArgumentError: `value` is too short, not made of whole pages, or has nothing for window layers at its end; the
            key of a state is not whole pages; or a number is none.
        """

    @abstractmethod
    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        """Evicts at least so many tokens, in whole unlocked leaves, unless fewer are evictable.

        Then, if that did not free as much of them: of what `swa_num_tokens` tokens have for window layers, and of
        `mamba_num` states, in whatever nodes they are. Cost: O(evicted).

        Raises:
          ArgumentError: The cache keeps no windows, or no states, and is asked for some; or a number is none.
        """

    @abstractmethod
    def inc_lock_ref(self, node: Match | Insertion | None) -> Receipt | None:
        """Protects what a match or an insert found, the `last_node` of its result; of None, nothing.

        Raises:
          ReceiptError: It is no longer there: match again.
        """

    @abstractmethod
    def dec_lock_ref(
        self, node: Receipt | Match | Insertion | None, swa_boundary_id: Receipt | None = None, **kwargs: Any
    ) -> None:
        """Takes a receipt back, exactly once: alone, or after the node that was locked. Of None: nothing to do.

        Raises:
          ArgumentError: A node without its receipt.
          ReceiptError: It was given back before, is foreign, or from before a reset. Nothing changes.
        """

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers."""
        return 0

    def protected_size(self) -> int:
        """Cached tokens that a lock covers."""
        return 0

    def swa_evictable_size(self) -> int:
        """Cached tokens with something for window layers that no lock covers."""
        return 0

    def swa_protected_size(self) -> int:
        """Cached tokens with something for window layers that a lock covers."""
        return 0

    def mamba_evictable_size(self) -> int:
        """Cached states that no lock covers."""
        return 0

    def mamba_protected_size(self) -> int:
        """Cached states that a lock covers."""
        return 0

    def total_size(self) -> int:
        """Cached tokens."""
        return self.evictable_size() + self.protected_size()

    @abstractmethod
    def pretty_print(self) -> None:
        """Prints what is cached."""


class ChunkCache(BasePrefixCache):
    """A cache that finds nothing and keeps nothing: slots stay the caller's. Takes and ignores any arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def reset(self) -> None: ...

    def match_prefix(self, key: Tokens) -> MatchResult:
        return MatchResult(EMPTY_IDS)

    def insert(self, key: Tokens, value: np.ndarray | None = None, **kwargs: Any) -> InsertResult:
        return InsertResult()

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> EvictResult:
        return EvictResult()

    def inc_lock_ref(self, node: Match | Insertion | None) -> None: ...

    def dec_lock_ref(self, node: Any, swa_boundary_id: Receipt | None = None, **kwargs: Any) -> None: ...

    def pretty_print(self) -> None: ...
