"""Pages as the slots in them, and back. A page is `page_size` slots in a row, from a multiple of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Int32


def expand_pages(pages: Int32[np.ndarray, " pages"], page_size: int) -> Int32[np.ndarray, " slots"]:
    """The slots of `pages`, in order."""
    if page_size == 1:
        return pages
    return (pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)).reshape(-1)


def slots_to_pages(
    slots: Int32[np.ndarray, " slots"], num_pages: int, page_size: int
) -> Int32[np.ndarray, " num_pages"]:
    """Page ids of the first `num_pages` pages of `slots`.

    Raises:
      ArgumentError: Not a vector of slots, too short, or not made of whole pages.
    """
    slots = np.asarray(slots)
    if slots.ndim != 1 or slots.dtype.kind not in "iu":
        raise ArgumentError(f"value must be one-dimensional integer slots, got {slots.dtype} of shape {slots.shape}")
    if len(slots) < num_pages * page_size:
        raise ArgumentError(f"value: the key needs {num_pages * page_size} slots, got {len(slots)}")
    slots = slots[: num_pages * page_size]
    if slots.size and not 0 <= slots.min() <= slots.max() < 2**31:
        raise ArgumentError(f"value: a slot lies outside [0, 2**31), they go from {slots.min()} to {slots.max()}")
    if page_size == 1:
        return slots.astype(np.int32, copy=False)
    rows = slots.reshape(num_pages, page_size)
    pages = (rows[:, 0] // page_size).astype(np.int32)
    if not np.array_equal(rows, pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)):
        raise ArgumentError(f"value must be whole pages: {page_size} consecutive slots from a multiple of {page_size}")
    return pages
