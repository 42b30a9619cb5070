"""The pages of one layer, for attention that reads a pool in place.

    kv = pool.pages(layer)                       inside a jitted step, free
    kv.arrays[0][kv.locate(page)]                the keys of a page, (page_size, heads, dim)

Slicing a layer out of its pool copies it. So an op is given the pages of all layers, and ids that point to those of its
layer: what `locate` makes of the pages in the request table, whatever the order of the pool, window or not.

Source: jaxcache's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """Where the pages of one layer lie. A view: made inside a jitted step by `pool.pages(layer)`, and of no use after.

    Attributes:
      arrays: Each array of the pool as pages of all layers, `(n, page_size, *row)`: keys and values, `(heads, dim)`
        each, or latent rows, `(rank + rope,)`. In storage dtype: unsigned integers are to be bitcast to `dtype`.
      scales: For each array, what its elements are worth in float32, if the pool has scales: one a head, `(heads,)`, or
        pages like those of the array without their last dimension. Empty if an element is worth itself.
      offset: int32, index of page 0 of this layer, its sink, which is zero.
      window: int32, window page of each full page if the layer has a window; 0, the sink, where it has none. Else None.
      stride: From one page of the layer to the next: 1, or the number of layers in a page-major pool. Static.
      dtype: What rows are to the caller. Static.
    """

    arrays: tuple[Shaped[Array, "n page_size *row"], ...]
    scales: tuple[Float32[Array, "..."], ...]
    offset: Int32[Array, ""]
    window: Int32[Array, " full_pages+1"] | None
    stride: int = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.arrays[0].shape[1]

    def locate(self, pages: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """Which pages of `arrays` are these pages of the request table, in this layer. Page 0 is the layer's sink."""
        if self.window is not None:
            pages = self.window.at[pages].get(mode="clip")
        return self.offset + pages * self.stride
