"""Steps as donated, jitted functions of pool, table and one packed upload; and those that are compiled already."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

from jaxcache.device.donation import DonatingStep, donating, is_update
from jaxcache.device.staging import fetched
from jaxcache.errors import ArgumentError
from jaxcache.steps.batch import unpack
from jaxcache.steps.buckets import Bucket
from jaxcache.steps.loop import LoopShape, unpack_loop
from jaxcache.tables.device_table import RequestTable

MAX_FUNCTIONS = 32
"""Functions whose compiled steps are kept."""

Patch = Callable[[Any, Any, Any], Any]
"""`DeviceMap.patched` of a map: (pool, index, page) -> pool."""
NO_PATCHES: Mapping[str, Patch] = MappingProxyType({})


def whole_step(
    step: Callable, bucket: Bucket, page_size: int, patches: Mapping[str, Patch] = NO_PATCHES
) -> DonatingStep:
    """`step(pool, batch, *args) -> (pool, out)` as a donated step of pool, table and a packed plan.

    `patches` writes the changes that the plan brings into the pool's maps, one for each name in `bucket.maps`.

    The result is called with `(pool, table, upload, *args)` and returns the pool, the table, the packed plan as it
    reached the device, and `out`.
    """

    def jaxcache_step(pool: Any, table: RequestTable, upload: Any, *args: Any) -> Any:
        packed = fetched(upload)
        batch = unpack(packed, bucket, table, page_size)
        for name in bucket.maps:
            parts = bucket.packing.unpack(packed)
            pool = patches[name](pool, parts[f"{name}_index"], parts[f"{name}_page"])
        result = step(pool, batch, *args)
        if isinstance(result, tuple) and len(result) == 2 and is_update(result[0], pool):
            return result[0], batch.table, packed, result[1]
        raise ArgumentError("step must return (pool, out), the pool being the one it was given, updated")

    return donating(jaxcache_step)


def whole_loop(step: Callable, shape: LoopShape) -> DonatingStep:
    """`step(pool, loop, *args) -> (pool, loop, out)` as a donated step of pool, table and a packed plan.

    The result is called with `(pool, table, upload, *args)` and returns the pool, the table, the packed plan as it
    reached the device, and a pair: what a debug check reads (the rows and the allocator), and `out`.
    """

    def jaxcache_loop(pool: Any, table: RequestTable, upload: Any, *args: Any) -> Any:
        packed = fetched(upload)
        pool, loop, out = step(pool, unpack_loop(packed, shape, table), *args)
        return pool, loop.table, packed, ((loop.rows, loop.allocator), out)

    return donating(jaxcache_loop)


class CompiledSteps:
    """Jitted steps by function and static shape: an LRU cache, bounded by `max_functions`.

    A caller that makes a new function for each call would otherwise keep every one of them alive, compiled.
    """

    def __init__(self, max_functions: int = MAX_FUNCTIONS):
        self._max_functions = max_functions
        self._steps: OrderedDict[Callable, dict[Hashable, DonatingStep]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, step: Callable, shape: Hashable, build: Callable[[], DonatingStep]) -> DonatingStep:
        """The jitted step for a function and a shape; `build` makes it where there is none."""
        if step not in self._steps:
            self._steps[step] = {}
            if len(self._steps) > self._max_functions:
                self._steps.popitem(last=False)
        self._steps.move_to_end(step)
        by_shape = self._steps[step]
        if shape not in by_shape:
            by_shape[shape] = build()
        return by_shape[shape]
