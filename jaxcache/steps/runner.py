"""The device's side of a manager: pool and request table, and the jitted steps that consume and replace them.

Everything a step is told travels in one packed vector. Changes of the request table and of the maps of components go
with it, or ahead of it where its bucket has no room for them.

Source: jaxcache's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcache.components.base import MemoryComponent
from jaxcache.device.donation import DonatingStep, donating, is_update
from jaxcache.device.packing import NOWHERE
from jaxcache.device.staging import Uploads
from jaxcache.errors import ArgumentError, ReleasedError
from jaxcache.pools.released import ReleasedPool
from jaxcache.pools.stack import MemoryPool
from jaxcache.steps.buckets import Bucket
from jaxcache.steps.compiled import CompiledSteps, Outcome, whole_loop, whole_step
from jaxcache.steps.loop import LoopShape
from jaxcache.steps.loop_plan import LoopPlan
from jaxcache.steps.plan import StepPlan
from jaxcache.steps.warm_up import Progress, compile_ahead
from jaxcache.tables.changes import TableChanges
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.request_table import ReqToTokenPool

TABLE_PATCH_ENTRIES = 8192
"""Table entries that travel by themselves when a step's bucket has no room for them."""


class StepRunner:
    """Pool and request table on the device, and what runs on them. Not thread-safe: its manager's thread owns it.

    Args:
      pool: The KV pool; the runner's from now on.
      host_table: What the device table follows.
      components: Whose maps the pool has copies of.

    Attributes:
      maps: Those maps.
      table: Device twin of the request table; likewise replaced.
      compiled: The jitted steps. Managers of equal sizes may share them.
      is_undone: The step that failed last has changed nothing.
    """

    def __init__(self, pool: MemoryPool, host_table: ReqToTokenPool, components: Sequence[MemoryComponent] = ()):
        self._pool: Any = pool
        self._mesh = pool.mesh
        self.is_undone = False
        self._released: ReleasedPool | None = None
        self.table: RequestTable = host_table.device_table(pool.mesh)
        self._everywhere: Sharding
        if pool.mesh is None:
            (device,) = jax.tree.leaves(pool)[0].devices()
            self._everywhere = SingleDeviceSharding(device)
            # Arrays that are bound to no device compile apart from those that are, as uploads must be.
            self.table = jax.device_put(self.table, device)
            if not pool.is_shared:  # this makes another pool of the same memory, of which no view would know
                self._pool = jax.device_put(pool, device)
        else:
            self._everywhere = NamedSharding(pool.mesh, PartitionSpec())
        self.compiled = CompiledSteps()
        self._host_table = host_table
        self._components = tuple(components)
        self.maps = tuple(device_map for component in components for device_map in component.maps)
        self._patches = {device_map.name: device_map.patched for device_map in self.maps}
        self._uploads: dict[int, Uploads] = {}
        self._patch = donating(RequestTable.patched)
        self._patch_map = {name: donating(patched) for name, patched in self._patches.items()}

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
        for device_map in self.maps:
            device_map.send_all()

    def revive(self, new_pool: Callable[[Mesh | None], MemoryPool]) -> None:
        """Replaces a pool or table that a step consumed without returning another, and sends every map again."""
        self._uploads.clear()
        if self._released is None and self._pool.is_stale:
            self._pool = new_pool(self._mesh)
            for device_map in self.maps:
                device_map.send_all()
        if self.table.is_stale:
            self.table = self._host_table.device_table(self._mesh)
        if self._mesh is None and self._released is None and not self._pool.is_shared:
            self._pool, self.table = jax.device_put((self._pool, self.table), self._everywhere)

    def run(self, step: Callable, plan: StepPlan, *args: Any) -> Outcome:
        """Dispatches a step and returns its `Outcome`. If it fails, its table changes wait again."""
        self.is_undone = False
        bucket, pool = plan.bucket, self._pool
        jitted = self._jitted(step, bucket)
        map_room = bucket.changes if bucket.maps else 0
        self.send_changes(bucket.changes, map_room)
        changes = self._host_table.take_changes(bucket.changes)
        map_changes = {device_map.name: device_map.take_changes(map_room) for device_map in self.maps}
        try:
            pack = functools.partial(plan.pack, changes, map_changes)
            out = self._dispatch(jitted, bucket.packing.size, pack, args)
        except BaseException:
            self._host_table.give_back(changes)
            for device_map in self.maps:
                device_map.give_back(map_changes[device_map.name])
            self.is_undone = self._pool is pool
            raise
        return out

    def run_loop(self, step: Callable, plan: LoopPlan, *args: Any) -> tuple[Any, Any]:
        """Dispatches a decode loop. Returns its final rows and allocator, for a debug check, and its `out`."""
        self.is_undone = False
        jitted = self._jitted(step, plan.shape)
        self.send_changes()
        pool = self._pool
        try:
            return self._dispatch(jitted, plan.shape.packing.size, plan.pack, args)
        except BaseException:
            self.is_undone = self._pool is pool
            raise

    def _dispatch(
        self, jitted: DonatingStep, size: int, pack: Callable[[np.ndarray], Any], args: tuple[Any, ...]
    ) -> Any:
        uploads = self._uploads_of(size)
        slot = uploads.take()
        pack(slot.values)
        slot.fill_copies()
        self._pool, self.table, packed, out = jitted.on_own_pools(2, self.pool, self.table, slot.array, *args)
        uploads.give_back(slot, packed)
        return out

    def _uploads_of(self, size: int) -> Uploads:
        if size not in self._uploads:
            self._uploads[size] = Uploads(size, self._everywhere)
        return self._uploads[size]

    def _jitted(self, step: Callable, shape: Bucket | LoopShape) -> DonatingStep:
        def build() -> DonatingStep:
            if isinstance(shape, LoopShape):
                return whole_loop(step, shape)
            return whole_step(step, shape, self._host_table.page_size, self._patches)

        return self.compiled.find(step, shape, build)

    def compile_ahead(
        self,
        step: Callable,
        shapes: Sequence[Bucket | LoopShape],
        args: tuple[Any, ...],
        threads: int | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Compiles a step or a loop for these shapes, in threads; see `jaxcache.steps.warm_up`.

        Steps on a pool that another framework shares take what to wait for as well: they compile when they first run.
        """
        if not self.pool.is_shared:
            lowered = (self._lowered(self._jitted(step, shape), shape.packing.size, args) for shape in shapes)
            compile_ahead(lowered, len(shapes), threads=threads, progress=progress)

    def _lowered(self, jitted: DonatingStep, size: int, args: tuple[Any, ...]) -> jax.stages.Lowered:
        uploads = self._uploads_of(size)
        slot = uploads.take()
        uploads.give_back(slot, slot.array)  # no step reads it
        return jitted.lower(self.pool, self.table, slot.array, *args)

    def send_changes(self, room: int = 0, map_room: int = 0) -> None:
        """Sends changes ahead of a step that has room for no more than so many of the table and of each map."""
        while self._host_table.num_changed() > room:
            with _sent(self._host_table) as patch:
                self.table = self._patch(self.table, *patch)
        for device_map in self.maps:
            while device_map.num_changed() > map_room:
                with _sent(device_map) as patch:
                    self.pool = self._patch_map[device_map.name](self.pool, *patch)

    def warm_up(self) -> None:
        """Compiles what `send_changes` and the copies of components run."""
        self.table = self._patch(self.table, *_patch_of_nothing())
        for device_map in self.maps:
            self.pool = self._patch_map[device_map.name](self.pool, *_patch_of_nothing())
        for component in self._components:
            self.pool = component.warmed_up(self.pool, self._host_table.size)


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
