"""What the KV pools have in common: sizes, layers, storage, and everything that treats the rows of all layers alike.

A pool is a frozen dataclass pytree. Its arrays are stacked over layers, `(layers, size + page_size, *row)`; the page
beyond `size` is page 0, the sink of padding, which is never handed out, never written and stays zero. An update returns
the new pool and consumes the old one. Inside a jitted step that owns the pool (donated, or carried by a loop) an update
is in place; outside, every method is itself such a step (see `jaxcache.donation`).

A pool never decides who owns a slot (`jaxcache.pages` does) and never looks at what a row holds.

Source: SGLang 0.5.2 memory_pool.py, KVCache.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec, Sharding
from jax.typing import ArrayLike

from jaxcache.donation import DevicePool, donating
from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import require_array
from jaxcache.kernels.copy_kv import gather_rows, move_rows, scatter_rows
from jaxcache.pools.config import KVCacheConfig, from_storage, require, storage_dtype, to_storage
from jaxcache.pools.layout import BufferInfo, layer_infos
from jaxcache.pools.sharding import mesh_of, on_every_shard, require_one_shard, sharding_on, zeros_on

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

    LayerId: TypeAlias = int | Int32[Array, ""]

__all__ = [
    "BufferInfo",
    "CpuCopy",
    "DevicePool",
    "KVCache",
    "KVCacheConfig",
    "from_storage",
    "storage_dtype",
    "to_storage",
]

COPY_BUCKET_TOKENS = 2048
"""Tokens that one step of `get_cpu_copy` and `load_cpu_copy` moves: one compilation serves every length."""

PoolT = TypeVar("PoolT", bound="KVCache")


@dataclass(frozen=True, eq=False)
class CpuCopy:
    """Rows of some tokens in host memory, independent of the pool they came from.

    Attributes:
      config: The configuration of that pool.
      buffers: `(layers, tokens, *row)` for each array of the pool, in its storage dtype. Owned by this object.
    """

    config: KVCacheConfig
    buffers: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens copied."""
        return self.buffers[0].shape[1]


