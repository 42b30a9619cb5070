"""A trace that is stopped in the middle, saved, loaded and gone on with finds what it would have found without."""

from __future__ import annotations

import dataclasses

import pytest

import jaxcache
from jaxcache.index.policies.registry import Policy
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.config import CacheKind, ReplayConfig
from jaxcache.replay.proof import count_leaks
from jaxcache.replay.run import Replay
from jaxcache.replay.setup import memory_config
from tests.snapshot.caches import MODEL, assert_same
from tests.support.replays import CHAT, few_shapes
from tests.support.shared_steps import share_steps

FLAVOURS = [CacheKind.RADIX, CacheKind.SWA, CacheKind.MAMBA, CacheKind.SWA_MAMBA, CacheKind.LORA]
CASES = [(cache, Policy.LRU) for cache in FLAVOURS] + [(cache, Policy.ADAPTIVE) for cache in FLAVOURS[::3]]


class Half(Replay):
    """A part of a trace, whose cache stays as it is at its end."""

    def _balance(self) -> None:
        self.result.leaked_slots = count_leaks(self.manager)
        self.manager.check_memory(read_device=True)


def serve(config, manager, requests):
    """Serves requests; what each of them found, and what had to be evicted for them."""
    half = Half(config, manager, requests, None)
    found = []
    admit = manager.admit

    def admit_and_note(request):
        out = admit(request)
        found.append((request.rid, out, request.cached_tokens))
        return out

    manager.admit = admit_and_note
    result = half.run()
    manager.admit = admit
    assert result.error is None
    assert (result.mismatched_slots, result.leaked_slots) == (0, 0)
    assert result.verified_slots >= result.hit_tokens > 0
    return found, result.evicted_tokens


def new_manager(config, requests) -> MemoryManager:
    manager = init_memory_pool_and_cache(
        dataclasses.replace(memory_config(config, requests), buckets=few_shapes(config))
    )
    share_steps(manager)
    return manager


@pytest.mark.parametrize(("cache", "policy"), CASES)
def test_the_second_half_finds_what_it_would_have_found(cache, policy, tmp_path):
    config = ReplayConfig(**CHAT | {"cache": cache, "window": 100, "policy": policy, "page_size": 16}).for_platform(
        "cpu"
    )
    requests = generate_chat(60, 5)
    first, second = requests[:35], requests[35:]

    manager = new_manager(config, requests)
    serve(config, manager, first)
    jaxcache.save_snapshot(tmp_path, manager, model=MODEL)
    restored = jaxcache.load_snapshot(tmp_path, manager.config, model=MODEL)
    share_steps(restored)
    assert_same(manager, restored)

    without_stop = serve(config, manager, second)
    assert serve(config, restored, second) == without_stop
    found, evicted = without_stop
    assert sum(cached for _, _, cached in found) > 1000 and evicted > 0
    assert_same(manager, restored)
