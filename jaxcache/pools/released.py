"""A pool without its device memory: what is left of it, and how it comes back.

    pool ── release ──► ReleasedPool: sizes, place, and, if they are kept, rows in page-locked host memory
         ◄── resume ──  new arrays, at other addresses perhaps; those rows are where they were, all others are zero

Source: SGLang's memory saver (release_memory_occupation), which keeps addresses; XLA has none to keep.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from jaxcache.pools.copies import CpuCopy
from jaxcache.pools.rows import pad_to
from jaxcache.pools.stack import MemoryPool
from jaxcache.pools.stacks import parts_of, rows_per_part

_EMPTY_ROWS = np.empty(0, np.int32)
_MAX_IN_FLIGHT = 4


class ReleasedPool:
    """Frees the arrays of `pool`, which is stale from then on, once what is to be kept is in host memory.

    Args:
      pool: That of one owner: no other framework has a view of it.
      kept: For each stack of layers, the rows to keep; None to keep nothing.

    Raises:
      StalePoolError, BorrowedError: The pool was consumed, or another framework looks into it. Nothing has changed.

    Cost: the rows over the host link, and as much page-locked memory for as long as this lives.
    """

    def __init__(self, pool: MemoryPool, kept: Mapping[str, np.ndarray] | None):
        pool.require_unshared()
        self._type, self._config, self._mesh = type(pool), pool.config, pool.mesh
        self._device = next(iter(pool.buffers[0].devices())) if self._mesh is None else None
        self._parts: dict[str, list[tuple[np.ndarray, CpuCopy]]] = {}
        for name, stack in pool.stacks().items():
            size = rows_per_part(stack)
            parts = self._parts[name] = []
            for rows in parts_of(_EMPTY_ROWS if kept is None else kept[name], size):
                rows = pad_to(rows, size)
                parts.append((rows, stack.start_copy(rows)))
                jax.block_until_ready(parts[-_MAX_IN_FLIGHT:][0][1].buffers)  # each needs room on the device
        jax.block_until_ready([copy.buffers for parts in self._parts.values() for _, copy in parts])
        for buffer in pool.buffers:
            buffer.delete()

    def resumed(self) -> MemoryPool:
        """A pool like the one that was released, with the rows that were kept. May be tried again if memory is short.

        Cost: those rows over the host link.
        """
        pool = self._type.create(self._config, device=self._device, mesh=self._mesh)
        stacks = pool.stacks()
        for name, parts in self._parts.items():
            for i, (rows, copy) in enumerate(parts):
                stacks[name] = stacks[name].with_rows(rows, stacks[name].placed(copy))
                if i % _MAX_IN_FLIGHT == 0:
                    jax.block_until_ready(stacks[name])
        return pool.with_stacks(stacks)
