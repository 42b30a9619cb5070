"""Reading traces: what is accepted, what is refused and where the message points; and the tokens that ids stand for."""

import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxcache.errors import ArgumentError, TraceError
from jaxcache.replay.chat import ChatShape, generate_chat
from jaxcache.replay.trace import (
    MAX_LINE_BYTES,
    TraceRequest,
    output_tokens,
    prompt_tokens,
    read_trace,
    write_trace,
)

GOLDEN_PROMPT = [865868522, 976530062, 93615457, 974333574]
GOLDEN_OUTPUT = [2100462426, 1681824171, 1516754453, 1168871874]
GOOD = {"timestamp": 5, "input_length": 700, "output_length": 3, "hash_ids": [4, 9]}


def line(**changes: object) -> str:
    """A good line with some fields replaced; a field set to `...` is left out."""
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...})


@pytest.fixture
def trace_file(tmp_path: Path):
    """Writes a trace file and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_a_line_is_a_request(trace_file) -> None:
    assert read_trace(trace_file(line() + "\n")) == [TraceRequest(5, 700, 3, (4, 9))]


def test_order_blank_lines_and_a_missing_last_newline(trace_file) -> None:
    path = trace_file(line(timestamp=1) + "\n\n" + line(timestamp=0) + "\r\n" + line(timestamp=7))
    assert [request.timestamp_ms for request in read_trace(path)] == [1, 0, 7]


def test_limit_stops_before_later_lines_are_looked_at(trace_file) -> None:
    path = trace_file(line() + "\n" + line() + "\nnot JSON\n")
    assert len(read_trace(path, limit=2)) == 2
    with pytest.raises(TraceError, match=":3: not JSON"):
        read_trace(path, limit=3)


def test_more_ids_than_needed_and_the_largest_id_are_fine(trace_file) -> None:
    request = read_trace(trace_file(line(hash_ids=[2**63 - 1, 1, 2])))[0]
    assert len(prompt_tokens(request)) == 700


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD_LINES = {
    "truncated": (line()[:-9], "not JSON.*truncated"),
    "not JSON": ("hello\n", "not JSON"),
    "nested too deep": ("[" * 200_000 + "\n", "not JSON|must be a JSON object"),
    "digits without end": (line(timestamp=0).replace(" 0,", " " + "9" * 5000 + ",") + "\n", "not JSON"),
    "not an object": ("[1, 2]\n", "must be a JSON object, got list"),
    "a number": ("12\n", "must be a JSON object, got int"),
    "no timestamp": (line(timestamp=...), "timestamp is missing"),
    "no input_length": (line(input_length=...), "input_length is missing"),
    "no output_length": (line(output_length=...), "output_length is missing"),
    "no hash_ids": (line(hash_ids=...), "hash_ids is missing"),
    "negative timestamp": (line(timestamp=-1), r"timestamp must be in \[0, .*got -1"),
    "negative input": (line(input_length=-700), r"input_length must be in \[1, .*got -700"),
    "empty prompt": (line(input_length=0, hash_ids=[]), r"input_length must be in \[1, .*got 0"),
    "negative output": (line(output_length=-1), r"output_length must be in \[0, .*got -1"),
    "float length": (line(input_length=700.0), "input_length must be an integer, got 700.0"),
    "text length": (line(input_length="700"), "input_length must be an integer, got '700'"),
    "bool length": (line(output_length=True), "output_length must be an integer, got True"),
    "null length": (line(output_length=None), "output_length must be an integer, got None"),
    "absurd input": (line(input_length=10**12), r"input_length must be in \[1, "),
    "absurd output": (line(output_length=10**100), "output_length must be in .* an integer of 333 bits"),
    "NaN": (line(timestamp=float("nan")), "timestamp must be an integer, got nan"),
    "ids are no list": (line(hash_ids={"a": 1}), "hash_ids must be a list"),
    "ids are text": (line(hash_ids="12"), "hash_ids must be a list, got '12'"),
    "an id is text": (line(hash_ids=[1, "2"]), r"hash_ids\[1\] must be an integer .* got '2'"),
    "an id is a bool": (line(hash_ids=[True, 2]), r"hash_ids\[0\] must be an integer"),
    "an id is negative": (line(hash_ids=[1, -2]), r"hash_ids\[1\] must be an integer in \[0, .*got -2"),
    "an id is too large": (line(hash_ids=[2**63, 0]), r"hash_ids\[0\] must be an integer in"),
    "too few ids": (line(hash_ids=[1]), "hash_ids must cover input_length: 700 tokens are 2 blocks of 512, got 1"),
    "one token over": (line(input_length=1025), "1025 tokens are 3 blocks of 512, got 2 ids"),
    "not UTF-8": (b"\xff\xfe{}\n", "not JSON"),
    "a NUL byte": (b"\x00\n", "not JSON"),
    "endless line": (b" " * (MAX_LINE_BYTES + 2), "longer than"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_with_file_and_line(name: str, trace_file) -> None:
    content, message = BAD_LINES[name]
    path = trace_file(line().encode() + b"\n" + (content if isinstance(content, bytes) else content.encode()))
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(str(caught.value)) < 600, "a damaged line must not flood the terminal"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path)


def test_a_name_that_cannot_be() -> None:
    with pytest.raises(TraceError, match=r"is no file name|cannot be read"):
        read_trace("a\0b")


@pytest.mark.parametrize("content", ["", "\n", " \n\n"])
def test_an_empty_file(content: str, trace_file) -> None:
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(trace_file(content))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit: int, trace_file) -> None:
    with pytest.raises(ArgumentError, match="limit must be at least 1"):
        read_trace(trace_file(line()), limit=limit)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "other"]), json_values) | json_values)
def test_any_json_is_a_request_or_a_trace_error(tmp_path_factory: pytest.TempPathFactory, record: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(record))
    try:
        request = read_trace(path)[0]
    except TraceError:
        return
    assert len(prompt_tokens(request)) == request.input_length


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    requests = generate_chat(50, seed=3)
    write_trace(tmp_path / "t.jsonl", requests)
    assert read_trace(tmp_path / "t.jsonl") == requests


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(tmp_path / "no" / "t.jsonl", [])


# ---- tokens ----------------------------------------------------------------------------------------------------------


def request_of(*ids: int, length: int | None = None) -> TraceRequest:
    return TraceRequest(0, len(ids) * 512 if length is None else length, 0, ids)


def test_equal_ids_give_equal_tokens_wherever_they_stand() -> None:
    a, b = prompt_tokens(request_of(1, 2, 3)), prompt_tokens(request_of(9, 3, 1))
    assert a.dtype == np.int32 and a.shape == (1536,)
    np.testing.assert_array_equal(a[:512], b[1024:])
    np.testing.assert_array_equal(a[1024:], b[512:1024])


def test_a_part_full_block_has_the_first_tokens_of_its_id() -> None:
    np.testing.assert_array_equal(
        prompt_tokens(request_of(1, 2, length=700)), prompt_tokens(request_of(1, 2, length=1024))[:700]
    )


def test_another_block_size() -> None:
    np.testing.assert_array_equal(prompt_tokens(request_of(7, length=5), block=8), prompt_tokens(request_of(7))[:5])


def test_tokens_are_the_same_in_every_process_and_version() -> None:
    """Golden: a changed function would make stored results incomparable."""
    assert prompt_tokens(request_of(0, length=4)).tolist() == GOLDEN_PROMPT
    assert output_tokens(0, 4, seed=0).tolist() == GOLDEN_OUTPUT


def test_different_ids_give_different_blocks() -> None:
    """Ids that are near each other, or that differ only in high bits, share no eight tokens in a row at their start."""
    ids = [*range(5_000), *(2**63 - 1 - i for i in range(5_000)), *(i << 32 for i in range(1, 5_000))]
    starts = {prompt_tokens(request_of(i, length=8)).tobytes() for i in ids}
    assert len(starts) == len(ids)


def test_tokens_within_a_block_are_spread() -> None:
    tokens = prompt_tokens(request_of(*range(64)))
    assert len(np.unique(tokens)) > 0.999 * len(tokens)
    assert tokens.min() >= 0 and tokens.max() < 2**30
    assert abs(tokens.mean() / 2**29 - 1) < 0.02


def test_output_tokens_are_fresh_and_never_prompt_tokens() -> None:
    answers = [output_tokens(i, 16, seed) for i in range(100) for seed in range(5)]
    assert len({answer.tobytes() for answer in answers}) == 500
    assert min(answer.min() for answer in answers) >= 2**30
    np.testing.assert_array_equal(output_tokens(3, 16, 1), output_tokens(3, 20, 1)[:16])
    assert output_tokens(3, 0).shape == (0,) and output_tokens(3, 2).dtype == np.int32


def test_tokens_refuse_what_they_cannot_cover() -> None:
    with pytest.raises(ArgumentError, match="hash_ids must cover input_length: 513 tokens are 2 blocks of 512, got 1"):
        prompt_tokens(request_of(1, length=513))
    with pytest.raises(ArgumentError, match="must not be negative"):
        output_tokens(0, -1)
    with pytest.raises(ArgumentError, match="must not be negative"):
        output_tokens(-1, 1)


# ---- generated chats -------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 1000))
def test_generated_chats_are_a_valid_trace(requests: int, seed: int) -> None:
    trace = generate_chat(requests, seed)
    assert len(trace) == requests
    times = [request.timestamp_ms for request in trace]
    assert times == sorted(times)
    for request in trace:
        assert len(request.hash_ids) == -(-request.input_length // 512)
        assert len(set(request.hash_ids)) == len(request.hash_ids)
        assert request.output_length >= 1


def test_a_turn_begins_with_the_turn_before_and_chats_share_system_prompts() -> None:
    trace = generate_chat(400, seed=1)
    chats: dict[int, list[TraceRequest]] = {}
    system_ids = {i for i in range(64) if sum(i in request.hash_ids for request in trace) > 1}
    for request in trace:
        own = [i for i in request.hash_ids if i not in system_ids]
        if own:
            chats.setdefault(own[0], []).append(request)
    grown = [chat for chat in chats.values() if len(chat) > 1]
    assert len(grown) > 20
    for chat in grown:
        for before, after in itertools.pairwise(chat):
            assert after.input_length > before.input_length + before.output_length
            np.testing.assert_array_equal(prompt_tokens(after)[: before.input_length], prompt_tokens(before))
    firsts = [request.hash_ids[0] for request in trace]
    assert len(set(firsts)) <= ChatShape.system_prompts < len(firsts)


def test_a_chat_ends_before_it_is_longer_than_its_shape_allows() -> None:
    shape = ChatShape(turns=50, max_context=3000, system_blocks=2)
    trace = generate_chat(300, seed=2, shape=shape)
    assert 2500 < max(request.input_length + request.output_length for request in trace) <= 3000


def test_chats_of_one_turn_share_system_prompts_only() -> None:
    trace = generate_chat(200, seed=4, shape=ChatShape(turns=1))
    assert len({request.hash_ids[-1] for request in trace}) == 200
    assert len({request.hash_ids[0] for request in trace}) <= ChatShape.system_prompts


def test_the_same_arguments_give_the_same_trace() -> None:
    assert generate_chat(60, 5) == generate_chat(60, 5)
    assert generate_chat(60, 5) != generate_chat(60, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"requests": 0}, r"requests must be in \[1, "),
        ({"requests": 10**9}, r"requests must be in \[1, "),
        ({"requests": 1, "seed": -1}, "seed must not be negative"),
    ],
)
def test_generate_chat_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        generate_chat(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 0.5}, "turns must be at least 1"),
        ({"system_prompts": 0}, "system_prompts must be at least 1"),
        ({"turn_gap_ms": -1.0}, "turn_gap_ms must not be negative"),
        ({"max_context": 2048}, "max_context must be longer than a system prompt"),
    ],
)
def test_chat_shape_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ChatShape(**changes)
