"""The device's map of full pages to window pages: how slots are looked up in it, and how it is patched.

    full slot ── page ──► full_to_window[page] ── window page, or 0: none ──► window slot, or 0: the sink

Source: SGLang 0.5.2 memory_pool.py, SWAKVPool, which has pages of one slot only.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.pools.config import require

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@functools.partial(jax.jit, static_argnames="page_size")
def window_slots(
    full_to_window: Int32[Array, " full_pages+1"], loc: Int32[Array, " n"], *, page_size: int
) -> Int32[Array, " n"]:
    """The window slot of each full slot; 0, the sink, where there is none, or no such page."""
    pages = jnp.asarray(loc) // page_size
    windows = full_to_window.at[pages].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jnp.where(windows > 0, windows * page_size + loc % page_size, 0)


def window_slots_on_host(
    full_to_window: Int32[np.ndarray, " full_pages+1"], slots: Int32[np.ndarray, " n"], page_size: int
) -> Int32[np.ndarray, " n"]:
    """`window_slots` for a map and slots on the host."""
    windows = full_to_window[slots // page_size]
    return np.where(windows > 0, windows * page_size + slots % page_size, 0).astype(np.int32)


def patched(full_to_window: Int32[Array, " full_pages+1"], index: Any, page: Any) -> Int32[Array, " full_pages+1"]:
    """The map with the entries at `index` overwritten by `page`, inside a step that owns it."""
    nowhere = full_to_window.shape[0]
    index = jnp.where(jnp.asarray(index) == 0, nowhere, index)  # The sink has no window page, ever.
    return full_to_window.at[index].set(page, mode="drop", wrap_negative_indices=False)


def require_entries(index: Any, page: Any, last: int) -> None:
    """Raises ArgumentError unless both are int32 lists of one length, and a page on the host is in [0, `last`]."""
    for name, array in (("index", index), ("page", page)):
        is_list = isinstance(array, (jax.Array, np.ndarray)) and array.ndim == 1 and array.dtype == np.int32
        require(is_list, name, "must be a one-dimensional int32 array", array)
    require(page.shape == index.shape, "page", f"must be as many as index, {index.shape[0]}", page.shape[0])
    if isinstance(page, np.ndarray) and page.size:
        is_page = bool(page.min() >= 0 and page.max() <= last)
        require(is_page, "page", f"must be in [0, {last}]", (page.min(), page.max()))
