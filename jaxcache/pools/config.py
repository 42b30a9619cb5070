"""The static part of a pool: its sizes, its layers, where it lies, and how its rows are stored.

Source: SGLang 0.5.2 memory_pool.py, the constructor of KVCache.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxcache.errors import ArgumentError, shown
from jaxcache.kernels.float8 import FLOAT8_DTYPES, float8_bits
from jaxcache.pools.layout import LayerMajor, Layout, PageMajor

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped


_POOL_DTYPES = tuple(
    map(
        np.dtype,
        (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8, jnp.uint8),
    )
)
_CPU_STORAGE = {2: np.dtype(np.uint16), 1: np.dtype(np.uint8)}


def storage_dtype(dtype: DTypeLike, platform: str) -> np.dtype:
    """The dtype of a pool's arrays on `platform` ("cpu", "gpu"), for rows of `dtype`.

    XLA:CPU carries out a scatter into bfloat16 or float8 by converting the whole pool to float32 and back. There,
    floats of 16 and 8 bits are stored as unsigned integers of their width, and rows, never the pool, are bitcast.
    """
    dtype = np.dtype(dtype)
    if platform == "cpu" and jnp.issubdtype(dtype, jnp.floating):
        return _CPU_STORAGE.get(dtype.itemsize, dtype)
    return dtype


def to_storage(rows: ArrayLike, dtype: DTypeLike, storage: DTypeLike) -> Shaped[Array, "*rows"]:
    """Casts `rows` to the pool's `dtype`, rounding to nearest even, and reinterprets the bits as `storage`.

    What is too large for float8 saturates (`jaxcache.kernels.float8`); for float16 and bfloat16 it becomes an infinity.
    Rows of the pool's dtype keep their bits.
    """
    rows, dtype = jnp.asarray(rows), np.dtype(dtype)
    if dtype in FLOAT8_DTYPES and rows.dtype != dtype:
        return _bitcast(float8_bits(rows, dtype), storage)
    return _bitcast(rows.astype(dtype), storage)


def from_storage(rows: Shaped[Array, "*rows"], dtype: DTypeLike) -> Shaped[Array, "*rows"]:
    """Reinterprets stored rows as the pool's `dtype`. A bitcast, which XLA fuses into what reads the rows."""
    return _bitcast(rows, dtype)


