"""MultiModalCache against a list of pairs, and its rules one by one."""

from __future__ import annotations

import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.caches.multimodal import MultiModalCache
from jaxcache.errors import ArgumentError
from jaxcache.index.hashing import content_digest
from jaxcache.index.key import Namespace


def digest(i):
    return content_digest(str(i))


def array(num_bytes, fill=0):
    return np.full(num_bytes, fill, np.uint8)


def model_put(entries, key, size, room):
    """What must be kept afterwards, the one used longest ago first: written from the contract."""
    if size > room:
        return entries
    entries = [entry for entry in entries if entry[0] != key]
    while sum(size for _, size in entries) + size > room:
        entries = entries[1:]
    return [*entries, (key, size)]


@pytest.mark.parametrize("seed", range(20))
def test_it_keeps_what_the_model_keeps(seed):
    rng = random.Random(seed)
    cache, entries = MultiModalCache(100), []
    for step in range(300):
        key = (digest(rng.randrange(8)), rng.choice([None, "tenant"]))
        choice = rng.random()
        if choice < 0.5:
            size = rng.choice([1, 10, 30, 50, 100, 101])
            assert cache.put(key[0], array(size, step % 251), key[1]) is (size <= 100)
            entries = model_put(entries, key, size, 100)
        elif choice < 0.8:
            found = cache.get(*key)
            mine = [entry for entry in entries if entry[0] == key]
            assert (0 if found is None else found.nbytes) == sum(size for _, size in mine)
            entries = [entry for entry in entries if entry[0] != key] + mine
        elif choice < 0.99:
            assert cache.has(*key) is any(entry[0] == key for entry in entries)
        else:
            cache.clear()
            entries = []
        assert cache.current_size == sum(size for _, size in entries) <= cache.max_size
        assert len(cache) == len(entries)


def test_namespaces_share_nothing():
    cache = MultiModalCache(100)
    spaces = [None, "a", Namespace(lora_id="a"), Namespace(cache_salt="a")]
    for i, space in enumerate(spaces):
        assert cache.get(digest(1), space) is None
        cache.put(digest(1), array(4, i), space)
    assert [int(cache.get(digest(1), space)[0]) for space in spaces] == [0, 1, 2, 3]
    assert cache.current_size == 16


def test_a_numpy_array_is_copied_and_what_is_given_out_is_read_only():
    cache = MultiModalCache(100)
    mine = np.arange(100, dtype=np.uint8)
    cache.put(digest(1), mine[::10])
    mine[:] = 7
    found = cache.get(digest(1))
    assert found.tolist() == list(range(0, 100, 10))
    assert found.base is None, "a view would keep all 100 bytes alive"
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_a_jax_array_is_shared_and_once_donated_it_is_a_miss():
    cache = MultiModalCache(1000)
    mine, other = jnp.arange(10.0), jnp.arange(3.0)
    cache.put(digest(1), mine)
    cache.put(digest(2), other)
    assert cache.get(digest(1)) is mine
    mine.delete()
    assert not cache.has(digest(1))
    assert cache.get(digest(1)) is None
    assert (len(cache), cache.current_size) == (1, other.nbytes)
    with pytest.raises(ArgumentError, match="donated"):
        cache.put(digest(1), mine)


def test_tracers_and_what_is_no_array_are_refused():
    cache = MultiModalCache(100)
    with pytest.raises(ArgumentError, match="outside jit"):
        jax.jit(lambda x: cache.put(digest(1), x) or x)(jnp.zeros(3))
    for embedding in ([1.0], None, b"abc", 1.0):
        with pytest.raises(ArgumentError, match="NumPy or JAX array"):
            cache.put(digest(1), embedding)
    with pytest.raises(ArgumentError, match="is empty"):
        cache.put(digest(1), np.zeros((0, 4)))
    with pytest.raises(ArgumentError, match="numbers"):
        cache.put(digest(1), np.array([None]))
    assert len(cache) == cache.current_size == 0


@pytest.mark.parametrize("size", [-1, 1.5, None, True])
def test_sizes_that_are_none(size):
    with pytest.raises(ArgumentError, match="max_size"):
        MultiModalCache(size)


def test_without_room_nothing_is_kept():
    cache = MultiModalCache(0)
    assert cache.put(digest(1), array(1)) is False
    assert cache.get(digest(1)) is None


def test_threads_leave_the_books_balanced():
    cache = MultiModalCache(500)

    def work(seed):
        rng = random.Random(seed)
        for _ in range(2000):
            key = digest(rng.randrange(30))
            if rng.random() < 0.5:
                cache.put(key, array(rng.randint(1, 60)))
            else:
                cache.get(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [cache.get(digest(i)) for i in range(30)]
    assert cache.current_size == sum(found.nbytes for found in kept if found is not None) <= 500
    assert len(cache) == sum(found is not None for found in kept)
