"""Keys of the tree: packed tokens in a namespace.

Tokens are packed once, as little-endian int32 bytes. Every comparison on a hot path is then a `memcmp`, every child is
found by the bytes of its first page, and no loop runs over tokens.

    RadixKey([5, 6, 7, 8])     5 6 7 8         an element is a token      4 bytes
    BigramKey([5, 6, 7, 8])    56 67 78        an element is a pair       8 bytes

A tree knows elements only, and takes keys of one kind. Images and audio have placeholder tokens; which ones they are is
said beside them, by position: see `media`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxcache.errors import ArgumentError, shown
from jaxcache.index.media import MediaRange, as_media, of_pairs, part_of, require_digest

if TYPE_CHECKING:
    from typing import Self

    from jaxtyping import Int32

TOKEN_BYTES = 4
BIGRAM_BYTES = 8
_LITTLE_ENDIAN = sys.byteorder == "little"

TokenIds = "RadixKey | bytes | np.ndarray | Sequence[int]"


@dataclass(frozen=True)
class Namespace:
    """What separates identical tokens whose KV must not be shared.

    Attributes:
      extra_key: Free-form separator, as SGLang's `extra_key`.
      lora_id: Adapter, by load generation rather than by name if weights can be reloaded.
      cache_salt: Secret of a tenant.
      media: Content digests of images or audio, in order, whose place among the tokens is not known; at least 2 bytes
        each. They separate all of the tokens, the text before them too: where places are known, give a key or a request
        its `media` ranges instead.

    Two namespaces are equal exactly when their encodings are: every field is tagged, typed and length-prefixed, so lora
    "x" is never salt "x".
    """

    extra_key: str | bytes | None = None
    lora_id: str | bytes | None = None
    cache_salt: str | bytes | None = None
    media: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """The injective encoding that tree, hashes and events share; empty for the default namespace."""
        if not isinstance(self.media, (tuple, list)):
            raise ArgumentError(f"media must be a tuple of digests, got {self.media!r}")
        for digest in self.media:
            require_digest("media of a namespace: each", digest)
        fields = [(b"x", self.extra_key), (b"l", self.lora_id), (b"s", self.cache_salt)]
        fields += [(b"m", digest) for digest in self.media]
        return b"".join(tag + _encode_field(value) for tag, value in fields if value is not None)

    @classmethod
    def decode(cls, encoded: bytes) -> Namespace:
        """The namespace that `encode` made this of."""
        fields: dict[bytes, str | bytes] = {}
        media: list[Any] = []
        start = 0
        while start < len(encoded):  # a tag, a kind, a length, the field
            tag, kind = encoded[start : start + 1], encoded[start + 1 : start + 2]
            stop = start + 6 + int.from_bytes(encoded[start + 2 : start + 6], "little")
            data = encoded[start + 6 : stop]
            value = data.decode("utf-8", "surrogatepass") if kind == b"t" else data
            if tag == b"m":
                media.append(value)
            else:
                fields[tag] = value
            start = stop
        return cls(fields.get(b"x"), fields.get(b"l"), fields.get(b"s"), tuple(media))


def _encode_field(value: str | bytes) -> bytes:
    if isinstance(value, str):
        kind, data = b"t", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        kind, data = b"b", value
    else:
        raise ArgumentError(f"a namespace field must be str or bytes, got {shown(value)}: convert it first")
    return kind + len(data).to_bytes(4, "little") + data


class RadixKey:
    """A token sequence in a namespace, packed once.

    Args:
      token_ids: Tokens as a NumPy integer array, a sequence of ints, or bytes that are packed already (int32 little
        endian). A list costs about 10 ns a token to pack: pack once a request, then slice and extend.
      extra_key: Namespace; a str or bytes is short for `Namespace(extra_key=...)`.
      media: The ranges of tokens that stand for images or audio, in any order.

    Raises:
      ArgumentError: A token is not an integer in the int32 range, or the array has more than one dimension; ranges
        overlap, or lie outside.

    Attributes:
      packed: The elements; there may be more than `length`, which do not belong to the key.
      length: Elements of the key.
      namespace: Encoding of the namespace.
      media: Ranges of elements, in order of their starts; there may be some beyond `length`.
      element_bytes: Bytes of an element, the same for all keys of a class.

    Source: SGLang 0.5.3 radix_cache.py, RadixKey; pymllm base_prefix_cache.
    """

    __slots__ = ("length", "media", "namespace", "packed")

    packed: bytes
    length: int
    namespace: bytes
    media: tuple[MediaRange, ...]
    element_bytes: ClassVar[int] = TOKEN_BYTES

    def __init__(
        self,
        token_ids: bytes | np.ndarray | Sequence[int],
        extra_key: str | bytes | Namespace | None = None,
        media: Iterable[MediaRange] = (),
    ):
        self.packed = pack(token_ids)
        self.length = len(self.packed) // TOKEN_BYTES
        self.namespace = b"" if extra_key is None else _namespace(extra_key).encode()
        self.media = as_media(media, self.length) if media != () else ()

    @classmethod
    def _of(cls, packed: bytes, length: int, namespace: bytes, media: tuple[MediaRange, ...] = ()) -> Self:
        key = cls.__new__(cls)
        key.packed, key.length, key.namespace, key.media = packed, length, namespace, media
        return key

    def within(self, namespace: bytes) -> Self:
        """The same elements in the namespace of that encoding. O(1)."""
        return self._of(self.packed, self.length, namespace, self.media)

    def bigrams(self) -> BigramKey:
        """The pairs of neighbouring tokens, as a key in the same namespace. O(length)."""
        packed = _pairs(self.packed[: TOKEN_BYTES * self.length])
        return BigramKey._of(packed, max(self.length - 1, 0), self.namespace, of_pairs(self.media))

    @property
    def token_ids(self) -> Int32[np.ndarray, " tokens"]:
        """The tokens, as a read-only view."""
        return np.frombuffer(self.packed, "<i4", self.length)

    @property
    def extra_key(self) -> str | bytes | Namespace | None:
        """What separates it from equal tokens, as it would be given: None in the default namespace."""
        space = Namespace.decode(self.namespace)
        return space.extra_key if space == Namespace(extra_key=space.extra_key) else space

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.token_ids.tolist())

    def __getitem__(self, index: int | slice) -> Self:
        """A part of the key in the same namespace; a prefix shares the packed bytes and costs O(1)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step != 1:
                raise ArgumentError(f"index: a key can only be cut with step 1, got step {step}")
            stop = max(start, stop)
        else:
            start = range(self.length)[index]
            stop = start + 1
        if start == 0:
            return self._of(self.packed, stop, self.namespace, self.media)
        size, media = self.element_bytes, part_of(self.media, start) if self.media else ()
        return self._of(self.packed[size * start : size * stop], stop - start, self.namespace, media)

    def extended(self, token_ids: bytes | np.ndarray | Sequence[int]) -> Self:
        """This key with more tokens of text at its end; only the new tokens are converted."""
        packed = self.packed[: TOKEN_BYTES * self.length] + pack(token_ids)
        return self._of(packed, len(packed) // TOKEN_BYTES, self.namespace, self.media_within)

    @property
    def media_within(self) -> tuple[MediaRange, ...]:
        """The ranges that begin in the key."""
        if not self.media or self.media[-1].start < self.length:
            return self.media
        return tuple([each for each in self.media if each.start < self.length])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RadixKey):
            return NotImplemented
        end = self.element_bytes * self.length
        same = self.length == other.length and self.namespace == other.namespace
        same = same and self.media_within == other.media_within
        return same and self.element_bytes == other.element_bytes and self.packed[:end] == other.packed[:end]

    def __hash__(self) -> int:
        return hash((self.packed[: self.element_bytes * self.length], self.namespace))

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self[:10])) + (", ..." if self.length > 10 else "")
        space = f", namespace={self.namespace!r}" if self.namespace else ""
        space += f", media={list(self.media_within)}" if self.media_within else ""
        return f"{type(self).__name__}([{shown}], length={self.length}{space})"


