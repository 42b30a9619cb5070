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
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.index.key import RadixKey
from jaxcache.index.node import Match, Receipt
from jaxcache.observe.events import KVCacheEvent
from jaxcache.request import Request

if TYPE_CHECKING:
    from jaxtyping import Int32


class MatchResult:
    """What a lookup found.

    Attributes:
      pages: int32 page ids of the prefix, read-only; at hand at once.
      prefix_len: Tokens found.
      last_device_node: The position to lock: hand it to `inc_lock_ref`.
      last_host_node: The same where there is no host tier.
      host_hit_length: Further tokens that a host tier has.

    Source: SGLang 0.5.2 base_prefix_cache.py, MatchResult.
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

    def __repr__(self) -> str:
        return f"MatchResult(prefix_len={self.prefix_len})"


def expand_pages(pages: Int32[np.ndarray, " pages"], page_size: int) -> Int32[np.ndarray, " slots"]:
    """The slots of `pages`, in order."""
    if page_size == 1:
        return pages
    return (pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)).reshape(-1)


class BasePrefixCache(ABC):
    """A cache of prefixes, driven by requests.

    One signature for every flavour: a lock is a receipt, sizes are tokens, results are host arrays.

    Source: SGLang 0.5.2 base_prefix_cache.py.
    """

    page_size: int

    @abstractmethod
    def reset(self) -> None:
        """Forgets every prefix. Frees no page: clear the allocator with it."""

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
    def evict(self, num_tokens: int) -> int:
        """Frees at least `num_tokens` tokens, unless fewer are evictable; returns how many."""

    @abstractmethod
    def inc_lock_ref(self, node: Match) -> Receipt:
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
