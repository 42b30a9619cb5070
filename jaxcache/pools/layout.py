"""Where the rows of a pool lie in its arrays: layer after layer, or page after page.

    LAYER_MAJOR   (layers, slots, *row)                        a scan over layers carries it
    PAGE_MAJOR    (1, pages * layers * page_size, *row)        a page of all layers is one piece of memory

The second is a stack of one layer, so that the kernels take both as they are; `locate` says in which of its rows a slot
lies, and nothing else knows the order. A dimension each for pages, layers and slots would be easier to read, but XLA
copies such an array when a loop carries it, if one of its dimensions is 1.

Source: SGLang 0.5.2 memory_pool.py (AscendTokenToKVPool; get_contiguous_buf_infos, which returns pointers).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax
    from jaxtyping import Array, Shaped


class Layout(enum.Enum):
    """How the rows of all layers lie in the arrays of a KV pool. The methods of a pool are the same for both.

    In both orders `array.reshape(-1, page_size, *row)` is free, and what attention reads: page `p` of layer `i` is page
    `i * pages + p` there, or page-major `p * layers + i`. Layers count from 0 on, and the sink page is a page.
    """

    LAYER_MAJOR = "layer_major"
    """Layer after layer: `(layers, slots, *row)`."""
    PAGE_MAJOR = "page_major"
    """Page after page, each with its rows of all layers: `(1, pages * layers * page_size, *row)`. A page is copied in
    one piece: `kernels.copy_pages.gather_pages(array, pages, page_size=layers * page_size)`."""


@dataclass(frozen=True)
class LayerMajor:
    """Rows layer after layer.

    Attributes:
      layers: Layers of the pool.
      rows: Rows of each layer, the sink included.
    """

    layers: int
    rows: int

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions of an array in front of those of a row: layers and rows of the stack that kernels see."""
        return self.layers, self.rows

    def locate(self, layer: Any, loc: Any) -> tuple[Any, Any]:
        """The layer and row of that stack where row `loc` of layer `layer` lies, counted from 0 on.

        For integers and arrays of NumPy, JAX and torch. The sink, and what is outside the pool, stays so.
        """
        return layer, loc

    def locate_all(self, loc: Any) -> Any:
        """The rows of each layer of that stack where the rows `loc` of all layers lie, layer after layer."""
        return loc

    def first_page(self, layer: Any, page_size: int) -> tuple[Any, int]:
        """Of an array seen as pages, the index of page 0 of a layer, and the distance from each page to the next."""
        return layer * (self.rows // page_size), 1

    def whole_layer(self, array: Shaped[Array, "stack_layers stack_rows *row"], layer: Any) -> jax.Array:
        """The rows of one layer, as a copy; zeros if there is no such layer."""
        return array.at[layer].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@dataclass(frozen=True)
class PageMajor(LayerMajor):
    """Rows page after page.

    Attributes:
      page_size: Rows of a layer in a page.
    """

    page_size: int

    @property
    def dims(self) -> tuple[int, int]:
        return 1, self.layers * self.rows

    def locate(self, layer: Any, loc: Any) -> tuple[Any, Any]:
        is_inside = (loc > 0) & (loc < self.rows) & (layer >= 0) & (layer < self.layers)
        row = (loc // self.page_size * self.layers + layer) * self.page_size + loc % self.page_size
        return 0, is_inside * row  # row 0 is the sink: what goes there is dropped, and it reads as zeros

    def locate_all(self, loc: Any) -> Any:
        every_layer = np.arange(self.layers, dtype=np.int32)
        return self.locate(every_layer[:, None], loc[None])[1].reshape(-1)

    def first_page(self, layer: Any, page_size: int) -> tuple[Any, int]:
        return layer, self.layers

    def whole_layer(self, array: Shaped[Array, "stack_layers stack_rows *row"], layer: Any) -> jax.Array:
        by_page = array.reshape(-1, self.layers, self.page_size, *array.shape[2:])
        rows = by_page.at[:, layer].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return rows.reshape(self.rows, *array.shape[2:])
