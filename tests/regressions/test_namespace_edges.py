"""Sharp edges of namespaces in the systems before us, S-18, S-19 and S-52, and rows of the reliability survey about
what must not be shared: each stays fixed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxcache.caches.lora_radix import LoRAKey, LoRARadixCache
from jaxcache.errors import LockedError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from tests.caches.content import ContentLife, Shape
from tests.caches.flavours import make_mamba_cache, make_swa_cache, put
from tests.support.counting import count_calls


def lora_cache(page_size=1, size=64):
    allocator = TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
    return LoRARadixCache(None, allocator, page_size)


def keep(cache, key):
    present = cache.insert(key, cache.token_to_kv_pool_allocator.alloc(len(key)))
    assert present == 0


def test_s18_an_adapter_and_a_token_are_not_run_together():
    cache = lora_cache()
    keys = [LoRAKey("a1", [2, 5]), LoRAKey("a", [12, 5]), LoRAKey("a", [1, 2, 5]), LoRAKey(None, [2, 5])]
    for key in keys:
        assert cache.match_prefix_with_lora_id(key).prefix_len == 0
        keep(cache, key)
    for key in keys:
        assert cache.match_prefix_with_lora_id(key).prefix_len == len(key)
    assert cache.total_size() == sum(map(len, keys))


def test_s18_a_child_is_found_by_its_tokens_not_by_a_hash_of_them():
    cache = lora_cache()
    colliding = [-1, -2]  # Python hashes both to -2
    assert len({hash(token) for token in colliding}) == 1
    for token in colliding:
        keep(cache, LoRAKey("a", [token, 7]))
    assert [cache.match_prefix(LoRAKey("a", [token, 7])).prefix_len for token in colliding] == [2, 2]


def test_s19_an_empty_cache_has_a_size_and_a_picture(capsys):
    cache = lora_cache()
    for _ in range(2):
        assert (cache.total_size(), cache.evictable_size(), cache.all_values_flatten().tolist()) == (0, 0, [])
        cache.pretty_print()
        keep(cache, LoRAKey("a", [1, 2]))
        cache.reset()
        cache.token_to_kv_pool_allocator.clear()
    assert capsys.readouterr().out == "(empty)\n(empty)\n"


@pytest.mark.parametrize("make", [make_swa_cache, make_mamba_cache], ids=["window", "state"])
def test_s52_equal_placeholders_of_other_images_share_nothing(make):
    cache = make(4) if make is make_swa_cache else make()
    spaces = [Namespace(media=(digest,)) for digest in (b"cat", b"dog")]
    spaces += [Namespace(lora_id="x"), Namespace(cache_salt="x"), Namespace(extra_key="x"), Namespace(extra_key=b"x")]
    for count, space in enumerate(spaces):
        assert cache.match_prefix(RadixKey([9, 9, 9], space)).prefix_len == 0
        put(cache, [9, 9, 9], space=space)
        assert cache.total_size() == 3 * (count + 1)
    cache.check()


def test_s52_a_requests_namespace_reaches_the_tree():
    life = ContentLife(Shape(page_size=2, window=3, has_states=True, num_pages=64, num_windows=64))
    for space in (b"cat", b"dog", b""):
        life.admit(bytes(range(8)), space)
        assert life.running[0].kv_len == 0
        life.compute(0, 8, 0, save=True, share=True, drop=True)
        life.check()
        life.finish(0)
    assert set(life.cache.tree.roots) == {
        Namespace(extra_key=b"cat").encode(),
        Namespace(extra_key=b"dog").encode(),
        b"",
    }
    life.wind_down()


def test_1c_05_fields_are_told_apart_whatever_is_in_them():
    """No value of one field, however chosen, makes the namespace of another field."""
    values: list[str | bytes | None] = [None, "", "x", b"x", "lx", "ltx", "\0", Namespace(lora_id="x").encode()]
    fields = ("extra_key", "lora_id", "cache_salt")
    seen = {}
    for combination in itertools.product(values, repeat=3):
        space = Namespace(**dict(zip(fields, combination, strict=True)))
        assert seen.setdefault(space.encode(), combination) == combination
    assert len(seen) == len(values) ** 3


def test_1c_06_an_adapter_that_goes_takes_its_own_and_nothing_else():
    cache = lora_cache(page_size=2)
    for lora_id in ("a", "b", None):
        keep(cache, LoRAKey(lora_id, [1, 2, 3, 4]))
        keep(cache, LoRAKey(lora_id, [5, 6]))
    assert cache.drop_adapter("a") == 6
    assert cache.match_prefix(LoRAKey("a", [1, 2])).prefix_len == 0
    assert [cache.match_prefix(LoRAKey(x, [1, 2, 3, 4])).prefix_len for x in ("b", None)] == [4, 4]
    assert cache.drop_adapter("a") == 0
    cache.check()
    assert cache.drop_adapter(None) == 6
    assert (cache.total_size(), cache.token_to_kv_pool_allocator.available_size()) == (6, 58)


def test_1c_06_an_adapter_in_use_stays():
    cache = lora_cache()
    keep(cache, LoRAKey("a", [1, 2, 3]))
    lock = cache.inc_lock_ref(cache.match_prefix(LoRAKey("a", [1, 2])))
    with pytest.raises(LockedError):
        cache.drop_adapter("a")
    assert cache.total_size() == 3
    cache.check()
    cache.dec_lock_ref(lock)
    assert cache.drop_adapter("a") == 3
    cache.check()


@pytest.mark.parametrize("make", [make_swa_cache, make_mamba_cache], ids=["window", "state"])
def test_1c_06_with_an_adapter_go_its_windows_and_states(make):
    cache = make(2, size=64) if make is make_swa_cache else make(size=64)
    for space in ("a", "b"):
        for end in (4, 8):
            put(cache, list(range(end)), space=space)
    cache.evict(0, 1, 1)
    left = cache.drop("a") + cache.drop("b")
    assert left == 16
    assert (cache.total_size(), cache.swa_evictable_size(), cache.mamba_evictable_size()) == (0, 0, 0)
    cache.check()


def test_an_adapter_is_dropped_at_the_price_of_its_nodes():
    def cost(others):
        cache = LoRARadixCache(None, None, 1)
        for i in range(others):
            cache.insert_pages(LoRAKey(f"other{i}", [1, 2, i]), np.array([1, 2, 3], np.int32))
        for i in range(20):
            cache.insert_pages(LoRAKey("a", [1, i]), np.array([1, 2], np.int32))
        return count_calls(lambda: cache.drop_adapter("a"))

    assert cost(5000) <= 1.05 * cost(10)
