"""Replays small enough for a test."""

from __future__ import annotations

from jaxcache.index.policies.registry import Policy
from jaxcache.replay.config import ReplayConfig
from jaxcache.replay.trace import TraceRequest
from jaxcache.steps.buckets import Buckets

# Two layers, as on a CPU: a replay on a GPU would take as many as its whole memory holds.
CHAT = {"layers": 2, "requests": 60, "concurrency": 8, "chunk": 2048, "device_tokens": 24_000, "policy": Policy.LRU}


def few_shapes(config: ReplayConfig) -> Buckets:
    """Three sizes of steps. The default's twenty take ten times as long to compile as a small replay takes to run."""
    rows = (config.concurrency,)
    return Buckets(rows, tuple(sorted({max(config.chunk // 8, 1), config.chunk})), rows)


def long_answers(count):
    """Requests whose answers outgrow the memory that their prompts were admitted into."""
    return [TraceRequest(i, 30 + 7 * (i % 5), 40 + 11 * (i % 7), (i % 3,)) for i in range(count)]


def assert_clean(result):
    assert result.error is None
    assert (result.mismatched_slots, result.leaked_slots, result.recompiles_after_warmup) == (0, 0, 0)
    assert result.verified_slots >= result.hit_tokens > 0
    assert result.is_clean
