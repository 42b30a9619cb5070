"""Who owns which recurrent state. A state is a page of one slot, with the owners and the checks of every other page.

Source: pymllm's GDNPool (alloc_track_slot, free_track_slot); SGLang 0.5.2 memory_pool.py, MambaPool.alloc and free.
"""

from __future__ import annotations

from jaxcache.arguments import as_count, as_int32
from jaxcache.pages.ownership import PageState
from jaxcache.pages.token import TokenToKVPoolAllocator


class StateAllocator(TokenToKVPoolAllocator):
    """Allocates the states 1 .. `size` of a `MambaPool`: working states of requests, and checkpoints, in one list.

    A request's states are PRIVATE; a checkpoint that a prefix cache adopts is TREE. What a state held stays in it when
    it is freed: its next owner empties it, or copies another state over it, before reading.

    >>> states = StateAllocator(2)
    >>> states.alloc_track_slot(), states.alloc_track_slot(), states.alloc_track_slot()
    (1, 2, None)
    >>> states.free_track_slot(1)
    >>> states.available_size()
    1
    """

    def alloc_track_slot(self) -> int | None:
        """One state, now PRIVATE; None if none is free. O(1)."""
        states = self.alloc_pages(1)
        return None if states is None else int(states[0])

    def free_track_slot(self, slot: int) -> None:
        """Frees a PRIVATE state. O(1).

        Raises:
          DoubleFreeError: if it is free already.
          OwnershipError: if it is not PRIVATE (the tree's states go back through `release`), or no state.
          ArgumentError: if it is not an integer.
        """
        self._release("slot", as_int32("slot", [as_count("slot", slot)]), PageState.PRIVATE)
