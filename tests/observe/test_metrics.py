"""Metrics: their names, what they count, and that nobody pays who does not watch."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError
from jaxcache.observe.metrics import SECONDS, CacheMetrics, CacheSource, MetricPool
from jaxcache.request import Request
from tests.model.manager_driver import small_manager, write_step
from tests.support.counting import count_calls
from tests.support.radix_caches import make_cache


def values(registry):
    """Every sample that is not about buckets or times of creation, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def counts(registry):
    return {key[0].removeprefix("jaxcache:"): value for key, value in values(registry).items() if value}


def test_names():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    for pool in MetricPool:
        metrics.watch(pool, lambda: (0, 0.0, 0, 0))
    sizes = [f"{name}_{what}_tokens" for name in ("kv", "swa", "mamba") for what in ("used", "available", "evictable")]
    latencies = [
        f"{what}_duration_seconds_{part}" for what in ("match", "insert", "eviction") for part in ("count", "sum")
    ]
    totals = [f"{what}_total" for what in ("prefix_cache_queries", "prefix_cache_hits", "cached_tokens")]
    totals += ["evicted_tokens_total", "inserted_tokens_total", "resumed_tokens_total"]
    usages = ["token_usage", "full_token_usage", "swa_token_usage", "mamba_usage"]
    assert {key[0] for key in values(registry)} == {f"jaxcache:{name}" for name in sizes + latencies + totals + usages}
    assert {dict(key[1:]).get("cache_source") for key in values(registry)} == {None, "device", "host", "storage"}


def test_labels_and_prefix():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry, {"model_name": "m", "dp_rank": "1"}, "sglang:", ("full", "window"))
    metrics.evicted([0, 7], 0.0)
    metrics.watch(MetricPool.FULL, lambda: (1, 0.5, 2, 3))
    shown = values(registry)
    both = (("dp_rank", "1"), ("model_name", "m"))
    assert shown["sglang:evicted_tokens_total", ("component", "window"), *both] == 7
    assert shown["sglang:evicted_tokens_total", ("component", "full"), *both] == 0
    assert shown["sglang:token_usage", *both] == 0.5
    assert all(set(both) <= set(key[1:]) for key in shown)
    assert b"sglang:evicted_tokens_total{" in generate_latest(registry)


def test_a_cache_tells_what_happens():
    registry = CollectorRegistry()
    cache = make_cache(page_size=2)
    cache.observer = CacheMetrics(registry)
    allocator = cache.token_to_kv_pool_allocator
    cache.insert([1, 2, 3, 4], allocator.alloc(4))
    cache.insert([1, 2, 5, 6], allocator.alloc(4))
    cache.match_prefix([1, 2, 9])
    cache.evict(1)
    seen = counts(registry)
    assert {name: value for name, value in seen.items() if not name.endswith("_sum")} == {
        "inserted_tokens_total": 6,
        "insert_duration_seconds_count": 2,
        "match_duration_seconds_count": 1,
        "evicted_tokens_total": 2,
        "eviction_duration_seconds_count": 1,
    }
    assert all(0 < seen[f"{what}_duration_seconds_sum"] < 10 for what in ("insert", "match", "eviction"))


def test_a_manager_tells_who_was_admitted_and_how_full_it_is():
    registry = CollectorRegistry()
    manager = small_manager(page_size=4, num_pages=16)
    metrics = CacheMetrics(registry)
    manager.cache.observer = metrics
    metrics.watch(MetricPool.FULL, manager.get_token_info)
    for name in ("first", "second"):
        request = Request(name, list(range(10)))
        manager.admit(request)
        plan = manager.extend([(request, request.num_tokens - request.kv_len)])
        manager.run(write_step, plan)
        if name == "first":
            manager.finish(request)
    seen = counts(registry)
    assert (seen["prefix_cache_queries_total"], seen["prefix_cache_hits_total"]) == (20, 8)
    assert seen["cached_tokens_total"] == 8
    used, usage, available, _ = manager.get_token_info()
    assert (seen["kv_used_tokens"], seen["kv_available_tokens"]) == (used, available)
    assert seen["token_usage"] == seen["full_token_usage"] == usage > 0
    assert "kv_evictable_tokens" not in seen  # all that is cached is locked
    manager.finish(request)
    assert counts(registry)["kv_evictable_tokens"] == manager.get_token_info()[3] == 8


