"""Names of pages and of contents: SHA-256, chained where position matters.

    page 0           page 1           page 2           a digest depends on every token before its end, on the media
    h0 = H(seed t0)  h1 = H(h0 t1)    h2 = H(h1 t2)    behind them and on the namespace (the seed), never on how the
                                                       tree is cut into nodes

Digests of 32 bytes are identities. Their first 64 bits are only the short names that events use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.key import RadixKey
from jaxcache.index.media import marks_of
from jaxcache.index.node import Node, Root
from jaxcache.index.page_hashes import DIGEST_BYTES, PageHashes


@runtime_checkable
class _Array(Protocol):
    """An array of any framework that NumPy can read."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


def hash_token_ids(
    token_ids: np.ndarray | Sequence[int] | Sequence[tuple[int, ...]], prior_hash: str | None = None
) -> str:
    """SHA-256 of one page of tokens as a hex digest, chained to that of the page before it.

    Tokens are hashed as 4 little-endian bytes each, unsigned; of a tuple (bigram keys), each element in order.

    Args:
      token_ids: The tokens of the page.
      prior_hash: Digest of the page before; None or "" at the start of a sequence.

    Raises:
      ArgumentError: A token is not an integer in [0, 2**32), or `prior_hash` is not a SHA-256 digest.

    Source: SGLang 0.5.2 hicache_storage.py, get_hash_str; pymllm base_prefix_cache, hash_token_ids.
    """
    try:
        tokens = np.asarray(token_ids)
    except ValueError as error:  # a list of what has different lengths
        raise ArgumentError("token_ids: all must be tokens, or all tuples of as many tokens") from error
    if tokens.size and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**32):
        raise ArgumentError("token_ids: every token must be an integer in [0, 2**32)")
    prior = _from_hex("prior_hash", prior_hash, DIGEST_BYTES) if prior_hash else b""
    return hashlib.sha256(prior + tokens.astype("<u4").tobytes()).hexdigest()


def hash_to_int64(hex_str: str) -> int:
    """The first 64 bits of a hex digest as a signed integer: the name of a block in an event.

    Raises:
      ArgumentError: It has fewer than 16 hex digits.

    Source: pymllm base_prefix_cache, hash_to_int64.
    """
    digits = hex_str[:16] if isinstance(hex_str, str) else hex_str
    return int.from_bytes(_from_hex("hex_str", digits, 8), "big", signed=True)


def hash_bytes(data: bytes) -> int:
    """The first 64 bits of the SHA-256 of `data`, unsigned. A short name: `content_digest` makes keys.

    Raises:
      ArgumentError: `data` is no bytes.

    Source: pymllm base_prefix_cache, hash_bytes.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ArgumentError(f"data must be bytes, got {type(data).__name__}: encode it first")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def content_digest(*parts: Any) -> bytes:
    """SHA-256 of contents, such as an image, or the digests of all images of a request in order.

    Each part is hashed with its kind, shape and length, so that different parts never run together into the same bytes.

    Args:
      *parts: bytes (bytearray and memoryview alike), str, or arrays of NumPy, of JAX (which are read back) or of torch
        (on the host, and not bfloat16). Arrays of equal dtype, shape and numbers have equal digests.

    Raises:
      ArgumentError: There is no part, or one is none of those.
    """
    if not parts:
        raise ArgumentError("parts: there is nothing to hash: pass at least one")
    digest = hashlib.sha256(b"jaxcache/content/1")
    for part in parts:
        kind, data = _content(part)
        digest.update(len(kind).to_bytes(4, "little") + kind + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def _content(part: Any) -> tuple[bytes, bytes]:
    if isinstance(part, (bytes, bytearray, memoryview)):
        return b"bytes", bytes(part)
    if isinstance(part, str):
        return b"text", part.encode("utf-8", "surrogatepass")
    part = _numbers(part)
    little = part.astype(part.dtype.newbyteorder("<"), copy=False)
    return f"{part.dtype.name}{part.shape}".encode(), little.tobytes()


def _numbers(part: Any) -> np.ndarray:
    try:
        array = np.asarray(part) if isinstance(part, _Array) else np.empty(0, object)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"parts: a {type(part).__name__} cannot be read by NumPy ({str(error)[:200]}): pass it as an array of the "
            "host; one of torch as part.detach().cpu(), in bfloat16 as .view(torch.uint16)"
        ) from error
    if array.dtype.hasobject:
        raise ArgumentError(f"parts: expected bytes, str or an array of numbers, got {type(part).__name__}")
    return array


def compute_node_hash(node: Node, page_bytes: int) -> PageHashes:
    """The chained digests of a node's pages, whether its tree keeps hashes or not; they are kept in the nodes.

    The nodes above it come first, always: the same pages have the same digests, in whatever order they are asked for.

    Args:
      node: A node in a tree.
      page_bytes: Bytes of a page of the tree's keys.

    Raises:
      ArgumentError: The node is a root, or has left its tree.

    Cost: hashes the pages of the path that were not hashed yet, and those only.

    Source: pymllm radix_cache, compute_node_hash.
    """
    if not isinstance(node, Node):
        raise ArgumentError(f"node must be a node of a tree, got {type(node).__name__}")
    path: list[Node] = []
    above = node
    while above.parent is not None:
        path.append(above)
        above = above.parent
    if not path or not isinstance(above, Root):
        raise ArgumentError("node: it is a root or has left its tree: match again")
    prior: PageHashes | bytes = above.namespace
    for step in reversed(path[1:]):
        prior = _hashed(step, page_bytes, prior)
    return _hashed(node, page_bytes, prior)


def hashes_of(key: RadixKey, page_size: int) -> list[PageHashes]:
    """The digests of a key's whole pages, as a tree names them, in runs that begin where media start.

    Cost: O(ranges); what is looked at is hashed then.
    """
    size, end = key.element_bytes, key.length // page_size * page_size
    marks = marks_of(key.media, page_size)
    runs: list[PageHashes] = []
    for start, stop in pairwise([*sorted({0, *[at for at in marks if at < end]}), end] if end else []):
        prior = runs[-1] if runs else key.namespace
        runs.append(PageHashes(key.packed[size * start : size * stop], size * page_size, prior, marks.get(start, b"")))
    return runs


def _hashed(node: Node, page_bytes: int, prior: PageHashes | bytes) -> PageHashes:
    if node.hashes is None:
        node.hashes = PageHashes(node.key, page_bytes, prior, node.media)
    return node.hashes


def _from_hex(name: str, digits: str, num_bytes: int) -> bytes:
    try:
        data = bytes.fromhex(digits)
    except (TypeError, ValueError):
        data = b""
    if len(data) != num_bytes or len(digits) != 2 * num_bytes:
        raise ArgumentError(f"{name}: expected {2 * num_bytes} hex digits, got {digits!r}")
    return data
