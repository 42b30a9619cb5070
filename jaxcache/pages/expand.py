"""From new pages to one slot a token of a batch, in NumPy: the host twin of `kernels/alloc_pages.py`.

Source: SGLang 0.5.2 allocator.py (alloc_extend_kernel, alloc_decode_kernel), as runs of consecutive slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcache.slots import pages_of

if TYPE_CHECKING:
    from jaxtyping import Int32


def extend_slots(
    prefix_lens: Int32[np.ndarray, " bs"],
    seq_lens: Int32[np.ndarray, " bs"],
    last_loc: Int32[np.ndarray, " bs"],
    pages: Int32[np.ndarray, " pages"],
    page_size: int,
) -> Int32[np.ndarray, " tokens"]:
    """Slots of the tokens `prefix_lens .. seq_lens` of each request, request after request.

    A request gets the tail of its last page (from `last_loc + 1`), then its share of `pages`, all full but the last:
    `1 + its pages` runs of consecutive slots. All arguments have been checked. O(bs + pages + tokens).
    """
    pages_before = pages_of(prefix_lens, page_size)
    pages_after = pages_of(seq_lens, page_size)
    taken = pages_after - pages_before
    last_run = np.cumsum(taken + 1) - 1
    tail_run = last_run - taken

    num_runs = len(prefix_lens) + len(pages)
    is_page = np.ones(num_runs, bool)
    is_page[tail_run] = False
    first_slot = np.empty(num_runs, np.int32)
    first_slot[is_page] = pages * np.int32(page_size)
    first_slot[tail_run] = last_loc + 1
    length = np.full(num_runs, page_size, np.int32)
    length[last_run] = seq_lens - (pages_after - 1) * page_size
    length[tail_run] = np.minimum(seq_lens, pages_before * page_size) - prefix_lens

    end = np.cumsum(length, dtype=np.int32)
    slots = np.repeat(first_slot - (end - length), length)
    slots += np.arange(len(slots), dtype=np.int32)
    return slots
