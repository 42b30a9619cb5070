"""What every prefix cache offers, whatever it is made of.

The ownership of each token range of a running request, which `cache_unfinished_req` and `cache_finished_req` move:

    tokens   0 ..... lock.length ..... present ..... A = whole pages ..... kv_len
    before   | tree, locked | private    | private     | private: the tail page  |
    insert   | tree, locked | duplicates | adopted     |                         |
    after    | tree, locked ............................| private                |
                              the duplicates are freed and the row points at the tree's pages instead
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.events.events import KVCacheEvent
from jaxcache.index.key import RadixKey
from jaxcache.index.node import Match
from jaxcache.index.receipt import Receipt
from jaxcache.index.slots import expand_pages
from jaxcache.request import Request

if TYPE_CHECKING:
    from jaxtyping import Int32


NONE_SPARED: Mapping[str, int] = MappingProxyType({})
"""By component, how many of fresh pages need nothing of it: none of them."""


class MatchResult:
    """What a lookup found.

    Attributes:
      pages: int32 page ids of the prefix, read-only; at hand at once.
      prefix_len: Tokens found.
      last_device_node: The position to lock: hand it to `inc_lock_ref`.
      last_host_node: The same where there is no host tier.
      host_hit_length: Further tokens that a host tier has.

    Source: SGLang 0.5.2 base_prefix_cache.py, MatchResult; pymllm base_prefix_cache.
    """

    __slots__ = ("host_hit_length", "last_device_node", "page_size", "pages", "prefix_len")

    def __init__(self, match: Match, page_size: int):
        self.last_device_node = match
        self.pages = match.pages
        self.prefix_len = match.length
        self.page_size = page_size
        self.host_hit_length = 0

    @property
    def last_host_node(self) -> Match:
        """See the class."""
        return self.last_device_node

    @property
    def device_indices(self) -> Int32[np.ndarray, " prefix_len"]:
        """One slot a token, expanded on demand. O(prefix_len)."""
        return expand_pages(self.pages, self.page_size)

    @property
    def state(self) -> int:
        """The state saved after `prefix_len` tokens, to be copied before a step updates it; 0 if there is none.

        The prefix must be locked until it was copied.
        """
        return self.last_device_node.state

    @property
    def mamba_branching_seqlen(self) -> int | None:
        """Tokens whose pages are cached, where that is further than windows and states allow to continue; else None.

        Others have come this far: a checkpoint taken here, while it is computed again, will be of use.
        """
        match = self.last_device_node
        return match.structural_length if match.structural_length > match.length else None

    def __repr__(self) -> str:
        return f"MatchResult(prefix_len={self.prefix_len})"


class BasePrefixCache(ABC):
    """A cache of prefixes, driven by requests.

    One signature for every flavour: a lock is a receipt, sizes are tokens, results are host arrays.

    Source: SGLang 0.5.2 base_prefix_cache.py.
    """

    page_size: int

    @abstractmethod
    def reset(self) -> None:
        """Forgets every prefix. Frees no page: clear the allocator with it, or call `MemoryManager.reset`."""

    @abstractmethod
    def match_prefix(self, key: RadixKey | np.ndarray | Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key`."""

    @abstractmethod
    def cache_finished_req(self, req: Request) -> None:
        """Takes over what can be reused of a request that ended and frees the rest; afterwards it owns nothing."""

    @abstractmethod
    def cache_unfinished_req(self, req: Request, chunked: bool = False) -> None:
        """Makes the whole pages a running request has computed available to others."""

    @abstractmethod
    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> int:
        """Frees at least so many tokens, tokens of windows, and states, unless fewer are evictable.

        Returns:
          Tokens freed.
        """

    @abstractmethod
    def make_room(self, pages: int, states: int = 0, *, without_window: int = 0) -> bool:
        """Whether so many pages and states can be taken now, after evicting what is short if that suffices for all."""

    @abstractmethod
    def make_room_for_pages(self, num_pages: int, spared: Mapping[str, int] = NONE_SPARED) -> bool:
        """`make_room` for pages of which, by component, the first `spared` ones need nothing of it."""

    @abstractmethod
    def drop_out_of_window(self, req: Request, keep_checkpoint: bool = True) -> None:
        """Frees window pages of a running request that neither a later token nor its checkpoint needs."""

    @abstractmethod
    def inc_lock_ref(self, node: Match | MatchResult) -> Receipt:
        """Protects what a match found; the receipt is the only way to undo it."""

    @abstractmethod
    def dec_lock_ref(self, receipt: Receipt) -> int:
        """Takes a receipt back; returns the tokens that became evictable."""

    def evictable_size(self) -> int:
        """Cached tokens that no lock covers."""
        return 0

    def protected_size(self) -> int:
        """Cached tokens that a lock covers."""
        return 0

    def full_evictable_size(self) -> int:
        """`evictable_size` of the full-attention component."""
        return self.evictable_size()

    def full_protected_size(self) -> int:
        """`protected_size` of the full-attention component."""
        return self.protected_size()

    def swa_evictable_size(self) -> int:
        """`evictable_size` of the sliding-window component; 0 without one."""
        return 0

    def swa_protected_size(self) -> int:
        """`protected_size` of the sliding-window component; 0 without one."""
        return 0

    def mamba_evictable_size(self) -> int:
        """Cached states that no lock covers; 0 where none are kept."""
        return 0

    def mamba_protected_size(self) -> int:
        """Cached states that a lock covers; 0 where none are kept."""
        return 0

    def total_size(self) -> int:
        """Cached tokens."""
        return self.evictable_size() + self.protected_size()

    def take_events(self) -> list[KVCacheEvent]:
        """Events since the last call; empty unless events are on."""
        return []

    def pretty_print(self) -> None:
        """Prints what is cached."""
        print(self.draw())

    def draw(self) -> str:
        """What is cached, as text."""
        return ""