class BigramKey(RadixKey):
    """A key of pairs of neighbouring tokens: n tokens make n - 1 elements, (t0, t1) (t1, t2) ...

    The KV of an EAGLE draft model at a position depends on the token there and on the next one, so what may be shared
    is named by pairs. Fewer than two tokens make an empty key.

    Args:
      token_ids: The tokens, not the pairs; in any form that `RadixKey` takes. O(tokens).
      extra_key: See `RadixKey`.
      media: Ranges of tokens; see `RadixKey`.

    Raises:
      ArgumentError: See `RadixKey`.

    Source: SGLang 0.5.3 radix_cache.py, _convert_to_bigram_key.
    """

    __slots__ = ()

    element_bytes: ClassVar[int] = BIGRAM_BYTES

    def __init__(
        self,
        token_ids: bytes | np.ndarray | Sequence[int],
        extra_key: str | bytes | Namespace | None = None,
        media: Iterable[MediaRange] = (),
    ):
        packed = pack(token_ids)
        self.packed = _pairs(packed)
        self.length = len(self.packed) // BIGRAM_BYTES
        self.namespace = b"" if extra_key is None else _namespace(extra_key).encode()
        self.media = of_pairs(as_media(media, len(packed) // TOKEN_BYTES)) if media != () else ()

    @property
    def pairs(self) -> Int32[np.ndarray, "pairs 2"]:
        """The pairs, as a read-only view."""
        return np.frombuffer(self.packed, "<i4", 2 * self.length).reshape(self.length, 2)

    @property
    def token_ids(self) -> Int32[np.ndarray, " pairs"]:
        """The first token of each pair, as a read-only view."""
        return self.pairs[:, 0]

    def __iter__(self) -> Iterator[tuple[int, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return map(tuple, self.pairs.tolist())

    def bigrams(self) -> BigramKey:
        """The key itself: its elements are pairs already."""
        return self

    def extended(self, token_ids: bytes | np.ndarray | Sequence[int]) -> Self:
        """This key with more tokens at its end; only the new tokens are converted.

        Raises:
          ArgumentError: The key is empty, so that it does not know the token before the new ones.
        """
        if not self.length:
            raise ArgumentError("token_ids: an empty key of pairs cannot be extended: make one of all the tokens")
        end = BIGRAM_BYTES * self.length
        packed = self.packed[:end] + _pairs(self.packed[end - TOKEN_BYTES : end] + pack(token_ids))
        return self._of(packed, len(packed) // BIGRAM_BYTES, self.namespace, self.media_within)


def _pairs(packed: bytes) -> bytes:
    """Packed tokens as packed pairs of neighbours."""
    tokens = np.frombuffer(packed, "<i4")
    return np.stack([tokens[:-1], tokens[1:]], axis=1).tobytes() if len(tokens) > 1 else b""


def _namespace(extra_key: str | bytes | Namespace) -> Namespace:
    return extra_key if isinstance(extra_key, Namespace) else Namespace(extra_key=extra_key)


def as_key(token_ids: RadixKey | bytes | np.ndarray | Sequence[int]) -> RadixKey:
    """`token_ids` as a key; a key passes through untouched."""
    return token_ids if isinstance(token_ids, RadixKey) else RadixKey(token_ids)


def as_bigrams(token_ids: RadixKey | np.ndarray | Sequence[int]) -> RadixKey:
    """`as_key` of pairs of neighbouring tokens, one fewer."""
    return as_key(token_ids).bigrams()


def pack(token_ids: bytes | np.ndarray | Iterable[int]) -> bytes:
    """Tokens as little-endian int32 bytes.

    Raises:
      ArgumentError: see `RadixKey`.
    """
    if isinstance(token_ids, bytes):
        if len(token_ids) % TOKEN_BYTES:
            raise ArgumentError(f"token_ids: packed tokens take 4 bytes each, got {len(token_ids)} bytes")
        return token_ids
    if isinstance(token_ids, np.ndarray):
        return _pack_array(token_ids)
    if isinstance(token_ids, RadixKey):  # Iterable too, but its namespace would be lost.
        raise ArgumentError("token_ids: a RadixKey is packed already and has a namespace: use it as it is")
    try:
        packed = array("i", token_ids)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last of a deleted array of a device
        raise ArgumentError(f"token_ids: every token must be an integer in the int32 range ({error})") from error
    if not _LITTLE_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def _pack_array(tokens: np.ndarray) -> bytes:
    if tokens.ndim != 1:
        raise ArgumentError(f"token_ids: expected one dimension, got shape {tokens.shape}: pass one sequence at a time")
    if tokens.dtype != np.int32:
        if tokens.dtype.kind not in "iu" and tokens.size:
            raise ArgumentError(f"token_ids: expected integers, got dtype {tokens.dtype}: convert them first")
        if tokens.size and (tokens.max() > 2**31 - 1 or tokens.min() < -(2**31)):
            raise ArgumentError("token_ids: a token is outside the int32 range")
    return tokens.astype("<i4", copy=False).tobytes()


def first_mismatch(ours: bytes, theirs: bytes, offset: int, length: int) -> int:
    """Byte position (a multiple of 4) of the first token that differs among `length` bytes; `length` if none does.

    Compares `ours[:length]` with `theirs[offset:offset + length]` in galloping windows, so that an early difference in
    a long segment is found at the price of a short one.
    """
    start, window = 0, 16384
    while start < length:
        count = min(window, length - start) // TOKEN_BYTES
        mine = np.frombuffer(ours, np.int32, count, start)
        differs = mine != np.frombuffer(theirs, np.int32, count, offset + start)
        first = int(differs.argmax())
        if differs[first]:
            return start + TOKEN_BYTES * first
        start += TOKEN_BYTES * count
        window *= 4
    return length
