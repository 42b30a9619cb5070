"""Page-locked memory through which a step's host inputs reach the device.

    host                                        device
    slot = uploads.take()
    pack into slot.values
    run the step on slot.array          ──►     packed = fetched(array), before anything else; the step returns it, too
    uploads.give_back(slot, packed)             once that is ready, the slot may be written to again

A NumPy array handed to a jitted step is first copied by a thread of JAX's, which has to wake up: on an H200's host that
takes longer than all other host work of a step. Memory which is page-locked already is fetched by the step itself.

These are JAX arrays that the host writes into, behind JAX's back. It is safe because nothing else sees them: a step
only copies them, their value on the host is never asked for, and a buffer is not reused before its step has ended.

Source: jaxcache's own.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Sharding

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

MOST_SLOTS = 64
"""Steps with packed vectors of one size that can be in flight before the host waits for the oldest."""


def fetched(array: Int32[Array, " size"]) -> Int32[Array, " size"]:
    """Inside a jitted step: what a slot holds, on the device. An array that is there already costs nothing."""
    return jax.device_put(array, jax.memory.Space.Device)


class UploadSlot:
    """One piece of page-locked memory, on each device of a sharding that replicates.

    Attributes:
      array: What a step is given.
      values: int32 NumPy view of its memory, to be written.
    """

    def __init__(self, size: int, sharding: Sharding):
        self.array: Any = jax.device_put(np.zeros(size, np.int32), sharding.with_memory_kind("pinned_host"))
        self.array.block_until_ready()
        self.values, *self._copies = (_view(shard.data, size) for shard in self.array.addressable_shards)

    def fill_copies(self) -> None:
        """Gives every device what stands in `values`."""
        for copy in self._copies:
            copy[:] = self.values


class Uploads:
    """The slots for packed vectors of one size; as many as there are steps in flight, up to `MOST_SLOTS`."""

    def __init__(self, size: int, sharding: Sharding):
        self._size, self._sharding = size, sharding
        self._in_use: deque[tuple[UploadSlot, Any]] = deque()  # with a result of the step that reads it; oldest first

    def take(self) -> UploadSlot:
        """A slot that no step is left to read, for the next one. Waits if too many steps are in flight."""
        if not self._in_use:
            return UploadSlot(self._size, self._sharding)
        _, result = self._in_use[0]
        if not result.is_ready():
            if len(self._in_use) < MOST_SLOTS:
                return UploadSlot(self._size, self._sharding)
            result.block_until_ready()
        return self._in_use.popleft()[0]

    def give_back(self, slot: UploadSlot, result: Any) -> None:
        """A step was given the slot's array and returned `result`. A slot whose step failed is not given back."""
        self._in_use.append((slot, result))


def _view(array: Any, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(array.unsafe_buffer_pointer()))
