"""Tables that live twice: the host writes, the device follows. Only entries that changed travel.

    host table ── mark ──► ChangeLog ── take ──► TableChanges ──► patched into the device's copy by a step

An entry is remembered, not its value: values are read when they leave, so the order of changes cannot matter.

Source: jaxcache's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.arguments import as_count, require_kind

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class TableChanges:
    """Entries of a host table of pages on their way to the device.

    Attributes:
      index: int32 flat indices.
      page: int32 values.
    """

    index: np.ndarray
    page: np.ndarray


class ChangeLog:
    """Which entries of a host table its copy on the device has not been sent.

    Args:
      table: The host table; read, never written. It must stay this very array.

    Bounded by twice the table, whether anybody takes the changes or not.
    """

    def __init__(self, table: Int32[np.ndarray, "..."]):
        self._table = table.reshape(-1)
        self.forget()

    def __len__(self) -> int:
        return self._count

    def forget(self) -> None:
        """The device has a copy of the whole table: nothing waits."""
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def mark(self, index: Int32[np.ndarray, " entries"]) -> None:
        """These entries have changed. The array is kept: give one that is not written to."""
        self._waiting.append(index)
        self._count += len(index)
        if self._count > 2 * len(self._table):
            self._waiting = [np.unique(np.concatenate(self._waiting))]
            self._count = len(self._waiting[0])

    def take(self, limit: int) -> TableChanges:
        """At most `limit` changed entries with their values of this moment; they count as sent.

        Raises:
          ArgumentError: `limit` is negative or no integer.
        """
        limit = as_count("limit", limit)
        waiting = np.concatenate(self._waiting) if self._waiting else np.empty(0, np.int32)
        index = waiting[:limit]
        self.forget()
        if len(waiting) > limit:
            self.mark(waiting[limit:])
        return TableChanges(index, self._table[index])

    def give_back(self, changes: TableChanges) -> None:
        """Changes that were taken and did not reach the device wait again."""
        require_kind("changes", changes, TableChanges)
        self.mark(changes.index)
