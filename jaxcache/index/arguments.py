"""Checks of what callers hand to a cache."""

from __future__ import annotations

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.key import BIGRAM_BYTES, TOKEN_BYTES
from jaxcache.index.policies.registry import Policy


def require_tree(page_size: int, policy: Policy, element_bytes: int) -> None:
    """Raises ArgumentError unless a tree can be built of these."""
    if not isinstance(page_size, (int, np.integer)) or page_size < 1:
        raise ArgumentError(f"page_size must be an integer of at least 1, got {page_size!r}")
    if not isinstance(policy, Policy):
        raise ArgumentError(f"policy must be a Policy, got {policy!r}: use Policy({policy!r})")
    if element_bytes not in (TOKEN_BYTES, BIGRAM_BYTES):
        raise ArgumentError(f"element_bytes: give that of a key class, such as BigramKey's; got {element_bytes!r}")
