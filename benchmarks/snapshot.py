"""How fast a whole cache is saved and loaded, against plain file I/O of the same bytes in the same run; or released.

    python -m benchmarks.snapshot --folder SCRATCH --json OUT.json         8 GB of pool, all of it in use
    python -m benchmarks.snapshot --release --json OUT.json                its memory released and resumed, no files
    python -m benchmarks.snapshot --small                                  a few MB: does it work?

Plain: threads, as many as the snapshot has (and fewer, if that is faster), write as many bytes from host memory to as
many files and wait until the disk has each; and read them into memory that is there already. They take turns with the
snapshot, whose time is that of the whole call: books, copies from and to the device, checksums, files. Reads are timed
with what the system keeps of the files in memory dropped beforehand (cold), and again with it (warm), where plain I/O
is a copy of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import machine, write_figures
from jaxcache.device.donation import donating
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.mha import MHAConfig
from jaxcache.snapshot.load import load_snapshot
from jaxcache.snapshot.save import save_snapshot, thread_count

FILE_BYTES = 64 << 20
SEQUENCE_TOKENS = 2048
MODEL = "benchmark"
LARGE = MHAConfig(
    size=1 << 16, page_size=16, dtype=jnp.bfloat16, layer_num=32, head_num=8, head_dim=128
)  # 8.6 GB, 128 KB a token
SMALL = replace(LARGE, size=1 << 12, layer_num=2, end_layer=None, head_num=2)


@donating
def fill(pool: Any, seed: Any) -> Any:
    """A pool of other bits everywhere but in the sink page, layer by layer."""
    buffers = []
    for buffer in pool.buffers:
        first = pool.config.page_size

        def one_layer(i: Any, filled: Any, first: int = first) -> Any:
            place = jax.lax.broadcasted_iota(jnp.uint32, filled.shape[1:], 0) + i.astype(jnp.uint32) * 77777
            bits = (place * jnp.uint32(2654435761) + seed) >> 16
            bits += jax.lax.broadcasted_iota(jnp.uint32, filled.shape[1:], 2) * 31
            rows = jnp.where(jnp.arange(filled.shape[1])[:, None, None] >= first, bits, 0).astype(jnp.uint16)
            stored = rows if filled.dtype == jnp.uint16 else jax.lax.bitcast_convert_type(rows, filled.dtype)
            return filled.at[i].set(stored)

        buffers.append(jax.lax.fori_loop(0, buffer.shape[0], one_layer, buffer))
    return pool.with_buffers(*buffers)


@jax.jit
def are_equal(mine: Any, theirs: Any) -> Any:
    """Whether two pools hold the same bits."""

    def bits(array: Any) -> Any:
        return array if array.dtype == jnp.uint16 else jax.lax.bitcast_convert_type(array, jnp.uint16)

    return jnp.all(jnp.array([jnp.all(bits(a) == bits(b)) for a, b in zip(mine, theirs, strict=True)]))


def full_manager(config: MemoryConfig) -> MemoryManager:
    """A manager whose pages are all cached, in sequences of random tokens."""
    manager = init_memory_pool_and_cache(config)
    random, page_size = np.random.default_rng(0), manager.page_size
    while available := manager.allocator.available_size():
        count = min(SEQUENCE_TOKENS, available)
        pages: Any = manager.allocator.alloc_pages(count // page_size)  # there are as many
        manager.cache.insert_pages(random.integers(0, 32_000, count, np.int32), pages)
    manager.pool = jax.block_until_ready(fill(manager.pool, np.uint32(12345)))
    return manager


class PlainFiles:
    """Files of `FILE_BYTES` with as many bytes as a snapshot, from and to memory that is there already."""

    def __init__(self, folder: Path, num_bytes: int, threads: int):
        self.folder = folder
        self.sizes = [min(FILE_BYTES, num_bytes - start) for start in range(0, num_bytes, FILE_BYTES)]
        self.threads = threads
        self._data = np.random.default_rng(1).integers(0, 256, (threads, FILE_BYTES), np.uint8)

    def write(self, threads: int) -> None:
        """Writes all files, each to the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._each(self._write_one, threads)

    def read(self, threads: int) -> None:
        """Reads all files."""
        self._each(self._read_one, threads)

    def _each(self, call: Callable[[int], None], threads: int) -> None:
        with ThreadPoolExecutor(threads) as workers:
            list(workers.map(call, range(len(self.sizes))))

    def _write_one(self, i: int) -> None:
        with (self.folder / str(i)).open("wb", buffering=0) as file:
            rest = self._data[i % self.threads, : self.sizes[i]].data
            while len(rest):
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def _read_one(self, i: int) -> None:
        with (self.folder / str(i)).open("rb", buffering=0) as file:
            room = self._data[i % self.threads, : self.sizes[i]].data
            while len(room):
                room = room[file.readinto(room) :]


