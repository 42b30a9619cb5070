"""What all pools have in common: how they are made, where they lie, how rows are named, and copies to the host.

A pool is a frozen dataclass pytree. The arrays of a `LayerStack` hold as many rows for each layer, by default stacked
as `(layers, rows, *row)`; `jaxcache.pools.layout` says what else there is. Row 0 of each layer is the sink of padding,
which is never handed out, never written and stays zero. An update returns the new pool and consumes the old one. Inside
a jitted step that owns the pool (donated, or carried by a loop) an update is in place; outside, every method is itself
such a step (see `jaxcache.device.donation`).

A pool never decides who owns a row (`jaxcache.pages` does) and never looks at what a row holds.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec, Sharding
from jax.typing import ArrayLike

from jaxcache.device.donation import donating, reading
from jaxcache.device.placing import on_host, zeros
from jaxcache.device.pool import DevicePool
from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import require_array
from jaxcache.kernels.copy_kv import gather_rows, scatter_rows
from jaxcache.pools.buffers import BufferInfo
from jaxcache.pools.config import PoolConfig, require
from jaxcache.pools.copies import CpuCopy, PoolCopy
from jaxcache.pools.identity import require_same_rows
from jaxcache.pools.rows import pad_to, read_back, require_distinct
from jaxcache.pools.sharding import mesh_of, on_every_shard, require_one_shard, sharding_on, zeros_on

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

    LayerId: TypeAlias = int | Int32[Array, ""]

PoolT = TypeVar("PoolT", bound="LayerStack")


class MemoryPool(DevicePool, abc.ABC):
    """What a manager needs of its pool, be it one stack of layers or several pools in one.

    Attributes:
      config: The sizes.
    """

    copy_type: ClassVar[type[PoolCopy]]
    """What `get_cpu_copy` returns."""

    config: Any

    @classmethod
    @abc.abstractmethod
    def create(
        cls,
        config: Any,
        *,
        device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
    ) -> Self:
        """A pool of zeros on `device`, by default JAX's default device; or on `mesh`, if the config names its axis.

        Raises:
          ArgumentError: if the mesh is missing, unwanted, or has no such axis, or `device` stands for several devices.
        """

    @classmethod
    @abc.abstractmethod
    def abstract(cls, config: Any, *, platform: str, mesh: Mesh | None = None) -> Self:
        """A pool of shapes without memory, to lower a step and prove it in place (`jaxcache.kernels.in_place`)."""

    @property
    @abc.abstractmethod
    def mesh(self) -> Mesh | None:
        """The mesh that a sharded pool lies on; None for a pool on one device.

        Raises:
          ShardingError: if a sharded pool lies elsewhere, or is traced.
        """

    @abc.abstractmethod
    def partition_specs(self) -> Self:
        """A pool of `PartitionSpec`s: what to give `jax.shard_map` as the pool's in_specs and out_specs."""

    @abc.abstractmethod
    def get_cpu_copy(self, indices: Int32[ArrayLike, " n"]) -> Any:
        """Copies what `n` slots hold to host memory, as for a retracted request. Blocks until done."""

    @abc.abstractmethod
    def load_cpu_copy(self, copy: Any, indices: Int32[ArrayLike, " n"]) -> Self:
        """Writes what `get_cpu_copy` took to as many slots. Returns the updated pool; this one is consumed."""

    def copy_tokens(self, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> Self:
        """Copies all that the pool has of the tokens in some slots to as many others, which are distinct.

        Returns:
          The updated pool; this one is consumed.

        Cost: as `move_kv_cache`; on a mesh by way of host memory.
        """
        return self.load_cpu_copy(self.get_cpu_copy(source), target)

    def require_copy_of_such(self, copy: Any) -> None:
        """Raises ArgumentError, naming both pools, unless `copy` was taken of rows like this pool's."""
        if not isinstance(copy, self.copy_type):
            mine = type(self.config).__name__
            theirs = f" of a {type(copy.config).__name__}, not of a {mine}" if isinstance(copy, PoolCopy) else ""
            raise ArgumentError(f"copy must be what get_cpu_copy returned; got {type(copy).__name__}{theirs}")
        require_same_rows("copy", self.config, copy.config)

    @abc.abstractmethod
    def stacks(self) -> dict[str, LayerStack]:
        """The stacks of layers that the pool consists of, by name; a new dict each time."""

    @abc.abstractmethod
    def with_stacks(self, stacks: Mapping[str, Any]) -> Self:
        """The pool with these stacks, which are updates of its own, one for each name of `stacks()`."""

    def token_rows(self, loc: Int32[ArrayLike, " n"]) -> dict[str, Any]:
        """Row of each of `n` slots in the stacks that have one a token, by name; 0, the sink, where there is none."""
        raise NotImplementedError(f"{type(self).__name__} has rows for no tokens")

    @abc.abstractmethod
    def get_kv_size_bytes(self) -> Any:
        """Bytes of the arrays, the sink included: one number, or one for each part of a row."""

    @abc.abstractmethod
    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where the rows lie, array by array. Of a sharded pool this is one device's share."""


@dataclass(frozen=True)
class LayerStack(MemoryPool):
    """Base of the pools that are one stack of layers. Subclasses add an array field for each of `config.row_shapes`.

    Rows: `loc` arguments are one-dimensional. A NumPy array or list is checked against the pool before anything
    happens; an array on the device, or traced, is not read back: there, rows outside the pool read as zeros and are not
    written. Rows of one write must be distinct, except for the sink, row 0, which is never written: a repeated row is
    refused on the host; elsewhere each of its elements is one of the values. Under `jax.disable_jit()`, nothing
    is traced, and every `loc` is read back and checked like one on the host.

    Layers are global ids. A Python int is checked; a traced one out of range reads as zeros and writes nothing.

    Inside a jit, read from the pool that the last update returned. A step that reads the old pool beside the new one
    makes XLA keep both: on the CPU a copy of the pool, even if the read comes first in the program.
    """

    copy_type = CpuCopy
    rows_per_copy: ClassVar[int] = 1
    """Rows of each layer that one step of `get_cpu_copy` and `load_cpu_copy` moves: one compilation serves every
    length."""

    config: PoolConfig

    @classmethod
    def create(
        cls,
        config: PoolConfig,
        *,
        device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
    ) -> Self:
        if mesh is not None or config.axis_name is not None:
            require(device is None, "device", "must be None for a pool on a mesh", device)
            return cls(config, *zeros_on(mesh, config))
        is_one = not isinstance(device, Sharding) or device.num_devices == 1
        require(is_one, "device", "must be one device; for several, pass mesh and set config.axis_name", device)
        platform = next(iter(zeros((), bool, device).devices())).platform
        return cls(config, *(zeros(b.shape, b.dtype, device) for b in config.abstract_buffers(platform)))

    @classmethod
    def abstract(cls, config: PoolConfig, *, platform: str, mesh: Mesh | None = None) -> Self:
        buffers = config.abstract_buffers(platform)
        if mesh is not None or config.axis_name is not None:
            sharding = sharding_on(mesh, config)
            buffers = tuple(jax.ShapeDtypeStruct(b.shape, b.dtype, sharding=sharding) for b in buffers)
        return cls(config, *buffers)

    @property
    def mesh(self) -> Mesh | None:
        return mesh_of(self.config, self.buffers[0])

    def partition_specs(self) -> Self:
        return type(self)(self.config, *[self.config.partition_spec] * len(self.buffers))

    def stacks(self) -> dict[str, LayerStack]:
        return {"kv": self}

    def with_stacks(self, stacks: Mapping[str, Any]) -> Self:
        return stacks["kv"]

    def with_buffers(self, *buffers: Shaped[Array, "layers rows *row"]) -> Self:
        """A pool of the same configuration around other arrays."""
        return type(self)(self.config, *buffers)

    def get_cpu_copy(self, indices: Int32[ArrayLike, " n"]) -> CpuCopy:
        """Copies `n` rows of every layer to host memory, as for a retracted request. Blocks until done.

        A sharded pool is copied whole, each shard by its own device; call this outside `jax.shard_map` and jit.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on rows outside the pool.
          ShardingError: if this pool is sharded and lies elsewhere than on its mesh, or is traced.

        Cost: `n` rows of every layer over the host link, `rows_per_copy` at a time.
        Source: SGLang 0.5.2 memory_pool.py, get_cpu_copy.
        """
        self.require_live()
        mesh = self.mesh
        slots = self.host_loc("indices", indices)
        copies = tuple(
            np.empty((self.config.layer_num, len(slots), *buffer.shape[2:]), buffer.dtype) for buffer in self.buffers
        )
        for start, chunk in self._chunks(slots):
            for copy, rows in zip(copies, _read(self, pad_to(chunk, self.rows_per_copy), mesh=mesh), strict=True):
                copy[:, start : start + len(chunk)] = on_host(rows)[:, : len(chunk)]
        return CpuCopy(self.config, copies)

    def load_cpu_copy(self, copy: CpuCopy, indices: Int32[ArrayLike, " n"]) -> Self:
        """Writes rows taken by `get_cpu_copy` to as many rows, the same or others, of this pool or a like one.

        A like one has the same layers, by their ids, and the same kind, shapes and dtypes of rows. Size, page size,
        layout and sharding may differ: a copy holds whole rows.

        Args:
          copy: What `get_cpu_copy` returned. Stays valid.
          indices: A distinct row for each that was copied, in the order of the copy.

        Returns:
          The updated pool; this one is consumed (unless there is nothing to load).

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on another number of rows, a copy of other layers or of another kind of rows, or rows outside
            the pool or named twice.
          ShardingError: if this pool is sharded and lies elsewhere than on its mesh, or is traced.

        Cost: `n` rows of every layer over the host link, `rows_per_copy` at a time.
        Source: SGLang 0.5.2 memory_pool.py, load_cpu_copy.
        """
        slots = self.require_loadable(copy, indices)
        pool, mesh = self, self.mesh
        for start, chunk in self._chunks(slots):
            rows = (
                pad_to(on_host(stored)[:, start : start + len(chunk)].view(buffer.dtype), self.rows_per_copy, axis=1)
                for stored, buffer in zip(copy.buffers, pool.buffers, strict=True)
            )
            if mesh is not None:  # a mesh of explicit axes wants them cut beforehand
                rows = (jax.device_put(r, b.sharding) for r, b in zip(rows, pool.buffers, strict=True))
            pool = _load(pool, pad_to(chunk, self.rows_per_copy), *rows, mesh=mesh)
        return pool

    def start_copy(self, rows: Int32[np.ndarray, " n"]) -> CpuCopy:
        """Starts to copy `n` rows of every layer to page-locked host memory, in storage dtype; waits for nothing.

        For parts of one size: each `n` compiles once. `np.asarray` of a buffer of the copy waits for it; of a pool on
        one GPU it is that memory itself. A step that is dispatched next may overwrite the rows.

        Raises:
          StalePoolError: if the pool was consumed.
          ShardingError: if this pool is sharded and lies elsewhere than on its mesh, or is traced.

        Cost: `n` rows of every layer over the host link, and room for them on the device meanwhile.
        """
        copies = _read(self, rows, mesh=self.mesh)
        pinned = (jax.device_put(copy, copy.sharding.with_memory_kind("pinned_host")) for copy in copies)
        return CpuCopy(self.config, tuple(pinned))

    def placed(self, copy: CpuCopy) -> CpuCopy:
        """Rows of every layer from host memory, in storage dtype, on the devices of the pool. Threads may call it.

        Raises:
          ArgumentError: on a copy of other layers or of another kind of rows.
        """
        self.require_copy_of_such(copy)
        where = self.buffers[0].sharding
        pinned = [jax.device_put(buffer, where.with_memory_kind("pinned_host")) for buffer in copy.buffers]
        return CpuCopy(copy.config, tuple(jax.device_put(buffer, where) for buffer in pinned))

    def with_rows(self, rows: Int32[np.ndarray, " n"], copy: CpuCopy) -> Self:
        """Writes what `placed` returned to rows of every layer, distinct but for 0. Each `n` compiles once.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on a copy of other layers or of another kind of rows.
        """
        self.require_copy_of_such(copy)
        values: Any = copy.buffers
        return _load(self, rows, *values, mesh=self.mesh)

    def require_loadable(self, copy: CpuCopy, indices: Int32[ArrayLike, " n"]) -> Int32[np.ndarray, " n"]:
        """Refuses what `load_cpu_copy` would refuse, and returns the rows as int32."""
        self.require_copy_of_such(copy)
        slots = self.host_loc("indices", indices)
        require(len(slots) == copy.num_tokens, "indices", f"must name {copy.num_tokens} slots, one a token", len(slots))
        require_distinct("indices", slots)
        return slots

    def _chunks(self, slots: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(slots), self.rows_per_copy):
            yield start, slots[start : start + self.rows_per_copy]

    def _require_one_shard(self) -> None:
        """Refuses a device op on a sharded pool outside `jax.shard_map`."""
        require_one_shard(self.config, self.buffers)

    def _layer_index(self, layer: LayerId) -> Any:
        """The index into the stack of a global layer id."""
        if not isinstance(layer, (int, np.integer)):
            require_array("layer", layer)
            is_id = layer.shape == () and layer.dtype == np.int32
            require(is_id, "layer", "must be an int or an int32 scalar", f"{layer.dtype}{list(layer.shape)}")
        return self.config.layer_index(layer)

    def checked_loc(self, name: str, loc: Any) -> Any:
        """Rows as int32: a checked NumPy array if they are on the host, unread if on the device or traced."""
        is_debugging = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(loc, jax.Array) and (isinstance(loc, Tracer) or not is_debugging):
            require(loc.ndim == 1 and loc.dtype == jnp.int32, name, "must be one-dimensional int32", jax.typeof(loc))
            return loc
        slots = read_back(name, loc)
        is_list = slots.ndim == 1 and (slots.size == 0 or np.issubdtype(slots.dtype, np.integer))
        require(is_list, name, "must be a one-dimensional list of integers", f"{slots.dtype}{list(slots.shape)}")
        outside = (slots < 0) | (slots >= self.config.rows)
        if outside.any():
            i = int(outside.argmax())
            raise ArgumentError(
                f"{name}[{i}] must be a slot in [0, {self.config.rows}), got {slots[i]}: "
                "pass slots of this pool's allocator, and 0 for padding"
            )
        return slots.astype(np.int32)

    def target_loc(self, name: str, loc: Any) -> Any:
        """`checked_loc` of rows to write, which must be distinct."""
        loc = self.checked_loc(name, loc)
        if isinstance(loc, np.ndarray):
            require_distinct(name, loc)
        return loc

    def host_loc(self, name: str, indices: Any) -> np.ndarray:
        """`checked_loc` of rows that are read back from the device if they are there."""
        if isinstance(indices, Tracer):
            raise ArgumentError(f"{name} must be known on the host: call this method outside jit, or use gather")
        return self.checked_loc(name, read_back(name, indices))

    def _gather_stored(self, loc: Any, layer: Any = None) -> tuple[jax.Array, ...]:
        """Rows in storage dtype, of all layers or of the layer with this index."""
        placement, layers, n = self.config.placement, self.config.layer_num, loc.shape[0]
        if layer is None:
            loc = placement.locate_all(loc)
            return tuple(gather_rows(b, loc).reshape(layers, n, *b.shape[2:]) for b in self.buffers)
        at = placement.locate(layer, loc)
        return tuple(b.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False) for b in self.buffers)

    def _scatter_stored(self, loc: Any, *rows: jax.Array) -> Self:
        """Rows in storage dtype to all layers."""
        loc = self.config.placement.locate_all(loc)
        pairs = zip(self.buffers, rows, strict=True)
        return self.with_buffers(
            *(scatter_rows(b, loc, r.reshape(b.shape[0], *loc.shape, *b.shape[2:])) for b, r in pairs)
        )


@functools.partial(reading, static_argnames="mesh")
def _read(pool: LayerStack, loc: Any, *, mesh: Mesh | None) -> tuple[jax.Array, ...]:
    specs = pool.partition_specs()
    read = on_every_shard(lambda pool, loc: pool._gather_stored(loc), mesh, (specs, PartitionSpec()), specs.buffers)
    return read(pool, loc)


@functools.partial(donating, static_argnames="mesh")
def _load(pool: PoolT, loc: Any, *rows: jax.Array, mesh: Mesh | None) -> PoolT:
    specs = pool.partition_specs()
    in_specs = specs, PartitionSpec(), *specs.buffers
    return on_every_shard(lambda pool, loc, *rows: pool._scatter_stored(loc, *rows), mesh, in_specs, specs)(
        pool, loc, *rows
    )
