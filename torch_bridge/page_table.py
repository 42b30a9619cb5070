"""The pages of the sequences of a batch, for attention of torch engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from jaxcache.arguments import as_int32
from jaxcache.manager.manager import MemoryManager
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pools.config import require
from jaxcache.request import Request
from jaxcache.slots import pages_of

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class PageTable:
    """The pages of each sequence of a batch, in one list, as FlashInfer takes them.

    Attributes:
      page_size: Tokens a page.
      indptr: int32 (sequences + 1), where the pages of each sequence begin and end in `indices`.
      indices: int32, pages, of each sequence in the order of its tokens.
      last_page_len: int32 (sequences), tokens in the last page of each: 1 .. page_size.
    """

    page_size: int
    indptr: Int32[np.ndarray, " sequences+1"]
    indices: Int32[np.ndarray, " pages"]
    last_page_len: Int32[np.ndarray, " sequences"]

    @classmethod
    def of(cls, memory: MemoryManager, requests: Sequence[Request], kv_lens: Any = None) -> Self:
        """The pages of running requests.

        Args:
          memory: Where they run.
          requests: They.
          kv_lens: Tokens of each to attend to, at least 1; those that they have KV of by default. Give the length after
            a step for a step that writes KV before it attends.

        Raises:
          ArgumentError: A length is not positive, or a request lacks the pages for it.
          RequestStateError: A request does not run.
        """
        for request in requests:
            memory.planner.require_running(request)
        size, table = memory.page_size, memory.req_to_token_pool
        lens = as_int32("kv_lens", [r.kv_len for r in requests] if kv_lens is None else kv_lens)
        held = np.array([request.num_pages for request in requests], np.int32)
        require(lens.shape == held.shape, "kv_lens", f"must be {len(held)}, one a request", len(lens))
        num_pages = pages_of(lens, size)
        fits = bool((lens >= 1).all() and (num_pages <= held).all())
        require(fits, "kv_lens", f"must be at least 1, and fit into pages of {size}: {held.tolist()} of them", lens)
        rows = [table.row_pages(r.req_pool_idx or 0, 0, n) for r, n in zip(requests, num_pages.tolist(), strict=True)]
        indptr = np.concatenate([[0], np.cumsum(num_pages)]).astype(np.int32)
        return cls(size, indptr, np.concatenate([*rows, np.empty(0, np.int32)]), lens - (num_pages - 1) * size)

    def in_window(self, allocator: SWATokenToKVPoolAllocator) -> Self:
        """The window pages of the same tokens, for a sliding-window pool's `window` side; 0 where they are gone.

        Those must be before every query's window: `plan` looks.
        """
        return replace(self, indices=allocator.window_pages(self.indices))

    @property
    def kv_lens(self) -> Int32[np.ndarray, " sequences"]:
        """Tokens of each sequence."""
        return (np.diff(self.indptr) - 1) * self.page_size + self.last_page_len


def require_pages_there(pages: PageTable, first_query: np.ndarray, window: int | None) -> None:
    """Raises ArgumentError if a query attends to page 0: all must be there from where a sequence's first one looks."""
    first = np.zeros_like(first_query) if window is None else np.maximum(first_query - (window - 1), 0)
    page = np.arange(len(pages.indices)) - np.repeat(pages.indptr[:-1], np.diff(pages.indptr))
    is_gone = (pages.indices == 0) & (page >= np.repeat(first // pages.page_size, np.diff(pages.indptr)))
    rule = "must be there where queries attend, but the window page of some tokens is gone: compute them again"
    require(not is_gone.any(), "pages", rule, f"0 at {np.flatnonzero(is_gone)[:5].tolist()}")
