"""Metrics for Prometheus, under the names that SGLang and vLLM use.

    metrics = CacheMetrics(labels={"model_name": "m"})
    memory.cache.observer = metrics                            # counters and latencies, as things happen
    metrics.watch(MetricPool.FULL, memory.get_token_info)      # sizes, looked at when they are scraped
    metrics.watch(MetricPool.SWA, lambda: itemgetter(1, 3, 6, 7)(memory.get_swa_token_info()))

| here, after `jaxcache:`                                     | SGLang 0.5.23                | vLLM 0.33           |
|--------------------------------------------------------------|------------------------------|---------------------|
| prefix_cache_queries_total, prefix_cache_hits_total (tokens) | cache_hit_rate, the quotient | the same            |
| cached_tokens_total{cache_source}                            | the same                     |                     |
| resumed_tokens_total{cache_source}                           |                              |                     |
| evicted_tokens_total{component}                              | evicted_tokens_total         |                     |
| eviction_duration_seconds                                    | the same                     |                     |
| match_duration_seconds, insert_duration_seconds              |                              |                     |
| inserted_tokens_total                                        |                              |                     |
| token_usage, full_token_usage, swa_token_usage, mamba_usage  | the same                     | kv_cache_usage_perc |
| kv_used_tokens, kv_available_tokens, kv_evictable_tokens     | the same                     |                     |
| swa_..._tokens, mamba_..._tokens                             | the same                     |                     |

Queries, hits and cached tokens are those of first admissions, so each token of a request counts once, however often it
is retracted. What comes back afterwards, from the cache or from a host copy, are resumed tokens.

`CacheMetrics(prefix="sglang:")` or `"vllm:"` feeds a dashboard that is made already.

Needs prometheus-client, extra `metrics`.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Mapping, Sequence

from jaxcache.errors import ArgumentError, UnsupportedError

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    raise UnsupportedError("metrics need prometheus-client: pip install 'jaxcache[metrics]'") from error

TokenInfo = Callable[[], tuple[int, float, int, int]]
"""(used, usage, available, evictable) of a pool, as `MemoryManager.get_token_info` says them."""

SECONDS = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2, 1e-1, 1.0)
"""Bounds of the buckets of latencies."""


class MetricPool(enum.Enum):
    """A pool whose sizes are published: what its names begin with, and the name of its usage."""

    FULL = ("kv", "full_token_usage")
    SWA = ("swa", "swa_token_usage")
    MAMBA = ("mamba", "mamba_usage")


class CacheSource(enum.Enum):
    """Where tokens were found, under SGLang's names."""

    DEVICE = "device"
    HOST = "host"
    STORAGE = "storage"


