"""What all pools for torch have in common: SGLang's method names, on the memory of a jaxcache pool, in place.

Make one with `borrow` or `share`. Getters return views, setters write through the project's own kernels on a GPU and
through torch on a CPU. Contracts are those of the JAX pools where nothing else is said: slot 0 is the sink, and rows
for it or for slots outside the pool are dropped; layers are global ids, or objects that have a `layer_id`.

Source: SGLang 0.5.2 memory_pool.py, whose tensors a torch engine would otherwise allocate itself.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import torch

from jaxcache.device.pool import DevicePool
from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.pools.base import CpuCopy, KVCache
from jaxcache.pools.config import require
from jaxcache.pools.layout import Layout
from torch_bridge.dtypes import cast, torch_dtype
from torch_bridge.memory import PoolMemory
from torch_bridge.slots import slots_to_host
from torch_bridge.writes import move_rows


class HasLayerId(Protocol):
    """An attention layer, such as SGLang's RadixAttention."""

    layer_id: int


Layer: TypeAlias = int | HasLayerId


def layer_id_of(layer: Layer) -> int:
    """The global id of a layer."""
    return layer if isinstance(layer, (int, np.integer)) else layer.layer_id


class BufferInfos(NamedTuple):
    """What SGLang's transfer engines register: one entry a layer and array. Addresses die with the view."""

    data_ptrs: list[int]
    data_lens: list[int]
    item_lens: list[int]


@functools.singledispatch
def torch_pool(pool: DevicePool) -> Any:
    """The view of `pool` for torch that fits its kind. Modules of this package register theirs."""
    return TorchPool(pool)


class TorchPool:
    """Torch tensors over the arrays of a pool. Use as a context manager, or `close` it.

    Args:
      pool: The pool, on one device.

    Attributes:
      parts: Views of the pools that it consists of, by field.

    Raises:
      StalePoolError, ShardingError, ArgumentError, UnsupportedError: if torch cannot look into it; see `PoolMemory`.
    """

    def __init__(self, pool: DevicePool):
        self._memory = PoolMemory(pool)
        self._tensors = self._memory.tensors()
        self.parts = {name: torch_pool(part) for name, part in vars(pool).items() if isinstance(part, DevicePool)}

    @property
    def pool(self) -> Any:
        """The JAX pool that is in this memory now; a donated step replaces it.

        Raises:
          DeadViewError: if this view has ended.
        """
        self._memory.require_alive()
        pools = {name: part.pool for name, part in self.parts.items()}
        pool = self._memory.pool
        is_whole = all(vars(pool)[name] is part for name, part in pools.items())
        return pool if is_whole else pool.replaced(**pools)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self._memory.device

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """The whole arrays, in the dtypes that their rows have for the caller: the pool's own, then those of its parts.

        Raises:
          DeadViewError: if this view has ended.
        """
        own = tuple(map(self._lent, self._tensors))
        return sum((part.buffers for part in self.parts.values()), own)

    def fence(self) -> None:
        """Whatever either framework was given so far comes before what the other one is given from now on.

        `borrow`, steps made by `donating` and all pool methods do what is needed by themselves. Only a jit of your own
        that reads a shared pool without donating it needs this: before it for torch's writes, after it if torch writes.

        Cost: on a GPU some ten microseconds of the host, 100 while torch is busy; no wait.
        """
        self._memory.require_alive()
        self._memory.order.jax_after_torch()
        self._memory.order.torch_after_all(self._memory.pool.buffers[0])

    def torch_after_jax(self) -> list[Any]:
        """Torch comes after the steps that made the pool and those that read it. For `borrow` and `share`.

        Returns:
          What keeps JAX from updating the pool in place while it is kept.
        """
        holds = self._memory.torch_after_jax()
        for part in self.parts.values():
            holds += part.torch_after_jax()
        return holds

    def close(self) -> None:
        """Ends the view: JAX comes after what torch was given, and every tensor is dead, slices included."""
        self._memory.order.jax_after_torch()
        self._memory.end("this torch view of a pool was closed: use its tensors only before, in the block of a borrow")
        for part in self.parts.values():
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _lent(self, tensor: torch.Tensor) -> torch.Tensor:
        self._memory.require_alive()
        return self._memory.lent(tensor)


