"""Steps as donated, jitted functions of pool, table and one packed upload; and those that are compiled already."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any

import jax

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outcome:
    """What a step returned beside the pool.

    Attributes:
      out: For the engine.
      has_sampled: Whether it left tokens in the registers of its rows; static.
    """

    out: Any
    has_sampled: bool = field(metadata={"static": True})


def whole_step(
    step: Callable, bucket: Bucket, page_size: int, patches: Mapping[str, Patch] = NO_PATCHES
) -> DonatingStep:
    """`step(pool, batch, *args) -> (pool, out)` or `(pool, out, sampled)` as a donated step of pool, table and a plan.

    `patches` writes the changes that the plan brings into the pool's maps, one for each name in `bucket.maps`.

    The result is called with `(pool, table, upload, *args)` and returns the pool, the table, the packed plan as it
    reached the device, and an `Outcome`.
    """

    def jaxcache_step(pool: Any, table: RequestTable, upload: Any, *args: Any) -> Any:
        packed = fetched(upload)
        batch = unpack(packed, bucket, table, page_size)
        for name in bucket.maps:
            parts = bucket.packing.unpack(packed)
            pool = patches[name](pool, parts[f"{name}_index"], parts[f"{name}_page"])
        result = step(pool, batch, *args)
        if not isinstance(result, tuple) or len(result) not in (2, 3) or not is_update(result[0], pool):
            raise ArgumentError(
                "step must return (pool, out) or (pool, out, sampled), the pool being the one it was given, updated"
            )
        pool, out, *sampled = result
        new_table = batch.table.sampled(batch.row, *sampled) if sampled else batch.table
        return pool, new_table, packed, Outcome(out, bool(sampled))

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

    A caller that makes a new function for each call would otherwise keep every one of them alive, compiled. Where one
    is compiled for a shape that another function of the same code was compiled for, a warning says so, once.
    """

    def __init__(self, max_functions: int = MAX_FUNCTIONS):
        self._max_functions = max_functions
        self._steps: OrderedDict[Callable, dict[Hashable, DonatingStep]] = OrderedDict()
        self._has_warned = False

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
            self._warn_if_made_anew(step, shape)
            by_shape[shape] = build()
        return by_shape[shape]

    def _warn_if_made_anew(self, step: Callable, shape: Hashable) -> None:
        code = _code_of(step)
        if self._has_warned or code is None:
            return
        twins = [other for other, by_shape in self._steps.items() if shape in by_shape and _code_of(other) == code]
        if twins:
            self._has_warned = True
            warnings.warn(
                f"step: {code[0].co_qualname} is another function object than the one that was compiled for this shape "
                "before, and is compiled again: make a function, lambda or partial once, and pass what changes to it",
                stacklevel=5,
            )


def _code_of(step: Callable) -> tuple[CodeType, int] | None:
    """What two functions have in common that were made by one line; None for other callables."""
    partials = 0
    while isinstance(step, functools.partial):
        step, partials = step.func, partials + 1
    if isinstance(step, MethodType):
        step = step.__func__
    return (step.__code__, partials) if isinstance(step, FunctionType) else None
