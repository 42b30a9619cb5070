"""Steps that took one thing for another."""

from __future__ import annotations

import dataclasses

from examples.engine.engine import EngineConfig, new_engine
from examples.engine.models import FAMILIES, Mixer
from jaxcache.serve import SamplingParams
from jaxcache.steps.buckets import Buckets

MODEL = dataclasses.replace(FAMILIES["llama"], layers=(Mixer.ATTENTION,) * 2)


def answers(sizes: Buckets) -> list[list[int]]:
    """What the example engine answers with steps of these sizes: prompts that leave a short last chunk."""
    config = EngineConfig(512, 8, max_running=8, max_context_len=128, chunk=64, buckets=sizes)
    prompts = [[i + 7 * j for j in range(9 + 8 * i)] for i in range(4)]
    return [list(each.tokens) for each in new_engine(MODEL, config).generate(prompts, SamplingParams(4))]


def test_an_extend_step_of_as_many_tokens_as_requests_is_not_taken_for_a_decode_step():
    """The example engine told them apart by their shapes: where chunk was 8 x max_running, answers were wrong."""
    assert answers(Buckets((8,), (8, 64), (8,), step_cost=0)) == answers(Buckets((8,), (64,), (8,)))
