"""The pages of a batch in one list, as FlashInfer's paged wrappers and other kernels take them (CSR).

Request `i` has the pages `indices[indptr[i] : indptr[i + 1]]`, in the order of its tokens; the last of them holds
`last_page_len[i]`.

Source: jaxcache's own; FlashInfer's kv_indptr, kv_indices and kv_last_page_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageList:
    """Pages request after request. NumPy arrays from a table on the host, JAX arrays in a step.

    Attributes:
      indptr: int32, where the pages of each request begin, and where the last one's end.
      indices: int32, pages. In a step there is room for the longest requests, and 0 behind the last page.
      last_page_len: int32, tokens in the last page of each request: 1 .. page_size, or 0 where it has no page.
    """

    indptr: Int32[Any, " requests+1"]
    indices: Int32[Any, " pages"]
    last_page_len: Int32[Any, " requests"]


def page_list(
    block_table: Int32[Array, "requests width"], seq_len: Int32[Array, " requests"], page_size: int
) -> PageList:
    """The list of a block table, in a step.

    Args:
      block_table: The pages of each request in the order of its tokens; what stands behind its last one is not read.
      seq_len: Tokens of each; 0 for padding.
      page_size: Tokens a page.

    Cost: one scatter of the block table.
    """
    requests, width = block_table.shape
    counts = -(-seq_len // page_size)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    ordinal = jnp.arange(width, dtype=jnp.int32)
    place = jnp.where(ordinal < counts[:, None], (ends - counts)[:, None] + ordinal, requests * width)
    indices = jnp.zeros(requests * width, jnp.int32).at[place].set(block_table, mode="drop")
    indptr = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return PageList(indptr, indices, seq_len - jnp.maximum(counts - 1, 0) * page_size)
