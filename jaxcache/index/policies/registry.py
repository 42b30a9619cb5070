"""Eviction policies by name."""

from __future__ import annotations

import enum

from jaxcache.index.policies.adaptive import Adaptive
from jaxcache.index.policies.base import EvictionPolicy
from jaxcache.index.policies.lru import LRU
from jaxcache.index.policies.queues import S3FIFO, SLRU
from jaxcache.index.policies.ranked import FIFO, FILO, LFU, MRU, Priority


class Policy(enum.Enum):
    """Eviction policies by name.

    LRU, LFU, FIFO, MRU, FILO, PRIORITY and SLRU mean what they mean in SGLang, but LFU counts every hit and SLRU bounds
    what it protects. S3FIFO and ADAPTIVE remember some of what they evicted.
    """

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    MRU = "mru"
    FILO = "filo"
    SLRU = "slru"
    PRIORITY = "priority"
    S3FIFO = "s3fifo"
    ADAPTIVE = "adaptive"

    def build(self, leaves_only: bool) -> EvictionPolicy:
        """A new, empty policy of this kind."""
        return _POLICIES[self](leaves_only)


_POLICIES: dict[Policy, type[EvictionPolicy]] = {
    Policy.LRU: LRU,
    Policy.LFU: LFU,
    Policy.FIFO: FIFO,
    Policy.MRU: MRU,
    Policy.FILO: FILO,
    Policy.SLRU: SLRU,
    Policy.PRIORITY: Priority,
    Policy.S3FIFO: S3FIFO,
    Policy.ADAPTIVE: Adaptive,
}
