"""What has to hold of a batch before its tokens get slots. Vectorised, O(bs)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import MAX_SLOTS, as_int32, require_rows, require_same_length
from jaxcache.errors import OwnershipError
from jaxcache.pages.ownership import PageOwners, PageState


def batch_lengths(prefix_lens: ArrayLike, seq_lens: ArrayLike, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Both lengths as int32 (bs,), with `0 <= prefix_lens <= seq_lens` in every row. Raises ArgumentError if not."""
    prefixes, lengths = as_int32("prefix_lens", prefix_lens), as_int32("seq_lens", seq_lens)
    require_same_length(prefix_lens=prefixes, seq_lens=lengths)
    longest = MAX_SLOTS - page_size
    require_rows(
        (prefixes >= 0) & (lengths >= prefixes) & (lengths <= longest),
        f"lengths must satisfy 0 <= prefix_lens <= seq_lens <= {longest}",
        prefix_lens=prefixes,
        seq_lens=lengths,
    )
    return prefixes, lengths


def batch_last_loc(
    prefix_lens: np.ndarray, seq_lens: np.ndarray, last_loc: ArrayLike, page_size: int, owners: PageOwners
) -> np.ndarray:
    """`last_loc` as int32 (bs,): -1, or a slot where the request's prefix can end and its next token can follow.

    Raises:
      ArgumentError: if the lengths contradict `last_loc`.
      OwnershipError: if it lies in a page that has no owner; or if its page would be filled further, but is not a
        request's own, or is that of two requests: another's KV would be overwritten.
    """
    slots = as_int32("last_loc", last_loc)
    require_same_length(seq_lens=seq_lens, last_loc=slots)
    rows = {"prefix_lens": prefix_lens, "last_loc": slots}
    has_prefix = prefix_lens > 0
    require_rows((slots == -1) != has_prefix, "last_loc must be -1 exactly where the prefix is empty", **rows)
    filled = prefix_lens % page_size
    aligned = (slots + 1) % page_size == filled
    require_rows(aligned, f"last_loc + 1 must equal prefix_lens modulo page_size = {page_size}", **rows)

    pages = slots // page_size
    held = pages[has_prefix]
    owners.require_in_range("last_loc", held, lowest=1)
    states = owners.states[held]
    nobodys = held[(states == PageState.FREE) | (states == PageState.PENDING)]
    if len(nobodys):
        raise OwnershipError(f"last_loc must lie in a page that is held, but {owners.describe(int(nobodys[0]))}")
    continued = pages[(filled > 0) & (seq_lens > prefix_lens)]
    owners.require("last_loc", continued, PageState.PRIVATE, repeated=OwnershipError)
    return slots
