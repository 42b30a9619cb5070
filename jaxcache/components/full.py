"""Full pages: what layers of full attention keep of each token. A node of the tree exactly as long as it has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.components.base import TreeComponent, allocator_digest, are_all_of, private_problem, used_slots
from jaxcache.errors import ArgumentError
from jaxcache.index.component import FULL
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.slots import page_slots
from jaxcache.state_dict import Columns, StateDict, prefixed

if TYPE_CHECKING:
    from jaxtyping import Int32


class FullPages(TreeComponent):
    """The pages of the request table, and the first component of every tree.

    Args:
      allocator: Their owner. None for tests and simulations: nothing is checked or freed.
      stack: Name of their stack in the pool.
    """

    name = FULL.name
    component = FULL
    per_page = 1

    def __init__(self, allocator: BaseTokenToKVPoolAllocator | None, stack: str = "kv"):
        self._allocator = allocator
        self.stack_names = (stack,)

    # ---- pages ---------------------------------------------------------------------------------------------------

    def available(self) -> int:
        """See `TreeComponent.available`."""
        allocator = self._allocator
        return 0 if allocator is None else allocator.full_available_size() // allocator.page_size

    def size(self) -> int:
        """See `TreeComponent.size`."""
        return 0 if self._allocator is None else self._allocator.num_pages

    def alloc_pages(self, num_pages: int, spared: Mapping[str, int]) -> Int32[np.ndarray, " pages"] | None:
        """Fresh pages, with all that other components keep with a page; None, and nothing taken, if some are short.

        Args:
          num_pages: How many.
          spared: By component, how many of the first ones need nothing of it.
        """
        return self._owner().alloc_pages(num_pages)

    # ---- the tree ------------------------------------------------------------------------------------------------

    def candidates(self, pages: Int32[np.ndarray, " pages"], value: int) -> Int32[np.ndarray, " pages"]:
        """The pages."""
        return pages

    def claim(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Pages that the tree is about to take become the tree's, with what other components keep with a page.

        Raises:
          OwnershipError: One is not privately owned. Nothing changes.
        """
        if self._allocator is not None:
            self._allocator.transfer(pages, PageState.PRIVATE, PageState.TREE)

    def adopt(
        self, pages: Int32[np.ndarray, " pages"], value: int, inserted: Insertion, spare: Int32[np.ndarray, " spare"]
    ) -> None:
        """Nothing is left to do: what the tree took was claimed before."""

    def free(self, values: Int32[np.ndarray, " values"]) -> None:
        """See `TreeComponent.free`. What other components keep with these pages goes with them."""
        if self._allocator is not None:
            self._allocator.release(values, PageState.TREE)

    def release_request(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """See `TreeComponent.release_request`."""
        if self._allocator is not None and len(own_pages):
            self._allocator.release(own_pages.copy(), PageState.PRIVATE)

    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """See `TreeComponent.problems`."""
        if self._allocator is None:
            return
        self._allocator.check()
        if not are_all_of(self._allocator, pages):
            yield f"the tree holds {len(pages)} pages, the allocator disagrees"

    # ---- the other rooms -----------------------------------------------------------------------------------------

    def rows_in_use(self) -> Int32[np.ndarray, " slots"]:
        """See `MemoryComponent.rows_in_use`."""
        return used_slots(self._owner())

    def token_rows(
        self, row: int, pages: Int32[np.ndarray, " pages"], start: int, stop: int
    ) -> Int32[np.ndarray, " tokens"]:
        """See `MemoryComponent.token_rows`."""
        return page_slots(pages, self._owner().page_size)[: stop - start]

    def clear(self) -> None:
        """See `MemoryComponent.clear`. Pages of other components that come with pages are freed with them."""
        if self._allocator is not None:
            self._allocator.clear()

    def private_problems(self, pages: Int32[np.ndarray, " pages"]) -> Iterator[str]:
        """See `MemoryComponent.private_problems`."""
        return private_problem("pages", pages, self._owner())

    def state_dict(self) -> StateDict:
        """See `MemoryComponent.state_dict`; with that of what comes with pages."""
        return prefixed("pages", self._owner().state_dict())

    def load_state_dict(self, columns: Columns) -> None:
        """See `MemoryComponent.load_state_dict`."""
        self._owner().load_state_dict(columns.part("pages"))

    def digest(self) -> tuple[Any, ...]:
        """See `MemoryComponent.digest`."""
        return allocator_digest(self._owner())

    def _owner(self) -> BaseTokenToKVPoolAllocator:
        if self._allocator is None:
            raise ArgumentError("token_to_kv_pool_allocator: this cache was built without one; it takes no pages")
        return self._allocator
