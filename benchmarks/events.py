"""What events and metrics cost, what publishing costs its thread, and whether a consumer knows the tree.

    python -m benchmarks.events TRACE --json OUT.json

The drivers of `benchmarks.index` take turns, one request at a time on one core: without events, with events that are
recorded and taken, and with events that are published. Of each step of each request the fastest of several passes
counts, and beside it their median. `in all` is match + evict + insert, and with events what the engine's thread does
about them.

Back to back, the publisher's thread hashes and encodes all the time (it is told of millions of tokens a second), and
both threads want one interpreter. An engine waits for its device after each step: with `--step-ms` ours does too.

The proof is `tests.observe.event_driver`: random operations on trees of every mix of components, and a consumer behind
a channel with and without faults, which must know the blocks of the tree at every checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.figures import measured_on, requests_of, write_figures
from benchmarks.index import STEPS, Run, summarise
from benchmarks.index_drivers import Packed
from jaxcache.caches.radix import RadixCache
from jaxcache.events.events import EventBatch, KVCacheEvent
from jaxcache.events.publisher import KVEventsConfig, ZmqEventPublisher
from jaxcache.events.wire import encode_batch
from jaxcache.observe.metrics import CacheMetrics
from jaxcache.replay.trace import TraceRequest
from tests.observe.event_driver import DEAF, HARSH, HEALABLE, MIXES, NO_FAULTS, Life


class Recorded(Packed):
    """Events are recorded, and taken after each request."""

    def __init__(self, device_tokens: int, page_size: int):
        super().__init__(device_tokens, page_size)
        self.cache = RadixCache(None, self.allocator, page_size, enable_kv_cache_events=True)

    def insert(self) -> None:
        super().insert()
        self.cache.take_events()


class Published(Recorded):
    """Events go to a publisher after each request. Nobody listens, so it hashes, encodes and keeps them."""

    def __init__(self, publisher: ZmqEventPublisher, device_tokens: int, page_size: int):
        super().__init__(device_tokens, page_size)
        self.publisher = publisher

    def insert(self) -> None:
        Packed.insert(self)
        if self.cache.events is not None:
            self.publisher.publish_from(self.cache.events)


class EngineWith:
    """A driver whose engine waits for its device, so long, before each request."""

    def __init__(self, driver: Packed, step_s: float):
        self._driver, self._step_s = driver, step_s

    def prepare(self, *tokens: np.ndarray) -> None:
        self._driver.prepare(*tokens)
        time.sleep(self._step_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


def measure_cost(
    requests: Sequence[TraceRequest], page_size: int, device_tokens: int, repeat: int, step_s: float = 0.0
) -> dict[str, dict[str, float]]:
    """Microseconds a request, for each case; `percent` is what a case costs over the one without events."""
    with ZmqEventPublisher(KVEventsConfig("tcp://127.0.0.1:*")) as publisher:
        makers: dict[str, Callable[[], Packed]] = {
            "off": functools.partial(Packed, device_tokens, page_size),
            "recorded": functools.partial(Recorded, device_tokens, page_size),
            "published": functools.partial(Published, publisher, device_tokens, page_size),
        }
        runs: dict[str, list[Run]] = {name: [] for name in makers}
        for _ in range(repeat):
            for name, make in makers.items():
                gc.collect()
                driver: Any = EngineWith(make(), step_s) if step_s else make()
                runs[name].append(Run(driver, requests))
    tokens = sum(request.input_length for request in requests)
    rows = {name: summarise(of_case, tokens) for name, of_case in runs.items()}
    for name, row in rows.items():
        row["in_all_median_us"] = median_us(runs[name])
        row["percent"] = 100 * (row["in_all_us"] / rows["off"]["in_all_us"] - 1)
        row["percent_of_median"] = 100 * (row["in_all_median_us"] / rows["off"]["in_all_median_us"] - 1)
    return rows


def median_us(runs: Sequence[Run]) -> float:
    """Microseconds a request for match + evict + insert, of each step the median of all passes."""
    steps = [STEPS.index(name) for name in ("match", "evict", "insert")]
    return float(np.median([run.nanoseconds[:, steps] for run in runs], axis=0).sum(axis=1).mean() / 1e3)


def measure_thread(requests: Sequence[TraceRequest], page_size: int, device_tokens: int) -> dict[str, float]:
    """What the publisher's thread spends: hashing and encoding the events of all requests, a batch each."""
    driver = Recorded(device_tokens, page_size)
    taken: list[list[KVCacheEvent]] = []
    driver.cache.take_events = lambda: taken.append(queue.take()) or []  # type: ignore[method-assign,union-attr]
    queue = driver.cache.events
    Run(driver, requests)
    blocks = sum(len(event) for events in taken for event in events)
    started = time.perf_counter()
    size = sum(len(encode_batch(EventBatch(0.0, events))) for events in taken)
    seconds = time.perf_counter() - started
    return {"blocks": blocks, "ns_a_block": 1e9 * seconds / blocks, "bytes_a_block": size / blocks}