class CacheMetrics:
    """A `CacheObserver` that counts. Labels are bound once, so an update is an addition; thread-safe.

    Args:
      registry: Where the metrics are registered; Prometheus' own by default. One registry takes one of these a prefix.
      labels: The same for all metrics, such as model_name and data_parallel_rank.
      prefix: What every name begins with.
      components: Names of all of the tree's components, in its order.

    Raises:
      ArgumentError: The registry has metrics of these names, or a name is not one Prometheus accepts.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        labels: Mapping[str, str] | None = None,
        prefix: str = "jaxcache:",
        components: Sequence[str] = ("full",),
    ):
        self._registry = REGISTRY if registry is None else registry
        self._labels = dict(labels or {})
        self._prefix = prefix
        self._infos: dict[MetricPool, TokenInfo] = {}
        with contextlib.ExitStack() as self._undo:  # a name that is refused leaves nothing behind
            self._queries = self._counter("prefix_cache_queries", "Tokens of admitted requests.")
            self._hits = self._counter("prefix_cache_hits", "Tokens of them that were in the cache.")
            cached = self._family(Counter, "cached_tokens", "Tokens found, by where they were.", "cache_source")
            self._sources = {source: self._bound(cached, cache_source=source.value) for source in CacheSource}
            resumed = self._family(Counter, "resumed_tokens", "Tokens that came back.", "cache_source")
            resumable = (CacheSource.DEVICE, CacheSource.HOST)
            self._resumed = [self._bound(resumed, cache_source=source.value) for source in resumable]
            evicted = self._family(Counter, "evicted_tokens", "Tokens, or states, evicted.", "component")
            self._evicted = [self._bound(evicted, component=name) for name in components]
            self._inserted = self._counter("inserted_tokens", "Tokens that came into the cache.")
            self._match_s = self._latency("match_duration_seconds", "Time of a lookup.")
            self._insert_s = self._latency("insert_duration_seconds", "Time of an insert.")
            self._evict_s = self._latency("eviction_duration_seconds", "Time of an eviction.")
            self._undo.pop_all()

    # ---- as things happen ----------------------------------------------------------------------------------------

    def admitted(self, tokens: int, found: int) -> None:
        """See `CacheObserver.admitted`: found on the device. `found_in` counts what other tiers had."""
        self._queries.inc(tokens)
        self._hits.inc(found)
        self._sources[CacheSource.DEVICE].inc(found)

    def resumed(self, found: int, loaded: int) -> None:
        """See `CacheObserver.resumed`. No query and no hit."""
        for counter, tokens in zip(self._resumed, (found, loaded), strict=True):
            counter.inc(tokens)

    def found_in(self, source: CacheSource, tokens: int) -> None:
        """So many tokens of an admitted request came from another tier."""
        self._hits.inc(tokens)
        self._sources[source].inc(tokens)

    def matched(self, seconds: float) -> None:
        """See `CacheObserver.matched`."""
        self._match_s.observe(seconds)

    def inserted(self, tokens: int, seconds: float) -> None:
        """See `CacheObserver.inserted`."""
        self._inserted.inc(tokens)
        self._insert_s.observe(seconds)

    def evicted(self, amounts: Sequence[int], seconds: float) -> None:
        """See `CacheObserver.evicted`."""
        for i, amount in enumerate(amounts):
            if amount:
                self._evicted[i].inc(amount)
        self._evict_s.observe(seconds)

    # ---- sizes, when they are scraped ----------------------------------------------------------------------------

    def watch(self, pool: MetricPool, token_info: TokenInfo) -> None:
        """Publishes the sizes of a pool from now on. A scrape calls `token_info`, from another thread.

        Raises:
          ArgumentError: That pool is watched already.
        """
        if pool in self._infos:
            raise ArgumentError(f"pool: {pool} is watched already")
        name, usage = pool.value
        with self._undo:
            for i, what in ((0, "used"), (2, "available"), (3, "evictable")):
                self._gauge(
                    f"{name}_{what}_tokens", f"Tokens of the pool that are {what}.", lambda i=i: token_info()[i]
                )
            self._gauge(usage, "Used part of the pool, not counting what can be evicted.", lambda: token_info()[1])
            if not self._infos:
                self._gauge("token_usage", "The highest of the pools' usages.", self._highest_usage)
            self._undo.pop_all()
        self._infos[pool] = token_info

    def _highest_usage(self) -> float:
        return max(token_info()[1] for token_info in self._infos.values())

    # ---- made once -----------------------------------------------------------------------------------------------

    def _family(self, kind: type, name: str, words: str, *labels: str, **options: object):
        try:
            family = kind(self._prefix + name, words, [*self._labels, *labels], registry=self._registry, **options)
        except ValueError as error:
            raise ArgumentError(f"registry, prefix or labels: {error}") from error
        self._undo.callback(self._registry.unregister, family)
        return family

    def _bound(self, family, **labels: str):
        values = self._labels | labels
        return family.labels(**values) if values else family

    def _counter(self, name: str, words: str):
        return self._bound(self._family(Counter, name, words))

    def _latency(self, name: str, words: str):
        return self._bound(self._family(Histogram, name, words, buckets=SECONDS))

    def _gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        self._bound(self._family(Gauge, name, words)).set_function(value)
