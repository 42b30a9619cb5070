"""Who has which host page: one state byte an id, and the only transitions there are.

    IDLE ── alloc ──► RESERVED ── backup starts ──► PROTECTED ── ends ──► SYNCED ── evicted on the device ──► BACKUP
                          │                             ▲                   ▲ ◄────── adopted again ───────────  │
                          └── landed from storage ──────│───────────────────│──────────────────────────────►     │
                                                        └────────────── load starts ─────────────────────────────┘

RESERVED holds nothing yet, PROTECTED has a transfer in flight, SYNCED says the same as the device, BACKUP is the only
copy. All but PROTECTED may be freed. Every transition is checked, always, and before anything changes.

Source: SGLang 0.5.2 memory_pool_host.py (MemoryStateInt), which checks only while it is debugged.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.arguments import as_count
from jaxcache.errors import ArgumentError, DoubleFreeError, OwnershipError
from jaxcache.pages.ring import PageRing

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8


class HostState(enum.IntEnum):
    """What a host page holds. The numbers are those of SGLang's `MemoryStateInt`."""

    IDLE = 0
    """Free."""
    RESERVED = 1
    """Allocated, with nothing in it yet."""
    PROTECTED = 2
    """A transfer from or to the device is in flight."""
    SYNCED = 3
    """The device has the same."""
    BACKUP = 4
    """The only copy."""


OWNED = (HostState.RESERVED, HostState.SYNCED, HostState.BACKUP)
"""States in which a page has an owner who may free it."""


class HostStates:
    """The ids 1 .. `size`, all IDLE at first.

    Args:
      size: How many.

    Attributes:
      size: How many.
      states: uint8 (size + 1,), index = id; a live, read-only view. Index 0 is no id.
    """

    def __init__(self, size: int):
        self.size = size
        self._states = np.zeros(size + 1, np.uint8)
        self.states: UInt8[np.ndarray, " size+1"] = self._states.view()
        self.states.flags.writeable = False
        self._free = PageRing(size)
        self.clear()

    def require_idle(self) -> None:
        """Raises OwnershipError if a transfer is in flight. O(size)."""
        busy = np.flatnonzero(self._states == HostState.PROTECTED)
        if len(busy):
            raise OwnershipError(
                f"host page {busy[0]} is PROTECTED, a transfer of it is in flight: wait for the transfers first"
            )

    def clear(self) -> None:
        """Every id becomes IDLE.

        Raises:
          OwnershipError: A transfer is in flight. Nothing changes.
        """
        self.require_idle()
        self._states[:] = HostState.IDLE
        self._free.reset(np.arange(1, self.size + 1, dtype=np.int32))

    def available(self) -> int:
        """Ids that are IDLE. O(1)."""
        return self._free.count

    def alloc(self, count: int) -> Int32[np.ndarray, " count"] | None:
        """Takes the `count` ids that have been IDLE for longest: IDLE to RESERVED. None, and nothing taken, if short.

        Raises:
          ArgumentError: `count` is no count.
        """
        count = as_count("count", count)
        if count > self._free.count:
            return None
        ids = self._free.take(count)
        self._states[ids] = HostState.RESERVED
        return ids

    def free(self, ids: Int32[np.ndarray, " n"]) -> None:
        """Gives ids back: RESERVED, SYNCED or BACKUP to IDLE.

        Raises:
          DoubleFreeError: One is IDLE, or is named twice.
          OwnershipError: One is PROTECTED, or is no id.
        """
        ids = self.require("ids", ids, OWNED)
        self._states[ids] = HostState.IDLE
        self._free.put_back(ids)

    def move(self, name: str, ids: Int32[np.ndarray, " n"], sources: Sequence[HostState], target: HostState) -> None:
        """Puts ids of the argument `name`, each in one of `sources`, into `target`.

        Raises:
          OwnershipError, DoubleFreeError: as `require`.
        """
        self._states[self.require(name, ids, sources)] = target

    def require(self, name: str, ids: Any, allowed: Sequence[HostState]) -> Int32[np.ndarray, " n"]:
        """The ids of the argument `name` as int32, each known, named once and in one of the states `allowed`.

        Raises:
          ArgumentError: They must be a list of integers.
          OwnershipError: One is no id, or in another state.
          DoubleFreeError: One is IDLE, or is named twice.
        """
        rows = np.asarray(ids)
        if rows.ndim != 1 or not (rows.size == 0 or np.issubdtype(rows.dtype, np.integer)):
            raise ArgumentError(f"{name} must be a list of host ids, got {rows.dtype}{list(rows.shape)}")
        outside = (rows < 1) | (rows > self.size)
        if outside.any():
            raise OwnershipError(
                f"{name}: every host id must be in [1, {self.size}], got {rows[outside.argmax()]}: 0 stands for none, "
                "drop it"
            )
        states = self._states[rows]
        wrong = ~np.isin(states, allowed)
        if wrong.any():
            at = int(wrong.argmax())
            state = HostState(states[at])
            kind = DoubleFreeError if state is HostState.IDLE else OwnershipError
            names = " or ".join(one.name for one in allowed)
            raise kind(f"{name}: every host page must be {names}, but host page {rows[at]} is {state.name}")
        ordered = np.sort(rows)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise DoubleFreeError(f"{name}: host page {repeated[0]} is named twice: name each once")
        return rows.astype(np.int32)

    def check(self) -> None:
        """Raises OwnershipError unless the ids that can be taken are the IDLE ones, each once. O(size)."""
        free = np.sort(self._free.peek(self._free.head, self._free.count))
        idle = np.flatnonzero(self._states[1:] == HostState.IDLE) + 1
        if not np.array_equal(free, idle):
            raise OwnershipError(f"host pages {np.setxor1d(free, idle)[:5]} are free and owned at once, or neither")
