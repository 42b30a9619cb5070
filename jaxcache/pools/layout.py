"""Where the rows of a pool lie, for those who move its memory by themselves.

Source: SGLang 0.5.2 memory_pool.py, get_contiguous_buf_infos, which returns pointers, sizes and bytes per page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxcache.pools.config import KVCacheConfig


@dataclass(frozen=True)
class BufferInfo:
    """Where the rows of one layer lie, for transfer engines. No pointer: one that outlives its pool would go unnoticed.

    Attributes:
      name: Field of the pool that holds the stacked array.
      layer_id: Global layer.
      shape: `(size + page_size, *row)`.
      strides_bytes: Bytes from one element to the next, by dimension.
      offset_bytes: Where the layer begins in the stacked array.
      size_bytes: Bytes of the layer.
      page_bytes: Bytes of one page.
    """

    name: str
    layer_id: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    page_bytes: int


def layer_infos(config: KVCacheConfig, name: str, row: tuple[int, ...], itemsize: int) -> Iterator[BufferInfo]:
    """One info a layer, for the array `name` whose rows have the shape `row` on this device."""
    shape = (config.rows, *row)
    strides = tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    size_bytes = itemsize * math.prod(shape)
    for i in range(config.layer_num):
        layer_id, page_bytes = config.start_layer + i, config.page_size * strides[0]
        yield BufferInfo(name, layer_id, shape, strides, i * size_bytes, size_bytes, page_bytes)
