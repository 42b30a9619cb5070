"""OpenAI's protocol, as far as the server speaks it: what a client may ask, and the form of the answers.

Source: OpenAI's API reference, completions and chat completions.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.engine.engine import END, decode, encode
from examples.engine.worker import Token
from jaxcache.errors import ArgumentError
from jaxcache.serve import SamplingParams

ANSWER_TOKENS = 128
"""Tokens of a chat's answer if its client names none."""
_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Asked:
    """What one request of a client asks for.

    Attributes:
      prompts: Tokens of each.
      params: How to sample each of the choices of a prompt.
      stops: Texts that end an answer; they are not part of it.
      is_chat: Which of the two forms the answer has.
      is_stream, has_usage: Whether it comes token by token; whether it ends with the number of tokens.
      has_logprobs: Whether log-probabilities are wanted.
      priority: Higher first.
      key: Namespace of the cache; texts are shared inside one.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    stops: tuple[str, ...]
    is_chat: bool
    is_stream: bool
    has_usage: bool
    has_logprobs: bool
    priority: int
    key: str | None

    @classmethod
    def read(cls, body: Any, is_chat: bool) -> Asked:
        """Reads the body of a request.

        Raises:
          ArgumentError: It is not what the protocol says; the message names the field.
        """
        if not isinstance(body, dict):
            raise ArgumentError("the body must be a JSON object")
        stop = _read(body, "stop", (str, list), [])
        stops = tuple([stop] if isinstance(stop, str) else stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ArgumentError("stop must be a text or a list of texts, none of them empty")
        top = _read(body, "top_logprobs" if is_chat else "logprobs", (int,), 0)
        has_logprobs = bool(_read(body, "logprobs", (bool,), False)) if is_chat else body.get("logprobs") is not None
        limits = ("max_completion_tokens", "max_tokens")
        named = [_read(body, name, (int,), 0) for name in limits if body.get(name) is not None]
        seed = _read(body, "seed", (int,), uuid.uuid4().int & 0x7FFFFFFF)
        return cls(
            prompts=[_chat(body)] if is_chat else _prompts(body.get("prompt")),
            params=[
                SamplingParams(
                    max_tokens=named[0] if named else ANSWER_TOKENS if is_chat else 16,
                    temperature=float(_read(body, "temperature", (int, float), 1.0)),
                    top_k=_read(body, "top_k", (int,), 0),
                    top_p=float(_read(body, "top_p", (int, float), 1.0)),
                    seed=seed + i,
                    stop_token_ids=() if _read(body, "ignore_eos", (bool,), False) else (END,),
                    logprobs=top,
                )
                for i in range(_read(body, "n", (int,), 1))
            ],
            stops=stops,
            is_chat=is_chat,
            is_stream=_read(body, "stream", (bool,), False),
            has_usage=bool(_read(body, "stream_options", (dict,), {}).get("include_usage")),
            has_logprobs=has_logprobs,
            priority=_read(body, "priority", (int,), 0),
            key=_read(body, "prompt_cache_key", (str,), None),
        )


def _read(body: Mapping[str, Any], name: str, types: tuple[type, ...], default: Any) -> Any:
    """A field of the body, or the default where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ArgumentError(f"{name} must be {' or '.join(kind.__name__ for kind in types)}, got {value!r}")
    return value


