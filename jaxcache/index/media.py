"""Images and audio behind placeholder tokens: which of them a prefix holds, by position.

    tokens   7 8 9 0 0 0 0 5 6        0: what stands for an image, of which the KV says more than the token
    media          [3, 7) = D         the image with digest D
    pages    7 8 | 9 0+D | 0 0 | 5 6  page size 2: the page in which an image starts is named by D as well

A page is known by what comes before it, so D is needed once: in the page where its range starts. All later pages hang
below that one, in the tree and in the chain of hashes, and all earlier ones are those of the text. Digests are compared
as a whole, and hashed as a whole: two images are taken for each other only if their digests, or two hashes of 256 bits,
are equal. No token is changed, whatever the vocabulary, and keys without media are what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxcache.arguments import as_count
from jaxcache.errors import ArgumentError

LEAST_DIGEST_BYTES = 2


@dataclass(frozen=True)
class MediaRange:
    """What stands for one image, or one piece of audio or video.

    Attributes:
      start: First token of it.
      stop: Token after the last one.
      digest: Of the content, and of all else that its KV depends on, such as its size in the model's input. 2 bytes at
        least; take 16 or more, as `content_digest` does: two images with one digest are taken for each other.

    Raises:
      ArgumentError: The range is empty or negative, or the digest is too short or no bytes.
    """

    start: int
    stop: int
    digest: bytes

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            object.__setattr__(self, name, as_count(f"{name} of media", getattr(self, name)))
        if self.start >= self.stop:
            raise ArgumentError(f"media [{self.start}, {self.stop}) is empty: give the tokens that stand for it")
        require_digest("digest of media", self.digest)

    def later(self, tokens: int) -> MediaRange:
        """The same range, so many tokens later."""
        return MediaRange(self.start + tokens, self.stop + tokens, self.digest)

    def rest(self, position: int) -> MediaRange:
        """What is left of it from `position` on, which is inside: something of its own, as it is not the whole."""
        skipped = (position - self.start).to_bytes(8, "little")
        return MediaRange(
            position, self.stop, hashlib.sha256(b"jaxcache/media/rest/1" + skipped + self.digest).digest()
        )


def require_digest(name: str, digest: Any) -> None:
    """Raises ArgumentError unless `digest` can tell contents apart."""
    if not isinstance(digest, bytes) or len(digest) < LEAST_DIGEST_BYTES:
        found = f"{len(digest)} bytes" if isinstance(digest, bytes) else type(digest).__name__
        raise ArgumentError(
            f"{name} must be at least {LEAST_DIGEST_BYTES} bytes, got {found}: "
            "content_digest(pixels) of jaxcache.index.hashing makes one of 32"
        )


def as_media(media: Any, tokens: int) -> tuple[MediaRange, ...]:
    """Ranges of a sequence of so many tokens, in order.

    Args:
      media: `MediaRange`s, in any order.
      tokens: Of the sequence.

    Raises:
      ArgumentError: One is no `MediaRange`, two overlap, or one ends after the sequence.
    """
    ranges = tuple(media) if isinstance(media, Iterable) else (media,)
    for each in ranges:
        if not isinstance(each, MediaRange):
            raise ArgumentError(f"media must be a sequence of MediaRange, got {type(each).__name__} in it")
    ranges = tuple(sorted(ranges, key=lambda each: each.start))
    for before, after in pairwise(ranges):
        if before.stop > after.start:
            raise ArgumentError(
                f"media [{before.start}, {before.stop}) and [{after.start}, {after.stop}) overlap: a token stands for "
                "one of them"
            )
    if ranges and ranges[-1].stop > tokens:
        raise ArgumentError(
            f"media [{ranges[-1].start}, {ranges[-1].stop}) ends after the {tokens} tokens: give the tokens of the key "
            "that stand for it"
        )
    return ranges


def part_of(media: Sequence[MediaRange], start: int) -> tuple[MediaRange, ...]:
    """The ranges as positions in what is left of a sequence from token `start` on."""
    left = [each if each.start >= start else each.rest(start) for each in media if each.stop > start]
    return tuple([each.later(-start) for each in left])


def of_pairs(media: Sequence[MediaRange]) -> tuple[MediaRange, ...]:
    """The ranges in a key of pairs: the pair of a token and the first one of an image depends on the image too."""
    # none starts before the first pair: one that starts with it has a digest of its own, so that it is not the next
    return tuple([MediaRange(each.start - 1, each.stop, each.digest) if each.start else each.rest(0) for each in media])


def marks_of(media: Sequence[MediaRange], page_size: int) -> dict[int, bytes]:
    """By the first token of each page in which ranges start, an injective encoding of those, in order. O(ranges)."""
    marks: dict[int, bytes] = {}
    for each in media:
        offset = each.start % page_size
        sizes = (offset, each.stop - each.start, len(each.digest))
        code = b"".join([size.to_bytes(8, "little") for size in sizes]) + each.digest
        page = each.start - offset
        marks[page] = marks.get(page, b"") + code
    return marks


def digests_of(mark: bytes) -> list[bytes]:
    """The digests in what `marks_of` has for a page."""
    digests = []
    while mark:
        end = 24 + int.from_bytes(mark[16:24], "little")
        digests.append(mark[24:end])
        mark = mark[end:]
    return digests


def with_media(prior: bytes, mark: bytes) -> bytes:
    """What the hash of a page is chained to instead of `prior`, where ranges start in it."""
    return hashlib.sha256(b"jaxcache/media/1" + len(prior).to_bytes(1, "little") + prior + mark).digest()
