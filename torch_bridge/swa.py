"""The pool of models with sliding windows for torch: two pools, and the map from slots of one to slots of the other.

Source: SGLang 0.5.2 memory_pool.py, SWAKVPool.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from jaxcache.pools.swa import SWAConfig, SWACpuCopy, SWAKVPool
from torch_bridge.pool import BufferInfos, Layer, TorchKVPool, TorchPool, layer_id_of, torch_pool
from torch_bridge.slots import slots_to_host


@torch_pool.register(SWAKVPool)
class TorchSWAPool(TorchPool):
    """KV of both kinds of layers. Slots are those of the full side, layers global ids; see `TorchKVPool` for the rest.

    Attributes:
      config: The sizes.
    """

    def __init__(self, pool: SWAKVPool):
        super().__init__(pool)
        self.config: SWAConfig = pool.config

    @property
    def full(self) -> TorchKVPool:
        """The pool of the layers of full attention, whose layers count from 0."""
        return self.parts["full"]

    @property
    def window(self) -> TorchKVPool:
        """The pool of the window's layers, whose layers count from 0, by its own slots."""
        return self.parts["window"]

    @property
    def full_to_window(self) -> torch.Tensor:
        """int32, the window page of each full page, 0 = none. The allocator's: read it only."""
        return self._lent(self._tensors[0])

    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor) -> torch.Tensor:
        """The window slot of each full slot, int32; 0, the sink, where there is none, and for slots outside the pool.

        Raises:
          DeadViewError: if this view has ended.
        """
        page_size = self.config.page_size
        inside = (kv_indices > 0) & (kv_indices < self.config.size + page_size)
        windows = self.full_to_window[torch.where(inside, kv_indices // page_size, 0)]
        return torch.where(windows > 0, windows * page_size + kv_indices % page_size, 0).to(torch.int32)

    def set_kv_buffer(
        self, layer: Layer, loc: torch.Tensor, *rows: Any, layer_id_override: int | None = None, **scales: Any
    ) -> None:
        """Writes the rows of `n` tokens in one layer, to `loc` or to their window slots.

        Args:
          layer: Global layer id, or the layer itself.
          loc: `(n,)` full slots. Where one has no window page, a window's layer drops the row.
          *rows: As the setter of the sides takes them: keys and values, or latent rows.
          layer_id_override: Takes the place of `layer` if given.
          **scales: Likewise the setter's, such as `k_scale`.

        Raises:
          DeadViewError, ArgumentError: as the setter of the sides.
        """
        index, is_window = self._locate(layer if layer_id_override is None else layer_id_override)
        self.full.check_loc("loc", loc)
        side, slots = (self.window, self.translate_loc_from_full_to_swa(loc)) if is_window else (self.full, loc)
        side.set_kv_buffer(index, slots, *rows, **scales)  # pyright: ignore[reportAttributeAccessIssue]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Keys of a layer, by the slots of its side: a view."""
        side, index = self._side(layer_id)
        return side.get_key_buffer(index)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Values of a layer, by the slots of its side: a view."""
        side, index = self._side(layer_id)
        return side.get_value_buffer(index)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`get_key_buffer` and `get_value_buffer`."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def get_paged_buffers(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        """Each array of a layer as `(pages, page_size, *row)`, by the pages of its side: views."""
        side, index = self._side(layer_id)
        return side.get_paged_buffers(index)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copies full slot `src_loc[i]` to `tgt_loc[i]` in every layer of both sides.

        In the window's layers, targets without a window page are not written, and sources without one are zeros.
        """
        self.full.move_kv_cache(tgt_loc, src_loc)
        self.window.move_kv_cache(*map(self.translate_loc_from_full_to_swa, (tgt_loc, src_loc)))

    def get_contiguous_buf_infos(self) -> BufferInfos:
        """Address, bytes and bytes of a page: of the full side's layers, then of the window's."""
        return BufferInfos(
            *map(operator.add, self.full.get_contiguous_buf_infos(), self.window.get_contiguous_buf_infos())
        )

    def get_kv_size_bytes(self) -> Any:
        """Bytes of both sides together, as the sides give theirs."""
        full, window = self.full.get_kv_size_bytes(), self.window.get_kv_size_bytes()  # pyright: ignore[reportAttributeAccessIssue]
        return full + window if isinstance(full, int) else tuple(map(operator.add, full, window))

    def get_cpu_copy(self, indices: torch.Tensor) -> SWACpuCopy:
        """The rows of some slots in host memory: `SWAKVPool.get_cpu_copy`, behind torch's writes."""
        return self.pool.get_cpu_copy(slots_to_host("indices", indices))

    def load_cpu_copy(self, kv_cache_cpu: SWACpuCopy, indices: torch.Tensor) -> None:
        """Writes what `get_cpu_copy` took: `SWAKVPool.load_cpu_copy`. Torch reads behind it.

        Raises:
          BorrowedError: in the block of a `borrow`: JAX writes there, and takes the pool.
        """
        self.pool.load_cpu_copy(kv_cache_cpu, slots_to_host("indices", indices))

    def _side(self, layer: Layer) -> tuple[TorchKVPool, int]:
        index, is_window = self._locate(layer)
        return (self.window if is_window else self.full), index

    def _locate(self, layer: Layer) -> tuple[int, bool]:
        return self.config.locate(layer_id_of(layer))
