"""Event batches as bytes: the msgpack format that SGLang 0.5.23 publishes and vLLM and its routers read.

    [ts, [event, ...], data_parallel_rank]        a batch is an array
    {"type": "BlockStored", "block_hashes": [...], "parent_block_hash": int | nil, "token_ids": [...],
     "block_size": int, "lora_id": nil, "medium": "GPU", "lora_name": str | nil, "extra_keys": [[str] | nil, ...]}
    {"type": "BlockRemoved", "block_hashes": [...], "medium": "GPU"}
    {"type": "AllBlocksCleared"}

`medium` and `lora_name` are always there, since vLLM's consumers demand them; `extra_keys` only where images start in a
block. Names of blocks are chained from their
namespace, so a salt or an extra key need not be told, and is not. What older releases publish is read too: events and
batches as arrays or as maps, names of blocks as bytes.

Needs msgspec, extra `events`.

Source: SGLang 0.5.23 disaggregation/kv_events.py; vLLM 0.33 distributed/kv_events.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.events.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVCacheEvent,
    StorageMedium,
)
from jaxcache.index.key import Namespace

try:
    import msgspec
except ImportError as error:
    raise UnsupportedError("events on the wire need msgspec: pip install 'jaxcache[events]'") from error

_MEDIA = {medium.value: medium for medium in StorageMedium} | {
    None: StorageMedium.GPU,
    "CPU": StorageMedium.CPU,
    "FS": StorageMedium.DISK,
    "STORAGE": StorageMedium.DISK,
}
TOKENS_AT_ONCE = 2048
"""Between two pauses of `encode_batch`: some 20 microseconds."""

MAX_EVENTS = 1 << 20
"""Events of one batch; the length of the list is compared before any of it is read."""


_KeysOfBlock = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=1024)]
_ExtraKeys = Annotated[list[_KeysOfBlock | None], msgspec.Meta(max_length=MAX_EVENTS)]
_Pair = Annotated[list[str | int | float | None], msgspec.Meta(max_length=16)]
"""What other releases have among the keys of a block, such as an image and where it starts."""


class _Batch(msgspec.Struct, array_like=True):
    """What a batch must be; events are read one by one, since those of unknown kinds are left out."""

    ts: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct):
    ts: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]
    data_parallel_rank: int | None = None
    attn_dp_rank: int | None = None


class _Kind(msgspec.Struct):
    type: msgspec.Raw = msgspec.Raw()


class _KindArray(_Kind, array_like=True):
    pass


class _Stored(msgspec.Struct):
    type: str
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: msgspec.Raw = msgspec.Raw()
    lora_name: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()
    extra_keys: msgspec.Raw = msgspec.Raw()


class _StoredArray(_Stored, array_like=True):
    pass


class _Removed(msgspec.Struct):
    type: str
    block_hashes: list[int | bytes]
    medium: msgspec.Raw = msgspec.Raw()


class _RemovedArray(_Removed, array_like=True):
    pass


def _decoders(*types: Any) -> tuple[msgspec.msgpack.Decoder, ...]:
    return tuple(msgspec.msgpack.Decoder(kind) for kind in types)


_BATCH, _BATCH_MAP = _decoders(_Batch, _BatchMap)
_AS_MAP = _decoders(_Kind, _Stored, _Removed)
_AS_ARRAY = _decoders(_KindArray, _StoredArray, _RemovedArray)
_EXTRA_KEYS, _PAIR = _decoders(_ExtraKeys, _Pair)
_TEXT = msgspec.msgpack.Decoder(str)
_MAP_HEADS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_ARRAY_HEADS = frozenset((*range(0x91, 0xA0), 0xDC, 0xDD))
_LIST_HEADS = _ARRAY_HEADS | {0x90}
_TEXT_HEADS = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))
"""First bytes of what msgpack writes for a map, for an array that is not empty, and for text."""


def _never() -> None:
    """Keeps other threads from running."""


def encode_batch(batch: EventBatch, with_token_ids: bool = True, pause: Callable[[], None] = _never) -> bytes:
    """The bytes of a batch. This is where names are hashed and tokens unpacked.

    Args:
      batch: Its `namespace`s are not told, but for a `lora_id` that is text.
      with_token_ids: False leaves the tokens out, which are what users wrote, and the digests of their images:
        consumers that go by names need neither.
      pause: Called about every 20 microseconds, so that a worker thread can let others run.

    Raises:
      ArgumentError: A field is of another type than its event wants, or does not fit 64 bits.
    """
    try:
        events = [msgspec.Raw(_encode(_encoded(event, with_token_ids, pause))) for event in batch.events]
        return _encode([batch.ts, events, batch.data_parallel_rank])
    except (TypeError, OverflowError, UnicodeError) as error:
        raise ArgumentError(f"batch: a field of an event cannot be encoded: {error}") from error


def _encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Numbers of NumPy as those of Python."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} must be an integer, text or bytes")


def _encoded(event: KVCacheEvent, with_token_ids: bool, pause: Callable[[], None]) -> dict[str, Any]:
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    event.work_out(pause)
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": event.block_hashes, "medium": event.medium.value}
    lora_id = Namespace.decode(event.namespace).lora_id
    media = {"extra_keys": event.extra_keys} if event.extra_keys and with_token_ids else {}
    return media | {
        "type": "BlockStored",
        "block_hashes": event.block_hashes,
        "parent_block_hash": event.parent_block_hash,
        "token_ids": _packed_tokens(event, pause) if with_token_ids else [],
        "block_size": event.block_size,
        "lora_id": None,
        "medium": event.medium.value,
        "lora_name": lora_id if isinstance(lora_id, str) else None,
    }


def _packed_tokens(event: BlockStored, pause: Callable[[], None]) -> msgspec.Raw:
    """The tokens of an event as a msgpack array of 32-bit length, made a piece at a time."""
    count, pieces = 0, []
    for tokens in event.token_pieces(TOKENS_AT_ONCE):
        count += len(tokens)
        pieces.append(_encode(tokens)[1 if len(tokens) < 16 else 3 :])  # without the length of the piece
        pause()
    return msgspec.Raw(b"".join([b"\xdd", count.to_bytes(4, "big"), *pieces]))


def decode_batch(payload: bytes) -> EventBatch:
    """The batch of these bytes. Kinds of events that are not known are left out.

    Cost: in the size of the payload. What is no batch is refused where it first is none: nothing is made of the rest.

    Raises:
      ArgumentError: They are not a batch of events, or one of more than `MAX_EVENTS`.
    """
    try:
        if payload[:1] and payload[0] in _MAP_HEADS:
            as_map = _BATCH_MAP.decode(payload)
            rank = as_map.attn_dp_rank if as_map.data_parallel_rank is None else as_map.data_parallel_rank
            batch = _Batch(as_map.ts, as_map.events, rank)
        else:
            batch = _BATCH.decode(payload)
        events = [event for event in map(_decoded, batch.events) if event is not None]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArgumentError(f"payload: a batch is [ts, events, rank]; this is something else: {error}") from error
    if not math.isfinite(batch.ts):
        raise ArgumentError(f"payload: the time of a batch must be finite, got {batch.ts}")
    return EventBatch(batch.ts, events, batch.data_parallel_rank)


def _decoded(raw: msgspec.Raw) -> KVCacheEvent | None:
    """An event; None for a kind that is not known."""
    head = memoryview(raw)[0]
    if head in _MAP_HEADS:
        as_kind, as_stored, as_removed = _AS_MAP
    elif head in _ARRAY_HEADS:
        as_kind, as_stored, as_removed = _AS_ARRAY
    else:
        return None
    kind = _text(as_kind.decode(raw).type)
    if kind == "AllBlocksCleared":
        return AllBlocksCleared()
    if kind == "BlockRemoved":
        removed = as_removed.decode(raw)
        return BlockRemoved(removed.block_hashes, _medium(removed.medium))
    if kind != "BlockStored":
        return None
    stored = as_stored.decode(raw)
    space = Namespace(lora_id=_text(stored.lora_name), cache_salt=_text(stored.cache_salt)).encode()
    parent, medium = stored.parent_block_hash, _medium(stored.medium)
    extra = _extra_keys(stored.extra_keys)
    return BlockStored(stored.block_hashes, parent, stored.token_ids, stored.block_size, space, medium, extra)


def _extra_keys(raw: msgspec.Raw) -> list[Any] | None:
    """The extra keys of blocks, or None for anything but a list."""
    view = memoryview(raw)
    if not len(view) or view[0] not in _LIST_HEADS:
        return None
    return [keys and [_extra_key(key) for key in keys] for keys in _EXTRA_KEYS.decode(view)]


def _extra_key(raw: msgspec.Raw) -> Any:
    """Text, bytes, a number, None, or a few of them."""
    view = memoryview(raw)
    if view[0] in _MAP_HEADS | _LIST_HEADS:
        return _PAIR.decode(view)
    return msgspec.msgpack.decode(view)


def _medium(raw: msgspec.Raw) -> StorageMedium:
    return _MEDIA.get(_text(raw), StorageMedium.EXTERNAL)


def _text(raw: msgspec.Raw) -> str | None:
    """Text, or None for anything else: other releases have other things there."""
    view = memoryview(raw)
    return _TEXT.decode(view) if len(view) and view[0] in _TEXT_HEADS else None
