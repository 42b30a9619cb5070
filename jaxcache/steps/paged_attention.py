"""What an attention op over pages is told of one layer in a step: whichever op an engine brings.

    inputs = batch.attention(pool, layer)        or loop.attention(pool, layer), after `loop.grow()`
    k, v = inputs.kv.arrays                      (n, page_size, heads, dim) each, the pages of all layers, in place
    op(q, k, v, inputs.block_table, inputs.seq_len, inputs.cu_q)

Write a layer's new rows before it attends: the queries of a step attend to each other through the pool.

Source: jaxcache's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from jaxcache.pools.layer_pages import LayerPages
from jaxcache.tables.page_list import PageList, page_list

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedAttention:
    """One layer's KV, and which queries attend to how much of it.

    The query at position `p` of a request attends to its tokens `0 .. p`; in a layer with a window, to the last of them
    that the window covers. How wide it is, the model knows; pages before it that are gone read as zeros.

    Attributes:
      kv: The pages of all layers, and where this one's lie.
      block_table: int32, pages of `kv.arrays` that hold the tokens of each request, in their order. Behind the last
        one, for padding, and where a window has left a page behind, it is the layer's sink, which is zero.
      prefix_len: int32, position of the first query of each request; 0 for padding.
      seq_len: int32, tokens that its last query attends to, itself included; 0 for padding, which attends to nothing.
      cu_q: int32, where the queries of each request begin among the tokens of the step, and where the last one's end.
    """

    kv: LayerPages
    block_table: Int32[Array, "requests pages"]
    prefix_len: Int32[Array, " requests"]
    seq_len: Int32[Array, " requests"]
    cu_q: Int32[Array, " requests+1"]

    def page_list(self) -> PageList:
        """The block table as one list, for ops that take it so. Cost: one scatter of the table."""
        return page_list(self.block_table, self.seq_len, self.kv.page_size)