def measure_metrics(repeat: int = 1_000, calls: int = 1_000) -> dict[str, float]:
    """Nanoseconds an update of `CacheMetrics`; the fastest of several."""
    metrics = CacheMetrics(CollectorRegistry(), {"model_name": "m", "data_parallel_rank": "0"})
    updates: dict[str, Callable[[], None]] = {
        "admitted": lambda: metrics.admitted(1000, 500),
        "matched": lambda: metrics.matched(1e-5),
        "inserted": lambda: metrics.inserted(500, 1e-5),
        "evicted": lambda: metrics.evicted((500,), 1e-5),
        "nothing": lambda: None,
    }
    fastest = {name: min(timeit.repeat(update, number=calls, repeat=repeat)) for name, update in updates.items()}
    nothing = fastest.pop("nothing")
    return {f"{name}_ns": 1e9 * (seconds - nothing) / calls for name, seconds in fastest.items()}


def prove(operations: int) -> dict[str, Any]:
    """Random operations, the same number on each mix of components with each kind of faults."""
    faults = {"none": NO_FAULTS, "healable": HEALABLE, "harsh": HARSH, "no replay": DEAF}
    cases = [(mix, kind) for mix in MIXES for kind in faults]
    lives = [
        Life(seed, MIXES[mix], (1, 2, 4)[seed % 3], faults[kind]).run(-(-operations // len(cases)))
        for seed, (mix, kind) in enumerate(cases)
    ]
    consumers = [life.channel.consumer for life in lives]
    return {
        "operations": -(-operations // len(cases)) * len(cases),
        "mixes": list(MIXES),
        "faults": list(faults),
        "batches": sum(life.channel.sent for life in lives),
        "dropped": sum(life.channel.dropped for life in lives),
        "gaps": sum(consumer.gaps for consumer in consumers),
        "repeated": sum(consumer.repeated for consumer in consumers),
        "restarts": sum(consumer.restarts for consumer in consumers),
        "losses": sum(consumer.losses for consumer in consumers),
        "checked": sum(life.checked for life in lives),
        "differences": 0,  # the first one ends the run
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="Mooncake's format; without it a chat trace is generated")
    parser.add_argument("--requests", type=int, default=2_000, help="only the first so many")
    parser.add_argument("--device-tokens", type=int, default=3_000_000, help="room of the cache")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeat", type=int, default=5, help="passes of each case")
    parser.add_argument("--step-ms", type=float, default=5.0, help="what a step of the engine's device takes")
    parser.add_argument("--operations", type=int, default=1_000_000, help="of the proof")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what was written."""
    options = parse(arguments)
    requests = requests_of(options)
    result: dict[str, Any] = measured_on(options, requests) | {
        "event_cost": {},
        "step_ms": options.step_ms,
        "event_cost_beside_steps": {},
        "thread": {},
    }
    for page_size in options.page_sizes:
        cost = functools.partial(measure_cost, requests, page_size, options.device_tokens, options.repeat)
        for key, step_s in (("event_cost", 0.0), ("event_cost_beside_steps", options.step_ms / 1e3)):
            rows = result[key][str(page_size)] = cost(step_s)
            for name, row in rows.items():
                took = f"{row['in_all_us']:7.2f} us a request {row['percent']:+6.1f} %"
                print(f"page {page_size}, {key}, {name:9} {took}, median {row['percent_of_median']:+6.1f} %")
        thread = measure_thread(requests, page_size, options.device_tokens)
        result["thread"][str(page_size)] = thread
        print(f"page {page_size}, publisher's thread: {thread['ns_a_block']:.0f} ns a block")
    result["metrics"] = measure_metrics()
    print(json.dumps(result["metrics"], indent=1))
    result["proof"] = prove(options.operations)
    print(json.dumps(result["proof"], indent=1))
    write_figures(options.json, result)
    return result


if __name__ == "__main__":
    main()
