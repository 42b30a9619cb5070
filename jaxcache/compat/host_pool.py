"""SGLang's host pools: slots of tokens over a `HostPool`, with its names, layouts and states.

    host = MHATokenToKVPoolHost(device_pool, 2.0, 0, page_size, "page_first")
    slots = host.alloc(2 * page_size)                                # from 0 on, whole pages
    host.backup_from_device_all_layer(device_pool, slots, device_slots, "direct")
    device_pool = host.load_to_device_per_layer(device_pool, slots, device_slots, layer_id, "kernel")

What differs: pages are whole by construction and every transition is checked, whatever the log level; the host may be
smaller than the device; a load returns the updated pool; both back ends are the same copy, which blocks. Engines use
`jaxcache.tiers.transfer`, which does not.

Source: SGLang 0.5.2 memory_pool_host.py.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from jaxcache.arguments import as_count
from jaxcache.components.full import FullPages
from jaxcache.errors import ArgumentError, shown
from jaxcache.pools.base import KVCache
from jaxcache.pools.config import require
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from jaxcache.slots import page_slots, whole_pages
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.host_states import HostState

if TYPE_CHECKING:
    from jaxtyping import Int32, Shaped

BACK_ENDS = ("kernel", "direct")
F = TypeVar("F", bound=Callable[..., Any])


def synchronized(debug_only: bool = False) -> Callable[[F], F]:
    """Has a method hold its object's re-entrant `lock`. Always: `debug_only` is accepted and ignored.

    Source: SGLang 0.5.2, where a method that is for debugging only does nothing else, and answers True.
    """
    del debug_only

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.lock:
                return method(self, *args, **kwargs)

        return cast(F, locked)

    return decorate


class HostKVCache(abc.ABC):
    """Host memory for the pages of a device's pool, by slots of tokens: 0 .. `size - 1`, pages from a multiple on.

    Args:
      device_pool: The device's; looked at, not kept.
      host_to_device_ratio: Host slots for one of the device, if `host_size` is 0.
      host_size: GB (10**9 bytes) of host memory, or 0.
      page_size: Tokens a page, as on the device.
      layout: "layer_first", "page_first" or "page_first_direct".
      pin_memory: Ignored: memory is page-locked where there is a GPU.
      device: Must be "cpu".

    Attributes:
      lock: Held by every method; re-entrant.
      size: Slots.
      page_size: Tokens a page.
      page_num: Pages.
      layout: As it was given.
      dtype: Of the elements, as the device stores them.
      host_pool: The pages and their states.

    Raises:
      ArgumentError: Another kind of pool, page size or layout, or memory that is not there.
    """

    pool_type: type[KVCache]
    """Kind of the device's pool."""

    def __init__(
        self,
        device_pool: KVCache,
        host_to_device_ratio: float,
        host_size: float,
        page_size: int,
        layout: str,
        pin_memory: bool = True,
        device: str = "cpu",
    ):
        del pin_memory
        name = self.pool_type.__name__
        require(isinstance(device_pool, self.pool_type), "device_pool", f"must be of type {name}", type(device_pool))
        rule = f"must be the device's, {device_pool.config.page_size}"
        require(page_size == device_pool.config.page_size, "page_size", rule, page_size)
        require(device == "cpu", "device", "must be 'cpu'", device)
        layouts = {one.value: one for one in HostLayout}
        require(layout in layouts, "layout", f"must be one of {sorted(layouts)}", shown(layout))
        require(device_pool.mesh is None, "device_pool", "must lie on one device: use HostMemory for a mesh", layout)
        config = HostConfig(
            bytes=int(host_size * 1e9) if host_size > 0 else None,
            ratio=None if host_size > 0 else host_to_device_ratio,
            layout=layouts[layout],
        )
        self.lock = threading.RLock()
        self.layout, self.page_size = layout, page_size
        self._config, self.dtype = device_pool.config, np.dtype(device_pool.buffers[0].dtype)
        self.init_kv_buffer(device_pool, config)
        self.page_num = self.host_pool.size
        self.size = self.page_num * page_size

    def init_kv_buffer(self, device_pool: KVCache, config: HostConfig) -> None:
        """Takes the memory. Called once, by the constructor."""
        self._memory = HostMemory.create(device_pool, [FullPages(None)], config)
        self.host_pool = self._memory[FullPages.name]

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def get_size_per_token(self) -> int:
        """Bytes of a token in all layers."""
        return self.host_pool.page_bytes // self.page_size

    def get_ksize_per_token(self) -> int:
        """Bytes of a token's keys in all layers; of a latent row, all of it."""
        return self.host_pool.arrays[0].shape.page_bytes // self.page_size

    # ---- slots ---------------------------------------------------------------------------------------------------

    @synchronized()
    def clear(self) -> None:
        """Every slot is free again.

        Raises:
          OwnershipError: A page is PROTECTED. Nothing has changed.
        """
        self.host_pool.clear()

    @synchronized()
    def available_size(self) -> int:
        """Free slots."""
        return self.host_pool.available() * self.page_size

    @synchronized()
    def alloc(self, need_size: int) -> Int32[np.ndarray, " slots"] | None:
        """Takes slots of whole pages, those freed first; None, and nothing is taken, if there are fewer.

        Raises:
          ArgumentError: `need_size` is no multiple of the page size.
        """
        need_size = as_count("need_size", need_size)
        rule = f"must be a multiple of page_size, {self.page_size}"
        require(need_size % self.page_size == 0, "need_size", rule, need_size)
        ids = self.host_pool.alloc(need_size // self.page_size)
        return None if ids is None else page_slots(ids - np.int32(1), self.page_size)

    @synchronized()
    def free(self, indices: Int32[np.ndarray, " slots"]) -> int:
        """Gives slots of whole pages back. Returns how many.

        Raises:
          ArgumentError: They are no whole pages.
          DoubleFreeError, OwnershipError: One is free already, PROTECTED or unknown. Nothing has changed.
        """
        ids = self._ids(indices)
        self.host_pool.free(ids)
        return len(ids) * self.page_size

    # ---- states --------------------------------------------------------------------------------------------------

    @synchronized(debug_only=True)
    def get_state(self, indices: Int32[np.ndarray, " slots"]) -> HostState:
        """The one state of these slots.

        Raises:
          ArgumentError: They are none, no whole pages, or of several states.
        """
        states = np.unique(self.host_pool.states[self._ids(indices)])
        require(len(states) == 1, "indices", "must be slots of one state", [HostState(s).name for s in states])
        return HostState(states[0])

    @synchronized(debug_only=True)
    def is_reserved(self, indices: Int32[np.ndarray, " slots"]) -> bool:
        """Whether they are taken and hold nothing yet."""
        return self.get_state(indices) is HostState.RESERVED

    @synchronized(debug_only=True)
    def is_protected(self, indices: Int32[np.ndarray, " slots"]) -> bool:
        """Whether a transfer of them is in flight."""
        return self.get_state(indices) is HostState.PROTECTED

    @synchronized(debug_only=True)
    def is_synced(self, indices: Int32[np.ndarray, " slots"]) -> bool:
        """Whether the device has the same."""
        return self.get_state(indices) is HostState.SYNCED

    @synchronized(debug_only=True)
    def is_backup(self, indices: Int32[np.ndarray, " slots"]) -> bool:
        """Whether they are the only copy."""
        return self.get_state(indices) is HostState.BACKUP

    @synchronized(debug_only=True)
    def protect_write(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """A copy from the device starts: RESERVED to PROTECTED, or OwnershipError."""
        self.host_pool.start_transfer(self._ids(indices), HostState.RESERVED)

    @synchronized(debug_only=True)
    def protect_load(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """A copy to the device starts: BACKUP to PROTECTED, or OwnershipError."""
        self.host_pool.start_transfer(self._ids(indices), HostState.BACKUP)

    @synchronized(debug_only=True)
    def complete_io(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """A copy has arrived: PROTECTED to SYNCED, or OwnershipError."""
        self.host_pool.end_transfer(self._ids(indices))

    @synchronized(debug_only=True)
    def update_backup(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """The device gave them up: SYNCED to BACKUP, or OwnershipError."""
        self.host_pool.evicted_on_device(self._ids(indices))

    @synchronized(debug_only=True)
    def update_prefetch(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """Storage has filled them: RESERVED to BACKUP, or OwnershipError."""
        self.host_pool.landed(self._ids(indices))

    @synchronized(debug_only=True)
    def update_synced(self, indices: Int32[np.ndarray, " slots"]) -> None:
        """The device has computed them again: BACKUP to SYNCED, or OwnershipError."""
        self.host_pool.adopted_on_device(self._ids(indices))

    # ---- copies --------------------------------------------------------------------------------------------------

    @synchronized()
    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: Int32[np.ndarray, " slots"],
        device_indices: Int32[np.ndarray, " slots"],
        layer_id: int,
        io_backend: str,
    ) -> Any:
        """Copies slots of one layer to the device: `host_indices[i]` to `device_indices[i]`.

        Args:
          device_pool: The device's; consumed.
          host_indices: Whole pages that hold something.
          device_indices: As many distinct slots of the device.
          layer_id: Global id of the layer.
          io_backend: "kernel" or "direct"; there is one way.

        Returns:
          The updated pool.

        Raises:
          ArgumentError, OwnershipError: Wrong slots, layer or back end. Nothing has changed.
          StalePoolError, BorrowedError: The pool cannot be donated.

        Cost: the rows over the host link; blocks while they are read.
        """
        self._require_back_end(io_backend)
        held = (HostState.PROTECTED, HostState.SYNCED, HostState.BACKUP)
        ids = self.host_pool.require("host_indices", self._ids(host_indices), *held)
        layer = int(self._config.layer_index(layer_id))
        rows = [
            np.ascontiguousarray(array.canonical[ids - 1, layer]).reshape(-1).view(self._config.dtype)
            for array in self.host_pool.arrays
        ]
        shaped = (one.reshape(-1, *array.shape.row) for one, array in zip(rows, self.host_pool.arrays, strict=True))
        return device_pool.set_kv_buffer(layer_id, device_indices, *shaped)

    @synchronized()
    def backup_from_device_all_layer(
        self,
        device_pool: KVCache,
        host_indices: Int32[np.ndarray, " slots"],
        device_indices: Int32[np.ndarray, " slots"],
        io_backend: str,
    ) -> None:
        """Copies slots of every layer from the device: `device_indices[i]` to `host_indices[i]`.

        Args:
          device_pool: The device's; read, not consumed.
          host_indices: Whole pages, RESERVED or PROTECTED.
          device_indices: As many slots of the device.
          io_backend: "kernel" or "direct"; there is one way.

        Raises:
          ArgumentError, OwnershipError: Wrong slots or back end. Nothing has changed.
          StalePoolError: The pool was consumed.

        Cost: the rows over the host link; blocks until they are there.
        """
        self._require_back_end(io_backend)
        open_states = HostState.RESERVED, HostState.PROTECTED
        ids = self.host_pool.require("host_indices", self._ids(host_indices), *open_states)
        copy = device_pool.get_cpu_copy(device_indices)
        tokens = len(ids) * self.page_size
        rule = f"must be as many as host_indices, {tokens}"
        require(copy.num_tokens == tokens, "device_indices", rule, copy.num_tokens)
        for array, rows in zip(self.host_pool.arrays, copy.buffers, strict=True):
            by_page = np.asarray(rows).reshape(len(rows), len(ids), self.page_size, -1).swapaxes(0, 1)
            array.canonical[ids - 1] = np.ascontiguousarray(by_page).view(np.uint8)

    # ---- pages for storage ---------------------------------------------------------------------------------------

    @synchronized()
    def get_flat_data_page(self, index: int) -> Shaped[np.ndarray, " elements"]:
        """A copy of the page that begins at slot `index`, in the order of the layout: keys, then values."""
        page = self._page(index)
        flat = np.concatenate([np.ascontiguousarray(array.pages[page]).reshape(-1) for array in self.host_pool.arrays])
        return flat.view(self.dtype)

    def get_dummy_flat_data_page(self) -> Shaped[np.ndarray, " elements"]:
        """Zeros, as many as a page has elements."""
        return np.zeros(self.host_pool.page_bytes // self.dtype.itemsize, self.dtype)

    @synchronized()
    def set_from_flat_data_page(self, index: int, data_page: Shaped[np.ndarray, " elements"]) -> None:
        """Writes what `get_flat_data_page` of a pool of this layout returned to the page that begins at slot `index`.

        Raises:
          ArgumentError: It is not as many elements of this dtype, or no page begins there.
        """
        page, wanted = self._page(index), self.get_dummy_flat_data_page()
        is_page = isinstance(data_page, np.ndarray) and (data_page.shape, data_page.dtype) == (wanted.shape, self.dtype)
        require(is_page, "data_page", f"must be {wanted.size} elements of {self.dtype}", type(data_page))
        rest = np.ascontiguousarray(data_page).view(np.uint8)
        for array in self.host_pool.arrays:
            size = array.shape.page_bytes
            array.pages[page] = rest[:size].reshape(array.pages.shape[1:])
            rest = rest[size:]

    @abc.abstractmethod
    def get_buffer_meta(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"], local_rank: int
    ) -> tuple[list[str], list[int], list[int]]:
        """Storage key, address and length of each piece of these pages, for engines that copy memory themselves.

        Addresses are valid as long as this object lives, and the pages are the caller's.

        Raises:
          ArgumentError: The layout is layer_first, in which a page is not in one piece, or keys are not one a page.
        """

    @abc.abstractmethod
    def get_buffer_with_hash(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"] | None = None
    ) -> tuple[list[str], list[np.ndarray], int]:
        """Storage key and memory of each piece of these pages, and how many pieces a page has. The memory is shared.

        Raises:
          ArgumentError: As `get_buffer_meta`.
        """

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _ids(self, indices: Any) -> Int32[np.ndarray, " pages"]:
        """The host ids of slots of whole pages."""
        return whole_pages("indices", indices, self.page_size) + np.int32(1)

    def _page(self, index: int) -> int:
        """The row of the page that begins at a slot."""
        index = as_count("index", index)
        begins = index % self.page_size == 0 and index < self.size
        require(begins, "index", f"must be a multiple of {self.page_size} below {self.size}", index)
        return index // self.page_size

    def _pages_in_one_piece(self, keys: Sequence[str], indices: Any) -> list[int]:
        """The rows of pages that are in one piece, one a key."""
        require(self.layout != "layer_first", "layout", "must have a page in one piece, as page_first", self.layout)
        pages = (self._ids(indices) - 1).tolist()
        require(len(keys) == len(pages), "keys", f"must be one a page, {len(pages)}", len(keys))
        require(all(page < self.page_num for page in pages), "indices", f"must be slots below {self.size}", pages)
        return pages

    def _pieces(self, pages: list[int]) -> list[np.ndarray]:
        """Memory of pages, each array of a page by itself."""
        return [array.pages[page] for page in pages for array in self.host_pool.arrays]

    def _buffer(self, index: int) -> np.ndarray:
        """One array, in the order of the layout."""
        shape = self.host_pool.arrays[index].shape
        flat = self.host_pool.arrays[index].buffer.view(self.dtype)
        if self.layout == "layer_first":
            return flat.reshape(shape.layers, self.size, *shape.row)
        if self.layout == "page_first":
            return flat.reshape(self.size, shape.layers, *shape.row)
        return flat.reshape(self.page_num, shape.layers, self.page_size, *shape.row)

    @staticmethod
    def _require_back_end(io_backend: str) -> None:
        if io_backend not in BACK_ENDS:
            raise ArgumentError(f"io_backend must be one of {BACK_ENDS}, got {io_backend!r}")


class MHATokenToKVPoolHost(HostKVCache):
    """Host memory for an `MHATokenToKVPool`; see `HostKVCache`.

    Attributes:
      k_buffer: Keys, in the order of the layout: `(layers, size, heads, dim)`, `(size, layers, heads, dim)` or
        `(pages, layers, page_size, heads, dim)`. Live memory.
      v_buffer: Values, likewise.
    """

    pool_type = MHATokenToKVPool

    @property
    def k_buffer(self) -> np.ndarray:
        """Keys, in the order of the layout. Live memory."""
        return self._buffer(0)

    @property
    def v_buffer(self) -> np.ndarray:
        """Values, in the order of the layout. Live memory."""
        return self._buffer(1)

    def get_buffer_meta(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"], local_rank: int
    ) -> tuple[list[str], list[int], list[int]]:
        pieces = self._pieces(self._pages_in_one_piece(keys, indices))
        names = [f"{key}_{local_rank}_{part}" for key in keys for part in "kv"]
        return names, [piece.ctypes.data for piece in pieces], [piece.nbytes for piece in pieces]

    def get_buffer_with_hash(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"] | None = None
    ) -> tuple[list[str], list[np.ndarray], int]:
        pieces = [] if indices is None else self._pieces(self._pages_in_one_piece(keys, indices))
        return [f"{key}-{part}" for key in keys for part in "kv"], [piece.view(self.dtype) for piece in pieces], 2


class MLATokenToKVPoolHost(HostKVCache):
    """Host memory for an `MLATokenToKVPool`; see `HostKVCache`.

    Attributes:
      kv_buffer: Rows, in the order of the layout: `(layers, size, 1, row)`, `(size, layers, 1, row)` or `(pages,
        layers, page_size, 1, row)`. Live memory.
    """

    pool_type = MLATokenToKVPool

    @property
    def kv_buffer(self) -> np.ndarray:
        """Rows, in the order of the layout. Live memory."""
        return np.expand_dims(self._buffer(0), -2)

    def get_buffer_meta(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"], local_rank: int
    ) -> tuple[list[str], list[int], list[int]]:
        pieces = self._pieces(self._pages_in_one_piece(keys, indices))
        return [f"{key}_k" for key in keys], [piece.ctypes.data for piece in pieces], [piece.nbytes for piece in pieces]

    def get_buffer_with_hash(
        self, keys: Sequence[str], indices: Int32[np.ndarray, " slots"] | None = None
    ) -> tuple[list[str], list[np.ndarray], int]:
        pieces = [] if indices is None else self._pieces(self._pages_in_one_piece(keys, indices))
        return list(keys), [piece.view(self.dtype) for piece in pieces], 1
