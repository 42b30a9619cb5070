"""Compiling ahead: every shape of a step before the first request, in several threads.

XLA compiles outside Python's lock, so threads help; tracing stays in the caller's thread. What JAX's persistent
compilation cache has (`JAX_COMPILATION_CACHE_DIR`) is loaded from there, and what it has not is left there.

Source: jaxcache's own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import jax

from jaxcache.errors import ArgumentError

MAX_THREADS = 8
"""Threads that compile, by default, on a machine with as many processors."""


@dataclass(frozen=True)
class Progress:
    """How far a warm-up is.

    Attributes:
      done: Executables that are there.
      total: Executables there will be.
      seconds: Since it began.
    """

    done: int
    total: int
    seconds: float


def show_progress(progress: Progress) -> None:
    """A bar on stderr, drawn over itself: `warm_up(step, progress=show_progress)`."""
    width = 30
    filled = width * progress.done // progress.total
    bar = "#" * filled + "." * (width - filled)
    end = "\n" if progress.done == progress.total else ""
    line = f"\rcompiled [{bar}] {progress.done} of {progress.total} steps, {progress.seconds:.0f} s"
    print(line, end=end, file=sys.stderr, flush=True)


def compile_ahead(
    lowered: Iterable[jax.stages.Lowered],
    total: int,
    *,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Compiles what was lowered; a call of the same jitted function with such arguments finds it compiled.

    Args:
      lowered: Lowered steps, made one after the other while earlier ones compile.
      total: How many they are.
      threads: That compile; by default as many as there are processors, up to `MAX_THREADS`.
      progress: Called in the caller's thread after each of them.

    Raises:
      ArgumentError: `threads` is not a positive integer.
      Exception: Whatever lowering or compiling raised first; what was not begun then is not compiled.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, MAX_THREADS)
    if not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads must be an integer of at least 1, got {threads!r}")
    started = time.perf_counter()
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def compile_one(step: jax.stages.Lowered) -> jax.stages.Lowered:
        with jax.default_device(device):
            step.compile()
        return step

    with ThreadPoolExecutor(threads, thread_name_prefix="jaxcache-compile") as pool:
        try:
            waiting = [pool.submit(compile_one, each) for each in lowered]
            for done, future in enumerate(as_completed(waiting), 1):
                # JAX keys executables by the settings of the thread (default device, mesh, precision). Asked for again
                # where the steps will run: what differs there after all is compiled now and not in the first step.
                future.result().compile()
                if progress is not None:
                    progress(Progress(done, total, time.perf_counter() - started))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
