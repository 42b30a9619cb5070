"""How the rows of a stack of layers are taken in parts, as a snapshot and a released pool take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.pools.stack import LayerStack

if TYPE_CHECKING:
    from jaxtyping import Int32


PART_BYTES = 64 << 20
"""Most bytes of a part, but for a row that is longer."""


def rows_per_part(stack: LayerStack) -> int:
    """Rows of every layer in one part, but for the last one."""
    row_bytes = -(-stack.size_bytes // stack.config.rows)
    return max(1, min(PART_BYTES // row_bytes, stack.config.rows))


def parts_of(rows: Int32[np.ndarray, " rows"], size: int) -> Iterator[Int32[np.ndarray, " part"]]:
    """The rows, so many at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
