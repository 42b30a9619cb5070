"""FlashInfer's append as a peer, where it is installed: the same rows to the same slots, one layer after another.

FlashInfer appends to requests that are lists of pages. Slots in any order are one request whose pages, of one token
each, are those slots. Its latent cache is two arrays, so there the parts of a row do not end side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def append_kv(flashinfer: Any, k_pool: Any, v_pool: Any, slots: Any, k: Any, v: Any) -> Callable[[], None]:
    """Work that writes `k` and `v` into every layer of pools `(layers, slots, heads, dim)`."""
    places, pages = _places(slots), _pages(slots)

    def work() -> None:
        for layer in range(len(k_pool)):
            cache = k_pool[layer].unsqueeze(1), v_pool[layer].unsqueeze(1)  # (pages, 1, heads, dim)
            flashinfer.append_paged_kv_cache(k, v, *places, cache, *pages)

    return work


def append_mla_kv(flashinfer: Any, ckv: Any, kpe: Any, slots: Any, nope: Any, rope: Any) -> Callable[[], None]:
    """Work that writes `nope` and `rope` into every layer of two arrays `(layers, slots, width)`."""
    places, pages = _places(slots), _pages(slots)

    def work() -> None:
        for layer in range(len(ckv)):
            caches = ckv[layer].unsqueeze(1), kpe[layer].unsqueeze(1)
            flashinfer.append_paged_mla_kv_cache(nope, rope, *places, *caches, *pages)

    return work


def _places(slots: Any) -> tuple[Any, Any]:
    """batch_indices and positions of the rows."""
    positions = slots.new_ones(len(slots)).int().cumsum(0).int() - 1
    return positions * 0, positions


def _pages(slots: Any) -> tuple[Any, Any, Any]:
    """kv_indices, kv_indptr and kv_last_page_len of the one request."""
    return slots.int(), slots.new_tensor([0, len(slots)]).int(), slots.new_tensor([1]).int()
