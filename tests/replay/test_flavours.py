"""Every kind of cache through the whole stack: rows, windows and states proven, nothing lost, nothing compiled late."""

from __future__ import annotations

import pytest

from jaxcache.errors import ArgumentError
from jaxcache.pools.layout import Layout
from jaxcache.replay.config import CacheKind, Fault, PoolKind, ReplayConfig
from jaxcache.replay.run import run_replay
from tests.support.replays import CHAT, assert_clean, few_shapes, long_answers
from tests.support.shared_steps import share_steps

SHARING = [kind for kind in CacheKind if kind is not CacheKind.CHUNK]


def replay(cache, requests=None, shapes=few_shapes, **options):
    config = ReplayConfig(**CHAT | {"cache": cache, "window": 100} | options)
    return run_replay(config, requests=requests, observe=share_steps, buckets=shapes(config))


def test_the_default_shapes_of_steps():
    assert_clean(replay(CacheKind.SWA_MAMBA, page_size=16, shapes=lambda config: None))


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("cache", SHARING)
def test_a_chat_trace_is_served_right(cache, page_size):
    result = replay(cache, page_size=page_size)
    assert_clean(result)
    assert result.requests == 60
    assert result.evicted_tokens > 0
    assert bool(result.verified_states) == cache.has_states


@pytest.mark.parametrize("page_size", [1, 16])
def test_without_sharing_nothing_is_found_and_nothing_is_wrong(page_size):
    result = replay(CacheKind.CHUNK, page_size=page_size)
    assert (result.error, result.mismatched_slots, result.leaked_slots) == (None, 0, 0)
    assert (result.hit_tokens, result.evicted_tokens, result.requests) == (0, 0, 60)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("cache", CacheKind)
def test_tight_memory_retracts_and_loses_nothing(cache, page_size):
    tight = {"device_tokens": 280, "window_tokens": 200, "window": 24, "concurrency": 6, "chunk": 64}
    result = replay(cache, long_answers(40), page_size=page_size, states=13, **tight)
    assert (result.error, result.mismatched_slots, result.leaked_slots) == (None, 0, 0)
    assert result.recompiles_after_warmup == 0
    assert (result.requests, result.retractions > 0) == (40, True)


@pytest.mark.parametrize("window", [1, 16, 50, 64])
def test_any_window_in_a_small_window_pool(window):
    result = replay(CacheKind.SWA, window=window, page_size=16, window_tokens=6_000, chunk=1024)
    assert_clean(result)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("pool", PoolKind)
def test_both_kinds_of_rows_in_both_orders(pool, layout):
    assert_clean(replay(CacheKind.SWA_MAMBA, pool=pool, layout=layout, page_size=4))


@pytest.mark.parametrize(("pool", "page_size"), [(PoolKind.MHA, 1), (PoolKind.MLA, 16)])
def test_the_order_of_the_rows_changes_no_hit(pool, page_size):
    by_layer, by_page = (replay(CacheKind.RADIX, pool=pool, layout=layout, page_size=page_size) for layout in Layout)
    assert_clean(by_page)
    assert (by_page.hit_tokens, by_page.evicted_tokens) == (by_layer.hit_tokens, by_layer.evicted_tokens)
    assert by_page.pool_bytes == by_layer.pool_bytes


def test_a_window_that_holds_everything_hits_what_full_attention_hits():
    full = replay(CacheKind.RADIX)
    window = replay(CacheKind.SWA, window=1 << 20, window_tokens=CHAT["device_tokens"])
    assert window.hit_tokens == full.hit_tokens > 0
    assert window.evicted_tokens == full.evicted_tokens


def test_one_adapter_hits_what_no_adapter_hits():
    assert replay(CacheKind.LORA, adapters=1).hit_tokens == replay(CacheKind.RADIX).hit_tokens > 0


def test_adapters_share_nothing():
    one, four = (replay(CacheKind.LORA, adapters=n, device_tokens=200_000) for n in (1, 4))
    assert 0 < four.hit_tokens < one.hit_tokens


@pytest.mark.parametrize("cache", [CacheKind.SWA, CacheKind.MAMBA])
def test_what_can_be_continued_is_less_than_what_is_cached(cache):
    assert 0 < replay(cache, states=24).hit_tokens <= replay(CacheKind.RADIX).hit_tokens


@pytest.mark.parametrize("fault", [Fault.STALE_STATE, Fault.WRONG_WINDOW])
def test_a_fault_that_cannot_happen_is_refused(fault):
    with pytest.raises(ArgumentError, match="needs a cache with such a part"):
        ReplayConfig(plant=fault)


@pytest.mark.parametrize(
    ("fault", "cache"),
    [
        (Fault.STALE_STATE, CacheKind.MAMBA),
        (Fault.STALE_STATE, CacheKind.SWA_MAMBA),
        (Fault.WRONG_WINDOW, CacheKind.SWA),
        (Fault.WRONG_WINDOW, CacheKind.SWA_MAMBA),
        (Fault.WRONG_NAMESPACE, CacheKind.LORA),
        (Fault.OFF_BY_ONE_POSITION, CacheKind.MAMBA),
    ],
)
def test_faults_of_windows_states_and_namespaces_are_seen(fault, cache):
    result = replay(cache, plant=fault)
    assert result.mismatched_slots or result.error
    assert not result.is_clean
