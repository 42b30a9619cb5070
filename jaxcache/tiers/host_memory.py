"""The host memory of a cache: a pool for each component, of exactly the bytes that were asked for.

    memory = HostMemory.create(pool, components, HostConfig(bytes=64 << 30))
    memory["full"].alloc(8)

Each pool is one anonymous mapping, made once. On a GPU it is page-locked there and then
(`jaxcache.tiers.cuda`), as it is, where allocators of page-locked memory round each block up to a power of two. On a
CPU it stays plain memory; everything else is the same.

Source: SGLang 0.5.2 memory_pool_host.py, HostKVCache.__init__, which holds 10 GiB back and wants more than the device.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxcache.errors import ArgumentError, CacheError, shown
from jaxcache.pools.config import KVCacheConfig, require
from jaxcache.pools.stack import LayerStack, MemoryPool
from jaxcache.tiers.cuda import CudaLink
from jaxcache.tiers.host_layout import HostArray, HostLayout, HostShape
from jaxcache.tiers.host_pool import HostPool
from jaxcache.tiers.link import Link, MemoryLink
from jaxcache.tiers.machine import available_bytes

MIB = 1 << 20


class HasStacks(Protocol):
    """What host memory has to know of a component (`jaxcache.components.base.MemoryComponent`)."""

    @property
    def name(self) -> str:
        """That of the component."""
        ...

    @property
    def stack_names(self) -> tuple[str, ...]:
        """Stacks of the pool that hold its values."""
        ...


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How much host memory, and in which order. Exactly one of `bytes` and `ratio` is given.

    Attributes:
      bytes: Of all components and shards in this process together. Each component gets the same multiple of what the
        device has of it; what is left over goes to full pages.
      ratio: Host ids of each component, for one on the device.
      layout: Order of the bytes.
      staging_bytes: Device memory that transfers of one direction may hold at a time, on each device; both together
        twice as much. Belongs into the device's budget, see `Transfers.device_bytes`.
      reserve_bytes: What has to be left of the machine's available memory.

    Raises:
      ArgumentError: Neither or both of `bytes` and `ratio`, or values out of range.
    """

    bytes: int | None = None
    ratio: float | None = None
    layout: HostLayout = HostLayout.PAGE_FIRST_DIRECT
    staging_bytes: int = 256 * MIB
    reserve_bytes: int = 4096 * MIB

    def __post_init__(self) -> None:
        is_one = (self.bytes is None) != (self.ratio is None)
        require(is_one, "bytes", "or ratio must be given, and not both", (self.bytes, self.ratio))
        for name, value in (("bytes", self.bytes), ("staging_bytes", self.staging_bytes)):
            is_size = value is None or (_is_integer(value) and value > 0)
            require(is_size, name, "must be a positive integer", shown(value))
        is_ratio = self.ratio is None or (
            isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool) and 0 < self.ratio < float("inf")
        )
        require(is_ratio, "ratio", "must be a positive number", shown(self.ratio))
        require(isinstance(self.layout, HostLayout), "layout", "must be a HostLayout", shown(self.layout))
        is_reserve = _is_integer(self.reserve_bytes) and self.reserve_bytes >= 0
        require(is_reserve, "reserve_bytes", "must be an integer and not negative", shown(self.reserve_bytes))


class HostMemory(Mapping[str, HostPool]):
    """The host pools of a cache, by name of the component. Make it with `create`, end it with `close`.

    Args:
      pools: One for each component.
      config: What it was made from.
      link: What moves bytes between them and the device.

    Attributes:
      config: What it was made from.
      link: What moves bytes between them and the device.
    """

    def __init__(self, pools: Iterable[HostPool], config: HostConfig, link: Link):
        self._pools = {pool.name: pool for pool in pools}
        self.config, self.link = config, link

    @classmethod
    def create(cls, pool: MemoryPool, components: Iterable[HasStacks], config: HostConfig) -> HostMemory:
        """Takes host memory for the values that these components have in `pool`.

        Args:
          pool: The device's; looked at, not kept. On a mesh, the shards of this process count.
          components: Those whose values may go to the host; they have stacks in the pool.
          config: How much.

        Raises:
          ArgumentError: It is less than one id a component, or more than the machine has, less the reserve.

        Cost: one mapping a component. On a GPU each is page-locked, which takes about a second for some GB.
        """
        stacks, components = pool.stacks(), [one for one in components if one.stack_names]
        for name in (name for one in components for name in one.stack_names):
            require(name in stacks, "components", f"must have their stacks in the pool, {sorted(stacks)}", name)
        shapes = {one.name: shapes_of(stacks, one.stack_names) for one in components}
        counts = {one.name: ids_in(stacks[one.stack_names[0]]) for one in components}
        sizes = sized(
            counts, {name: sum(shape.page_bytes for shape in parts) for name, parts in shapes.items()}, config
        )
        link = link_to(pool)
        try:
            pools = [
                HostPool(
                    name, sizes[name], config.layout, _arrays(shapes[name], sizes[name], config, link), counts[name]
                )
                for name in shapes
            ]
        except CacheError:
            link.close()
            raise
        return cls(pools, config, link)

    def __getitem__(self, name: str) -> HostPool:
        return self._pools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    @property
    def size_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.size * pool.page_bytes for pool in self.values())

    def close(self) -> None:
        """Ends its use for transfers, of which none may be in flight. The memory is freed with its last view.

        Raises:
          OwnershipError: A transfer is in flight. Nothing has changed.
        """
        for pool in self.values():
            pool.require_idle()
        self.link.close()

    def clear(self) -> None:
        """Every id of every pool is free again.

        Raises:
          OwnershipError: A transfer is in flight. Nothing has changed.
        """
        for pool in self.values():
            pool.require_idle()
        for pool in self.values():
            pool.clear()