def test_what_twins_share_in_a_step_counts_as_found():
    """Only `admit` told of hits: the hit rate missed whatever requests found when their steps were planned."""
    registry = CollectorRegistry()
    manager = small_manager(page_size=4, num_pages=24)
    manager.cache.observer = CacheMetrics(registry)
    requests = [Request(str(i), list(range(10))) for i in range(3)]
    for request in requests:
        assert manager.admit(request) == 0
    manager.run(write_step, manager.extend([(request, request.num_tokens) for request in requests]))
    late = Request("late", list(range(10)))
    assert manager.admit(late) == 8
    seen = counts(registry)
    assert seen["prefix_cache_queries_total"] == 40
    assert seen["prefix_cache_hits_total"] == 24 == sum(request.cached_tokens for request in [*requests, late])


def test_a_request_that_finds_no_room_was_not_admitted():
    registry = CollectorRegistry()
    manager = small_manager(page_size=4, num_pages=16)
    manager.cache.observer = CacheMetrics(registry)
    rows = manager.req_to_token_pool.alloc(manager.req_to_token_pool.available_size())
    assert manager.admit(Request("a", [1, 2, 3])) is None
    assert "prefix_cache_queries_total" not in counts(registry)
    for row in rows:
        manager.req_to_token_pool.free(row)


def test_tokens_of_other_tiers_are_hits_too():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    metrics.admitted(100, 10)
    metrics.found_in(CacheSource.HOST, 20)
    metrics.found_in(CacheSource.STORAGE, 30)
    seen = values(registry)
    assert seen["jaxcache:prefix_cache_hits_total",] == 60
    sources = {source: seen["jaxcache:cached_tokens_total", ("cache_source", source)] for source in ("device", "host")}
    assert sources == {"device": 10, "host": 20}


def test_the_highest_usage_is_the_usage():
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    metrics.watch(MetricPool.FULL, lambda: (1, 0.25, 0, 0))
    metrics.watch(MetricPool.SWA, lambda: (1, 0.75, 0, 0))
    seen = counts(registry)
    assert (seen["full_token_usage"], seen["swa_token_usage"], seen["token_usage"]) == (0.25, 0.75, 0.75)
    with pytest.raises(ArgumentError, match="watched already"):
        metrics.watch(MetricPool.SWA, lambda: (1, 0.75, 0, 0))


def test_latencies_have_buckets_of_microseconds():
    registry = CollectorRegistry()
    CacheMetrics(registry).matched(1.5e-5)
    samples = [
        s for family in registry.collect() for s in family.samples if s.name == "jaxcache:match_duration_seconds_bucket"
    ]
    assert [float(sample.labels["le"]) for sample in samples] == [*SECONDS, float("inf")]
    assert [sample.value for sample in samples] == [0.0] * 3 + [1.0] * (len(SECONDS) - 2)


@pytest.mark.parametrize("options", [{}, {"labels": {"__x": "y"}}, {"labels": {"le": "y"}}])
def test_names_that_are_taken_or_no_names_leave_nothing_behind(options):
    registry = CollectorRegistry()
    taken = CacheMetrics(registry, prefix="jaxcache:") if not options else None
    before = len(list(registry.collect()))
    with pytest.raises(ArgumentError, match="registry, prefix or labels"):
        CacheMetrics(registry, **options)
    assert len(list(registry.collect())) == before
    assert CacheMetrics(registry, prefix="other:") is not taken


def test_who_is_not_watched_pays_nothing():
    """A call of an unwatched cache makes no call that has to do with watching."""

    def calls(cache):
        cache.insert_pages([1, 2, 3], np.arange(1, 4, dtype=np.int32))
        return [
            count_calls(lambda: cache.match_prefix([1, 2, 3])),
            count_calls(lambda: cache.insert_pages([1, 2, 9], np.arange(4, 7, dtype=np.int32))),
            count_calls(lambda: cache.evict(1)),
        ]

    unwatched, watched = RadixCache(None, None, 1), RadixCache(None, None, 1)
    assert unwatched.observer is None
    watched.observer = CacheMetrics(CollectorRegistry())
    clocks = [b - a for a, b in zip(calls(unwatched), calls(watched), strict=True)]
    assert all(more >= 3 for more in clocks)  # two looks at the clock and the observer; so without it there are none