@dataclass(frozen=True)
class KVCache(DevicePool, abc.ABC):
    """Base of the KV pools. Subclasses add one array field for each of `config.row_shapes`, in that order.

    Slots: `loc` arguments are one-dimensional. A NumPy array or list is checked against the pool before anything
    happens; an array on the device, or traced, is not read back: there, slots outside the pool read as zeros and are
    not written. Slots of one write must be distinct, except for the sink, slot 0, which is never written: a repeated
    slot is refused on the host, and keeps either row elsewhere. Under `jax.disable_jit()`, JAX's mode for debugging,
    nothing is traced, and every `loc` is read back and checked like one on the host.

    Layers are global ids. A Python int is checked; a traced one out of range reads as zeros and writes nothing.

    Inside a jit, read from the pool that the last update returned. A step that reads the old pool beside the new one
    makes XLA keep both: on the CPU a copy of the pool, even if the read comes first in the program.
    """

    config: KVCacheConfig

    @classmethod
    def create(
        cls,
        config: KVCacheConfig,
        *,
        device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
    ) -> Self:
        """A pool of zeros on `device`, by default JAX's default device; or on `mesh`, if the config names its axis.

        Raises:
          ArgumentError: if the mesh is missing, unwanted, or has no such axis, or `device` stands for several devices.
        """
        if mesh is not None or config.axis_name is not None:
            require(device is None, "device", "must be None for a pool on a mesh", device)
            return cls(config, *zeros_on(mesh, config))
        is_one = not isinstance(device, Sharding) or device.num_devices == 1
        require(is_one, "device", "must be one device; for several, pass mesh and set config.axis_name", device)
        platform = next(iter(jnp.zeros((), device=device).devices())).platform
        return cls(config, *(jnp.zeros(b.shape, b.dtype, device=device) for b in config.abstract_buffers(platform)))

    @classmethod
    def abstract(cls, config: KVCacheConfig, *, platform: str, mesh: Mesh | None = None) -> Self:
        """A pool of shapes without memory, to lower a step and prove it in place (`jaxcache.kernels.in_place`)."""
        buffers = config.abstract_buffers(platform)
        if mesh is not None or config.axis_name is not None:
            sharding = sharding_on(mesh, config)
            buffers = tuple(jax.ShapeDtypeStruct(b.shape, b.dtype, sharding=sharding) for b in buffers)
        return cls(config, *buffers)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that a sharded pool lies on; None for a pool on one device.

        Raises:
          ShardingError: if a sharded pool lies elsewhere, or is traced.
        """
        return mesh_of(self.config, self.buffers[0])

    def partition_specs(self) -> Self:
        """A pool of `PartitionSpec`s: what to give `jax.shard_map` as the pool's in_specs and out_specs."""
        return self.with_buffers(*[self.config.partition_spec] * len(self.buffers))  # pyright: ignore[reportArgumentType]

    @property
    def buffers(self) -> tuple[Shaped[Array, "layers slots *row"], ...]:
        """The stacked arrays, in storage dtype. They belong to the pool: a donated step consumes them."""
        return tuple(jax.tree_util.tree_leaves(self))

    def with_buffers(self, *buffers: Shaped[Array, "layers slots *row"]) -> Self:
        """A pool of the same configuration around other arrays."""
        return type(self)(self.config, *buffers)

    @abc.abstractmethod
    def get_key_buffer(self, layer: LayerId) -> Shaped[Array, " slots *row"]:
        """Keys of a layer, in the pool's dtype. Copies the layer; attention should read `buffers`, or `gather`."""

    @abc.abstractmethod
    def get_value_buffer(self, layer: LayerId) -> Shaped[Array, " slots *row"]:
        """Values of a layer, in the pool's dtype. Copies the layer; attention should read `buffers`, or `gather`."""

    def get_kv_buffer(self, layer: LayerId) -> tuple[Shaped[Array, " slots *row"], Shaped[Array, " slots *row"]]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer), self.get_value_buffer(layer)

    def gather(self, loc: Int32[Array, " n"], layer: LayerId | None = None) -> Any:
        """Reads the rows of `n` slots.

        Args:
          loc: Slots, in any order, with repeats. On the device or traced, slots outside the pool read as zeros.
          layer: Global id of one layer, or None for all of them.

        Returns:
          `(n, *row)`, or `(layers, n, *row)` for all layers, in the pool's dtype: `(k, v)` for a pool of keys and
          values, one array for an MLA pool.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on a layer or slot outside the pool.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: reads and writes `n` rows, a layer.
        """
        self.require_live()
        self._require_one_shard()
        loc = self._checked_loc("loc", loc)
        rows = _gather(self, loc, None if layer is None else self._layer_index(layer))
        return rows if len(rows) > 1 else rows[0]

    def set_all_layers(self, loc: Int32[Array, " n"], *rows: Shaped[Array, "layers n *row"]) -> Self:
        """Writes the rows of `n` tokens in every layer: the inverse of `gather(loc)`.

        Args:
          loc: Slot of each token.
          *rows: `(layers, n, *row)` for each array of the pool: k and v, or the latent rows. Cast to the pool's dtype.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on wrong shapes or dtypes, slots outside the pool, or a slot named twice.
          ShardingError: if this pool is sharded and this is not one shard of it.
        """
        self._require_one_shard()
        loc = self._target_loc("loc", loc)
        require(len(rows) == len(self.buffers), "rows", f"must be {len(self.buffers)} arrays", len(rows))
        for i, (array, row) in enumerate(zip(rows, self.config.shard_row_shapes, strict=True)):
            self._check_rows(f"rows[{i}]", array, (self.config.layer_num, loc.shape[0], *row))
        return _set_all_layers(self, loc, *rows)

    def move_kv_cache(self, tgt_loc: Int32[Array, " n"], src_loc: Int32[Array, " n"]) -> Self:
        """Copies slot `src_loc[i]` to slot `tgt_loc[i]` in every layer, all at the same instant: the lists may overlap.

        Args:
          tgt_loc: Slots to write, distinct but for 0. Lists on the host are padded to a power of two, so that few
            shapes compile.
          src_loc: Slots to read, as many.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on lists of different lengths, slots outside the pool, or a target named twice.
          ShardingError: if this pool is sharded and this is not one shard of it.

        Cost: `n` rows of every layer are read and written twice, through a temporary of that size.
        Source: SGLang 0.5.2 memory_pool.py, MHATokenToKVPool.move_kv_cache and copy_all_layer_kv_cache.
        """
        self._require_one_shard()
        tgt_loc, src_loc = self._target_loc("tgt_loc", tgt_loc), self._checked_loc("src_loc", src_loc)
        rule = f"must be as many as src_loc, {src_loc.shape[0]}"
        require(tgt_loc.shape == src_loc.shape, "tgt_loc", rule, tgt_loc.shape[0])
        if isinstance(tgt_loc, np.ndarray) and isinstance(src_loc, np.ndarray):
            bucket = 1 << max(4, (len(tgt_loc) - 1).bit_length())
            return _move(self, _pad(tgt_loc, bucket), _pad(src_loc, bucket))
        return _move(self, tgt_loc, src_loc)

    def get_cpu_copy(self, indices: Int32[ArrayLike, " n"]) -> CpuCopy:
        """Copies the rows of `n` slots of every layer to host memory, as for a retracted request. Blocks until done.

        A sharded pool is copied whole, each shard by its own device; call this outside `jax.shard_map` and jit.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on slots outside the pool.
          ShardingError: if this pool is sharded and lies elsewhere than on its mesh, or is traced.

        Cost: `n` rows of every layer over the host link, 2,048 tokens at a time.
        Source: SGLang 0.5.2 memory_pool.py, get_cpu_copy.
        """
        self.require_live()
        mesh = self.mesh
        slots = self._host_loc("indices", indices)
        copies = tuple(
            np.empty((self.config.layer_num, len(slots), *buffer.shape[2:]), buffer.dtype) for buffer in self.buffers
        )
        for start, chunk in _chunks(slots):
            for copy, rows in zip(copies, _read(self, _pad(chunk, COPY_BUCKET_TOKENS), mesh=mesh), strict=True):
                copy[:, start : start + len(chunk)] = np.asarray(rows)[:, : len(chunk)]
        return CpuCopy(self.config, copies)

    def load_cpu_copy(self, copy: CpuCopy, indices: Int32[ArrayLike, " n"]) -> Self:
        """Writes rows taken by `get_cpu_copy` to as many slots, the same or others, of this pool or a like one.

        The pools may be sharded differently: a copy holds whole rows.

        Args:
          copy: What `get_cpu_copy` returned. Stays valid.
          indices: A distinct slot for each copied token, in the order of the copy.

        Returns:
          The updated pool; this one is consumed (unless there is nothing to load).

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: on another number of tokens, another kind of pool, or slots outside the pool or named twice.
          ShardingError: if this pool is sharded and lies elsewhere than on its mesh, or is traced.

        Cost: `n` rows of every layer over the host link, 2,048 tokens at a time.
        Source: SGLang 0.5.2 memory_pool.py, load_cpu_copy.
        """
        require(isinstance(copy, CpuCopy), "copy", "must be what get_cpu_copy returned", type(copy).__name__)
        slots = self._host_loc("indices", indices)
        require(len(slots) == copy.num_tokens, "indices", f"must name {copy.num_tokens} slots, one a token", len(slots))
        _require_distinct("indices", slots)
        mine, theirs = (_row_layout(config) for config in (self.config, copy.config))
        require(mine == theirs, "copy", f"must come from a pool of the same layers, rows and dtype, {mine}", theirs)
        pool, mesh = self, self.mesh
        for start, chunk in _chunks(slots):
            rows = (
                _pad(stored[:, start : start + len(chunk)].view(buffer.dtype), COPY_BUCKET_TOKENS, axis=1)
                for stored, buffer in zip(copy.buffers, pool.buffers, strict=True)
            )
            if mesh is not None:  # a mesh of explicit axes wants them cut beforehand
                rows = (jax.device_put(r, b.sharding) for r, b in zip(rows, pool.buffers, strict=True))
            pool = _load(pool, _pad(chunk, COPY_BUCKET_TOKENS), *rows, mesh=mesh)
        return pool

    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where each layer of each array lies: all layers of the first array, then of the second.

        Of a sharded pool this is one device's share, and the same on all of them.

        Source: SGLang 0.5.2 memory_pool.py, get_contiguous_buf_infos, which returns pointers, sizes and bytes per page.
        """
        paths = jax.tree_util.tree_flatten_with_path(self)[0]
        return tuple(
            info
            for (path, buffer), row in zip(paths, self.config.shard_row_shapes, strict=True)
            for info in layer_infos(self.config, path[0].name, row, buffer.dtype.itemsize)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays, the sink page included; over all shards, a copy on several devices counted once."""
        return sum(_nbytes(buffer) for buffer in self.buffers)

    def maybe_get_custom_mem_pool(self) -> None:
        """None: XLA allocates the pool. Kept for callers of SGLang's name."""

    def _require_one_shard(self) -> None:
        """Refuses a device op on a sharded pool outside `jax.shard_map`."""
        require_one_shard(self.config, self.buffers)

    def _layer_index(self, layer: LayerId) -> Any:
        """The index into the stack of a global layer id."""
        first, count = self.config.start_layer, self.config.layer_num
        if isinstance(layer, (int, np.integer)):
            require(first <= layer < first + count, "layer", f"must be in [{first}, {first + count})", layer)
            return np.int32(layer - first)
        require_array("layer", layer)
        return layer - first

    def _checked_loc(self, name: str, loc: Any) -> Any:
        """Slots as int32: a checked NumPy array if they are on the host, unread if on the device or traced."""
        is_debugging = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(loc, jax.Array) and (isinstance(loc, Tracer) or not is_debugging):
            require(loc.ndim == 1 and loc.dtype == jnp.int32, name, "must be one-dimensional int32", jax.typeof(loc))
            return loc
        slots = np.asarray(loc)
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

    def _target_loc(self, name: str, loc: Any) -> Any:
        """`_checked_loc` of slots to write, which must be distinct."""
        loc = self._checked_loc(name, loc)
        if isinstance(loc, np.ndarray):
            _require_distinct(name, loc)
        return loc

    def _host_loc(self, name: str, indices: Any) -> np.ndarray:
        """`_checked_loc` of slots that are read back from the device if they are there."""
        if isinstance(indices, Tracer):
            raise ArgumentError(f"{name} must be known on the host: call this method outside jit, or use gather")
        return self._checked_loc(name, np.asarray(indices))

    def _check_rows(self, name: str, rows: Any, shape: tuple[int, ...]) -> None:
        """Refuses rows of another shape, or of a dtype that a cast would spoil."""
        require_array(name, rows)
        require(rows.shape == shape, name, f"must have shape {shape}", rows.shape)
        dtype = np.dtype(self.config.dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            require(jnp.issubdtype(rows.dtype, jnp.floating), name, f"must be floats, for a {dtype} pool", rows.dtype)
        else:
            require(rows.dtype == dtype, name, f"must be quantised to the pool's {dtype} by the caller", rows.dtype)

    def _stored(self, rows: ArrayLike, scale: ArrayLike | None = None) -> jax.Array:
        """Rows as this pool stores them, divided by `scale` in float32 before the cast."""
        if scale is not None:
            rows = jnp.asarray(rows, jnp.float32) / jnp.asarray(scale, jnp.float32)
        return to_storage(rows, self.config.dtype, self.buffers[0].dtype)

    def _layer_rows(self, buffer: jax.Array, layer: LayerId) -> jax.Array:
        """One layer of a stacked array, in the pool's dtype. A copy."""
        self.require_live()
        self._require_one_shard()
        index = self._layer_index(layer)
        rows = buffer.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return from_storage(rows, self.config.dtype)


@jax.jit
def _gather(pool: KVCache, loc: jax.Array, layer: jax.Array | None) -> tuple[jax.Array, ...]:
    if layer is None:
        rows = _gather_stored(pool, loc)
    else:
        rows = (b.at[layer, loc].get(mode="fill", fill_value=0, wrap_negative_indices=False) for b in pool.buffers)
    return tuple(from_storage(array, pool.config.dtype) for array in rows)


@jax.jit
def _gather_stored(pool: KVCache, loc: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(gather_rows(buffer, loc) for buffer in pool.buffers)


@donating
def _scatter_stored(pool: PoolT, loc: jax.Array, *rows: jax.Array) -> PoolT:
    return pool.with_buffers(*(scatter_rows(b, loc, r) for b, r in zip(pool.buffers, rows, strict=True)))


@functools.partial(jax.jit, static_argnames="mesh")
def _read(pool: KVCache, loc: jax.Array, *, mesh: Mesh | None) -> tuple[jax.Array, ...]:
    specs = pool.partition_specs()
    return on_every_shard(_gather_stored, mesh, (specs, PartitionSpec()), specs.buffers)(pool, loc)


@functools.partial(donating, static_argnames="mesh")
def _load(pool: PoolT, loc: jax.Array, *rows: jax.Array, mesh: Mesh | None) -> PoolT:
    specs = pool.partition_specs()
    load = on_every_shard(_scatter_stored, mesh, (specs, PartitionSpec(), *specs.buffers), specs)
    return load(pool, loc, *rows)


@donating
def _set_all_layers(pool: PoolT, loc: jax.Array, *rows: ArrayLike) -> PoolT:
    return _scatter_stored(pool, loc, *map(pool._stored, rows))


@donating
def _move(pool: PoolT, tgt_loc: Any, src_loc: Any) -> PoolT:
    return pool.with_buffers(*(move_rows(buffer, tgt_loc, src_loc) for buffer in pool.buffers))


def _nbytes(buffer: Any) -> int:
    return math.prod(buffer.shape) * buffer.dtype.itemsize


def _row_layout(config: KVCacheConfig) -> tuple[Any, ...]:
    return config.layer_num, config.row_shapes, config.dtype


def _chunks(slots: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(slots), COPY_BUCKET_TOKENS):
        yield start, slots[start : start + COPY_BUCKET_TOKENS]


def _pad(array: np.ndarray, length: int, axis: int = 0) -> np.ndarray:
    """`array` with zeros behind: rows of nothing for slot 0, the sink."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(array, widths)


def _require_distinct(name: str, slots: np.ndarray) -> None:
    used = np.sort(slots[slots != 0])
    repeated = used[1:][used[1:] == used[:-1]]
    require(not len(repeated), name, "must name each slot once (0 is padding), but repeats slot", repeated[:1])
