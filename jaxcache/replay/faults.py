"""Breaking the stack on purpose, to see that the replay notices.

Each fault is a mistake of a kind that serving systems have really made. None of this runs unless it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jaxcache.pages.allocator import PageState
from jaxcache.replay.config import Fault
from jaxcache.replay.content import Pool, write_rows, write_step
from jaxcache.tables.changes import TableChanges

if TYPE_CHECKING:
    import jax

    from jaxcache.components.base import PoolHolder
    from jaxcache.manager.manager import MemoryManager
    from jaxcache.request import Request
    from jaxcache.steps.batch import Batch

TIMES = 5
"""How often a fault of the host side strikes."""


def off_by_one_step(pool: Pool, batch: Batch) -> tuple[Pool, None]:
    """A step that computes about one token in a hundred for the position after its own."""
    return write_rows(pool, batch, batch.slots, batch.positions + _is_rare(batch).astype(jnp.int32)), None


def skipping_step(pool: Pool, batch: Batch) -> tuple[Pool, None]:
    """A step that forgets to write about one token in a hundred."""
    return write_rows(pool, batch, jnp.where(_is_rare(batch), 0, batch.slots), batch.positions), None


def _is_rare(batch: Batch) -> jax.Array:
    return batch.tokens % 101 == 0


def step_for(fault: Fault | None) -> Callable:
    """The step that a replay runs: the right one, or one that is wrong in the way asked for."""
    if fault is Fault.OFF_BY_ONE_POSITION:
        return off_by_one_step
    return skipping_step if fault is Fault.SKIP_WRITE else write_step


class Saboteur:
    """Strikes the host side `TIMES` times, as early as it can. Does nothing for a fault of the step itself."""

    def __init__(self, fault: Fault | None, manager: MemoryManager):
        self._fault = fault
        self._manager = manager
        self._left = TIMES
        if fault is Fault.DOUBLE_OWN:
            self._honest_alloc = manager.allocator.alloc_pages
            manager.allocator.alloc_pages = self._alloc_a_page_in_use
        if fault is Fault.STALE_STATE:
            for component in manager.cache.components:
                component.copy = functools.partial(self._copy_nothing, component.copy)
        if fault is Fault.WRONG_WINDOW:
            for device_map in manager.runner.maps:
                device_map.take_changes = functools.partial(self._take_blank_changes, device_map.take_changes)

    def after_plan(self) -> None:
        """Called when pages have been taken and the table is written, before the step runs."""
        if self._fault is Fault.WRONG_PAGE:
            victim = self._victim(at_least=2)
            if victim is not None:
                request, row, own = victim
                self._manager.req_to_token_pool.write_pages(row, request.num_pages - 1, own[:1])

    def _copy_nothing(self, honest: Callable, device: PoolHolder, source: np.ndarray, target: np.ndarray) -> None:
        if not source.any() or not self._strikes():
            honest(device, source, target)

    def _take_blank_changes(self, honest: Callable[[int], TableChanges], limit: int) -> TableChanges:
        changes = honest(limit)
        return TableChanges(changes.index, changes.page * 0) if len(changes.index) and self._strikes() else changes

    def after_step(self) -> None:
        """Called when a step has run."""
        if self._fault is Fault.FREE_EARLY:
            victim = self._victim(at_least=1)
            if victim is not None:
                self._manager.allocator.release(victim[2][:1], PageState.PRIVATE)

    def before_finish(self, request: Request) -> None:
        """Called when a request is about to end."""
        has_tail = request.num_pages > request.kv_len // self._manager.page_size
        if self._fault is Fault.LEAK and has_tail and self._strikes():
            request.num_pages -= 1

    def _alloc_a_page_in_use(self, n: int) -> np.ndarray | None:
        pages = self._honest_alloc(n)
        victim = self._victim(at_least=1) if n and pages is not None else None
        if pages is None or victim is None:
            return pages
        return np.concatenate([pages[:-1], victim[2][-1:]])

    def _victim(self, at_least: int) -> tuple[Request, int, np.ndarray] | None:
        """A running request with that many pages of its own, while strikes are left."""
        for row, request in self._manager.running.items():
            first = request.protected_len // self._manager.page_size
            own = self._manager.req_to_token_pool.row_pages(row, first, request.num_pages).copy()
            if len(own) >= at_least and self._strikes():
                return request, row, own
        return None

    def _strikes(self) -> bool:
        self._left -= 1
        return self._left >= 0
