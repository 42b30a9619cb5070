"""LoRARadixCache: equal tokens under different adapters have different KV, so each adapter has a tree of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.caches.base import MatchResult
from jaxcache.caches.radix import RadixCache
from jaxcache.index.key import Namespace, RadixKey

if TYPE_CHECKING:
    from jaxtyping import Int32


class LoRAKey(RadixKey):
    """Tokens under an adapter: a key in the namespace `Namespace(lora_id=...)`.

    Args:
      lora_id: The adapter; its load generation rather than its name, if weights can be reloaded. None for no adapter.
      token_ids: As for `RadixKey`.

    Source: SGLang 0.5.2 lora_radix_cache.py, LoRAKey.
    """

    __slots__ = ()

    def __init__(self, lora_id: str | bytes | None, token_ids: bytes | Int32[np.ndarray, " tokens"] | Sequence[int]):
        super().__init__(token_ids, Namespace(lora_id=lora_id))


class LoRARadixCache(RadixCache):
    """Prefix cache for requests with adapters. Every `RadixCache` keeps adapters apart; this one has the old names.

    A request says its adapter in its namespace: `Request(..., extra_key=Namespace(lora_id=...))`.

    Source: SGLang 0.5.2 lora_radix_cache.py, for pages of one slot.
    """

    def match_prefix_with_lora_id(self, key: LoRAKey) -> MatchResult:
        """`match_prefix`, under the name that it has in SGLang."""
        return self.match_prefix(key)

    def drop_adapter(self, lora_id: str | bytes | None) -> int:
        """Forgets all that is cached under an adapter, as when its weights go; returns the tokens freed. O(its nodes).

        Where namespaces say more than the adapter, such as a tenant's salt too, `drop` each of them.

        Raises:
          LockedError: A request of the adapter is running: end it first. Nothing changes.
        """
        return self.drop(Namespace(lora_id=lora_id))
