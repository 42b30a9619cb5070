"""Where rows lie in one piece, for transfer engines that copy whole buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxcache.pools.layout import Layout

if TYPE_CHECKING:
    from jaxcache.pools.config import KVCacheConfig


@dataclass(frozen=True)
class BufferInfo:
    """Where rows lie in one piece, for transfer engines. No pointer: one that outlives its pool would go unnoticed.

    Page `p` is the `page_bytes` from `offset_bytes + p * page_bytes` on.

    Attributes:
      name: Field of the pool that holds the array.
      layer_ids: Global layers: one, or all of them if the pool is page-major.
      shape: `(size + page_size, *row)`; page-major, `(pages, layers, page_size, *row)`.
      strides_bytes: Bytes from one element to the next, by dimension.
      offset_bytes: Where the piece begins in the array.
      size_bytes: Bytes of the piece.
      page_bytes: Bytes of one page in it.
    """

    name: str
    layer_ids: tuple[int, ...]
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    page_bytes: int


def buffer_infos(config: KVCacheConfig, name: str, row: tuple[int, ...], itemsize: int) -> Iterator[BufferInfo]:
    """An info for each piece of the array `name`, whose rows have the shape `row` on this device."""
    ids, pages = config.layer_ids, config.rows // config.page_size
    if config.layout is Layout.LAYER_MAJOR:
        return piece_infos(name, [(layer_id,) for layer_id in ids], (config.rows, *row), pages, itemsize)
    shape = (pages, config.layer_num, config.page_size, *row)
    return piece_infos(name, [ids], shape, pages, itemsize)


def piece_infos(
    name: str, pieces: Sequence[tuple[int, ...]], shape: tuple[int, ...], pages: int, itemsize: int
) -> Iterator[BufferInfo]:
    """An info for each piece of the array `name`, given the layers in it; all have one shape and so many pages."""
    strides = tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    size_bytes = itemsize * math.prod(shape)
    for i, layer_ids in enumerate(pieces):
        yield BufferInfo(name, layer_ids, shape, strides, i * size_bytes, size_bytes, size_bytes // pages)
