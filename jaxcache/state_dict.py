"""State dicts: what a snapshot keeps of each part of a cache, as arrays by name, checked when they come back.

    part.state_dict()  ->  {"order": int64, "keys": uint8, ...}  ->  a file  ->  Columns  ->  part.load_state_dict(...)

A file can hold anything. So code that restores asks for each array by its name, kind, length and range, and gets
that or a SnapshotError; an array is copied out of the file no sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.errors import SnapshotError

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

StateDict = dict[str, np.ndarray]
"""Arrays of one dimension by name."""


def prefixed(prefix: str, arrays: StateDict) -> StateDict:
    """The same arrays, under names that begin with `prefix`: what `Columns.part` undoes."""
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def joined_bytes(pieces: list[bytes]) -> np.ndarray:
    """Byte strings one behind the other, as an array; their lengths must be kept beside it."""
    return np.frombuffer(b"".join(pieces), np.uint8)


class Columns:
    """Untrusted arrays, validated on access.

    Args:
      arrays: By name.
      prefix: What the names begin with, in messages too.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], prefix: str = ""):
        self._arrays = arrays
        self._prefix = prefix

    def part(self, prefix: str) -> Columns:
        """Those whose names begin with `prefix`."""
        return Columns(self._arrays, f"{self._prefix}{prefix}.")

    def ints(
        self, name: str, length: int | None = None, low: int = 0, high: int = 2**63 - 1
    ) -> Int64[np.ndarray, " length"]:
        """Integers in [low, high], as many as `length` says.

        Raises:
          SnapshotError: There is no such array.
        """
        array = self._array(name, "iu", length).astype(np.int64)
        if len(array) and not (low <= array.min() and array.max() <= high):
            self._refuse(name, f"must be in [{low}, {high}]", f"[{array.min()}, {array.max()}]")
        return array

    def distinct(self, name: str, high: int) -> Int64[np.ndarray, " n"]:
        """Integers in [0, high], each at most once.

        Raises:
          SnapshotError: There is no such array.
        """
        array = self.ints(name, high=high)
        if len(np.unique(array)) < len(array):
            self._refuse(name, "must name nothing twice", f"{len(array)} entries that repeat")
        return array

    def number(self, name: str, low: int = 0) -> int:
        """One integer of at least `low`.

        Raises:
          SnapshotError: There is no such array.
        """
        return int(self.ints(name, 1, low)[0])

    def floats(self, name: str, length: int) -> Float64[np.ndarray, " length"]:
        """Finite numbers.

        Raises:
          SnapshotError: There is no such array.
        """
        array = self._array(name, "f", length).astype(np.float64)
        if not np.isfinite(array).all():
            self._refuse(name, "must be finite", "infinite or undefined numbers")
        return array

    def strings(self, name: str, lengths: Int64[np.ndarray, " n"]) -> list[bytes]:
        """Byte strings of these lengths: what `joined_bytes` joined.

        Raises:
          SnapshotError: There is no such array.
        """
        ends = np.cumsum(lengths).tolist()
        data = self._array(name, "u", ends[-1] if ends else 0).tobytes()
        return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _array(self, name: str, kinds: str, length: int | None) -> np.ndarray:
        array = self._arrays.get(self._prefix + name)
        if array is None:
            raise SnapshotError(f"{self._prefix}{name} is missing: this is no snapshot of such a cache")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            self._refuse(name, f"must have one dimension and a dtype of kind {kinds!r}", f"{array.dtype}{array.shape}")
        if length is not None and len(array) != length:
            self._refuse(name, f"must have {length} entries", len(array))
        return array

    def _refuse(self, name: str, rule: str, value: object) -> None:
        raise SnapshotError(f"{self._prefix}{name} {rule}, got {value}: the file is damaged or was made up")
