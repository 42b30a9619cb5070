"""What every flavour of prefix cache can be told."""

from __future__ import annotations

from typing import TypedDict

from jaxcache.index.policies.registry import Policy


class CacheOptions(TypedDict, total=False):
    """What every flavour can be told; see `RadixCache`."""

    disable: bool
    enable_kv_cache_events: bool
    policy: Policy
    is_eagle: bool