def _bitcast(rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    return rows if rows.dtype == dtype else jax.lax.bitcast_convert_type(rows, dtype)


@dataclass(frozen=True, kw_only=True)
class PoolConfig(abc.ABC):
    """Sizes of a pool of arrays that hold `rows` rows for each layer: the static part of its pytree.

    Attributes:
      layer_num: Layers that have rows here.
      start_layer: Global id of the first of them (pipeline parallelism).
      end_layer: Global id of the last of them; None means `start_layer + layer_num - 1`, and any other value is
        refused.
      layers: Global ids of them in the order of the stack, where they are not consecutive: `(3, 7, 11)` for a model in
        which every fourth layer attends. None: `start_layer .. end_layer`.
      axis_name: Mesh axis that the pool is sharded over, or None for a pool on one device. Every op on a sharded pool
        runs inside a `jax.shard_map` over that axis; see `jaxcache.pools.sharding`.
      shards: Devices along that axis.
      global_layers: Ids in the model of the layers of one side of an `SWAConfig`, which sets it; None where they are
        `start_layer` and those that follow. Methods count from `start_layer` nevertheless: this tells rows apart.

    Raises:
      ArgumentError: on sizes that do not fit together.
    """

    cuts_rows: ClassVar[bool] = False
    """Whether a shard holds a part of each row, cut along its first dimension; else it holds copies of whole rows."""

    layer_num: int
    start_layer: int = 0
    end_layer: int | None = None
    layers: tuple[int, ...] | None = None
    axis_name: str | None = None
    shards: int = 1
    global_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_positive(self, "layer_num", "shards")
        if self.layers is not None:
            require_layers("layers", self.layers, self.layer_num)
            is_default = self.start_layer == 0 and self.end_layer is None
            require(
                is_default, "start_layer", "must be 0, and end_layer None, where layers are named", self.start_layer
            )
        is_layer = isinstance(self.start_layer, (int, np.integer)) and bool(self.start_layer >= 0)
        require(is_layer, "start_layer", "must be an integer and not negative", self.start_layer)
        last = self.start_layer + self.layer_num - 1
        rule = f"must be {last}, for {self.layer_num} layers from layer {self.start_layer} on, or None"
        require(self.end_layer in (None, last), "end_layer", rule, self.end_layer)
        require(self.axis_name is not None or self.shards == 1, "shards", "must be 1 without an axis_name", self.shards)
        if self.global_layers is not None:
            require_layers("global_layers", self.global_layers, self.layer_num)
        object.__setattr__(self, "end_layer", last if self.layers is None else None)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Global ids of the layers, in the order of the stack."""
        return self.layers or tuple(range(self.start_layer, self.start_layer + self.layer_num))

    def layer_index(self, layer: Any) -> Any:
        """The index into the stack of a global layer id; of a traced id that names no layer, one outside the stack.

        Raises:
          ArgumentError: if an id on the host names no layer, or is not an integer.
        """
        if isinstance(layer, (int, np.integer)):
            if self.layers is not None:
                require(layer in self.layers, "layer", f"must be one of {self.layers}", layer)
                return np.int32(self.layers.index(layer))
            first, count = self.start_layer, self.layer_num
            require(bool(first <= layer < first + count), "layer", f"must be in [{first}, {first + count})", layer)
            return np.int32(layer - first)
        if self.layers is None:
            return layer - self.start_layer
        found = jnp.asarray(self.layers, jnp.int32) == layer
        return jnp.where(found.any(), jnp.argmax(found), -1).astype(jnp.int32)

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Rows of each layer, the sink included."""

    @property
    @abc.abstractmethod
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of a row in each array of the pool, in the order of the arrays, over all shards."""

    @property
    @abc.abstractmethod
    def row_dtypes(self) -> tuple[np.dtype, ...]:
        """What the rows of each array are to the caller."""

    @property
    def pool_type(self) -> type[Any]:
        """The class of the pools of these sizes."""
        raise ArgumentError(f"config must be of a kind that there is a pool for, got {type(self).__name__}")

    @property
    def shard_row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes as one device sees them."""
        if not self.cuts_rows:
            return self.row_shapes
        return tuple((first // self.shards, *rest) for first, *rest in self.row_shapes)

    @property
    def placement(self) -> LayerMajor:
        """Where the rows of all layers lie in the arrays."""
        return LayerMajor(self.layer_num, self.rows)

    @property
    def partition_spec(self) -> PartitionSpec:
        """How each array of the pool lies on a mesh, and rows of all layers, `(layers, n, *row)`."""
        is_cut = self.cuts_rows and self.axis_name is not None
        return PartitionSpec(None, None, self.axis_name) if is_cut else PartitionSpec()

    def abstract_buffers(self, platform: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and storage dtypes of the pool's arrays on `platform`."""
        return tuple(
            jax.ShapeDtypeStruct((*self.placement.dims, *row), storage_dtype(dtype, platform))
            for row, dtype in zip(self.row_shapes, self.row_dtypes, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class KVCacheConfig(PoolConfig):
    """Sizes of a KV pool; see `PoolConfig` for the fields that are not listed here.

    Attributes:
      size: Usable tokens: a positive multiple of `page_size`.
      page_size: Tokens in a page.
      dtype: What rows are to the caller: a float of 32, 16 or 8 bits, or int8 / uint8 for payload that the caller
        quantised.
      layout: Where the rows of all layers lie: layer after layer, or page after page.

    Raises:
      ArgumentError: on sizes that do not fit together, or 2**31 slots and more, page-major in all layers together.
    """

    size: int
    page_size: int
    dtype: DTypeLike
    layout: Layout = Layout.LAYER_MAJOR

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "size", "page_size")
        require(self.size % self.page_size == 0, "size", f"must be a multiple of page_size {self.page_size}", self.size)
        require(isinstance(self.layout, Layout), "layout", "must be a jaxcache.Layout", repr(self.layout))
        require(self.rows < 2**31, "size", "must leave int32 slots, below 2**31 with the sink page", self.size)
        rule = f"must leave int32 rows in all {self.layer_num} layers together, or take Layout.LAYER_MAJOR"
        require(self.placement.dims[1] < 2**31, "size", rule, self.size)
        object.__setattr__(self, "dtype", pool_dtype("dtype", self.dtype))

    @property
    def rows(self) -> int:
        """Rows of each layer: the usable tokens and the sink page."""
        return self.size + self.page_size

    @property
    def row_dtypes(self) -> tuple[np.dtype, ...]:
        """One dtype for all."""
        return (np.dtype(self.dtype),) * len(self.row_shapes)

    @property
    def placement(self) -> LayerMajor:
        is_page_major = self.layout is Layout.PAGE_MAJOR
        return PageMajor(self.layer_num, self.rows, self.page_size) if is_page_major else super().placement


def pool_dtype(name: str, dtype: DTypeLike) -> np.dtype:
    """`dtype` as a NumPy dtype. Raises ArgumentError unless a pool can hold it."""
    rule = f"must be one of {', '.join(map(str, _POOL_DTYPES))}"
    try:
        known = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(f"{name} {rule}; got {shown(dtype)}") from error
    require(known in _POOL_DTYPES, name, rule, known)
    return known


def require_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    """Raises ArgumentError unless these are `count` different layer ids."""
    are_ids = isinstance(layers, tuple) and all(isinstance(i, (int, np.integer)) and i >= 0 for i in layers)
    require(are_ids, name, "must be a tuple of layer ids, integers from 0 on", layers)
    require(len(set(layers)) == len(layers) == count, name, f"must name {count} layers, each once", layers)


def require(condition: bool, name: str, rule: str, value: Any) -> None:
    """Raises ArgumentError with the argument, its rule and its value unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{name} {rule}; got {shown(value, str)}")


def require_positive(config: PoolConfig, *names: str) -> None:
    """Raises ArgumentError unless these fields are positive integers."""
    for name in names:
        value = getattr(config, name)
        is_positive = isinstance(value, (int, np.integer)) and bool(value > 0)
        require(is_positive, name, "must be positive, and an integer", value)