def forget(folder: Path) -> None:
    """Has the system drop what it keeps in memory of the files below `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Times:
    """GB/s by name, a list each."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.gb_per_s: dict[str, list[float]] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Times what is done inside, and prints it."""
        started = time.perf_counter()
        yield
        rate = self.num_bytes / (time.perf_counter() - started) / 1e9
        self.gb_per_s.setdefault(name, []).append(round(rate, 3))
        print(f"{name:24} {rate:7.2f} GB/s", flush=True)

    def median(self, name: str) -> float:
        """The middle one."""
        return statistics.median(self.gb_per_s[name])


def measure(config: MemoryConfig, folder: Path, rounds: int) -> dict[str, Any]:
    """Plain I/O and the snapshot in turns."""
    manager = full_manager(config)
    num_bytes, threads = manager.pool.size_bytes, thread_count(None)
    times, plain = Times(num_bytes), PlainFiles(folder / "plain", num_bytes, threads)
    saved = folder / "snapshot"
    fewer = max(1, threads // 4)
    for _ in range(rounds):
        for count, label in ((threads, "all threads"), (fewer, "a quarter")):
            with times.timed(f"plain write, {label}"):
                plain.write(count)
        with times.timed("save"):
            manifest = save_snapshot(saved, manager, model=MODEL)
        for heat in ("cold", "warm"):
            for count, label in ((threads, "all threads"), (fewer, "a quarter")):
                if heat == "cold":
                    forget(plain.folder)
                with times.timed(f"plain read {heat}, {label}"):
                    plain.read(count)
            if heat == "cold":
                forget(saved)
            with times.timed(f"load {heat}"):
                other = load_snapshot(saved, config, model=MODEL)
                jax.block_until_ready(other.pool)
            if not are_equal(manager.pool.buffers, other.pool.buffers):
                raise SystemExit("what was loaded is not what was saved")
            del other
    results = {name: {"median": times.median(name), "all": rates} for name, rates in times.gb_per_s.items()}
    return {
        "pool_bytes": num_bytes,
        "file_bytes": manifest.num_bytes,
        "files": sum(map(len, manifest.parts.values())),
        "threads": threads,
        "gb_per_s": results,
        "of_plain": {
            "save": _share(times, "save", "plain write"),
            "load cold": _share(times, "load cold", "plain read cold"),
            "load warm": _share(times, "load warm", "plain read warm"),
        },
    }


def measure_release(config: MemoryConfig, rounds: int) -> dict[str, Any]:
    """Releases and resumes the memory of a full pool; the first time pins the host's memory."""
    manager = full_manager(config)
    times = Times(manager.pool.size_bytes)
    mark = checksum(manager.pool.buffers)
    in_use = [_bytes_in_use()]
    for i in range(rounds):
        turn = "first" if i == 0 else "later"
        with times.timed(f"release, kept, {turn}"):
            manager.release_memory(keep=True)
        in_use.append(_bytes_in_use())
        with times.timed(f"resume, {turn}"):
            manager.resume_memory()
            jax.block_until_ready(manager.pool)
        if checksum(manager.pool.buffers) != mark:
            raise SystemExit("what was resumed is not what was released")
    print(f"device memory in use: {in_use[0]} bytes, released {in_use[-1]}")
    results = {name: {"median": times.median(name), "all": rates} for name, rates in times.gb_per_s.items()}
    return {"pool_bytes": times.num_bytes, "device_bytes": in_use[0], "released_bytes": in_use[-1], "gb_per_s": results}


@jax.jit
def checksum(buffers: Any) -> Any:
    """Of all bits, place by place."""
    total = jnp.zeros((), jnp.uint32)
    for buffer in buffers:
        bits = buffer if buffer.dtype == jnp.uint16 else jax.lax.bitcast_convert_type(buffer, jnp.uint16)
        for axis in range(1, buffer.ndim):
            total += jnp.sum(bits * (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * 2 + 1), dtype=jnp.uint32)
    return total


def _bytes_in_use() -> int | None:
    """On the device, where it says so."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats["bytes_in_use"]


def _share(times: Times, name: str, plain: str) -> float:
    """Of what plain I/O reached with the number of threads with which it was faster."""
    return round(
        times.median(name) / max(times.median(other) for other in times.gb_per_s if other.startswith(plain)), 3
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="where there is room for three times the pool")
    parser.add_argument("--small", action="store_true", help="a few MB")
    parser.add_argument("--release", action="store_true", help="no files: release and resume device memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    config = MemoryConfig(SMALL if options.small else LARGE, max_running=16, max_context_len=1 << 12)
    result = machine() | {"device": jax.devices()[0].device_kind}
    if options.release:
        result |= measure_release(config, options.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="jaxcache-snapshot-", dir=options.folder) as folder:
            result |= measure(config, Path(folder), options.rounds)
        print(json.dumps(result["of_plain"], indent=1))
    write_figures(options.json, result)
    return result


if __name__ == "__main__":
    main()
