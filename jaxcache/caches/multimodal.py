"""Embeddings of images, audio and video by their content: what a vision tower has computed is not computed again."""

from __future__ import annotations

import threading
from typing import TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from jaxcache.arguments import as_count
from jaxcache.errors import ArgumentError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.page_hashes import DIGEST_BYTES

Array: TypeAlias = jax.Array | np.ndarray

MIN_DIGEST_BYTES = 16  # 128 bits: two contents with one digest would be taken for each other
MAX_DIGEST_BYTES = 64


class MultiModalCache:
    """A least-recently-used map from content digests to arrays, bounded in bytes.

    Thread-safe: every method holds one lock for a few dict operations, whatever the size of the arrays.

    Args:
      max_size: Bytes of all arrays together, each counted once (`nbytes`, whatever its sharding).

    Attributes:
      max_size: As given.
      current_size: Bytes of the arrays that are kept.

    Raises:
      ArgumentError: `max_size` is not an integer, or negative.

    Source: SGLang 0.5.2 multimodal_cache.py, whose keys are 64-bit integers.
    """

    def __init__(self, max_size: int):
        self.max_size = as_count("max_size", max_size)
        self.current_size = 0
        self._entries: dict[tuple[bytes, bytes], Array] = {}  # the one used longest ago first
        self._lock = threading.Lock()

    def put(self, mm_hash: bytes, embedding: Array, extra_key: str | bytes | Namespace | None = None) -> bool:
        """Keeps an embedding, and evicts the least recently used ones that it leaves no room for.

        The same digest again replaces the array and counts as a use.

        Args:
          mm_hash: Digest of the content, 16 to 64 bytes: see `content_digest`.
          embedding: A JAX array, which is shared, or a NumPy array, which is copied: the caller may write to it later.
          extra_key: Namespace; an embedding is found only in the one it was put in.

        Returns:
          False if it is larger than the whole cache. Nothing has changed then.

        Raises:
          ArgumentError: The digest is too short or not bytes, or `embedding` is empty or not an array of this process.
        """
        key = _key(mm_hash, extra_key)
        size = _size(embedding)
        if size > self.max_size:
            return False
        if isinstance(embedding, np.ndarray):
            embedding = np.array(embedding)
            embedding.setflags(write=False)
        with self._lock:
            self._remove(key)
            while self.current_size + size > self.max_size:
                self._remove(next(iter(self._entries)))
            self._entries[key] = embedding
            self.current_size += size
        return True

    def get(self, mm_hash: bytes, extra_key: str | bytes | Namespace | None = None) -> Array | None:
        """The embedding, now the one used last; None if it is not there, or its buffer was donated meanwhile.

        Raises:
          ArgumentError: The digest is too short or no bytes.
        """
        key = _key(mm_hash, extra_key)
        with self._lock:
            embedding = self._entries.get(key)
            if isinstance(embedding, jax.Array) and embedding.is_deleted():
                self._remove(key)
                return None
            if embedding is not None:
                self._entries[key] = self._entries.pop(key)
            return embedding

    def has(self, mm_hash: bytes, extra_key: str | bytes | Namespace | None = None) -> bool:
        """Whether `get` would find it. No use of it."""
        embedding = self._entries.get(_key(mm_hash, extra_key))
        return embedding is not None and not (isinstance(embedding, jax.Array) and embedding.is_deleted())

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._entries.clear()
            self.current_size = 0

    def __len__(self) -> int:
        """Embeddings that are kept."""
        return len(self._entries)

    def _remove(self, key: tuple[bytes, bytes]) -> None:
        gone = self._entries.pop(key, None)
        if gone is not None:
            self.current_size -= gone.nbytes


def _key(mm_hash: bytes, extra_key: str | bytes | Namespace | None) -> tuple[bytes, bytes]:
    if not isinstance(mm_hash, bytes) or not MIN_DIGEST_BYTES <= len(mm_hash) <= MAX_DIGEST_BYTES:
        found = f"{len(mm_hash)} bytes" if isinstance(mm_hash, bytes) else type(mm_hash).__name__
        raise ArgumentError(
            f"mm_hash must be a digest of {MIN_DIGEST_BYTES} to {MAX_DIGEST_BYTES} bytes, got {found}: "
            f"content_digest(pixels) makes one of {DIGEST_BYTES}"
        )
    return RadixKey(b"", extra_key).namespace, mm_hash


def _size(embedding: Array) -> int:
    if isinstance(embedding, Tracer) or not isinstance(embedding, (jax.Array, np.ndarray)):
        raise ArgumentError(
            f"embedding must be a NumPy or JAX array, got {type(embedding).__name__}: call it outside jit"
        )
    if isinstance(embedding, jax.Array) and embedding.is_deleted():
        raise ArgumentError("embedding: its buffer was donated or deleted: pass the array that replaced it")
    if isinstance(embedding, np.ndarray) and embedding.dtype.hasobject:
        raise ArgumentError(f"embedding must hold numbers, got dtype {embedding.dtype}")
    if not embedding.nbytes:
        raise ArgumentError(f"embedding of shape {embedding.shape} is empty: there is nothing to keep")
    return embedding.nbytes
