"""Request traces in Mooncake's format: reading, writing, and the tokens that their hash ids stand for.

One request a line, `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`, with one id for each
512-token block of the prompt. Equal ids stand for equal tokens; a last block that is not full has the first tokens of
its id. Everything is checked at the door, so that the rest of the replay can trust a `TraceRequest`.

Source of the format: Mooncake (FAST '25), https://github.com/kvcache-ai/Mooncake, `FAST25-release/traces`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxcache.errors import ArgumentError, TraceError
from jaxcache.replay.files import naming, shown

BLOCK_TOKENS = 512
MAX_TOKENS = 1 << 24
"""Longest prompt or answer that is believed; longer ones are a damaged line, not a request."""
MAX_HASH_ID = (1 << 63) - 1
MAX_TIMESTAMP_MS = 1 << 53
MAX_LINE_BYTES = 1 << 24

# Prompt tokens are in [0, 2^30), output tokens in [2^30, 2^31): an answer is never a prompt by accident.
_OUTPUT_TOKENS_FROM = np.int32(1 << 30)
_OUTPUT_SALT = 0x6A617863
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
      timestamp_ms: Arrival, in milliseconds since the trace began.
      input_length: Tokens of the prompt, at least 1.
      output_length: Tokens to generate, at least 0.
      hash_ids: At least one id for each block of `BLOCK_TOKENS` prompt tokens, the last block may be part full.
    """

    timestamp_ms: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: str | Path, limit: int | None = None) -> list[TraceRequest]:
    """Reads and checks the first `limit` requests of a trace (all of them by default).

    Lines after the `limit`-th request are not looked at; blank lines are skipped.

    Raises:
      TraceError: naming file and line, if the file cannot be read, holds no request, or a line is not a request.

    Cost: about 15 us a line of 24 ids.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit must be at least 1, got {limit}; leave it out to read the whole trace")
    path = Path(path)
    requests: list[TraceRequest] = []
    with naming(path, "read"):
        if path.is_dir():
            raise TraceError(f"{shown(path)}: is a directory; give a trace file (JSONL, one request a line)")
        with path.open("rb") as file:
            for where, line in _lines(file, shown(path)):
                requests.append(_parse(line, where))
                if len(requests) == limit:
                    break
    if not requests:
        raise TraceError(f"{shown(path)}: holds no request")
    return requests


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Each line that is not blank, with the place to name when it is wrong."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise TraceError(f"{where}: longer than {MAX_LINE_BYTES} bytes; this is no trace of one request a line")
        if line.strip():
            yield where, line


def _parse(line: bytes, where: str) -> TraceRequest:
    """The request on one line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " (the line has no end: is the file truncated?)"
        raise TraceError(f"{where}: not JSON{hint}: {error}") from error
    if not isinstance(record, dict):
        raise TraceError(f"{where}: must be a JSON object, got {type(record).__name__}")
    timestamp = _integer(record, "timestamp", 0, MAX_TIMESTAMP_MS, where)
    input_length = _integer(record, "input_length", 1, MAX_TOKENS, where)
    output_length = _integer(record, "output_length", 0, MAX_TOKENS, where)
    return TraceRequest(timestamp, input_length, output_length, _hash_ids(record, input_length, where))


def _integer(record: dict[str, object], field: str, low: int, high: int, where: str) -> int:
    if field not in record:
        raise TraceError(f"{where}: {field} is missing")
    value = record[field]
    if type(value) is not int:  # not isinstance: a bool is an int to it
        raise TraceError(f"{where}: {field} must be an integer, got {_short(value)}")
    if not low <= value <= high:
        raise TraceError(f"{where}: {field} must be in [{low}, {high}], got {_short(value)}")
    return value


def _hash_ids(record: dict[str, object], input_length: int, where: str) -> tuple[int, ...]:
    if "hash_ids" not in record:
        raise TraceError(f"{where}: hash_ids is missing")
    ids = record["hash_ids"]
    if not isinstance(ids, list):
        raise TraceError(f"{where}: hash_ids must be a list, got {_short(ids)}")
    for position, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= MAX_HASH_ID:
            rule = f"must be an integer in [0, {MAX_HASH_ID}]"
            raise TraceError(f"{where}: hash_ids[{position}] {rule}, got {_short(value)}")
    needed = _blocks(input_length, BLOCK_TOKENS)
    if len(ids) < needed:
        raise TraceError(
            f"{where}: hash_ids must cover input_length: {input_length} tokens are {needed} blocks of {BLOCK_TOKENS}, "
            f"got {len(ids)} ids"
        )
    return tuple(ids)


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _short(value: object) -> str:
    """`value` for a message: a damaged line can hold anything, so its size is bounded."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_trace(path: str | Path, requests: Iterable[TraceRequest]) -> None:
    """Writes requests so that `read_trace` gives them back.

    Raises:
      TraceError: if the file cannot be written.
    """
    with naming(path, "written"), Path(path).open("w", encoding="utf-8") as file:
        for request in requests:
            record = {
                "timestamp": request.timestamp_ms,
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": request.hash_ids,
            }
            file.write(json.dumps(record) + "\n")


def prompt_tokens(request: TraceRequest, block: int = BLOCK_TOKENS) -> np.ndarray:
    """The prompt of a request: token p is a fixed function of the id of p's block and of p's place in it.

    Args:
      request: The request; only `input_length` and `hash_ids` matter.
      block: Tokens an id stands for.

    Returns:
      int32[input_length], values in [0, 2^30).

    Raises:
      ArgumentError: if `hash_ids` has fewer ids than `input_length` needs.

    Cost: about 3 ns a token.
    """
    needed = _blocks(request.input_length, block)
    if len(request.hash_ids) < needed:
        raise ArgumentError(
            f"hash_ids must cover input_length: {request.input_length} tokens are {needed} blocks of {block}, "
            f"got {len(request.hash_ids)} ids"
        )
    ids = np.array(request.hash_ids[:needed], dtype=np.uint64)
    return _streams(_mix64(ids), block).reshape(-1)[: request.input_length]


def output_tokens(request_index: int, n: int, seed: int = 0) -> np.ndarray:
    """The answer of a request: a stream of its own for each (seed, request), never a token of any prompt.

    Args:
      request_index: Place of the request in the trace.
      n: Tokens of the answer.
      seed: Another seed gives other answers.

    Returns:
      int32[n], values in [2^30, 2^31).
    """
    if n < 0 or request_index < 0:
        raise ArgumentError(f"request_index and n must not be negative, got {request_index} and {n}")
    seeds = _mix64(np.array([(seed ^ _OUTPUT_SALT) & _MASK_64], dtype=np.uint64))
    stream = _mix64(seeds ^ np.uint64(request_index))
    return _streams(stream, n)[0] | _OUTPUT_TOKENS_FROM


def _mix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 that spreads neighbours apart. Source: Steele et al. 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _streams(state: np.ndarray, length: int) -> np.ndarray:
    """`length` tokens in [0, 2^30) for each uint64 state: int32[len(state), length].

    Each state is a start and an odd stride of a 32-bit counter, whose values are then scrambled: half the memory
    traffic of 64-bit mixing, which is what a replay of a hundred million tokens pays for.
    """
    start = state.astype(np.uint32)[:, None]
    stride = (state >> np.uint64(32)).astype(np.uint32)[:, None] | np.uint32(1)
    x = np.arange(length, dtype=np.uint32)[None, :] * stride
    x += start
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x >>= np.uint32(2)
    return x.view(np.int32)
