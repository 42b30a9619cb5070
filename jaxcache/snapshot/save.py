"""Saving a whole cache.

    device      gather a part    gather a part    ...           rows of pages in use, 64 MB at a time
    host link       copy to page-locked memory    ...
    threads               checksum, write, fsync   ...          one file a part

What is saved is the cache: the tree with the order of eviction, pages and states that it holds, free lists, map to
window pages and free rows. Requests are not: who saves has ended or retracted those that run, and what they computed is
in the tree then, where they find it again.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache.arguments import as_count, require_kind
from jaxcache.device.placing import on_host
from jaxcache.errors import RequestStateError
from jaxcache.manager.manager import MemoryManager
from jaxcache.pools.rows import pad_to
from jaxcache.pools.stack import LayerStack
from jaxcache.pools.stacks import parts_of, rows_per_part
from jaxcache.snapshot.books import state_dict
from jaxcache.snapshot.folder import as_path, new_folder, publish
from jaxcache.snapshot.manifest import Manifest, fingerprint
from jaxcache.snapshot.parts import Part, write_part

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # what rows are in a file, whatever they are to the caller


def save_snapshot(
    path: str | os.PathLike, manager: MemoryManager, *, model: str, threads: int | None = None
) -> Manifest:
    """Saves the whole cache, in place of what was saved there before. Blocks until the disk has it.

    A save that fails or is killed leaves the snapshot that was there whole. The cache goes on as if nothing had
    happened.

    Args:
      path: A folder of its own, on a local file system; made if it is not there, readable by its owner only.
      manager: Whose cache; no request runs. Read, not changed.
      model: What tells the weights apart whose KV this is: their name and revision, say. `load_snapshot` wants the
        same.
      threads: That checksum and write files; by default as many as there are processors, up to 16.

    Returns:
      What was written.

    Raises:
      RequestStateError: Requests run: finish, retract or abort them first.
      LockedError, SnapshotError: A lock or pages of the cache are held; or another process saves or loads there.
      ArgumentError: `model`, `path`, `manager` or `threads` is no such thing.
      StalePoolError: A donated step consumed the pool behind the manager's back.
      UnsupportedError: The extra `snapshot` is not installed.
      OSError: as the file system says.

    Cost: pages in use over the host link and to disk, at the same time; page-locked memory and room on the device for
    some parts of 64 MB.
    """
    path, count = as_path(path), thread_count(threads)
    require_kind("manager", manager, MemoryManager)
    name = fingerprint(model, manager.config)
    if manager.running:
        raise RequestStateError(f"{len(manager.running)} requests are running: finish, retract or abort them first")
    books = state_dict(manager)
    stacks, rows = manager.pool.stacks(), manager.cache.rows_in_use()
    sizes = {stack: rows_per_part(pool) for stack, pool in stacks.items()}
    with new_folder(path) as folder:
        parts = {"books": [write_part(folder / "books.safetensors", books)]}
        for stack, pool in stacks.items():
            parts[stack] = _write_rows(folder, stack, pool, rows[stack], sizes[stack], count)
        manifest = Manifest(folder.name, name, parts, sizes)
        publish(path, manifest)
    return manifest


def _write_rows(folder: Path, stack: str, pool: LayerStack, rows: np.ndarray, size: int, threads: int) -> list[Part]:
    """Writes these rows of every layer, a file a part; the device gathers some parts ahead."""
    written: list[Part] = []
    waiting: deque[Future[Part]] = deque()
    with ThreadPoolExecutor(threads) as workers:
        try:
            for i, part in enumerate(parts_of(rows, size)):
                copies = pool.start_copy(pad_to(part, size)).buffers
                waiting.append(workers.submit(_write_copies, part_path(folder, stack, i), pool, copies, len(part)))
                if len(waiting) > threads + 1:
                    written.append(waiting.popleft().result())
            written += [future.result() for future in waiting]
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return written


def _write_copies(path: Path, pool: LayerStack, copies: tuple[Any, ...], count: int) -> Part:
    names, arrays = array_names(pool), {}
    for name, copy in zip(names, copies, strict=True):
        stored = np.ascontiguousarray(on_host(copy)[:, :count])
        arrays[name] = stored.view(_UNSIGNED[stored.dtype.itemsize])
    return write_part(path, arrays)


# ---- what saving and loading have in common --------------------------------------------------------------------------


def thread_count(threads: int | None) -> int:
    """As asked for, or as many as there are processors, up to 16."""
    return max(1, as_count("threads", threads)) if threads is not None else min(16, os.cpu_count() or 1)


def part_path(folder: Path, stack: str, i: int) -> Path:
    """File `i` of a stack of layers."""
    return folder / f"{stack}-{i:05}.safetensors"


def array_names(pool: LayerStack) -> list[str]:
    """Names of the arrays of a stack of layers in its files, in its order."""
    return [f"rows_{i}" for i in range(len(pool.buffers))]
