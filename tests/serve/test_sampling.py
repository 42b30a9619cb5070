"""The choice of one token, against the definitions of temperature, top-k and top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.serve import SamplingParams, SamplingRows, sample

LOGITS = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 2
DRAWS = 20_000
_sample = jax.jit(sample)
_places = jax.jit(jax.vmap(lambda rows, place: sample(jnp.asarray(LOGITS), rows, place[None])[0], in_axes=(None, 0)))


def draws(params: SamplingParams) -> np.ndarray:
    """How often each token is drawn, over many places."""
    rows = SamplingRows.of(1)
    rows.set(0, params, prompt_len=0)
    return np.bincount(np.asarray(_places(rows, jnp.arange(DRAWS))), minlength=LOGITS.shape[1]) / DRAWS


def probabilities(params: SamplingParams) -> np.ndarray:
    """What the definitions say, a token at a time."""
    scaled = LOGITS[0].astype(np.float64) / params.temperature
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[: params.top_k] if params.top_k else order
    weights = {token: np.exp(scaled[token]) for token in kept}
    total, before, allowed = sum(weights.values()), 0.0, {}
    for token in kept:
        if before < params.top_p * total:
            allowed[token] = weights[token]
        before += weights[token]
    found = np.zeros(len(scaled))
    for token, weight in allowed.items():
        found[token] = weight / sum(allowed.values())
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (6, 0.8), (1, 1.0), (0, 1e-6), (100, 0.5)])
def test_draws_follow_the_definitions(temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    want, got = probabilities(params), draws(params)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want))
    np.testing.assert_allclose(got, want, atol=0.015)


def test_temperature_zero_is_the_most_likely_token() -> None:
    assert draws(SamplingParams(temperature=0, top_k=5, seed=1))[LOGITS[0].argmax()] == 1


def test_requests_of_one_batch_sample_each_in_its_own_way() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, seed=1, top_k=2),
        SamplingParams(temperature=0.3, seed=-5, top_p=0.4),
    ]
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32))
    rows = SamplingRows.of(4)
    for i, each in enumerate(params):
        rows.set(i, each, prompt_len=0)
    for place in range(20):
        together = _sample(logits, rows, jnp.full(4, place, jnp.int32))
        for i, each in enumerate(params):
            own = SamplingRows.of(1)
            own.set(0, each, prompt_len=0)
            alone = _sample(logits[i : i + 1], own, jnp.array([place], jnp.int32))
            assert together[i] == alone[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", "x"),
        ("logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=name):
        SamplingParams(**{name: value})
