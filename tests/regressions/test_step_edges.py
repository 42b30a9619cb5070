"""Steps that took one thing for another."""

from __future__ import annotations

import dataclasses

import pytest

from examples import engine
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.steps.buckets import Buckets


@pytest.fixture
def answers(monkeypatch):
    """What the example engine answers with steps of these sizes."""

    def answer(sizes):
        def with_sizes(config):
            return init_memory_pool_and_cache(dataclasses.replace(config, buckets=sizes))

        monkeypatch.setattr(engine, "init_memory_pool_and_cache", with_sizes)
        found = engine.Engine(engine.random_model(0), max_running=8).generate(engine.chats(), num_tokens=4)
        return [answer.tokens for answer in found]

    return answer


def test_an_extend_step_of_as_many_tokens_as_requests_is_not_taken_for_a_decode_step(answers):
    """The example engine told them apart by their shapes: where chunk was 8 x max_running, answers were wrong."""
    assert answers(Buckets((8,), (8, 64), (8,))) == answers(Buckets((8,), (64,), (8,)))
