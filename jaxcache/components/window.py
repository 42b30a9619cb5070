"""Window pages: what sliding-window layers keep of each token, beside the full pages, and free earlier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.components.base import TreeComponent, allocator_digest, are_all_of, private_problem, used_slots
from jaxcache.components.full import FullPages
from jaxcache.errors import ArgumentError
from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.slots import page_slots
from jaxcache.tables.changes import TableChanges

if TYPE_CHECKING:
    from jaxtyping import Int32


class PairedFullPages(FullPages):
    """Full pages that come with a window page each.

    Args:
      allocator: Owner of both, with the map between them.
    """

    def __init__(self, allocator: SWATokenToKVPoolAllocator):
        super().__init__(allocator, stack="full")
        self._pair = allocator

    def alloc_pages(self, num_pages: int, spared: Mapping[str, int]) -> Int32[np.ndarray, " pages"] | None:
        """See `FullPages.alloc_pages`."""
        return self._pair.alloc_pages(num_pages, without_window=spared.get(WindowPages.name, 0))


class WindowMap:
    """The map from full to window pages, as a `DeviceMap`.

    Args:
      allocator: Keeps it.
    """

    name = "window"

    def __init__(self, allocator: SWATokenToKVPoolAllocator):
        self._allocator = allocator

    def num_changed(self) -> int:
        """See `DeviceMap.num_changed`."""
        return self._allocator.num_changed()

    def take_changes(self, limit: int) -> TableChanges:
        """See `DeviceMap.take_changes`."""
        return self._allocator.take_changes(limit)

    def give_back(self, changes: TableChanges) -> None:
        """See `DeviceMap.give_back`."""
        self._allocator.give_back(changes)

    def send_all(self) -> None:
        """See `DeviceMap.send_all`."""
        self._allocator.send_all()

    @staticmethod
    def patched(pool: Any, index: Any, page: Any) -> Any:
        """See `DeviceMap.patched`."""
        if isinstance(pool, HybridKVPool):
            return pool.with_kv(WindowMap.patched(pool.kv, index, page))
        return pool.with_window_map(index, page)


class WindowPages(TreeComponent):
    """The window pages that go with the full pages.

    Args:
      allocator: Owner of both, with the map between them: a SWATokenToKVPoolAllocator.
      sliding_window_size: Tokens before a stopping point that a window layer needs: at least 1, or infinite.

    Attributes:
      full: The full pages that they go with.

    Raises:
      ArgumentError: `allocator` has no window pages, or the window is no such number.
    """

    name = "window"
    stack_names = ("window",)
    per_page = 1

    def __init__(self, allocator: BaseTokenToKVPoolAllocator | None, sliding_window_size: float):
        if not isinstance(allocator, SWATokenToKVPoolAllocator):
            raise ArgumentError(
                f"token_to_kv_pool_allocator: window layers need a SWATokenToKVPoolAllocator, got {allocator!r}"
            )
        is_count = isinstance(sliding_window_size, (int, np.integer)) and sliding_window_size >= 1
        if not is_count and sliding_window_size != math.inf:
            raise ArgumentError(f"sliding_window_size must be an integer of at least 1, got {sliding_window_size!r}")
        self.component = Component(self.name, sliding_window_size)
        self.full = PairedFullPages(allocator)
        self.maps = (WindowMap(allocator),)
        self._allocator = allocator
        self._page_size = allocator.page_size

    def available(self) -> int:
        """See `TreeComponent.available`."""
        return self._allocator.swa_available_size() // self._page_size

    def size(self) -> int:
        """See `TreeComponent.size`."""
        return self._allocator.size_swa // self._page_size

    # ---- the tree ------------------------------------------------------------------------------------------------

    def candidates(self, pages: Int32[np.ndarray, " pages"], value: int) -> Int32[np.ndarray, " pages"]:
        """The window page of each page, 0 where it has none."""
        return self._allocator.full_to_window[pages]

    def require_insertable(
        self, num_tokens: int, page_size: int, pages: Int32[np.ndarray, " pages"], value: int
    ) -> None:
        """Refuses pages that are not distinct and private: the window page of any may be taken to fill a hole."""
        self._allocator.require_owned(pages, PageState.PRIVATE)

    def adopt(
        self, pages: Int32[np.ndarray, " pages"], value: int, inserted: Insertion, spare: Int32[np.ndarray, " spare"]
    ) -> None:
        """Moves window pages that fill a hole onto the tree's full pages, which stay where others read them."""
        size = self._page_size
        for node in inserted.healed:
            self._allocator.move_windows(pages[node.start // size : node.end // size], node.value)
        if len(inserted.added) > 1:  # may start as a hole: window pages before the last gap are of no use to anybody
            gaps = np.flatnonzero(self._allocator.full_to_window[pages[: inserted.length // size]] == 0)
            begin = (int(gaps[-1]) + 1) * size if len(gaps) else 0
            for node in inserted.added:
                if node.end <= begin and self._allocator.full_to_window[node.value].any():
                    self._allocator.free_windows(node.value, PageState.TREE)

    def free(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `TreeComponent.free`. The full pages stay."""
        self._allocator.release_window_pages(values, PageState.TREE)

    def trim(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """See `TreeComponent.trim`."""
        self._allocator.free_windows(pages, PageState.PRIVATE)

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `TreeComponent.problems`."""
        if not np.array_equal(self._allocator.window_pages(pages), values):
            yield "the tree's window pages are not those that its pages have"
        if not are_all_of(self._allocator.window, values[values > 0]):
            yield f"the tree holds {np.count_nonzero(values)} window pages, the allocator disagrees"

    # ---- the other rooms ------------------------------------------------------------------------------------------

    def rows_in_use(self) -> Int32[np.ndarray, " slots"]:
        """See `MemoryComponent.rows_in_use`."""
        return used_slots(self._allocator.window)

    def token_rows(
        self, row: int, pages: Int32[np.ndarray, " pages"], start: int, stop: int
    ) -> Int32[np.ndarray, " tokens"]:
        """The slot in each token's window page; 0 where it has none."""
        windows = self._allocator.window_pages(pages)
        slots = page_slots(windows, self._page_size)
        return np.where(np.repeat(windows > 0, self._page_size), slots, np.int32(0))[: stop - start]

    def private_problems(self, pages: Int32[np.ndarray, " pages"]) -> Iterator[str]:
        """See `MemoryComponent.private_problems`."""
        windows = self._allocator.window_pages(pages)
        return private_problem("window pages", windows[windows > 0], self._allocator.window)

    def read_problems(self, row: int, pages: Int32[np.ndarray, " pages"], kv_len: int) -> Iterator[str]:
        """See `MemoryComponent.read_problems`: a window page that is gone would be read as page 0."""
        first = int(max(kv_len - (self.component.reach - 1), 0)) // self._page_size
        is_gone = self._allocator.window_pages(pages[first:]) == 0
        if is_gone.any():
            page = pages[first:][is_gone.argmax()]
            yield f"its next token, {kv_len}, attends to the window page of page {page}, which is gone"

    def device_problems(self, pool: Any) -> Iterator[str]:
        """See `MemoryComponent.device_problems`."""
        kv: Any = pool.kv if isinstance(pool, HybridKVPool) else pool
        differs = np.flatnonzero(kv.window_map_on_host() != self._allocator.full_to_window)
        if len(differs):
            yield f"full page {differs[0]}: the device's map to window pages differs from the host's"

    def digest(self) -> tuple[Any, ...]:
        """See `MemoryComponent.digest`."""
        return (*allocator_digest(self._allocator.window), self._allocator.full_to_window.tolist())
