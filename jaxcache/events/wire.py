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

from collections.abc import Callable, Sequence
from typing import Any

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

_STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "cache_salt",
    "extra_keys",
)
_REMOVED = ("block_hashes", "medium")


def _never() -> None:
    """Keeps other threads from running."""


def encode_batch(batch: EventBatch, with_token_ids: bool = True, pause: Callable[[], None] = _never) -> bytes:
    """The bytes of a batch. This is where names are hashed and tokens unpacked.

    Args:
      batch: Its `namespace`s are not told, but for a `lora_id` that is text.
      with_token_ids: False leaves the tokens out, which are what users wrote, and the digests of their images:
        consumers that go by names need neither.
      pause: Called every 20 microseconds or so, for a thread that shall not keep others waiting.
    """
    events = [msgspec.Raw(msgspec.msgpack.encode(_encoded(event, with_token_ids, pause))) for event in batch.events]
    return msgspec.msgpack.encode([batch.ts, events, batch.data_parallel_rank])


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
        pieces.append(msgspec.msgpack.encode(tokens)[1 if len(tokens) < 16 else 3 :])  # without the length of the piece
        pause()
    return msgspec.Raw(b"".join([b"\xdd", count.to_bytes(4, "big"), *pieces]))


def decode_batch(payload: bytes) -> EventBatch:
    """The batch of these bytes. Kinds of events that are not known are left out.

    Raises:
      ArgumentError: They are not a batch of events.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise ArgumentError(f"payload: it is no msgpack: {error}") from error
    if isinstance(batch, dict):
        rank = batch.get("data_parallel_rank", batch.get("attn_dp_rank"))
        batch = [batch.get("ts"), batch.get("events"), rank]
    ts, events, rank = (*batch, None, None, None)[:3] if isinstance(batch, list) else (None, None, None)
    if not isinstance(ts, (int, float)) or not isinstance(events, list) or not isinstance(rank, (int, type(None))):
        raise ArgumentError("payload: a batch is [ts, events, rank]; this is something else")
    decoded = [_decoded(event) for event in events]
    return EventBatch(float(ts), [event for event in decoded if event is not None], rank)


def _decoded(event: Any) -> KVCacheEvent | None:
    """An event; None for a kind that is not known."""
    kind: Any = event
    fields: dict[Any, Any] = {}
    if isinstance(event, dict):
        kind, fields = event.get("type"), event
    elif isinstance(event, list) and event:
        kind = event[0]
        fields = dict(zip(_REMOVED if kind == "BlockRemoved" else _STORED, event[1:], strict=False))
    if kind == "AllBlocksCleared":
        return AllBlocksCleared()
    if kind == "BlockRemoved":
        return BlockRemoved(_names(fields.get("block_hashes")), _medium(fields))
    if kind != "BlockStored":
        return None
    names, parent = _names(fields.get("block_hashes")), fields.get("parent_block_hash")
    tokens, size = fields.get("token_ids"), fields.get("block_size")
    if not isinstance(tokens, list) or not isinstance(size, int) or not isinstance(parent, (int, bytes, type(None))):
        raise ArgumentError("payload: a field of a BlockStored is missing or of a wrong type")
    space = Namespace(lora_id=_text(fields.get("lora_name")), cache_salt=_text(fields.get("cache_salt")))
    extra = fields.get("extra_keys")
    extra = extra if isinstance(extra, list) else None
    return BlockStored(names, parent, tokens, size, space.encode(), _medium(fields), extra)  # type: ignore[arg-type]


def _names(names: Any) -> Sequence[int]:
    if not isinstance(names, list) or not all(isinstance(name, (int, bytes)) for name in names):
        raise ArgumentError("payload: block_hashes must be integers or bytes")
    return names


def _medium(fields: dict[Any, Any]) -> StorageMedium:
    return _MEDIA.get(_text(fields.get("medium")), StorageMedium.EXTERNAL)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
