"""A hit is a recompute: with the cache, an engine gives the greedy tokens that it gives without, in float32."""

from __future__ import annotations

import pytest

from tests.support.recompute import FAMILIES, Serving

EVERY_TIME = "hit", "chunk", "pending"
"""What happens in every run, short as it may be."""
IN_A_LONG_RUN = (
    *("fork", "retraction", "restore", "eviction", "abort", "loop", "loop from a register", "surplus"),
    *EVERY_TIME,
)


def run(family: str, page_size: int, seed: int, requests: int) -> Serving:
    serving = Serving(family, page_size, seed)
    serving.run(requests)
    assert serving.wrong() == []
    assert 2 * serving.reused >= serving.prompt_tokens, "under half of the prompt tokens were reused: it proves little"
    return serving


CASES = [(family, page_size) for family in FAMILIES for page_size in (1, 16)]
AT_NIGHT = CASES[1::4] + CASES[2::4]
"""By day each family runs with one page size, and each page size with two families."""


@pytest.mark.parametrize(
    ("family", "page_size"),
    [pytest.param(*case, marks=pytest.mark.slow if case in AT_NIGHT else ()) for case in CASES],
)
def test_a_hit_is_a_recompute(family, page_size):
    serving = run(family, page_size, seed=page_size, requests=24)
    assert all(serving.happened[name] for name in EVERY_TIME), serving.happened


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_is_a_recompute_ten_thousand_times(family, page_size):
    """1,250 requests each, 10,000 in all."""
    serving = run(family, page_size, seed=100 + page_size, requests=1250)
    assert all(serving.happened[name] for name in IN_A_LONG_RUN), serving.happened
    assert serving.happened["draft"] or serving.has_states, serving.happened
    assert serving.happened["shared in a step"] or serving.has_states, serving.happened
