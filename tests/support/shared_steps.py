"""Replays of one process share what is compiled: the first one of each shape proves that nothing is compiled late."""

from __future__ import annotations

import functools

from jaxcache.manager.manager import MemoryManager
from jaxcache.steps.compiled import CompiledSteps

_steps = functools.cache(lambda page_size: CompiledSteps())


def share_steps(manager: MemoryManager) -> None:
    """To be called before a replay warms up. Steps know the page size; JAX tells pools apart by their shapes."""
    manager.runner.compiled = _steps(manager.page_size)
