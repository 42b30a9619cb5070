"""What a retracted request keeps in host memory, so that nothing has to be computed again.

    tokens    0 ......... holes ......... num_tokens        full layers: all of them
                          | window layers |                 window layers: those whose window pages are still there
                                          state             recurrent layers: the state after the last token

Each component says in which row of its stacks a token has its value, when the copy is made and when it is loaded back.

Source: SGLang 0.5.2 memory_pool.py, get_cpu_copy and load_cpu_copy, as its decode servers use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.components.base import MemoryComponent
from jaxcache.errors import ArgumentError
from jaxcache.pools.stack import CpuCopy, LayerStack, MemoryPool

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class StackCopy:
    """Rows of one stack in host memory.

    Attributes:
      rows: In the order of `tokens`.
      tokens: int32, ascending: the tokens that have a row.
    """

    rows: CpuCopy
    tokens: Int32[np.ndarray, " tokens"]

    def part(self, start: int, stop: int) -> StackCopy:
        """The rows of the tokens in `[start, stop)`, in the same memory."""
        first, last = np.searchsorted(self.tokens, (start, stop)).tolist()
        return StackCopy(self.rows.tokens(first, last), self.tokens[first:last])


@dataclass(frozen=True, eq=False)
class KeptCopy:
    """What a request's first tokens have in each stack of a pool, in host memory.

    Attributes:
      num_tokens: Tokens copied.
      page_size: Tokens a page.
      stacks: What was copied, by name of the stack.
      holes: By component, pages from the start up to the last one in which a token has no row.
    """

    num_tokens: int
    page_size: int
    stacks: Mapping[str, StackCopy]
    holes: Mapping[str, int]

    @classmethod
    def of(
        cls,
        pool: MemoryPool,
        components: Sequence[MemoryComponent],
        page_size: int,
        row: int,
        pages: Int32[np.ndarray, " pages"],
        num_tokens: int,
    ) -> KeptCopy:
        """Copies the first `num_tokens` tokens of a request. Blocks until done.

        Args:
          pool: Read, not consumed.
          components: Of the cache.
          page_size: Tokens a page.
          row: The request's row in the request table.
          pages: Its full pages.
          num_tokens: Tokens in them.
        """
        stacks = pool.stacks()
        copies: dict[str, StackCopy] = {}
        holes: dict[str, int] = {}
        for component in components:
            rows = component.token_rows(row, pages, 0, num_tokens)
            tokens, missing = np.flatnonzero(rows), np.flatnonzero(rows == 0)
            holes[component.name] = int(missing[-1]) // page_size + 1 if len(missing) else 0
            for name in component.stack_names:
                copies[name] = StackCopy(stacks[name].get_cpu_copy(rows[tokens]), tokens)
        return cls(num_tokens, page_size, copies, holes)

    def restorable_tokens(self, components: Sequence[MemoryComponent], limit: int) -> int:
        """Tokens that this copy can restore, at most `limit`."""
        return min(component.restorable_tokens(self.num_tokens, limit) for component in components)

    def spared(self, first_page: int, num_pages: int) -> dict[str, int]:
        """By component, how many of so many copied pages from `first_page` on, the first ones, need nothing of it."""
        return {name: min(max(holes - first_page, 0), num_pages) for name, holes in self.holes.items()}

    def loaded(
        self,
        pool: Any,
        components: Sequence[MemoryComponent],
        row: int,
        pages: Int32[np.ndarray, " pages"],
        start: int,
        stop: int,
    ) -> Any:
        """The pool with the tokens `[start, stop)` in fresh pages of the request in `row`; consumes the old one.

        Raises:
          ArgumentError: The copy is of a pool with other stacks or layers. The pool is as before.
          StalePoolError, BorrowedError: The pool cannot be donated.
        """
        stacks: dict[str, LayerStack] = pool.stacks()
        if stacks.keys() != self.stacks.keys():
            raise ArgumentError(
                f"cpu_copy: it has {sorted(self.stacks)}, this pool has {sorted(stacks)}: set it to None, and the "
                "request is computed again"
            )
        pool.require_donatable()
        loads: list[tuple[str, CpuCopy, np.ndarray]] = []
        for component in components:
            targets = component.token_rows(row, pages, start, stop)
            for name in component.stack_names:
                part = self.stacks[name].part(start, stop)
                loads.append((name, part.rows, targets[part.tokens - start]))
        for name, rows, targets in loads:  # all are checked first: one that is refused must not cost the others
            stacks[name].require_loadable(rows, targets)
        for name, rows, targets in loads:
            stacks[name] = stacks[name].load_cpu_copy(rows, targets)
        return pool.with_stacks(stacks)


def warmed_up(pool: MemoryPool) -> MemoryPool:
    """The pool, consumed and given back unchanged, with all that copies from and to it need compiled."""
    return pool.with_stacks({name: _round_trip(stack) for name, stack in pool.stacks().items()})


def _round_trip(stack: LayerStack) -> LayerStack:
    sink = np.zeros(1, np.int32)
    return stack.load_cpu_copy(stack.get_cpu_copy(sink), sink)
