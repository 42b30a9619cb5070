"""What went wrong in caches of image embeddings before us."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.caches.multimodal import MultiModalCache
from jaxcache.errors import ArgumentError
from jaxcache.index.hashing import content_digest, hash_bytes


def test_s43_putting_again_counts_once_and_is_a_use():
    cache = MultiModalCache(100)
    one, two, three = (content_digest(name) for name in ("one", "two", "three"))
    assert cache.put(one, np.zeros(40, np.uint8))
    assert cache.put(two, np.zeros(40, np.uint8))
    assert cache.put(one, np.zeros(40, np.uint8))
    assert (cache.current_size, len(cache)) == (80, 2)
    assert cache.put(three, np.zeros(40, np.uint8))
    assert [cache.has(key) for key in (one, two, three)] == [True, False, True]


@pytest.mark.parametrize("key", ["one", "other"])
def test_s43_what_is_too_large_is_refused_first_and_nothing_else_is_lost(key):
    cache = MultiModalCache(100)
    assert cache.put(content_digest("one"), np.ones(40, np.uint8))
    assert cache.put(content_digest(key), np.zeros(4000, np.uint8)) is False
    assert (cache.current_size, len(cache)) == (40, 1)
    assert cache.get(content_digest("one")).sum() == 40


def test_c9_c10_a_short_hash_is_no_identity():
    """LMCache#3301, #4086: image hashes of 16 bits. sglang PR 32404: of 64."""
    cache = MultiModalCache(100)
    for key in (hash_bytes(b"image"), b"\x01\x02", b"8 bytes.", "a" * 32, content_digest("image")[:15], bytes(65)):
        with pytest.raises(ArgumentError, match="digest of 16 to 64 bytes"):
            cache.put(key, np.zeros(1))
        with pytest.raises(ArgumentError, match="digest of 16 to 64 bytes"):
            cache.get(key)
    assert cache.put(content_digest("image")[:16], np.zeros(1))
