"""Steps as donated, jitted functions of pool, table and one packed upload; and those that are compiled already."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType, MethodType
from typing import Any

from jaxcache.device.donation import DonatingStep, donating, is_update
from jaxcache.device.staging import fetched
from jaxcache.errors import ArgumentError
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.steps.batch import unpack
from jaxcache.steps.buckets import Bucket
from jaxcache.steps.loop import LoopShape, unpack_loop
from jaxcache.tables.device_table import RequestTable

MOST_STEPS = 32
"""Functions whose compiled steps are kept."""


def whole_step(step: Callable, bucket: Bucket, page_size: int) -> DonatingStep:
    """`step(pool, batch, *args) -> (pool, out)` as a donated step of pool, table and a packed plan.

    The result is called with `(pool, table, upload, *args)` and returns the pool, the table, the packed plan as it
    reached the device, and `out`.
    """

    def jaxcache_step(pool: Any, table: RequestTable, upload: Any, *args: Any) -> Any:
        packed = fetched(upload)
        batch = unpack(packed, bucket, table, page_size)
        if bucket.window_changes:
            parts = bucket.packing.unpack(packed)
            pool = with_window_map(pool, parts["window_index"], parts["window_page"])
        result = step(pool, batch, *args)
        if isinstance(result, tuple) and len(result) == 2 and is_update(result[0], pool):
            return result[0], batch.table, packed, result[1]
        raise ArgumentError("step must return (pool, out), the pool being the one it was given, updated")

    return donating(jaxcache_step)


def with_window_map(pool: Any, index: Any, page: Any) -> Any:
    """The pool with entries of its map to window pages overwritten; an index past the end is padding."""
    if isinstance(pool, HybridKVPool):
        return pool.with_kv(with_window_map(pool.kv, index, page))
    return pool.with_window_map(index, page)


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
    """Jitted steps by function and static shape.

    A function made anew for each call would be kept, and what it was compiled to, for ever: of more than `most`
    functions, the one that was used least recently goes, and is compiled again should it come back. Where one is
    compiled for a shape that another function of the same code was compiled for, a warning says so, once.
    """

    def __init__(self, most: int = MOST_STEPS):
        self._most = most
        self._steps: OrderedDict[Callable, dict[Hashable, DonatingStep]] = OrderedDict()
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, step: Callable, shape: Hashable, build: Callable[[], DonatingStep]) -> DonatingStep:
        """The jitted step for a function and a shape; `build` makes it where there is none."""
        if step not in self._steps:
            self._steps[step] = {}
            if len(self._steps) > self._most:
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
