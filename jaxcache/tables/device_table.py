"""The request table on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
from jax.typing import ArrayLike

from jaxcache.device.pool import DevicePool

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RequestTable(DevicePool):
    """Device twin of the request table: `pages[row, i]` holds tokens `[i * P, (i + 1) * P)` of the request in `row`.

    Attributes:
      pages: (rows, max_pages) int32.
    """

    pages: Int32[Array, "rows max_pages"]

    def patched(self, index: Int32[ArrayLike, " entries"], page: Int32[ArrayLike, " entries"]) -> RequestTable:
        """Overwrites entries by flat index; an index past the end is padding. In place where the table is donated."""
        flat = self.pages.reshape(-1).at[index].set(page, mode="drop")
        return RequestTable(flat.reshape(self.pages.shape))

    def slots(
        self, row: Int32[Array, "*#tokens"], position: Int32[Array, "*#tokens"], page_size: int
    ) -> Int32[Array, "*tokens"]:
        """Slot of each (row, position). Positions past a request's end give stale slots: mask them."""
        return self.pages[row, position // page_size] * page_size + position % page_size
