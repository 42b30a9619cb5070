"""Small replays of the whole stack: every slot right, every planted fault seen, the hits those of brute force."""

from __future__ import annotations

import json

import pytest

from jaxcache.errors import ArgumentError, TraceError
from jaxcache.index.policies.registry import Policy
from jaxcache.replay.config import DType, Fault, PoolKind, ReplayConfig
from jaxcache.replay.run import run_replay
from jaxcache.replay.trace import TraceRequest
from tests.replay.simulator import simulate
from tests.support.replays import CHAT, assert_clean, few_shapes, long_answers
from tests.support.shared_steps import share_steps


def assert_twin_agrees(result, simulator):
    assert (sum(simulator.hits), simulator.prompt_tokens) == (result.hit_tokens, result.prompt_tokens)
    assert simulator.evicted_tokens == result.evicted_tokens
    assert simulator.hit_rate == result.hit_rate


@pytest.mark.parametrize(
    ("pool", "dtype", "page_size"),
    [
        (PoolKind.MHA, DType.FLOAT32, 16),
        (PoolKind.MHA, DType.BFLOAT16, 1),
        (PoolKind.MHA, DType.FLOAT8_E4M3FN, 64),
        (PoolKind.MLA, DType.FLOAT32, 64),
        (PoolKind.MLA, DType.BFLOAT16, 16),
        (PoolKind.MLA, DType.FLOAT8_E5M2, 1),
    ],
)
def test_a_chat_trace_is_served_right_and_hits_what_brute_force_hits(pool, dtype, page_size):
    result, simulator = simulate(ReplayConfig(**CHAT, pool=pool, dtype=dtype, page_size=page_size))
    assert_clean(result)
    assert_twin_agrees(result, simulator)
    assert (result.requests, result.max_running) == (60, 8)
    assert result.evicted_tokens > 10_000  # the memory was too small for what was said
    assert result.hit_rate > 0.3


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("policy", Policy)
def test_tight_memory_retracts_and_loses_nothing(page_size, policy):
    config = ReplayConfig(device_tokens=280, page_size=page_size, concurrency=6, chunk=64, policy=policy)
    result, simulator = simulate(config, long_answers(40))
    assert_clean(result)
    assert result.retractions > 0
    assert result.resumed_tokens > 0
    assert result.loaded_tokens > 0
    assert result.requests == 40
    if policy in (Policy.LRU, Policy.PRIORITY):  # with equal priorities, least recently used is what decides
        assert_twin_agrees(result, simulator)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.STALE_STATE, Fault.WRONG_WINDOW)])
def test_every_planted_fault_is_seen(fault):
    config = ReplayConfig(**CHAT | {"requests": 40}, plant=fault, attend=fault is Fault.STALE_LENGTH)
    result = run_replay(config, observe=share_steps, buckets=few_shapes(config))
    assert not result.is_clean
    where_it_shows = {
        Fault.WRONG_NAMESPACE: result.mismatched_slots,
        Fault.OFF_BY_ONE_POSITION: result.mismatched_slots,
        Fault.SKIP_WRITE: result.mismatched_slots,
        Fault.LEAK: result.leaked_slots,
        Fault.STALE_LENGTH: result.mismatched_queries,
    }
    assert where_it_shows.get(fault, result.error)


def test_results_have_the_documented_keys(tmp_path):
    result = run_replay(ReplayConfig(requests=5, device_tokens=20_000, concurrency=2, chunk=512))
    result.write_json(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written) >= {
        *("requests", "prompt_tokens", "hit_tokens", "hit_rate", "evicted_tokens", "verified_slots"),
        *("mismatched_slots", "leaked_slots", "max_running", "chunks", "decode_steps", "retractions"),
        *("recompiles_after_warmup", "wall_s", "host_us", "page_size", "device_tokens", "policy", "pool"),
        *("device", "jax_version"),
    }
    assert set(written["host_us"]) >= {"match", "admit", "plan", "insert"}
    assert set(written["host_us"]["match"]) >= {"p50", "p99", "total_s"}
    with pytest.raises(TraceError, match="cannot be written"):
        result.write_json(tmp_path / "missing" / "out.json")


def test_memory_smaller_than_one_request_is_refused():
    with pytest.raises(ArgumentError, match="cannot hold the longest request"):
        run_replay(ReplayConfig(device_tokens=64, page_size=16), requests=[TraceRequest(0, 60, 10, (1,))])
