"""Generated traces: chats of several turns that share system prompts, in the format of `trace`."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.replay.trace import BLOCK_TOKENS, MAX_TOKENS, TraceRequest

_MAX_REQUESTS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class ChatShape:
    """What the chats of a generated trace look like; all lengths are means of a distribution, in tokens.

    Attributes:
      system_prompts: How many system prompts there are; popular ones begin more chats.
      system_blocks: Longest system prompt, in blocks of `BLOCK_TOKENS` (a prompt is shared in whole blocks).
      turns: Turns of a chat.
      question_tokens: New tokens a turn.
      answer_tokens: Tokens of an answer.
      chat_gap_ms: Time between two chats' beginnings.
      turn_gap_ms: Time between the turns of a chat.
      max_context: A chat ends before prompt and answer would be longer than this.
    """

    system_prompts: int = 8
    system_blocks: int = 4
    turns: float = 5.0
    question_tokens: float = 300.0
    answer_tokens: float = 60.0
    chat_gap_ms: float = 400.0
    turn_gap_ms: float = 8_000.0
    max_context: int = 16_384

    def __post_init__(self) -> None:
        """Refuses shapes that no chat can have."""
        for name in ("system_prompts", "system_blocks", "turns", "question_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("chat_gap_ms", "turn_gap_ms"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.system_blocks * BLOCK_TOKENS < self.max_context <= MAX_TOKENS:
            raise ArgumentError(
                f"max_context must be longer than a system prompt ({self.system_blocks * BLOCK_TOKENS} tokens) and at "
                f"most {MAX_TOKENS}, got {self.max_context}"
            )


class _Chat:
    """One chat: its prompt so far, as ids. Turn t's prompt is turn t-1's prompt, its answer and a new question."""

    def __init__(self, ids: list[int], turns: int):
        self.ids = ids
        self.context = len(ids) * BLOCK_TOKENS
        self.turns_left = turns


class _Ids:
    """Hands out ids in order; those below `first` belong to the system prompts."""

    def __init__(self, first: int):
        self._next = first

    def extend(self, ids: list[int], tokens: int) -> None:
        """Appends fresh ids until `ids` cover `tokens`."""
        missing = -(-tokens // BLOCK_TOKENS) - len(ids)
        ids.extend(range(self._next, self._next + missing))
        self._next += max(missing, 0)


def generate_chat(requests: int, seed: int = 0, shape: ChatShape | None = None) -> list[TraceRequest]:
    """A trace of exactly `requests` turns, in order of arrival.

    A chat's blocks keep their ids while it grows, so turn t's prompt begins with the whole prompt of turn t-1, whatever
    its length; chats with the same system prompt begin with the same blocks. The same arguments give the same trace.

    Raises:
      ArgumentError: if `requests` or `seed` is out of range.

    Cost: O(requests), about 10 us each.
    """
    if not 1 <= requests <= _MAX_REQUESTS:
        raise ArgumentError(f"requests must be in [1, {_MAX_REQUESTS}], got {requests}")
    if seed < 0:
        raise ArgumentError(f"seed must not be negative, got {seed}")
    shape = shape or ChatShape()
    rng = np.random.default_rng(seed)
    systems = _system_prompts(rng, shape)
    fresh = _Ids(sum(len(ids) for ids in systems))
    waiting: list[tuple[float, int, _Chat]] = []
    trace: list[TraceRequest] = []
    next_chat_ms, chats = 0.0, 0
    while len(trace) < requests:
        if not waiting or next_chat_ms <= waiting[0][0]:
            heapq.heappush(waiting, (next_chat_ms, chats, _new_chat(rng, shape, systems)))
            chats += 1
            next_chat_ms += rng.exponential(shape.chat_gap_ms)
            continue
        now, number, chat = heapq.heappop(waiting)
        turn = _next_turn(rng, shape, fresh, chat, int(now))
        if turn is None:
            continue
        trace.append(turn)
        if chat.turns_left:
            heapq.heappush(waiting, (now + rng.exponential(shape.turn_gap_ms), number, chat))
    return trace


def _system_prompts(rng: np.random.Generator, shape: ChatShape) -> list[list[int]]:
    ends = np.cumsum(rng.integers(1, shape.system_blocks, endpoint=True, size=shape.system_prompts)).tolist()
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def _new_chat(rng: np.random.Generator, shape: ChatShape, systems: list[list[int]]) -> _Chat:
    # The square of a uniform number: the first system prompts are the popular ones.
    choice = int(rng.random() ** 2 * len(systems))
    return _Chat(list(systems[choice]), int(rng.geometric(1.0 / shape.turns)))


def _next_turn(
    rng: np.random.Generator, shape: ChatShape, fresh: _Ids, chat: _Chat, timestamp_ms: int
) -> TraceRequest | None:
    """The chat's next request; None when it has grown too long."""
    prompt = chat.context + 1 + int(rng.exponential(shape.question_tokens))
    answer = 1 + int(rng.exponential(shape.answer_tokens))
    if prompt + answer > shape.max_context:
        return None
    fresh.extend(chat.ids, prompt)
    chat.context = prompt + answer
    chat.turns_left -= 1
    return TraceRequest(timestamp_ms, prompt, answer, tuple(chat.ids))
