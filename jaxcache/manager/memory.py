"""The parts of a manager, and what is done to all of its memory at once: forgotten, released, resumed, checked."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.arguments import as_flag
from jaxcache.caches.check import check_cached
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.guard import Guard, exclusive
from jaxcache.manager.audit import check_device_maps, check_device_table, check_owners, check_planned, check_readable
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.swap import warmed_up
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request, RequestState
from jaxcache.steps.host_runner import EnginePool, new_runner
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


class ManagedMemory(abc.ABC):
    """Pool, allocator, request table and prefix cache, and the requests that have a share of them.

    Attributes:
      config: All sizes and choices.
      req_to_token_pool: Host request table.
      allocator: Owner of the pages.
      cache: The prefix cache, with a component for each kind of memory.
      runner: The device's side: pool, device table, compiled steps.
      running: Running requests by row.
      page_size: Tokens a page.
      guard: Who may call, see `jaxcache.guard`; the cache's too.
    """

    def __init__(
        self,
        config: MemoryConfig,
        pool: MemoryPool | EnginePool,
        allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        cache: RadixCache,
    ):
        self.config = config
        self.allocator = allocator
        self.req_to_token_pool = req_to_token_pool
        self.cache = cache
        self.page_size = config.kv.page_size
        self.running: dict[int, Request] = {}
        self.runner = new_runner(pool, req_to_token_pool, cache.components)
        allocator.follow_pool(self.runner)
        self.guard = cache.guard = Guard(self._audit, "call reset(force=True)")

    def hand_over(self) -> None:
        """Lets another thread call: the next that does is the owner. Call it from the present one, between calls.

        Not needed where the present one has ended, or has changed nothing: who only makes a manager owns nothing.

        Raises:
          ThreadError: Another thread is the owner.
        """
        self.guard.require_owner("hand_over")
        self.guard.hand_over()

    @property
    def pool(self) -> MemoryPool:
        """The KV pool. Replaced by every `run`: never keep it across one. What is set must be an update of it.

        Raises:
          ReleasedError: Its memory was released.
          ArgumentError: What is set is a pool of other sizes or layers.
        """
        return self.runner.pool

    @pool.setter
    def pool(self, pool: MemoryPool) -> None:
        self.runner.pool = pool

    @property
    def table(self) -> RequestTable:
        """Device twin of the request table; replaced as the pool is."""
        return self.runner.table

    @property
    @abc.abstractmethod
    def _planned_pages(self) -> Int32[np.ndarray, " pages"]:
        """Pages that several requests of a plan have, which has not run."""

    @exclusive
    def warm_up_offload(self) -> None:
        """Compiles what `retract(offload=True)` and coming back from it run."""
        self.pool = warmed_up(self.pool)

    def reset(self, *, force: bool = False) -> None:
        """Forgets every prefix and takes every page, state and row back, as if new; what is compiled stays.

        Args:
          force: Whatever has happened: loops end, running requests are RETRACTED without their KV, and a pool that a
            step consumed without returning another is replaced by a new one.

        Raises:
          RequestStateError: Requests are running, and `force` is False. Nothing has changed.
          BrokenInvariantError: A call was cut short, and `force` is False.
        """
        if not force:
            self.guard.look("reset")
            self._require_idle()
        self.guard.begin_anew("reset")
        self._retract_all()
        self._forget()
        if force:
            self.runner.revive(self.config.new_pool)
        self.guard.mend()

    def _retract_all(self) -> None:
        """Takes the rows of running requests; they stay in `running` till the rest is forgotten, for a second try."""
        for request in self.running.values():
            request.leave()
            request.lock, request.state = None, RequestState.RETRACTED

    def _require_idle(self) -> None:
        if self.running:
            raise RequestStateError(f"{len(self.running)} requests are running: finish, retract or abort them first")

    def _forget(self) -> None:
        self.cache.reset()
        for component in self.cache.components:
            component.clear()
        self.req_to_token_pool.clear()
        self.running.clear()

    @exclusive
    def release_memory(self, *, keep: bool = False) -> None:
        """Frees the pool's device memory until `resume_memory`: for other arrays of this process, such as training's.

        What needs the pool meanwhile raises ReleasedError: `pool`, `admit`, the steps, copies to the host. Request
        table and compiled steps stay. JAX keeps freed memory for itself unless it was told to allocate from the driver
        (`XLA_PYTHON_CLIENT_ALLOCATOR=platform`).

        Args:
          keep: Keep pages and states in use, in page-locked host memory. Requests may be running, and run on after
            `resume_memory`. If False, all is forgotten as by `reset`.

        Raises: (and nothing has changed)
          ReleasedError: It was released before.
          RequestStateError: Requests are running, and nothing is to be kept.
          BorrowedError: Another framework has borrowed or shares the pool: its tensors would lie in memory that is
            gone, and JAX may put the pool elsewhere when it comes back.
          StalePoolError: A donated step consumed the pool behind the manager's back.

        Cost: waits for the steps in flight; then what is kept, over the host link.
        Source: SGLang 0.5.2 scheduler, release_memory_occupation.
        """
        if as_flag("keep", keep):
            self.runner.release(self.cache.rows_in_use())
            return
        self._require_idle()
        self.runner.release(None)
        self._forget()

    @exclusive
    def resume_memory(self) -> None:
        """Brings the pool's device memory back, with what was kept; at other addresses, perhaps: share it again.

        Raises:
          ReleasedError: It was not released.
          jax.errors.JaxRuntimeError: The device has no room. It stays released, with what was kept: try again.

        Source: SGLang 0.5.2 scheduler, resume_memory_occupation.
        """
        self.runner.resume()

    def get_token_info(self) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable): tokens, and used as a fraction. Locked cached tokens count as used.

        From any thread: the numbers are those between two calls.

        Source: SGLang 0.5.2 scheduler, _get_token_info.
        """
        return self.guard.between_calls(lambda: self._usage("full"))

    def get_state_info(self) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable) of the recurrent states: as `get_token_info`, in states.

        Raises:
          ArgumentError: This memory caches no recurrent states.
        """
        try:
            size, available, evictable = self.cache.usage("state")
        except ArgumentError as error:
            raise ArgumentError("get_state_info: this memory caches no recurrent states; see get_token_info") from error
        used = size - available - evictable
        return used, used / size, available, evictable

    def get_swa_token_info(self) -> tuple[int, int, float, float, int, int, int, int]:
        """Tokens of the full and the window side.

        Returns:
          (full used, window used, full usage, window usage, full available, full evictable, window available, window
          evictable); usages are fractions.

        Raises:
          ArgumentError: There is no window side.

        Source: SGLang 0.5.2 scheduler, _get_swa_token_info.
        """
        return self.guard.between_calls(self._swa_usage)

    def _swa_usage(self) -> tuple[int, int, float, float, int, int, int, int]:
        try:
            used, usage, available, evictable = self._usage("window")
        except ArgumentError as error:
            raise ArgumentError(
                "get_swa_token_info: no layer of this memory has a window; see get_token_info"
            ) from error
        full_used, full_usage, full_available, full_evictable = self._usage("full")
        return full_used, used, full_usage, usage, full_available, full_evictable, available, evictable

    def _usage(self, name: str) -> tuple[int, float, int, int]:
        """(used, usage, available, evictable) of the pages of one component, in tokens."""
        size, available, evictable = (count * self.page_size for count in self.cache.usage(name))
        used = size - available - evictable
        return used, used / size, available, evictable

    @exclusive
    def check_memory(self, read_device: bool = False) -> None:
        """Verifies that every page and every row has exactly one owner, at any time, running requests and all.

        Also that the next token of each of these finds what it attends to.

        Args:
          read_device: Also read the device table back and compare it with the host's.

        Raises:
          BrokenInvariantError: names what has no owner, or two.

        Cost: O(cached pages + pages of running requests). It checks identity, not counts: leaks that cancel out show.
        """
        read_device = as_flag("read_device", read_device)
        self._audit()
        if read_device:
            self.runner.send_changes()
            check_device_table(self.running, self.req_to_token_pool, self.table)
            check_device_maps(self.pool, self.cache.components)

    def _audit(self) -> None:
        """The part that the host can do alone."""
        check_cached(self.cache.tree, self.cache.tree_components)
        planned = self._planned_pages
        check_owners(self.running, self.req_to_token_pool, self.cache.components, planned)
        check_planned(planned, self.allocator)
        check_readable(self.running, self.req_to_token_pool, self.cache.components)
