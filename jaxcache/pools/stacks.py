"""Which rows of a pool hold something: those of pages and states that are not free; and how they are taken in parts.

pool                 stacks of layers               rows in use, by the books of
MHA, MLA             kv                             the allocator
SWAKVPool            full, window                   the allocator and its window side
HybridKVPool         those of its KV, states        and the allocator of states
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.stack import LayerStack, MemoryPool
from jaxcache.pools.swa import SWAKVPool

if TYPE_CHECKING:
    from jaxtyping import Int32


PART_BYTES = 64 << 20
"""Most bytes of a part, but for a row that is longer."""


def layer_stacks(pool: MemoryPool) -> dict[str, LayerStack]:
    """The stacks of layers that a pool consists of, by name."""
    if isinstance(pool, HybridKVPool):
        return layer_stacks(pool.kv) | {"states": pool.states}
    if isinstance(pool, SWAKVPool):
        return {"full": pool.full, "window": pool.window}
    return {"kv": pool} if isinstance(pool, LayerStack) else {}


def with_layer_stacks(pool: MemoryPool, stacks: Mapping[str, Any]) -> MemoryPool:
    """The pool with these stacks, which are updates of its own."""
    if isinstance(pool, HybridKVPool):
        return pool.with_kv(with_layer_stacks(pool.kv, stacks)).with_states(stacks["states"])
    if isinstance(pool, SWAKVPool):
        return pool.replaced(full=stacks["full"], window=stacks["window"])
    return stacks["kv"]


def rows_per_part(pool: LayerStack) -> int:
    """Rows of every layer in one part, but for the last one."""
    row_bytes = -(-pool.size_bytes // pool.config.rows)
    return max(1, min(PART_BYTES // row_bytes, pool.config.rows))


def parts_of(rows: Int32[np.ndarray, " rows"], size: int) -> Iterator[Int32[np.ndarray, " part"]]:
    """The rows, so many at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
