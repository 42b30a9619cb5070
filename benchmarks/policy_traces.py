"""Traces that tell eviction policies apart: chats of several shapes, and what each policy is known to be bad at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np

from jaxcache.replay.chat import ChatShape, generate_chat
from jaxcache.replay.trace import BLOCK_TOKENS, TraceRequest

_FRESH = 10_000_000
_ANSWER = 200


def generated_traces(limit: int | None = None) -> dict[str, list[TraceRequest]]:
    """Every trace by name, each cut to its first `limit` requests."""
    made: dict[str, Callable[[], list[TraceRequest]]] = {
        "chats": lambda: generate_chat(4000, 1, ChatShape(question_tokens=2000, max_context=100_000)),
        "long chats": lambda: generate_chat(
            4000, 2, ChatShape(turns=15, question_tokens=1000, turn_gap_ms=30_000, max_context=64_000)
        ),
        "short chats": lambda: generate_chat(
            4000, 3, ChatShape(turns=1.3, question_tokens=6000, turn_gap_ms=60_000, max_context=100_000)
        ),
        "slow chats": lambda: generate_chat(
            6000, 4, ChatShape(turns=4, question_tokens=3000, turn_gap_ms=120_000, max_context=100_000)
        ),
        "many system prompts": lambda: generate_chat(
            4000, 5, ChatShape(system_prompts=200, system_blocks=30, question_tokens=1000, max_context=60_000)
        ),
        "slow chats, shuffled": lambda: shuffled(
            generate_chat(6000, 6, ChatShape(turns=4, question_tokens=3000, turn_gap_ms=60_000, max_context=100_000))
        ),
        "scan": scan,
        "loop": loop,
        "skewed": skewed,
        "drifting": drifting,
        "phases": phases,
    }
    return {name: make()[:limit] for name, make in made.items()}


def scan(requests: int = 3000, blocks: int = 12) -> list[TraceRequest]:
    """Documents that are read once, behind one system prompt."""
    return [_request(i, [0, *range(1 + i * blocks, i * blocks + blocks)]) for i in range(requests)]


def loop(requests: int = 3000, documents: int = 600, blocks: int = 20) -> list[TraceRequest]:
    """Documents that are read in turn, for ever: 6 M tokens of them."""
    return [
        _request(i, [0, *range(1 + i % documents * blocks, i % documents * blocks + blocks)]) for i in range(requests)
    ]


def skewed(requests: int = 5000, documents: int = 4000, blocks: int = 16, seed: int = 0) -> list[TraceRequest]:
    """Questions about documents of which a few are asked about most (a Zipf law)."""
    weights = 1.0 / np.arange(1, documents + 1) ** 0.7
    chosen = np.random.default_rng(seed).choice(documents, requests, p=weights / weights.sum())
    return [_question(i, int(document), blocks) for i, document in enumerate(chosen)]


def drifting(requests: int = 5000, blocks: int = 16, seed: int = 0) -> list[TraceRequest]:
    """Questions about documents that are asked about for a while and then no more: what LRU is best at."""
    chosen = (np.arange(requests) / 4 + np.random.default_rng(seed).exponential(60, requests)).astype(int)
    return [_question(i, int(document), blocks) for i, document in enumerate(chosen)]


def phases() -> list[TraceRequest]:
    """Chats, a scan, skewed questions, and the same chats again."""
    chats = generate_chat(2000, 7, ChatShape(question_tokens=2000, max_context=60_000))
    parts = [chats, scan(1500, 16), skewed(2000), chats]
    return [_shifted(request, i % 3) for i, part in enumerate(parts) for request in part]


def shuffled(requests: Iterable[TraceRequest], window: int = 50, seed: int = 0) -> list[TraceRequest]:
    """The same requests, each moved among those that came at about its time."""
    rng = random.Random(seed)
    ordered = list(requests)
    out: list[TraceRequest] = []
    for start in range(0, len(ordered), window):
        part = ordered[start : start + window]
        rng.shuffle(part)
        out += part
    return out


def _request(i: int, ids: list[int]) -> TraceRequest:
    return TraceRequest(i * 300, len(ids) * BLOCK_TOKENS - 100, _ANSWER, tuple(ids))


def _question(i: int, document: int, blocks: int) -> TraceRequest:
    return _request(i, [*range(1 + document * blocks, 1 + document * blocks + blocks), _FRESH + i])


def _shifted(request: TraceRequest, number: int) -> TraceRequest:
    ids = tuple(block_id + number * 10 * _FRESH for block_id in request.hash_ids)
    return TraceRequest(request.timestamp_ms, request.input_length, request.output_length, ids)
