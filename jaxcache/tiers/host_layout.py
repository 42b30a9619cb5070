"""Where the bytes of host pages lie: one array for each array of the device's pool (and for each shard of it).

    LAYER_FIRST        (layers, ids, rows, row)     a page of each layer is one piece
    PAGE_FIRST         (ids, rows, layers, row)     a page of all layers is one piece, its tokens one behind the other
    PAGE_FIRST_DIRECT  (ids, layers, rows, row)     the same, its layers one behind the other, as the device gathers it

`rows` is the page size, or 1 for a state. Whatever the layout, storage is given the bytes of a page in one order: array
by array, shard by shard, layer by layer, row by row.

Source: SGLang 0.5.2 memory_pool_host.py (layer_first, page_first), 0.5.3 (page_first_direct).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import UInt8


class HostLayout(enum.Enum):
    """Order of a host pool's bytes."""

    LAYER_FIRST = "layer_first"
    """Layer by layer. A transfer of a page takes as many pieces as there are layers."""
    PAGE_FIRST = "page_first"
    """Page by page, and in it token by token."""
    PAGE_FIRST_DIRECT = "page_first_direct"
    """Page by page, and in it layer by layer: what moves fastest, and what storage reads in one piece."""


@dataclass(frozen=True)
class HostShape:
    """Sizes of one array of one shard.

    Attributes:
      stack: Name of the stack in the device's pool.
      index: Which of its arrays.
      start: Where a shard's part of a row begins along the row's first dimension; 0 if it has all of it.
      layers: Layers.
      rows: Rows of each layer in a page: its tokens, or 1 for a state.
      row: Shape of a row there.
      dtype: Of its elements, as the device stores them.
    """

    stack: str
    index: int
    start: int
    layers: int
    rows: int
    row: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer."""
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one id in this array."""
        return self.layers * self.rows * self.row_bytes

    def block_shape(self, layout: HostLayout, count: int) -> tuple[int, ...]:
        """Of `count` pages as the device gathers them for this layout, in one piece."""
        is_token_major = layout is HostLayout.PAGE_FIRST
        inner = (self.rows, self.layers) if is_token_major else (self.layers, self.rows)
        return (count, *inner, *self.row)


class HostArray:
    """One array of a host pool.

    Args:
      shape: Its sizes.
      layout: Order of its bytes.
      buffer: uint8, `ids * shape.page_bytes` of them.

    Attributes:
      shape: Its sizes.
      buffer: All its bytes, in the order of the layout.
      pages: uint8 view `(ids, ...)` of them: page by page, in the order of a block (`HostShape.block_shape`).
      canonical: uint8 view `(ids, layers, rows, row_bytes)` of them: page by page, in the order of a payload.
    """

    def __init__(self, shape: HostShape, layout: HostLayout, buffer: UInt8[np.ndarray, " bytes"]):
        self.shape, self.buffer = shape, buffer
        layers, rows, row_bytes = shape.layers, shape.rows, shape.row_bytes
        if layout is HostLayout.LAYER_FIRST:
            self.pages = buffer.reshape(layers, -1, rows, row_bytes).swapaxes(0, 1)
            self.canonical = self.pages
        elif layout is HostLayout.PAGE_FIRST:
            self.pages = buffer.reshape(-1, rows, layers, row_bytes)
            self.canonical = self.pages.swapaxes(1, 2)
        else:
            self.pages = buffer.reshape(-1, layers, rows, row_bytes)
            self.canonical = self.pages


def pieces(view: Any) -> Iterator[memoryview]:
    """The bytes of a uint8 view, in its order, in as few pieces of memory as there are."""
    if view.flags.c_contiguous:
        yield memoryview(view.reshape(-1))
    else:
        for part in view:
            yield from pieces(part)
