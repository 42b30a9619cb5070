"""A host pool: the places of one component's values in host memory, and what stands in them.

    ids = pool.alloc(n)                RESERVED; None if the pool is full
    transfers.backup(...)              PROTECTED, and SYNCED once the bytes have arrived
    pool.evicted_on_device(ids)        BACKUP: now the only copy
    transfers.load(...)                PROTECTED, and SYNCED once the device has it again
    pool.free(ids)                     IDLE

A value is one id, 1 .. size, with all that belongs to it: keys and values, scales, every layer, every shard. A pool
moves nothing and decides nothing; its owner calls it from one thread.

Source: SGLang 0.5.2 memory_pool_host.py, HostKVCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.tiers.host_layout import HostArray, HostLayout, pieces
from jaxcache.tiers.host_states import HostState, HostStates

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

__all__ = ["HostPool", "HostState"]


class HostPool:
    """One component's places. Made by `HostMemory.create`.

    Args:
      name: That of the component.
      size: Ids: 1 .. `size`.
      layout: Order of the bytes.
      arrays: Where they are: one for each array and shard of the device's pool.
      device_ids: Ids that the device has of this component.

    Attributes:
      name: That of the component.
      device_ids: Ids that the device has of it.
      layout: Order of the bytes.
      arrays: Where they are.
    """

    def __init__(self, name: str, size: int, layout: HostLayout, arrays: Sequence[HostArray], device_ids: int):
        self.name, self.layout, self.arrays, self.device_ids = name, layout, tuple(arrays), device_ids
        self._states = HostStates(size)

    @property
    def size(self) -> int:
        """Ids in all."""
        return self._states.size

    @property
    def page_bytes(self) -> int:
        """Bytes of one id, with all its parts."""
        return sum(array.shape.page_bytes for array in self.arrays)

    @property
    def block_bytes(self) -> int:
        """Bytes of one id on one device of a mesh: its shard of all parts."""
        first = {(array.shape.stack, array.shape.index): array.shape.page_bytes for array in self.arrays}
        return sum(first.values())

    @property
    def states(self) -> UInt8[np.ndarray, " size+1"]:
        """A live, read-only view of the state of each id (`HostState`); index 0 is no id."""
        return self._states.states

    def available(self) -> int:
        """Ids that can be taken. O(1)."""
        return self._states.available()

    def alloc(self, count: int) -> Int32[np.ndarray, " count"] | None:
        """Takes ids: IDLE to RESERVED. Those freed first come first.

        Returns:
          The ids, which are the caller's until `free`; None, and nothing is taken, if there are fewer.

        Raises:
          ArgumentError: `count` is negative, or no integer.
        """
        return self._states.alloc(count)

    def free(self, ids: Int32[np.ndarray, " n"]) -> None:
        """Gives ids back: RESERVED, SYNCED or BACKUP to IDLE.

        Raises:
          DoubleFreeError: One is free already, or is named twice. Nothing has changed.
          OwnershipError: One has a transfer in flight, or is none of this pool's. Nothing has changed.
        """
        self._states.free(ids)

    def evicted_on_device(self, ids: Int32[np.ndarray, " n"]) -> None:
        """The device gave these values up: SYNCED to BACKUP.

        Raises:
          OwnershipError, DoubleFreeError: One is in another state, or is named twice. Nothing has changed.
        """
        self._states.move("ids", ids, (HostState.SYNCED,), HostState.BACKUP)

    def adopted_on_device(self, ids: Int32[np.ndarray, " n"]) -> None:
        """The device has computed these values again: BACKUP to SYNCED.

        Raises:
          OwnershipError, DoubleFreeError: One is in another state, or is named twice. Nothing has changed.
        """
        self._states.move("ids", ids, (HostState.BACKUP,), HostState.SYNCED)

    def landed(self, ids: Int32[np.ndarray, " n"]) -> None:
        """Storage has filled these (`payload_target`): RESERVED to BACKUP.

        Raises:
          OwnershipError, DoubleFreeError: One is in another state, or is named twice. Nothing has changed.
        """
        self._states.move("ids", ids, (HostState.RESERVED,), HostState.BACKUP)

    def start_transfer(self, ids: Int32[np.ndarray, " n"], state: HostState) -> None:
        """A transfer fills or reads these: RESERVED or BACKUP to PROTECTED. For `Transfers`."""
        self._states.move("host_ids", ids, (state,), HostState.PROTECTED)

    def end_transfer(self, ids: Int32[np.ndarray, " n"], state: HostState = HostState.SYNCED) -> None:
        """A transfer of these has ended: PROTECTED to SYNCED, or, if it failed, back to what they were.

        For `Transfers`.
        """
        self._states.move("host_ids", ids, (HostState.PROTECTED,), state)

    def require_idle(self) -> None:
        """Raises OwnershipError if a transfer of one of its ids is in flight."""
        self._states.require_idle()

    def clear(self) -> None:
        """Every id is free again.

        Raises:
          OwnershipError: A transfer is in flight. Nothing has changed.
        """
        self._states.clear()

    def payload(self, host_id: int) -> list[memoryview]:
        """The bytes of one id, in the one order that all layouts share; read-only, without a copy.

        Valid as long as the id is the caller's. In the layout page_first_direct there is one piece an array and shard,
        in layer_first one for each layer of it, in page_first one for each row.

        Raises:
          OwnershipError: There is no such id, or it holds nothing: it must be SYNCED or BACKUP.
        """
        self._states.require("host_id", [host_id], (HostState.SYNCED, HostState.BACKUP))
        return [piece.toreadonly() for piece in self._pieces(host_id)]

    def payload_target(self, host_id: int) -> list[memoryview]:
        """The places of `payload`, to be written; `landed` says that they are full.

        Raises:
          OwnershipError: There is no such id, or it must not be written: it must be RESERVED.
        """
        self._states.require("host_id", [host_id], (HostState.RESERVED,))
        return self._pieces(host_id)

    def check(self) -> None:
        """Raises OwnershipError unless every id is either free or owned. O(size)."""
        self._states.check()

    def require(self, name: str, ids: Int32[np.ndarray, " n"], *states: HostState) -> Int32[np.ndarray, " n"]:
        """The ids of the argument `name` as int32.

        Raises:
          ArgumentError, OwnershipError, DoubleFreeError: Unless each is known, named once and in one of these states.
        """
        return self._states.require(name, ids, states)

    def _pieces(self, host_id: int) -> list[memoryview]:
        return [piece for array in self.arrays for piece in pieces(array.canonical[host_id - 1])]
