"""Pages as the slots in them, and back. Page `p` is the slots `p * page_size` .. `(p + 1) * page_size - 1`. NumPy only.

tokens --pages_of--> how many pages       slots --whole_pages--> pages, checked
pages --page_slots--> slots               slots --distinct_pages--> pages
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.arguments import as_int32
from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Int32


def pages_of(num_tokens: np.ndarray, page_size: int) -> np.ndarray:
    """Pages that hold this many tokens: the quotient rounded up, safe for every int32."""
    return num_tokens if page_size == 1 else -(-num_tokens // page_size)


def page_slots(pages: Int32[np.ndarray, " pages"], page_size: int) -> Int32[np.ndarray, " slots"]:
    """Every slot of every page, page after page; `pages` itself where a page is a slot. O(slots)."""
    if page_size == 1:
        return pages
    return (pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)).reshape(-1)


def whole_pages(name: str, slots: ArrayLike, page_size: int, *, last_may_end: bool = False) -> Int32[np.ndarray, " n"]:
    """The pages that these slots are, page after page, each from its first slot to its last. O(slots).

    Args:
      name: The argument, for messages.
      slots: Slots from 0 on.
      page_size: Slots a page.
      last_may_end: The slots may end within the last page.

    Raises:
      ArgumentError: if `slots` is not a list of slots, or a page is not there whole and in order.
    """
    slots = as_int32(name, slots)
    if len(slots) and slots.min() < 0:
        raise ArgumentError(f"{name}: every slot must be in [0, 2**31), got {slots.min()}")
    if page_size == 1:
        return slots
    pages = slots[::page_size] // np.int32(page_size)
    expected = page_slots(pages, page_size)
    if not np.array_equal(slots, expected[: len(slots)] if last_may_end else expected):
        raise ArgumentError(f"{name} must be whole pages: {page_size} consecutive slots from a multiple of {page_size}")
    return pages


def first_pages(name: str, slots: ArrayLike, num_pages: int, page_size: int) -> Int32[np.ndarray, " num_pages"]:
    """The first `num_pages` pages of these slots, which are `whole_pages`; what follows is not looked at.

    Raises:
      ArgumentError: as `whole_pages`, or if there are fewer.
    """
    num_slots, slots = num_pages * page_size, as_int32(name, slots)
    if len(slots) < num_slots:
        raise ArgumentError(f"{name}: the key needs {num_slots} slots, got {len(slots)}")
    return whole_pages(name, slots[:num_slots], page_size)


def distinct_pages(slots: Int32[np.ndarray, " slots"], page_size: int) -> Int32[np.ndarray, " pages"]:
    """The pages of these slots, ascending. Slots come in runs, so most repeats go before anything is sorted."""
    pages = slots // np.int32(page_size)
    starts_run = np.ones(len(pages), bool)
    np.not_equal(pages[1:], pages[:-1], out=starts_run[1:])
    return np.unique(pages[starts_run])