def _prompts(prompt: Any) -> list[list[int]]:
    """A text, tokens, or a list of either."""
    if isinstance(prompt, str):
        return [encode(prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise ArgumentError("prompt must be a text, a list of tokens, or a list of either")
    if all(isinstance(part, int) for part in prompt):
        if not all(0 <= token <= END for token in prompt):
            raise ArgumentError(f"prompt: tokens must be in [0, {END}]")
        return [prompt]
    return [tokens for part in prompt for tokens in _prompts(part)]


def _chat(body: Mapping[str, Any]) -> list[int]:
    """The messages as one text, which the next answer follows. A longer chat begins with the shorter one's text."""
    messages = _read(body, "messages", (list,), [])
    if not messages:
        raise ArgumentError("messages must be a list of at least one message")
    text = ""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ArgumentError("messages: each must have a role and a content of text")
        text += f"<{message['role']}>{content}\n"
    return encode(text + "<assistant>")


@dataclass
class Answer:
    """One choice while it grows: the text of the tokens so far, cut at the first stop text.

    Attributes:
      index: Of the choice.
      stops: Texts that end it.
      text: All of it that is certain: no part of a stop text, and no part of a character.
      tokens: Those sampled.
      finish_reason: Why it ended; None while it grows.
    """

    index: int
    stops: tuple[str, ...]
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    _pending: str = ""
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8("replace"))

    def add(self, token: Token) -> str:
        """Adds a token, and returns what is now certain of the text behind what was."""
        self.tokens.append(token)
        is_last = token.finish_reason is not None
        data = b"" if token.token == END else bytes([token.token])
        self._pending += self._decoder.decode(data, is_last)
        cut = min((at for stop in self.stops if (at := self._pending.find(stop)) >= 0), default=None)
        if cut is not None:
            self.finish_reason, certain = "stop", cut
        elif is_last:
            self.finish_reason, certain = str(token.finish_reason and token.finish_reason.value), len(self._pending)
        else:
            certain = len(self._pending) - self._held_back()
        new, self._pending = self._pending[:certain], self._pending[certain:]
        self.text += new
        return new

    def _held_back(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = max(map(len, self.stops), default=1) - 1
        for count in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-count:]) for stop in self.stops):
                return count
        return 0


@dataclass(frozen=True)
class Form:
    """The form of the answers to one request.

    Attributes:
      asked: The request.
      model: Name of the model.
      rid: Name of the answer.
      created: Seconds since 1970.
    """

    asked: Asked
    model: str
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer that comes at once."""
        choices = []
        for answer in answers:
            said = (
                {"message": {"role": "assistant", "content": answer.text}}
                if self.asked.is_chat
                else {"text": answer.text}
            )
            choices.append(self._choice(answer, answer.tokens) | said)
        return self._envelope("chat.completion" if self.asked.is_chat else "text_completion", choices, answers)

    def part(self, answer: Answer, new: str) -> dict[str, Any]:
        """What a stream says after a token."""
        delta = {"content": new} | ({"role": "assistant"} if len(answer.tokens) == 1 else {})
        said = {"delta": delta} if self.asked.is_chat else {"text": new}
        name = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return self._envelope(name, [self._choice(answer, answer.tokens[-1:]) | said], None)

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a stream ends with, if it was asked to."""
        return self._envelope("chat.completion.chunk" if self.asked.is_chat else "text_completion", [], answers)

    def _choice(self, answer: Answer, tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = (
            (_chat_logprobs if self.asked.is_chat else _text_logprobs)(tokens) if self.asked.has_logprobs else None
        )
        return {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": logprobs}

    def _envelope(self, kind: str, choices: list[Any], counted: Sequence[Answer] | None) -> dict[str, Any]:
        prefix = "chatcmpl" if self.asked.is_chat else "cmpl"
        found = {"id": f"{prefix}-{self.rid}", "object": kind, "created": self.created, "model": self.model}
        found["choices"] = choices
        if counted is not None:
            prompt, sampled = sum(map(len, self.asked.prompts)), sum(len(answer.tokens) for answer in counted)
            cached = sum(answer.tokens[0].cached_tokens for answer in counted if answer.tokens)
            found["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": sampled,
                "total_tokens": prompt + sampled,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
        return found


def _text_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "tokens": [decode([each.token]) for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [{f"bytes:{token}": value for token, value in each.top.items()} for each in tokens],
        "text_offset": list(range(len(tokens))),
    }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": decode([token]), "logprob": logprob, "bytes": [token] if token < END else []}

    return {
        "content": [
            one(each.token, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top.items()]}
            for each in tokens
        ]
    }