def shapes_of(stacks: Mapping[str, LayerStack], names: Sequence[str]) -> list[HostShape]:
    """What one id has in these stacks: a shape for each array, and for each shard of it that differs."""
    return [
        HostShape(name, index, start, config.layer_num, rows_per_id(config), row, np.dtype(buffer.dtype))
        for name in names
        for config in (stacks[name].config,)
        for index, (buffer, row) in enumerate(zip(stacks[name].buffers, config.shard_row_shapes, strict=True))
        for start in sorted({shard.index[2].start or 0 for shard in buffer.addressable_shards})
    ]


def sized(counts: Mapping[str, int], page_bytes: Mapping[str, int], config: HostConfig) -> dict[str, int]:
    """Ids of each component.

    Args:
      counts: Ids that each has on the device; the first is that of full pages.
      page_bytes: Bytes of one id of each.
      config: How much.

    Raises:
      ArgumentError: It is less than one id a component, or more than the machine has, less the reserve.
    """
    require(bool(counts), "components", "must have at least one with a stack in the pool", list(counts))
    if config.bytes is None:
        sizes = {name: int(count * (config.ratio or 0)) for name, count in counts.items()}
    else:
        whole = sum(counts[name] * page_bytes[name] for name in counts)
        sizes = {name: count * config.bytes // whole for name, count in counts.items()}
        first = next(iter(sizes))
        left = config.bytes - sum(sizes[name] * page_bytes[name] for name in sizes)
        sizes[first] += left // page_bytes[first]
    for name, size in sizes.items():
        if size < 1:
            asked = f"bytes={config.bytes}" if config.ratio is None else f"ratio={config.ratio}"
            raise ArgumentError(
                f"host memory of {asked} has no room for one id of {name!r} of {page_bytes[name]} bytes: give it more"
            )
        require(size < 2**31 - 1, "bytes", f"must leave int32 ids of {name!r}", size)
    needed, there = sum(sizes[name] * page_bytes[name] for name in sizes), available_bytes()
    if needed > there - config.reserve_bytes:
        raise ArgumentError(
            f"host memory of {needed} bytes does not fit: this machine has {there} available, of which "
            f"{config.reserve_bytes} are reserved: ask for less, or lower reserve_bytes"
        )
    return sizes


def link_to(pool: MemoryPool) -> Link:
    """What moves bytes to and from the devices of a pool that belong to this process.

    Raises:
      TransferError: It is on a GPU, whose driver refuses.
    """
    buffer = pool.buffers[0]
    devices = [shard.device for shard in buffer.addressable_shards]
    return CudaLink(devices) if devices[0].platform == "gpu" else MemoryLink()


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def rows_per_id(config: Any) -> int:
    """Rows of one id in a layer."""
    return config.page_size if isinstance(config, KVCacheConfig) else 1


def ids_in(stack: LayerStack) -> int:
    """Ids that the device has in a stack, without the sink."""
    return stack.config.rows // rows_per_id(stack.config) - 1


def _arrays(shapes: Sequence[HostShape], size: int, config: HostConfig, link: Link) -> list[HostArray]:
    """Memory for so many ids, ready for transfers: the arrays one behind the other."""
    memory = np.frombuffer(_mapped(size * sum(shape.page_bytes for shape in shapes)), np.uint8)
    link.pin(memory)
    ends = np.cumsum([size * shape.page_bytes for shape in shapes]).tolist()
    return [
        HostArray(shape, config.layout, part) for shape, part in zip(shapes, np.split(memory, ends[:-1]), strict=True)
    ]


def _mapped(size: int) -> mmap.mmap:
    """Zeroed memory that nothing else is in, in large pages where the system has them.

    A child process does not get it: after a fork, what this process writes would go to a copy of a page, while the copy
    engine still has the page that was locked.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without large pages says no
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
