"""Several int32 vectors in one, so that a step's host inputs travel in a single upload.

    host                          device, inside the jitted step
    Packing.pack(parts)  ──►  packed  ──►  Packing.unpack(packed)

Source: jaxcache's own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

NOWHERE = int(np.iinfo(np.int32).max)
"""Padding of an index: past the end of every array, where a scatter with `mode="drop"` writes nothing."""


@dataclass(frozen=True)
class Field:
    """One part of a packed vector.

    Attributes:
      name: What it is called.
      length: Entries there is room for.
      padding: What stands behind the entries that are given.
    """

    name: str
    length: int
    padding: int = 0


@dataclass(frozen=True)
class Packing:
    """Where each part stands in a packed vector. Static: one packing compiles once.

    Attributes:
      fields: The parts, in order.
    """

    fields: tuple[Field, ...]

    @functools.cached_property
    def size(self) -> int:
        """Entries of the packed vector."""
        return sum(field.length for field in self.fields)

    @functools.cached_property
    def _places(self) -> list[tuple[str, int, int]]:
        """Name, start and length of each field."""
        starts = itertools.accumulate((field.length for field in self.fields), initial=0)
        return [(field.name, start, field.length) for field, start in zip(self.fields, starts, strict=False)]

    @functools.cached_property
    def _padding(self) -> np.ndarray:
        return np.concatenate([np.full(field.length, field.padding, np.int32) for field in self.fields])

    def pack(
        self, parts: Mapping[str, np.ndarray], out: Int32[np.ndarray, " size"] | None = None
    ) -> Int32[np.ndarray, " size"]:
        """A vector with the parts of these names, padded.

        Args:
          parts: One array for each field, by its name.
          out: Where to write it, or None for a new vector. JAX reads what it is given later than one thinks: pass
            nothing that a step may still be reading.

        Raises:
          ArgumentError: A part is longer than its field, or `out` is not such a vector.
        """
        if out is not None and not (
            isinstance(out, np.ndarray) and out.shape == (self.size,) and out.dtype == np.int32
        ):
            raise ArgumentError(f"out must be an int32 array of {self.size} entries, got {type(out).__name__}")
        packed = np.empty(self.size, np.int32) if out is None else out
        packed[:] = self._padding
        for name, start, length in self._places:
            part = parts[name]
            if len(part) > length:
                raise ArgumentError(f"{name}: {len(part)} entries do not fit the bucket's {length}")
            packed[start : start + len(part)] = part
        return packed

    def unpack(self, packed: Int32[Array, " size"]) -> dict[str, Int32[Array, " length"]]:
        """The parts by name, padding included. For use inside a jitted step."""
        return {name: packed[start : start + length] for name, start, length in self._places}
