"""The wire format against the structs of the engines that read it, written down here from their releases."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcache.errors import ArgumentError
from jaxcache.events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, StorageMedium
from jaxcache.events.wire import decode_batch, encode_batch
from jaxcache.index.key import Namespace
from jaxcache.index.page_hashes import PageHashes


class SGLangEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """SGLang 0.5.23."""


class SGLangStored(SGLangEvent, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class SGLangRemoved(SGLangEvent, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class SGLangCleared(SGLangEvent, tag="AllBlocksCleared"):
    pass


class SGLangBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[SGLangStored | SGLangRemoved | SGLangCleared]
    attn_dp_rank: int | None = None


class VLLMEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM 0.33: `medium` and `lora_name` have no defaults."""


class VLLMStored(VLLMEvent, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None


class VLLMRemoved(VLLMEvent, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None


class VLLMCleared(VLLMEvent, tag="AllBlocksCleared"):
    pass


class VLLMBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[VLLMStored | VLLMRemoved | VLLMCleared]
    data_parallel_rank: int | None = None


EVENTS = [
    AllBlocksCleared(),
    BlockStored([1, -(2**63)], None, [5, 6, 7, 8], 2),
    BlockStored([2**63 - 1], 1, [9, 9], 2, Namespace(lora_id="a").encode(), StorageMedium.CPU),
    BlockRemoved([1, 2], StorageMedium.DISK),
]
BATCH = EventBatch(12.5, EVENTS, 3)


@pytest.mark.parametrize("kind", [SGLangBatch, VLLMBatch])
def test_the_engines_own_types_read_it(kind):
    ts, events, rank = msgspec.structs.astuple(msgspec.msgpack.decode(encode_batch(BATCH), type=kind))
    assert (ts, rank) == (12.5, 3)
    cleared, first, second, gone = events
    assert type(cleared).__name__.endswith("Cleared")
    assert (first.block_hashes, first.parent_block_hash, first.token_ids) == ([1, -(2**63)], None, [5, 6, 7, 8])
    assert (first.block_size, first.lora_id, first.medium, first.lora_name) == (2, None, "GPU", None)
    assert (second.block_hashes, second.parent_block_hash) == ([2**63 - 1], 1)
    assert (second.medium, second.lora_name) == ("CPU_PINNED", "a")
    assert (gone.block_hashes, gone.medium) == ([1, 2], "DISK")


def test_the_bytes():
    payload = msgspec.msgpack.decode(encode_batch(EventBatch(1.0, EVENTS[:2], 0)))
    stored = {
        "type": "BlockStored",
        "block_hashes": [1, -(2**63)],
        "parent_block_hash": None,
        "token_ids": [5, 6, 7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    assert payload == [1.0, [{"type": "AllBlocksCleared"}, stored], 0]


def test_what_is_encoded_is_decoded():
    assert decode_batch(encode_batch(BATCH)) == BATCH
    assert decode_batch(encode_batch(EventBatch(1.0, [], None))) == EventBatch(1.0, [], None)


def test_secrets_and_on_demand_tokens_stay_at_home():
    space = Namespace(extra_key="tenant-7", lora_id=b"\x01", cache_salt="salt", media=(b"digest",))
    payload = encode_batch(EventBatch(1.0, [BlockStored([1], None, [123456, 7], 2, space.encode())]), False)
    decoded = msgspec.msgpack.decode(payload)[1][0]
    assert decoded["token_ids"] == [] and decoded["lora_name"] is None
    for secret in (b"tenant", b"salt", b"digest", msgspec.msgpack.encode(123456)):
        assert secret not in payload


def test_digests_of_media_are_told_with_the_tokens():
    told = BlockStored([1, 2], None, [3, 4, 5, 6], 2, extra_keys=[["ab12", "cd"], None])
    batch = EventBatch(1.0, [told, BlockStored([3], 2, [7, 8], 2)], None)
    fields = msgspec.msgpack.decode(encode_batch(batch))[1]
    assert fields[0]["extra_keys"] == [["ab12", "cd"], None]
    assert "extra_keys" not in fields[1]  # nor for consumers that do not know it
    assert decode_batch(encode_batch(batch)) == batch
    assert b"ab12" not in encode_batch(batch, with_token_ids=False)


@pytest.mark.parametrize("kind", [SGLangBatch, VLLMBatch])
def test_what_the_engines_publish_is_read(kind):
    stored, removed, cleared = kind.__annotations__["events"].split("[")[1].rstrip("]").split(" | ")
    types = globals()
    ours = types[stored]([1], 2, [3, 4], 2, None, medium="CPU", lora_name="a")
    batch = kind(1.5, [types[cleared](), ours, types[removed]([1], "EXTERNAL")], 1)
    space = Namespace(lora_id="a").encode()
    assert decode_batch(msgspec.msgpack.encode(batch)) == EventBatch(
        1.5,
        [
            AllBlocksCleared(),
            BlockStored([1], 2, [3, 4], 2, space, StorageMedium.CPU),
            BlockRemoved([1], StorageMedium.EXTERNAL),
        ],
        1,
    )


def test_older_and_unknown_forms_are_read():
    older = [2.0, [["BlockStored", [1], None, [3], 1, None], ["BlockRemoved", [1]], ["AllBlocksCleared"]]]
    expected = [BlockStored([1], None, [3], 1), BlockRemoved([1]), AllBlocksCleared()]
    assert decode_batch(msgspec.msgpack.encode(older)) == EventBatch(2.0, expected)
    as_map = {"ts": 2.0, "events": [], "data_parallel_rank": 4}
    assert decode_batch(msgspec.msgpack.encode(as_map)) == EventBatch(2.0, [], 4)
    names = [2.0, [{"type": "BlockRemoved", "block_hashes": [b"x" * 32], "medium": "nowhere"}], None, "more"]
    assert decode_batch(msgspec.msgpack.encode(names)).events == [BlockRemoved([b"x" * 32], StorageMedium.EXTERNAL)]
    unknown = [2.0, [{"type": "BlockMoved"}, ["Other", 1], 7, None, [], {"type": "AllBlocksCleared", "new": 1}], None]
    assert decode_batch(msgspec.msgpack.encode(unknown)).events == [AllBlocksCleared()]


def test_tokens_of_numpy_are_integers():
    tokens = np.arange(4, dtype="<i4").tobytes()
    event = BlockStored([PageHashes(tokens, 8)], None, tokens, 2)
    assert msgspec.msgpack.decode(encode_batch(EventBatch(0.0, [event])))[1][0]["token_ids"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "batch",
    [
        7,
        [],
        [1.0],
        ["1", []],
        [1.0, {}],
        [1.0, [], "rank"],
        [1.0, [["BlockStored"]]],
        [1.0, [["BlockRemoved"]]],
        [1.0, [["BlockRemoved", ["1"]]]],
        [1.0, [["BlockStored", [1], "parent", [1], 1]]],
        [1.0, [["BlockStored", [1], None, None, 1]]],
        [1.0, [["BlockStored", [1], None, [1], "1"]]],
    ],
)
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(ArgumentError, match="payload"):
        decode_batch(msgspec.msgpack.encode(batch))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_batch_or_refused(payload):
    whole = encode_batch(BATCH)
    for broken in (payload, whole[: len(payload)], whole[: len(payload)] + payload + whole[len(payload) :]):
        with contextlib.suppress(ArgumentError):
            assert isinstance(decode_batch(broken), EventBatch)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 2047, 2048, 2049, 2063, 2064, 70_000])
@pytest.mark.parametrize("form", [np.ndarray.tolist, lambda tokens: tokens.astype("<i4").tobytes()])
def test_tokens_are_packed_piece_by_piece_into_one_list(count, form):
    tokens = np.random.default_rng(count).integers(0, 2**31, count)
    pauses = []
    batch = EventBatch(1.0, [BlockStored([7] * count, None, form(tokens), 1), BlockRemoved([8])])
    payload = encode_batch(batch, pause=lambda: pauses.append(1))
    assert payload == encode_batch(batch)
    assert len(pauses) == -(-count // 2048)
    stored, removed = msgspec.msgpack.decode(payload, type=SGLangBatch).events
    assert stored.token_ids == tokens.tolist()
    assert removed.block_hashes == [8]
    assert decode_batch(payload) == batch
