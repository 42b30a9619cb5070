"""The pool of a model in which some layers attend to everything and the others to a window of the last tokens only.

It is two pools: `full` for the first kind of layers, `window`, which may have far fewer slots, for the others. Callers
know the slots of `full`, and a map says where `window` holds the same token:

    full slot ── page ──► full_to_window[page] ── window page, or 0: none ──► window slot, or 0: the sink

The map is the device's copy of `SWATokenToKVPoolAllocator.full_to_window`; a step patches it by what changed. A token
without a window page reads as zeros in the window's layers, and is not written there.

Source: SGLang 0.5.2 memory_pool.py, SWAKVPool, which has pages of one slot only.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike

from jaxcache.device.donation import donating
from jaxcache.device.placing import zeros
from jaxcache.pools.base import KVCache
from jaxcache.pools.buffers import BufferInfo
from jaxcache.pools.config import KVCacheConfig, require, require_layers
from jaxcache.pools.copies import SWACpuCopy as SWACpuCopy
from jaxcache.pools.layer_pages import LayerPages
from jaxcache.pools.rows import bucketed
from jaxcache.pools.stack import LayerStack, MemoryPool
from jaxcache.pools.window_map import patched, require_entries, window_slots, window_slots_on_host

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

PoolT = TypeVar("PoolT", bound="SWAKVPool")


@dataclass(frozen=True, kw_only=True)
class SWAConfig:
    """Sizes of an `SWAKVPool`, and which layer is of which side.

    Attributes:
      full: Sizes of the layers of full attention.
      window: Sizes of the window's layers: the same kind of pool with the same pages, on the same devices.
      full_layers: Global ids of the layers of `full`, in the order of its stack.
      window_layers: The same for `window`.

    Raises:
      ArgumentError: on sides that do not fit together, or layer ids that are not one for each layer.
    """

    full: KVCacheConfig
    window: KVCacheConfig
    full_layers: tuple[int, ...]
    window_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        rule = f"must be a {type(self.full).__name__} like full"
        require(isinstance(self.full, KVCacheConfig), "full", "must be a KVCacheConfig", type(self.full).__name__)
        require(type(self.window) is type(self.full), "window", rule, type(self.window).__name__)
        for name in ("page_size", "axis_name", "shards"):
            mine, theirs = getattr(self.window, name), getattr(self.full, name)
            require(mine == theirs, f"window.{name}", f"must be that of full, {theirs!r}", repr(mine))
        for name in ("full", "window"):
            side, layers = getattr(self, name), getattr(self, f"{name}_layers")
            require(
                side.start_layer == 0, f"{name}.start_layer", "must be 0: sides count by themselves", side.start_layer
            )
            rule = f"must be None: give the ids to {name}_layers, sides count by themselves"
            require(side.layers is None, f"{name}.layers", rule, side.layers)
            require_layers(f"{name}_layers", layers, side.layer_num)
            object.__setattr__(self, name, dataclasses.replace(side, global_layers=tuple(map(int, layers))))
        both = set(self.full_layers) & set(self.window_layers)
        require(not both, "window_layers", "must not name a layer of full_layers", sorted(both))

    @property
    def pool_type(self) -> type[SWAKVPool]:
        """The class of the pools of these sizes."""
        return SWAKVPool

    @property
    def page_size(self) -> int:
        """Tokens in a page, of both sides."""
        return self.full.page_size

    @property
    def num_pages(self) -> int:
        """Usable pages of the full side."""
        return self.full.size // self.full.page_size

    @property
    def size(self) -> int:
        """Usable tokens of the full side."""
        return self.full.size

    @property
    def size_swa(self) -> int:
        """Usable tokens of the window side."""
        return self.window.size

    @property
    def layer_num(self) -> int:
        """Layers of both sides together."""
        return self.full.layer_num + self.window.layer_num

    @property
    def axis_name(self) -> str | None:
        """Mesh axis that both sides are sharded over."""
        return self.full.axis_name

    @property
    def shards(self) -> int:
        """Devices along that axis."""
        return self.full.shards

    def locate(self, layer: int) -> tuple[int, bool]:
        """Where a global layer is: its index in the stack of its side, and whether that is the window's.

        Raises:
          ArgumentError: if there is no such layer, or the id is traced.
        """
        rule = (
            "must be a Python int: scan over pool.full or pool.window, whose layers count from 0, with slots translated"
        )
        require(isinstance(layer, (int, np.integer)), "layer", rule, type(layer).__name__)
        is_window = layer in self.window_layers
        layers = self.window_layers if is_window else self.full_layers
        require(layer in layers, "layer", f"must be one of {self.full_layers} or {self.window_layers}", layer)
        return layers.index(layer), is_window


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("full", "window", "full_to_window"), meta_fields=("config",)
)
@dataclass(frozen=True)
class SWAKVPool(MemoryPool):
    """KV of both kinds of layers, and the map between their slots. Make one with `create`.

    Slots are those of the full side, and layers global ids, given as Python ints; otherwise everything is as in
    `KVCache`. A model that scans over its layers scans over a side, and puts it back:

        window_loc = pool.translate_loc_from_full_to_swa(loc)                           # once a step
        pool = pool.with_window(scan(... side.set_kv_buffer(i, window_loc, k, v) ...))  # i = 0, 1, ... of the side

    Outside a jit an update of a side consumes it, and with it the pool that it was taken from.

    Attributes:
      config: The sizes.
      full: The pool of the layers of full attention.
      window: The pool of the window's layers.
      full_to_window: int32, the window page of each full page, index = full page id; 0 = none.
    """

    copy_type = SWACpuCopy

    config: SWAConfig
    full: KVCache
    window: KVCache
    full_to_window: Int32[Array, " full_pages+1"]

    @classmethod
    def create(
        cls,
        config: SWAConfig,
        *,
        device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
    ) -> Self:
        sides: list[Any] = [
            side.pool_type.create(side, device=device, mesh=mesh) for side in (config.full, config.window)
        ]
        where = device if mesh is None else NamedSharding(mesh, PartitionSpec())
        return cls(config, sides[0], sides[1], zeros((config.num_pages + 1,), jnp.int32, where))

    @classmethod
    def abstract(cls, config: SWAConfig, *, platform: str, mesh: Mesh | None = None) -> Self:
        sides: list[Any] = [
            side.pool_type.abstract(side, platform=platform, mesh=mesh) for side in (config.full, config.window)
        ]
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        full_to_window: Any = jax.ShapeDtypeStruct((config.num_pages + 1,), jnp.int32, sharding=where)
        return cls(config, sides[0], sides[1], full_to_window)

    @property
    def mesh(self) -> Mesh | None:
        return self.full.mesh

    def partition_specs(self) -> Self:
        specs: Any = PartitionSpec()
        return type(self)(self.config, self.full.partition_specs(), self.window.partition_specs(), specs)

    def stacks(self) -> dict[str, LayerStack]:
        return {"full": self.full, "window": self.window}

    def with_stacks(self, stacks: Mapping[str, Any]) -> Self:
        return self.replaced(full=stacks["full"], window=stacks["window"])

    def token_rows(self, loc: Int32[ArrayLike, " n"]) -> dict[str, Any]:
        """The slots themselves in `full`, and the slots of `translate_loc_from_full_to_swa` in `window`."""
        return {"full": loc, "window": self.translate_loc_from_full_to_swa(loc)}

    def with_full(self, full: KVCache) -> Self:
        """This pool with its full side replaced, by an update of it."""
        return self.replaced(full=full)

    def with_window(self, window: KVCache) -> Self:
        """This pool with its window side replaced, by an update of it."""
        return self.replaced(window=window)

    def with_window_map(self, index: Int32[Array, " n"], page: Int32[Array, " n"]) -> Self:
        """This pool with entries of the map overwritten: what `SWATokenToKVPoolAllocator.take_changes` returned.

        Args:
          index: Full pages. 0 and what lies outside the pool is padding.
          page: The window page of each, 0 = none. A page named twice must have the same one twice.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError: if this pool cannot be donated.
          ArgumentError: if both are not int32 lists of one length, or a page on the host is no window page.
        """
        require_entries(index, page, last=self.config.size_swa // self.config.page_size)
        return _patch(self, index, page)

    def translate_loc_from_full_to_swa(self, kv_indices: Int32[ArrayLike, " n"]) -> Int32[Array, " n"]:
        """The window slot of each full slot; 0, the sink, where there is none.

        Raises:
          StalePoolError: if the pool was consumed.
          ArgumentError: on slots outside the full side.

        Cost: O(n). In a step, XLA does it once for all layers that are given the same slots.
        """
        self.require_live()
        loc = self.full.checked_loc("kv_indices", kv_indices)
        return window_slots(self.full_to_window, loc, page_size=self.config.page_size)

    def set_kv_buffer(
        self,
        layer: int,
        loc: Int32[Array, " n"],
        *rows: Any,
        layer_id_override: int | None = None,
        **scales: Any,
    ) -> Self:
        """Writes the rows of `n` tokens in one layer, to `loc` or to their window slots.

        Args:
          layer: Global layer id.
          loc: Full slot of each token. Where it has no window page, a window's layer drops the row.
          *rows: As the setter of the sides takes them: `k, v`, or latent rows.
          layer_id_override: Takes the place of `layer` if given.
          **scales: Likewise the setter's, such as `k_scale`.

        Returns:
          The updated pool; this one is consumed.

        Raises:
          StalePoolError, BorrowedError, ArgumentError, ShardingError: as the setter of the sides.

        Cost: reads and writes `n` rows.
        """
        index, is_window = self.config.locate(layer if layer_id_override is None else layer_id_override)
        loc = self.full.target_loc("loc", loc)
        write = _write_window if is_window else _write_full
        return write(self, np.int32(index), loc, *rows, **scales)

    def get_key_buffer(self, layer: int) -> Shaped[Array, " slots *row"]:
        """Keys of a layer by the slots of its side, in the pool's dtype. Copies the layer; see `KVCache`."""
        index, is_window = self.config.locate(layer)
        return (self.window if is_window else self.full).get_key_buffer(index)

    def get_value_buffer(self, layer: int) -> Shaped[Array, " slots *row"]:
        """Values of a layer by the slots of its side, in the pool's dtype. Copies the layer; see `KVCache`."""
        index, is_window = self.config.locate(layer)
        return (self.window if is_window else self.full).get_value_buffer(index)

    def get_kv_buffer(self, layer: int) -> tuple[Shaped[Array, " slots *row"], Shaped[Array, " slots *row"]]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer), self.get_value_buffer(layer)

    def pages(self, layer: int) -> LayerPages:
        """The pages of a layer's side, as `KVCache.pages`; its `locate` takes full pages, also of a window's layer."""
        index, is_window = self.config.locate(layer)
        if not is_window:
            return self.full.pages(index)
        return dataclasses.replace(self.window.pages(index), window=self.full_to_window)

    def gather(self, loc: Int32[Array, " n"], layer: int) -> Any:
        """Reads the rows of `n` full slots in one layer, as `KVCache.gather`. Zeros where there is no window page."""
        index, is_window = self.config.locate(layer)
        if not is_window:
            return self.full.gather(loc, index)
        return self.window.gather(self.translate_loc_from_full_to_swa(loc), index)

    def copy_tokens(self, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> Self:
        """See `MemoryPool.copy_tokens`."""
        if self.mesh is not None:
            return super().copy_tokens(source, target)
        return self.move_kv_cache(target, source)  # pyright: ignore[reportArgumentType]

    def move_kv_cache(self, tgt_loc: Int32[Array, " n"], src_loc: Int32[Array, " n"]) -> Self:
        """Copies full slot `src_loc[i]` to `tgt_loc[i]` in every layer of both sides, as `KVCache.move_kv_cache`.

        In the window's layers, targets without a window page are not written, and sources without one are zeros.
        """
        targets, sources = self.full.target_loc("tgt_loc", tgt_loc), self.full.checked_loc("src_loc", src_loc)
        rule = f"must be as many as src_loc, {sources.shape[0]}"
        require(targets.shape == sources.shape, "tgt_loc", rule, targets.shape[0])
        if isinstance(targets, np.ndarray) and isinstance(sources, np.ndarray):
            targets, sources = bucketed(targets, 16), bucketed(sources, 16)
        return _move(self, targets, sources)

    def get_cpu_copy(self, indices: Int32[ArrayLike, " n"]) -> SWACpuCopy:
        """Copies the rows of `n` full slots of every layer to host memory, as `KVCache.get_cpu_copy`.

        Of the window's layers it takes the tokens that have a window page.
        """
        slots = self.full.host_loc("indices", indices)
        windows = self._window_slots(slots)
        window = self.window.get_cpu_copy(windows[windows > 0])
        return SWACpuCopy(self.config, self.full.get_cpu_copy(slots), window, windows > 0)

    def load_cpu_copy(self, copy: SWACpuCopy, indices: Int32[ArrayLike, " n"]) -> Self:
        """Writes rows taken by `get_cpu_copy` to as many full slots, the same or others, as `KVCache.load_cpu_copy`.

        In the window's layers, a token is written if it had a window page then and its slot has one now.
        """
        self.require_copy_of_such(copy)
        self.require_donatable()
        slots = self.full.require_loadable(copy.full, indices)
        windows = self._window_slots(slots)[copy.has_window]
        self.window.require_loadable(copy.window, windows)  # else one side would be lost when the other is refused
        full, window = self.full.load_cpu_copy(copy.full, slots), self.window.load_cpu_copy(copy.window, windows)
        return self.replaced(full=full, window=window)

    def window_map_on_host(self) -> Int32[np.ndarray, " full_pages+1"]:
        """`full_to_window` as a NumPy array of its own.

        A copy: on a CPU, NumPy would look at the map's own memory, which the next update then could not take over.
        """
        return np.asarray(jax.device_put(self.full_to_window, self.full_to_window.sharding, may_alias=False))

    def _window_slots(self, slots: np.ndarray) -> np.ndarray:
        """`translate_loc_from_full_to_swa` of slots on the host, whose number shall not be compiled in."""
        return window_slots_on_host(self.window_map_on_host(), slots, self.config.page_size)

    def get_kv_size_bytes(self) -> Any:
        """Bytes of both sides together, as the sides give theirs."""
        return jax.tree.map(operator.add, self.full.get_kv_size_bytes(), self.window.get_kv_size_bytes())

    def get_contiguous_buf_infos(self) -> tuple[BufferInfo, ...]:
        """Where each layer of each array lies, with its global id: those of the full side, then of the window's."""
        sides = (
            ("full", self.full, self.config.full_layers),
            ("window", self.window, self.config.window_layers),
        )
        return tuple(
            dataclasses.replace(info, name=f"{name}.{info.name}", layer_ids=tuple(layers[i] for i in info.layer_ids))
            for name, side, layers in sides
            for info in side.get_contiguous_buf_infos()
        )


@donating
def _patch(pool: PoolT, index: Any, page: Any) -> PoolT:
    return dataclasses.replace(pool, full_to_window=patched(pool.full_to_window, index, page))


@donating
def _write_full(pool: PoolT, index: Any, loc: Any, *rows: Any, **scales: Any) -> PoolT:
    return pool.with_full(pool.full.set_kv_buffer(index, loc, *rows, **scales))


@donating
def _write_window(pool: PoolT, index: Any, loc: Any, *rows: Any, **scales: Any) -> PoolT:
    loc = pool.translate_loc_from_full_to_swa(loc)
    return pool.with_window(pool.window.set_kv_buffer(index, loc, *rows, **scales))


@donating
def _move(pool: PoolT, targets: Any, sources: Any) -> PoolT:
    window_targets, window_sources = map(pool.translate_loc_from_full_to_swa, (targets, sources))
    pool = pool.with_window(pool.window.move_kv_cache(window_targets, window_sources))
    return pool.with_full(pool.full.move_kv_cache(targets, sources))
