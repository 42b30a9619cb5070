"""Loading a whole cache into a new manager, on one device or on any mesh.

Nothing is taken from a file before its checksum was compared, and nothing given to anybody before all of it was. A
cache that runs meanwhile is not touched: there is a new manager, or an error.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxcache.arguments import require_callable, require_kind
from jaxcache.errors import SnapshotError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.copies import CpuCopy
from jaxcache.pools.rows import pad_to
from jaxcache.pools.stack import LayerStack
from jaxcache.pools.stacks import parts_of
from jaxcache.snapshot.books import load_state_dict, max_bytes, state_dict
from jaxcache.snapshot.fit import Loaded, as_saved, fitted
from jaxcache.snapshot.folder import as_path, locked
from jaxcache.snapshot.manifest import Manifest, fingerprint, require_same
from jaxcache.snapshot.parts import Part, check_part, read_part
from jaxcache.snapshot.save import array_names, part_path, thread_count

_HEADER_BYTES = 1 << 16  # most of a file of rows


def load_snapshot(
    path: str | os.PathLike,
    config: MemoryConfig,
    *,
    model: str,
    mesh: Mesh | None = None,
    threads: int | None = None,
    report: Callable[[Loaded], None] | None = None,
) -> MemoryManager:
    """`init_memory_pool_and_cache`, with the cache that was saved.

    It finds what that one would have found, and evicts in the order in which that one would have. Of what was evicted
    before, `explain` knows nothing. Where events are on, the first that are taken tell of all that is there.

    Args:
      path: As for `save_snapshot`.
      config: As it was then, in all that content depends on. Axis and shards, `max_running`, `max_context_len`,
        `chunk`, `buckets` and `state_interval` may differ, and events may be on or off. So may the sizes of the pools,
        the policy and `need_sort`: then what fits is loaded, the most valuable prefixes first, and what the saved
        policy would have evicted first is left out, whole leaf by leaf.
      model: As it was then.
      mesh: Where a sharded pool lies, as for `init_memory_pool_and_cache`; any mesh that it fits on.
      threads: That read and checksum files; by default as many as there are processors, up to 16.
      report: Is told how much of the snapshot was loaded.

    Raises:
      SnapshotError: There is no snapshot, it is damaged or of another version, it was made with another model or
        config, or another process is about to replace it.
      ArgumentError: An argument is invalid.
      UnsupportedError: The extra `snapshot` is not installed.
      OSError: as the file system says.

    Cost: what was saved, from disk and over the host link at the same time; for the tree, some 50 us a node, most of it
    to make it and a quarter to check it.
    """
    path, count = as_path(path), thread_count(threads)
    require_kind("config", config, MemoryConfig)
    if mesh is not None:
        require_kind("mesh", mesh, Mesh)
    if report is not None:
        require_callable("report", report)
    fingerprint(model, config)
    with locked(path, exclusive=False):
        manifest = Manifest.read(path)
        saved = as_saved(config, manifest.fingerprint)
        require_same(path, manifest.fingerprint, fingerprint(model, saved))
        folder = path / manifest.folder
        books = _read_books(folder, manifest, saved)
        manager = init_memory_pool_and_cache(config, mesh=mesh)
        if fingerprint(model, config) == manifest.fingerprint:
            load_state_dict(manager, books)
            rows: Mapping[str, np.ndarray] = manager.cache.rows_in_use()
            loaded = _all_of(manager)
        else:
            fit = fitted(books, saved, manager, state_dict(manager))
            load_state_dict(manager, fit.books)
            rows, loaded = fit.rows, fit.loaded
        stacks = manager.pool.stacks()
        for stack in stacks:
            _require_parts(manifest, stack, _max_rows(saved), rows[stack])
        for stack, pool in stacks.items():
            stacks[stack] = _read_rows(folder, manifest, stack, pool, rows[stack], count)
        manager.pool = manager.pool.with_stacks(stacks)
    if report is not None:
        report(loaded)
    return manager


def _all_of(manager: MemoryManager) -> Loaded:
    values = {
        part.name: count
        for part, count in zip(manager.cache.tree_components, manager.cache.tree.evictable, strict=True)
    }
    tokens = len(manager.cache.tree) * manager.page_size
    return Loaded(tokens, tokens, values, values)


def verify_snapshot(path: str | os.PathLike, *, threads: int | None = None) -> Manifest:
    """Reads every file of a snapshot and compares its checksum. Needs no device, and memory for a megabyte a thread.

    Args:
      path: As for `load_snapshot`.
      threads: As for `load_snapshot`.

    Returns:
      What it says of itself.

    Raises:
      SnapshotError: There is no snapshot, it is damaged or of another version, or another process replaces it.
      ArgumentError: `path` or `threads` is no such thing.
      UnsupportedError: The extra `snapshot` is not installed.
    """
    path, count = as_path(path), thread_count(threads)
    with locked(path, exclusive=False):
        manifest = Manifest.read(path)
        folder = path / manifest.folder
        files = [(folder / "books.safetensors", part) for part in manifest.parts["books"]]
        for stack in manifest.rows_per_part:
            files += [(part_path(folder, stack, i), part) for i, part in enumerate(manifest.parts[stack])]

        def read(i: int) -> None:
            check_part(*files[i])

        with ThreadPoolExecutor(count) as workers:
            for _ in _ahead(workers, read, len(files), count + 1):
                pass
    return manifest


def _read_books(folder: Path, manifest: Manifest, config: MemoryConfig) -> dict[str, np.ndarray]:
    parts = manifest.parts["books"]
    most = max_bytes(config)
    if len(parts) != 1 or parts[0].num_bytes > most:
        raise SnapshotError(f"{folder}: it must have one file of books of at most {most} bytes, got {parts[:2]}")
    return read_part(folder / "books.safetensors", parts[0])


def _max_rows(config: MemoryConfig) -> int:
    """More rows than any stack of the pool of a config has."""
    return (config.num_values + 1) * config.kv.page_size + config.window_size


def _require_parts(manifest: Manifest, stack: str, most: int, rows: np.ndarray) -> None:
    size = manifest.rows_per_part.get(stack, 0)
    if not 0 < size <= most:
        raise SnapshotError(f"rows_per_part of {stack} must be in [1, {most}], got {size}")
    needed, given = -(-len(rows) // size), len(manifest.parts.get(stack, []))
    if needed != given:
        raise SnapshotError(f"parts of {stack} must be {needed}, for {len(rows)} rows, got {given}")


def _read_rows(
    folder: Path, manifest: Manifest, stack: str, pool: LayerStack, rows: np.ndarray, threads: int
) -> LayerStack:
    """The stack of layers, consumed, with the rows of files at these rows of it, 0 being none; threads read ahead."""
    size = manifest.rows_per_part[stack]
    parts = list(parts_of(rows, size))
    where = pool

    def read(i: int) -> CpuCopy:
        values = _rows_of(part_path(folder, stack, i), manifest.parts[stack][i], where, len(parts[i]))
        whole = tuple(pad_to(value, size, axis=1) if len(parts[i]) < size else value for value in values)
        return where.placed(CpuCopy(where.config, whole))  # `require_same` has compared the configs

    with ThreadPoolExecutor(threads) as workers:
        for part, copy in zip(parts, _ahead(workers, read, len(parts), threads + 1), strict=True):
            pool = pool.with_rows(pad_to(part, size), copy)
    return pool


def _ahead(workers: ThreadPoolExecutor, call: Any, count: int, most: int) -> Iterator[Any]:
    """`call(0)`, `call(1)`, ... in order, of which up to `most` are under way."""
    waiting: deque[Future[Any]] = deque()
    try:
        for i in range(count):
            waiting.append(workers.submit(call, i))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _rows_of(path: Path, part: Part, pool: LayerStack, count: int) -> list[np.ndarray]:
    """The arrays of a file with `count` rows of every layer, as they must be for this pool."""
    config = pool.config
    shapes = [(config.layer_num, count, *row) for row in config.row_shapes]
    most = sum(math.prod(s) * b.dtype.itemsize for s, b in zip(shapes, pool.buffers, strict=True)) + _HEADER_BYTES
    if part.num_bytes > most:
        raise SnapshotError(f"{path}: it must have at most {most} bytes, got {part.num_bytes}")
    arrays = read_part(path, part)
    values: list[np.ndarray] = []
    for name, shape, buffer in zip(array_names(pool), shapes, pool.buffers, strict=True):
        value = arrays.get(name)
        if value is None or value.shape != shape or value.dtype.itemsize != buffer.dtype.itemsize:
            raise SnapshotError(f"{path}: {name} must be {shape} of {buffer.dtype.itemsize} bytes each, but is not")
        values.append(value.view(buffer.dtype))
    return values
