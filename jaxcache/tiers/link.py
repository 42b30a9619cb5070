"""The link between a device's blocks and the places of host pages: what moves the bytes, and says when they are there.

    save     block on the device ──► pages in host memory         fetch     pages ──► a fresh block on the device

A block is what the device gathered of a component's values, one array for each of the pool's, in the order of the host
layout. `MemoryLink` is for devices whose memory is host memory; `jaxcache.tiers.cuda` is for NVIDIA GPUs.

Source: jaxcache's own.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcache.tiers.host_layout import HostArray
from jaxcache.tiers.host_pool import HostPool

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8


class Pending(abc.ABC):
    """A transfer in flight. It keeps alive what it reads and writes."""

    @abc.abstractmethod
    def is_done(self) -> bool:
        """Whether it has ended, without waiting.

        Raises:
          TransferError: It failed.
        """

    @abc.abstractmethod
    def wait(self) -> None:
        """Waits for its end. `is_done` is true then, or raises."""


class Link(abc.ABC):
    """What moves bytes. All calls are the engine's thread's."""

    @abc.abstractmethod
    def pin(self, buffer: UInt8[np.ndarray, " bytes"]) -> None:
        """Makes memory ready for transfers, once, before the first one.

        Raises:
          TransferError: The system refuses.
        """

    @abc.abstractmethod
    def save(self, blocks: Sequence[jax.Array], pool: HostPool, ids: Int32[np.ndarray, " n"]) -> Pending:
        """Starts to copy the first `n` pages of a block to these places, once the device has computed it."""

    @abc.abstractmethod
    def fetch(
        self, pool: HostPool, ids: Int32[np.ndarray, " n"], blocks: Sequence[jax.ShapeDtypeStruct], where: Sequence[Any]
    ) -> tuple[list[jax.Array], Pending]:
        """Starts to copy pages to the beginning of a fresh block.

        Args:
          pool: Where they are.
          ids: Which.
          blocks: Shape and dtype of each array; it may be longer than `n`, what follows is undefined.
          where: Its sharding, or None for the default device.

        Returns:
          The arrays, which must not be read before the transfer has ended.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Undoes `pin`. No transfer may be in flight."""


class MemoryLink(Link):
    """Copies by NumPy, for a device that computes in host memory."""

    def pin(self, buffer: UInt8[np.ndarray, " bytes"]) -> None:
        """Nothing is to do."""

    def save(self, blocks: Sequence[jax.Array], pool: HostPool, ids: Int32[np.ndarray, " n"]) -> Pending:
        """See `Link.save`. The copy is made when the block is found to be there."""
        return _Saving(blocks, pool, ids)

    def fetch(
        self, pool: HostPool, ids: Int32[np.ndarray, " n"], blocks: Sequence[jax.ShapeDtypeStruct], where: Sequence[Any]
    ) -> tuple[list[jax.Array], Pending]:
        """See `Link.fetch`. The copy is made at once."""
        arrays = []
        for index, (block, place) in enumerate(zip(blocks, where, strict=True)):
            rows = np.zeros(block.shape, block.dtype)
            for array in arrays_of(pool, index):
                part = rows[shard_slices(array, rows.ndim)]
                part[: len(ids)] = _typed(array.pages[ids - 1], part[: len(ids)])
            arrays.append(jax.device_put(rows, place))
        return arrays, _Fetching(arrays)

    def close(self) -> None:
        """Nothing is to do."""


class _Saving(Pending):
    def __init__(self, blocks: Sequence[Any], pool: HostPool, ids: np.ndarray):
        self._blocks, self._pool, self._ids = blocks, pool, ids

    def is_done(self) -> bool:
        if not all(block.is_ready() for block in self._blocks):
            return False
        for array, data in shards_of(self._pool, self._blocks):
            rows = np.asarray(data)[: len(self._ids)]
            array.pages[self._ids - 1] = rows.reshape(-1).view(np.uint8).reshape(len(self._ids), *array.pages.shape[1:])
        self._blocks = []
        return True

    def wait(self) -> None:
        jax.block_until_ready(self._blocks)


class _Fetching(Pending):
    def __init__(self, arrays: Sequence[Any]):
        self._arrays = arrays

    def is_done(self) -> bool:
        return all(array.is_ready() for array in self._arrays)

    def wait(self) -> None:
        jax.block_until_ready(self._arrays)


def arrays_of(pool: HostPool, index: int) -> list[HostArray]:
    """The arrays of a host pool that belong to array `index` of a block: one for each shard."""
    keys = list(dict.fromkeys((array.shape.stack, array.shape.index) for array in pool.arrays))
    return [array for array in pool.arrays if (array.shape.stack, array.shape.index) == keys[index]]


def shards_of(pool: HostPool, blocks: Sequence[jax.Array]) -> Iterator[tuple[HostArray, Any]]:
    """Each array of a host pool with the device's part of the block that belongs to it."""
    for index, block in enumerate(blocks):
        by_start: dict[int, Any] = {}
        for shard in block.addressable_shards:
            by_start.setdefault(_start(shard), shard.data)
        for array in arrays_of(pool, index):
            yield array, by_start[array.shape.start]


def every_shard_of(pool: HostPool, blocks: Sequence[jax.Array]) -> Iterator[tuple[HostArray, Any]]:
    """The device's parts of a block, copies among them, each with the array of the host pool that belongs to it."""
    for index, block in enumerate(blocks):
        by_start = {array.shape.start: array for array in arrays_of(pool, index)}
        for shard in block.addressable_shards:
            yield by_start[_start(shard)], shard.data


def shard_slices(array: HostArray, ndim: int) -> tuple[slice, ...]:
    """Where the rows of a shard are in a block of all shards: `(ids, ., ., *row)`, cut along the first of a row."""
    start, length = array.shape.start, array.shape.row[0]
    return (slice(None),) * 3 + (slice(start, start + length),) + (slice(None),) * (ndim - 4)


def _start(shard: Any) -> int:
    """First element of a row, along its first dimension, that a shard of a block has."""
    return shard.index[3].start or 0


def _typed(pages: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Pages, in bytes, as elements of a block."""
    return np.ascontiguousarray(pages).reshape(-1).view(like.dtype).reshape(like.shape)
