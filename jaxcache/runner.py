"""The device's side of a manager: pool and request table, and the jitted steps that consume and replace them.

Everything a step is told travels in one packed vector. Changes of the request table and of the map to window pages go
with it, or ahead of it where its bucket has no room for them.

Source: jaxcache's own.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcache.decode_loop import LoopShape, unpack_loop
from jaxcache.donation import DonatingStep, donating, is_update
from jaxcache.errors import ArgumentError, ReleasedError
from jaxcache.loop_plan import LoopPlan
from jaxcache.mirror import TableChanges
from jaxcache.packing import NOWHERE
from jaxcache.pages.swa import SWATokenToKVPoolAllocator
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.pools.stack import MemoryPool
from jaxcache.released import ReleasedPool
from jaxcache.step import NO_CHANGES, Bucket, StepPlan, unpack
from jaxcache.upload import Uploads, fetched

TABLE_PATCH_ENTRIES = 8192
"""Table entries that travel by themselves when a step's bucket has no room for them."""

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
    functions, the one that was used least recently goes, and is compiled again should it come back.
    """

    def __init__(self, most: int = MOST_STEPS):
        self._most = most
        self._steps: OrderedDict[Callable, dict[Hashable, DonatingStep]] = OrderedDict()

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
            by_shape[shape] = build()
        return by_shape[shape]


class StepRunner:
    """Pool and request table on the device, and what runs on them.

    Args:
      pool: The KV pool; the runner's from now on.
      host_table: What the device table follows.
      windows: What the pool's map to window pages follows, if it has one.

    Attributes:
      table: Device twin of the request table; likewise replaced.
      compiled: The jitted steps. Managers of equal sizes may share them.
    """

    def __init__(self, pool: MemoryPool, host_table: ReqToTokenPool, windows: SWATokenToKVPoolAllocator | None = None):
        self._pool: Any = pool
        self._released: ReleasedPool | None = None
        self.table: RequestTable = host_table.device_table(pool.mesh)
        self._everywhere: Sharding
        if pool.mesh is None:
            (device,) = jax.tree.leaves(pool)[0].devices()
            self._everywhere = SingleDeviceSharding(device)
            # Arrays that are bound to no device compile apart from those that are, as uploads must be.
            self.table = jax.device_put(self.table, device)
            if not pool.is_shared:  # this makes another pool of the same memory, of which nobody's view would know
                self._pool = jax.device_put(pool, device)
        else:
            self._everywhere = NamedSharding(pool.mesh, PartitionSpec())
        self.compiled = CompiledSteps()
        self._host_table = host_table
        self._windows = windows
        self._uploads: dict[int, Uploads] = {}
        self._patch = donating(RequestTable.patched)
        self._patch_map = donating(with_window_map)

    @property
    def pool(self) -> Any:
        """The KV pool. Replaced by every step: never keep it across one. What is set must be an update of it.

        Raises:
          ReleasedError: Its memory was released.
          ArgumentError: What is set is a pool of other sizes or layers.
        """
        if self._released is not None:
            self.require_resumed()
        return self._pool

    @pool.setter
    def pool(self, pool: MemoryPool) -> None:
        self.require_resumed()
        if not is_update(pool, self._pool):
            theirs = pool.config if isinstance(pool, MemoryPool) else type(pool).__name__
            raise ArgumentError(f"pool must be an update of the one that is here, {self._pool.config}; got {theirs}")
        self._pool = pool

    def require_resumed(self) -> None:
        """Raises ReleasedError while the pool has no memory."""
        if self._released is not None:
            raise ReleasedError("pool: its device memory was released: call resume_memory first")

    def release(self, kept: Mapping[str, np.ndarray] | None) -> None:
        """Frees the pool's memory; see `ReleasedPool`. Table and compiled steps stay."""
        self._released = ReleasedPool(self.pool, kept)
        self._pool = None

    def resume(self) -> None:
        """Brings the pool back, with the rows that were kept. If that fails, it is released as before.

        Raises:
          ReleasedError: It was not released.
        """
        if self._released is None:
            raise ReleasedError("pool: its device memory is there: call release_memory first")
        self._pool, self._released = self._released.resumed(), None
        if self._windows is not None:
            self._windows.send_all()

    def run(self, step: Callable, plan: StepPlan, *args: Any) -> Any:
        """Dispatches a step and returns its `out`. If it fails, its table changes wait again."""
        bucket, page_size, windows = plan.bucket, self._host_table.page_size, self._windows
        jitted = self.compiled.find(step, bucket, lambda: whole_step(step, bucket, page_size))
        self.send_changes(bucket.changes, bucket.window_changes)
        changes = self._host_table.take_changes(bucket.changes)
        window_changes = NO_CHANGES if windows is None else windows.take_changes(bucket.window_changes)
        try:
            pack = functools.partial(plan.pack, changes, window_changes)
            out = self._dispatch(jitted, bucket.packing.size, pack, args)
        except BaseException:
            self._host_table.give_back(changes)
            if windows is not None:
                windows.give_back(window_changes)
            raise
        return out

    def run_loop(self, step: Callable, plan: LoopPlan, *args: Any) -> tuple[Any, Any]:
        """Dispatches a decode loop. Returns its books, which are for a debug check to read, and its `out`."""
        jitted = self.compiled.find(step, plan.shape, lambda: whole_loop(step, plan.shape))
        self.send_changes()
        return self._dispatch(jitted, plan.shape.packing.size, plan.pack, args)

    def _dispatch(
        self, jitted: DonatingStep, size: int, pack: Callable[[np.ndarray], Any], args: tuple[Any, ...]
    ) -> Any:
        if size not in self._uploads:
            self._uploads[size] = Uploads(size, self._everywhere)
        slot = self._uploads[size].take()
        pack(slot.values)
        slot.fill_copies()
        self._pool, self.table, packed, out = jitted.on_own_pools(2, self.pool, self.table, slot.array, *args)
        self._uploads[size].give_back(slot, packed)
        return out

    def send_changes(self, room: int = 0, window_room: int = 0) -> None:
        """Sends changes ahead of a step that has room for no more than so many of them."""
        while self._host_table.num_changed() > room:
            with _sent(self._host_table) as patch:
                self.table = self._patch(self.table, *patch)
        while self._windows is not None and self._windows.num_changed() > window_room:
            with _sent(self._windows) as patch:
                self.pool = self._patch_map(self.pool, *patch)

    def copy_states(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies recurrent states, after what was dispatched before and before what is dispatched next.

        Args:
          source: int32 (n,); 0 makes the target zero.
          target: int32 (n,), distinct.
        """
        self.pool = self.pool.with_states(self.pool.states.copy_states(source, target))

    def warm_up(self) -> None:
        """Compiles what `send_changes` and `copy_states` run."""
        self.table = self._patch(self.table, *_patch_of_nothing())
        if self._windows is not None:
            self.pool = self._patch_map(self.pool, *_patch_of_nothing())
        if isinstance(self.pool, HybridKVPool):
            most = min(self._host_table.size, self.pool.config.states.num_states)
            self.pool = self.pool.with_states(self.pool.states.warmed_up(most))


class _Mirrored(Protocol):
    """A host table that the device follows."""

    def take_changes(self, limit: int) -> TableChanges: ...
    def give_back(self, changes: TableChanges) -> None: ...


@contextmanager
def _sent(host: _Mirrored) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The next changes, padded to one shape; they wait again if sending them fails."""
    changes = host.take_changes(TABLE_PATCH_ENTRIES)
    index, page = _patch_of_nothing()
    index[: len(changes.index)] = changes.index
    page[: len(changes.page)] = changes.page
    try:
        yield index, page
    except BaseException:
        host.give_back(changes)
        raise


def _patch_of_nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.full(TABLE_PATCH_ENTRIES, NOWHERE, np.int32), np.zeros(TABLE_PATCH_ENTRIES, np.int32)
