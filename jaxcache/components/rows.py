"""Which rows of a pool hold something: those of pages and states that are not free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.slots import page_slots

if TYPE_CHECKING:
    from jaxtyping import Int32


def rows_in_use(
    allocator: BaseTokenToKVPoolAllocator, states: StateAllocator | None
) -> dict[str, Int32[np.ndarray, " rows"]]:
    """The rows of each stack that are not free, ascending. O(pages)."""
    if isinstance(allocator, SWATokenToKVPoolAllocator):
        rows = {"full": _rows(allocator), "window": _rows(allocator.window)}
    else:
        rows = {"kv": _rows(allocator)}
    return rows if states is None else rows | {"states": _rows(states)}


def _rows(allocator: BaseTokenToKVPoolAllocator) -> np.ndarray:
    used = np.flatnonzero(~np.isin(allocator.states, (PageState.FREE, PageState.SINK)))
    return page_slots(used.astype(np.int32), allocator.page_size)
