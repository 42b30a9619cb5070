"""Chained page digests of a node, kept as it splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from jaxcache.index.media import with_media

DIGEST_BYTES = 32
PAGES_AT_ONCE = 32
"""Between two pauses of `PageHashes.work_out`: some 20 microseconds."""


def page_hashes(packed: bytes, page_bytes: int, prior: bytes = b"") -> list[bytes]:
    """One SHA-256 digest a whole page, each chained to the one before it.

    Args:
      packed: Packed elements; what is left after the last whole page is ignored.
      page_bytes: Bytes of a page of elements.
      prior: Digest of the page before, or `namespace_seed(...)` at the start of a sequence.

    The digest of a page depends on every token before its end and on the namespace, never on node boundaries. With the
    default namespace it equals SGLang's `get_hash_str` page by page (golden vector in the tests). A pair contributes
    both its tokens, in order.

    Source: SGLang 0.5.2 hicache_storage.py, get_hash_str.
    """
    digests = []
    for start in range(0, len(packed) - page_bytes + 1, page_bytes):
        prior = hashlib.sha256(prior + packed[start : start + page_bytes]).digest()
        digests.append(prior)
    return digests


def namespace_seed(namespace: bytes) -> bytes:
    """What the hash chain of a namespace starts from: nothing for the default namespace, else its digest."""
    return hashlib.sha256(b"jaxcache/namespace/1" + namespace).digest() if namespace else b""


class PageHashes(Sequence[bytes]):
    """The chained digests of a run of pages, worked out when one is first looked at.

    Making one hashes nothing, so an insert can afford it; any thread may look. Once they are worked out, it keeps 32
    bytes a page, and neither the tokens nor what comes before them.

    Args:
      packed: Packed tokens of whole pages.
      page_bytes: Bytes of a page of tokens.
      prior: The pages right before the first one, or the encoded namespace where there are none.
      media: What `marks_of` has for the first page; none may start in a later one.
    """

    __slots__ = ("_done", "_media", "_packed", "_page_bytes", "_pages", "_prior")

    def __init__(self, packed: bytes, page_bytes: int, prior: PageHashes | bytes = b"", media: bytes = b""):
        self._media = media
        self._packed = packed
        self._page_bytes = page_bytes
        self._prior = prior
        self._pages = len(packed) // page_bytes

    def __len__(self) -> int:
        return self._pages

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        """One digest, or several."""
        digests = self._digests()
        pages = range(self._pages)[index]
        if isinstance(pages, int):
            return digests[DIGEST_BYTES * pages : DIGEST_BYTES * (pages + 1)]
        return [digests[DIGEST_BYTES * page : DIGEST_BYTES * (page + 1)] for page in pages]

    def names(self) -> list[int]:
        """The first 64 bits of each digest as a signed integer, as `hash_to_int64`."""
        return np.frombuffer(self._digests(), ">i8")[::4].tolist()

    def split(self, upper: bytes, lower: bytes) -> tuple[PageHashes, PageHashes]:
        """Two runs, given the tokens of each; what was worked out for the whole is worked out for them."""
        # before asking whether it is done: see `_digests`
        first = PageHashes(upper, self._page_bytes, self._prior, self._media)
        second = PageHashes(lower, self._page_bytes, first)
        if not self._packed:
            cut = DIGEST_BYTES * first._pages
            for part, done in ((first, self._done[:cut]), (second, self._done[cut:])):
                part._done, part._packed, part._prior = done, b"", b""
        return first, second

    def work_out(self, pause: Callable[[], None]) -> None:
        """Works the digests out, a few at a time, with `pause()` after them: hashing keeps other threads waiting."""
        self._digests(pause)

    def _digests(self, pause: Callable[[], None] | None = None) -> bytes:
        """All digests, one behind the other. Two threads may work them out at once: to the same."""
        todo = []
        run = self
        while True:  # no recursion: chats make chains of any depth
            prior, packed = run._prior, run._packed  # in this order: it is done once there are no tokens
            if not packed:
                break
            todo.append((run, packed, prior))
            if isinstance(prior, bytes):
                break
            run = prior
        for run, packed, prior in reversed(todo):
            digests = [namespace_seed(prior) if isinstance(prior, bytes) else prior[-1]]
            if run._media:
                digests = [with_media(digests[0], run._media)]
            at_once = len(packed) if pause is None else PAGES_AT_ONCE * run._page_bytes
            for start in range(0, len(packed), at_once):
                digests += page_hashes(packed[start : start + at_once], run._page_bytes, digests[-1])
                if pause is not None:
                    pause()
            run._done = b"".join(digests[1:])
            run._packed = run._prior = b""
        return self._done

    def __repr__(self) -> str:
        return f"PageHashes({self._pages} pages)"
