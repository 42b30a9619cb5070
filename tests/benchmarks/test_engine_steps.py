"""The benchmark of an engine's steps: every figure is there, and what can be shared is computed once."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine_steps import padding, random_model, shared_prefill, time_to_first_token


def test_what_can_be_shared_is_computed_once():
    figures = shared_prefill(random_model())
    assert figures["shared_prefill"] >= 0.95
    assert figures["shared_prefill_computed"] < figures["shared_prefill_tokens"] / 3


@pytest.mark.parametrize("longest", [512, 2048])
def test_padding_is_small(longest):
    assert 1 <= padding(longest) <= 1.25


@pytest.mark.slow
def test_a_hit_finds_what_it_says():
    figures = time_to_first_token(random_model(), repeat=1)
    assert figures["cached_tokens"] == 400
    assert 0 < figures["ttft_cached_ms"] < figures["ttft_uncached_ms"]
    json.dumps(figures)