class TorchKVPool(TorchPool):
    """Base of the KV pools for torch. `loc` arguments are one-dimensional int64 or int32 tensors on the pool's device.

    Writes are in place and return nothing. Slots of one write must be distinct, but for 0; they are not read back, and
    if one repeats, either row stays.
    """

    def __init__(self, pool: KVCache):
        super().__init__(pool)
        self.config = pool.config
        self._dtype = torch_dtype("pool", np.dtype(self.config.dtype))
        self._layer_ids: tuple[torch.Tensor, ...] | None = None

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Keys of a layer, `(slots, heads, dim)`: a view.

        Raises:
          UnsupportedError: if the pool is page-major: no view has a layer's slots in one dimension.
        """
        return self._layer(0, layer_id)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Values of a layer, `(slots, heads, dim)`: a view, as of `get_key_buffer`."""
        return self._layer(1, layer_id)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def get_paged_buffers(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        """Each array of a layer as `(pages, page_size, *row)`, what FlashInfer calls NHD: views."""
        index, page_size = self._index(layer_id), self.config.page_size
        if self._is_page_major:
            by_page = (tensor[0].unflatten(0, (-1, self.config.layer_num, page_size)) for tensor in self._tensors)
            return tuple(self._lent(pages[:, index]) for pages in by_page)
        return tuple(self._lent(tensor[index].unflatten(0, (-1, page_size))) for tensor in self._tensors)

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Refused for kinds of pools that torch has no setter for.

        Raises:
          UnsupportedError: always; the classes that have a setter override this.
        """
        kind = type(self._memory.pool).__name__
        raise UnsupportedError(f"torch has no setter for a {kind}: write with its own set_kv_buffer, from JAX")

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copies slot `src_loc[i]` to slot `tgt_loc[i]` in every layer, all at the same instant: the lists may overlap.

        Raises:
          DeadViewError: if this view has ended.
          ArgumentError: on lists of different lengths or a wrong dtype or device.
        """
        self._memory.require_alive()
        self.check_loc("tgt_loc", tgt_loc)
        self.check_loc("src_loc", src_loc)
        require(tgt_loc.shape == src_loc.shape, "tgt_loc", f"must be as many as src_loc, {len(src_loc)}", len(tgt_loc))
        targets, sources = self._locate_all(tgt_loc), self._locate_all(src_loc)
        for tensor in self._tensors:
            move_rows(tensor, targets, sources)

    def get_contiguous_buf_infos(self) -> BufferInfos:
        """Address, bytes and bytes of a page: of each layer of the first array, then of the second.

        Page-major, of each array; a page is then one of all layers.
        """
        self._memory.require_alive()
        pieces = [piece for tensor in self._tensors for piece in tensor.unbind(0)]
        pages = self.config.rows // self.config.page_size
        return BufferInfos(
            [piece.data_ptr() for piece in pieces],
            [piece.nbytes for piece in pieces],
            [piece.nbytes // pages for piece in pieces],
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays, the sink page included."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def get_cpu_copy(self, indices: torch.Tensor) -> CpuCopy:
        """The rows of some slots in host memory: `KVCache.get_cpu_copy`, behind torch's writes."""
        return self.pool.get_cpu_copy(slots_to_host("indices", indices))

    def load_cpu_copy(self, kv_cache_cpu: CpuCopy, indices: torch.Tensor) -> None:
        """Writes what `get_cpu_copy` took: `KVCache.load_cpu_copy`. Torch reads behind it.

        Raises:
          BorrowedError: in the block of a `borrow`: JAX writes there, and takes the pool.
        """
        self.pool.load_cpu_copy(kv_cache_cpu, slots_to_host("indices", indices))

    def maybe_get_custom_mem_pool(self) -> None:
        """None. Kept for callers of SGLang's name."""

    @property
    def _is_page_major(self) -> bool:
        return self.config.layout is Layout.PAGE_MAJOR

    def _layer(self, array: int, layer: Layer) -> torch.Tensor:
        index = self._index(layer)
        if self._is_page_major:
            raise UnsupportedError(
                "a layer of a page-major pool lies in pieces, one a page: use get_paged_buffers(layer), or make the "
                "pool with Layout.LAYER_MAJOR"
            )
        return self._lent(self._tensors[array][index])

    def _locate(self, layer: Layer, loc: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Where the slots of a layer lie in the tensors."""
        return self.config.placement.locate(self._index(layer), loc)

    def _locate_all(self, loc: torch.Tensor) -> torch.Tensor:
        """Where the slots of all layers lie in the tensors."""
        if not self._is_page_major:
            return loc
        every_layer = torch.arange(self.config.layer_num, dtype=torch.int32, device=self.device)
        return self.config.placement.locate(every_layer[:, None], loc)[1].flatten()

    def _index(self, layer: Layer) -> int:
        """The index into the stack of a global layer id."""
        return int(self.config.layer_index(int(layer_id_of(layer))))

    def _on_device(self, index: int) -> torch.Tensor:
        """A layer's index as the kernels want it: on the device, so that a captured graph reads it there."""
        if self._layer_ids is None:
            ids = torch.arange(self.config.layer_num, dtype=torch.int32, device=self.device)
            self._layer_ids = ids.unbind(0)
        return self._layer_ids[index]

    def check_loc(self, name: str, loc: Any) -> None:
        """Raises ArgumentError unless `loc` is a list of slots on the pool's device."""
        self._check_tensor(name, loc)
        if loc.ndim != 1 or (loc.dtype is not torch.int64 and loc.dtype is not torch.int32):
            raise ArgumentError(f"{name} must be one-dimensional int64 or int32; got {loc.dtype}{list(loc.shape)}")

    def _stored(self, name: str, rows: Any, shape: tuple[int, ...], scale: Any = None) -> torch.Tensor:
        """Rows as the pool keeps them, divided by `scale` in float32 before the cast; the caller's are untouched."""
        self._check_tensor(name, rows)
        if rows.shape != shape:
            raise ArgumentError(f"{name} must have shape {shape}; got {tuple(rows.shape)}")
        if scale is None and rows.dtype is self._dtype:
            return rows.contiguous()
        if not self._dtype.is_floating_point:
            rule = f"must be quantised to the pool's {self._dtype} by the caller, and not be scaled"
            raise ArgumentError(f"{name} {rule}; got {rows.dtype}, scale {scale}")
        require(rows.is_floating_point(), name, f"must be floats, for a {self._dtype} pool", rows.dtype)
        rows = rows if scale is None else rows.float() / scale
        return cast(rows, self._dtype).contiguous()

    def _check_tensor(self, name: str, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} must be a torch tensor, got {type(tensor).__name__}: use torch.as_tensor")
        if tensor.device != self._memory.device:
            raise ArgumentError(f"{name} must lie on {self.device}, where the pool is; got {tensor.device}")


@torch_pool.register(KVCache)
def _other_kv_pool(pool: KVCache) -> TorchKVPool:
    return TorchKVPool(pool)
