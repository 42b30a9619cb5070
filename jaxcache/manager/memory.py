"""The memory of a manager as a whole: forgotten, released and resumed, measured."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.request import Request
from jaxcache.steps.runner import StepRunner
from jaxcache.tables.request_table import ReqToTokenPool


class WholeMemory:
    """Everything that a manager has, at once. `MemoryManager` has the contract of each method.

    Args:
      running: Running requests by row.
      cache: The prefix cache, with all components.
      table: The host request table.
      runner: Holds the pool.
    """

    def __init__(self, running: Mapping[int, Request], cache: RadixCache, table: ReqToTokenPool, runner: StepRunner):
        self._running, self._cache, self._table, self._runner = running, cache, table, runner

    def reset(self) -> None:
        """See `MemoryManager.reset`."""
        self.require_idle()
        self._forget()

    def require_idle(self) -> None:
        """Raises RequestStateError while requests are running."""
        if self._running:
            raise RequestStateError(f"{len(self._running)} requests are running: finish, retract or abort them first")

    def _forget(self) -> None:
        self._cache.reset()
        for component in self._cache.components:
            component.clear()
        self._table.clear()

    def release(self, keep: bool) -> None:
        """See `MemoryManager.release_memory`."""
        if keep:
            self._runner.release(self._cache.rows_in_use())
            return
        self.require_idle()
        self._runner.release(None)
        self._forget()

    def usage(self, name: str) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable) of the pages of one component, in tokens.

        Raises:
          ArgumentError: There is no such component.
        """
        return _used(*(count * self._table.page_size for count in self._cache.usage(name)))

    def state_usage(self) -> tuple[int, float, int, int]:
        """See `MemoryManager.get_state_info`."""
        try:
            return _used(*self._cache.usage("state"))
        except ArgumentError as error:
            raise ArgumentError("get_state_info: this memory caches no recurrent states; see get_token_info") from error

    def swa_usage(self) -> tuple[int, int, float, float, int, int, int, int]:
        """See `MemoryManager.get_swa_token_info`."""
        try:
            used, usage, available, evictable = self.usage("window")
        except ArgumentError as error:
            raise ArgumentError(
                "get_swa_token_info: no layer of this memory has a window; see get_token_info"
            ) from error
        full_used, full_usage, full_available, full_evictable = self.usage("full")
        return full_used, used, full_usage, usage, full_available, full_evictable, available, evictable


def _used(size: int, available: int, evictable: int) -> tuple[int, float, int, int]:
    used = size - available - evictable
    return used, used / size, available, evictable
