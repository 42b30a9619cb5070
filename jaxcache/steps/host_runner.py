"""In place of a `StepRunner` where there is no pool: the engine has its own, and runs its own steps on it.

Source: jaxcache's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self, TypeAlias, cast

import numpy as np

from jaxcache.components.base import DeviceMap, MemoryComponent
from jaxcache.errors import UnsupportedError
from jaxcache.pools.stack import MemoryPool
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.runner import StepRunner
from jaxcache.tables.request_table import ReqToTokenPool

CopyStates: TypeAlias = Callable[[np.ndarray, np.ndarray], None]
"""Copies recurrent states: `target[i]` becomes what `source[i]` was, all at the same instant; source 0 empties it. To
happen after the steps that were dispatched before, and before those dispatched next."""


class EnginePool:
    """What stands in the place of a pool: the engine has one of its own, of which only copies of states are known.

    Args:
      copy_states: The engine's; None for a model without recurrent states.
    """

    def __init__(self, copy_states: CopyStates | None = None):
        self._copy_states = copy_states

    @property
    def states(self) -> Self:
        """The states of a pool; here the same object."""
        return self

    def copy_states(self, source: np.ndarray, target: np.ndarray) -> Self:
        """Has the engine copy its states; see `CopyStates`.

        Raises:
          UnsupportedError: It gave nothing to copy them with.
        """
        if self._copy_states is None:
            raise UnsupportedError("copy_states: give init_memory_pool_and_cache what copies your recurrent states")
        self._copy_states(source, target)
        return self

    def with_states(self, states: Self) -> Self:
        """The pool with other states; here the same object."""
        return states

    def copy_tokens(self, source: np.ndarray, target: np.ndarray) -> NoReturn:
        """Refused: a fork copies the page that is not full."""
        raise _refusal("fork")

    def stacks(self) -> NoReturn:
        """Refused: copies to the host and snapshots are the engine's to make."""
        raise _refusal("stacks")

    def get_cpu_copy(self, indices: Any) -> NoReturn:
        """Refused, as `stacks`."""
        raise _refusal("get_cpu_copy")

    def load_cpu_copy(self, cpu_copy: Any, indices: Any) -> NoReturn:
        """Refused, as `stacks`."""
        raise _refusal("load_cpu_copy")


class HostRunner:
    """Refuses what needs a pool. For the rest see `StepRunner`.

    Args:
      pool: What stands in its place.
    """

    maps: tuple[DeviceMap, ...] = ()
    is_undone = False

    def __init__(self, pool: EnginePool):
        self.pool = pool
        self.compiled = CompiledSteps()

    @property
    def table(self) -> NoReturn:
        """Refused: there is none on a device; see `MemoryManager.req_to_token_pool`."""
        raise _refusal("table")

    def require_resumed(self) -> None:
        """Nothing can be released."""

    def revive(self, new_pool: Any) -> None:
        """There is no pool that a step could have consumed."""

    def send_changes(self, room: int = 0, map_room: int = 0) -> None:
        """There is no device copy of the tables."""

    def run(self, *args: Any) -> NoReturn:
        """Refused."""
        raise _refusal("run")

    def run_loop(self, *args: Any) -> NoReturn:
        """Refused."""
        raise _refusal("run_loop")

    def compile_ahead(self, *args: Any) -> NoReturn:
        """Refused."""
        raise _refusal("warm_up")

    def release(self, kept: Any) -> NoReturn:
        """Refused."""
        raise _refusal("release_memory")

    def resume(self) -> NoReturn:
        """Refused."""
        raise _refusal("resume_memory")


def new_runner(
    pool: MemoryPool | EnginePool, table: ReqToTokenPool, components: Sequence[MemoryComponent]
) -> StepRunner:
    """The runner of a pool; or of what stands in the place of one, and then runs nothing."""
    if isinstance(pool, EnginePool):
        return cast(StepRunner, HostRunner(pool))
    return StepRunner(pool, table, components)


def _refusal(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name}: this memory was made without a pool (host_only=True): run your own step over host_batch(plan), then "
        "commit(plan)"
    )
