"""What a replay reads back: rows through the device's own tables, states, and the count of what is wrong.

Nothing here asks the cache what it returned: what must be there follows from a request's own tokens.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxcache.manager.manager import MemoryManager
from jaxcache.replay.content import READ_BACK_HEADER, count_mismatches, count_wrong_states, prefix_digest
from jaxcache.request import Request

READ_BACK_TOKENS = (1024, 8192)
"""Tokens that one read-back compares at most: two shapes serve every length."""


class Proof:
    """Reads back and counts. Nothing waits for the device until `mismatched` is asked for.

    Attributes:
      verified_slots: Slots compared.
      verified_states: States compared.
    """

    def __init__(self, manager: MemoryManager):
        self._manager = manager
        self._reaches = [part.reach for part in manager.cache.tree.components if part.spans]
        self._prefixes = [part for part in manager.cache.components if part.per_request]  # one value a prefix
        self._wrong = self._zero()
        self._read_rows = jax.jit(count_mismatches)
        self._read_state = jax.jit(count_wrong_states)
        self.verified_slots = 0
        self.verified_states = 0

    def warm_up(self) -> None:
        """Compiles every shape."""
        for room in READ_BACK_TOKENS:
            self._compare_rows(np.zeros(READ_BACK_HEADER + len(self._reaches) + room, np.int32))
        self._compare_state(0, np.uint32(0))
        self._wrong = self._zero()  # the sink holds nothing that could be right

    def _zero(self) -> jax.Array:
        """A count that lies where all later counts will: JAX compiles again for an array that is bound to no device."""
        return jax.device_put(np.zeros((), np.int32), self._manager.table.pages.sharding)

    @property
    def mismatched(self) -> int:
        """Slots and states that held something else. Waits for the device."""
        return int(self._wrong)

    def verify(self, request: Request, count: int) -> None:
        """Compares the first `count` tokens of a running request.

        All of them in layers that attend to everything, and the last ones in window layers.
        """
        tokens = request.key.token_ids
        firsts = [int(max(0, count - reach)) for reach in self._reaches]
        header = READ_BACK_HEADER + len(firsts)
        for start in range(0, count, READ_BACK_TOKENS[-1]):
            size = min(READ_BACK_TOKENS[-1], count - start)
            room = next(room for room in READ_BACK_TOKENS if room >= size)
            packed = np.zeros(header + room, np.int32)
            packed[:header] = request.req_pool_idx or 0, request.tag, start, size, *firsts
            packed[header : header + size] = tokens[start : start + size]
            self._compare_rows(packed)
        self.verified_slots += count

    def verify_state(self, request: Request) -> None:
        """Compares the state that a running request works on with the whole of what was computed for it."""
        if not self._prefixes or not request.kv_len:
            return
        self._compare_state(
            self._manager.working_state(request), prefix_digest(request.tag, request.key.token_ids[: request.kv_len])
        )
        self.verified_states += 1

    def _compare_rows(self, packed: np.ndarray) -> None:
        self._wrong = self._read_rows(self._manager.pool, self._manager.table, packed, self._wrong)

    def _compare_state(self, state: int, digest: np.uint32) -> None:
        packed = np.array([state, digest], np.uint32)
        stacks = self._manager.pool.stacks()
        for component in self._prefixes:
            for name in component.stack_names:
                self._wrong = self._read_state(stacks[name], packed, self._wrong)


def count_leaks(manager: MemoryManager) -> int:
    """Slots of each side, and states, that neither the cache nor anybody's free list has, or that are still locked.

    For when no request runs.
    """
    cache = manager.cache
    locked = cache.full_protected_size() + cache.swa_protected_size() + cache.mamba_protected_size()
    lost = 0
    for component in cache.tree.components:
        size, available, evictable = cache.usage(component.name)
        lost += abs(size - available - evictable) * (manager.page_size if component.spans else 1)
    return locked + lost
