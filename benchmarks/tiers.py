"""How fast pages go to host memory and come back, beside a plain page-locked copy of as many bytes in the same run.

    python -m benchmarks.tiers --json OUT.json            MHA and MLA, 0.5 and 4 GB of random pages: a GPU
    python -m benchmarks.tiers --layout all --gb 0.5      every order of host memory
    python -m benchmarks.tiers --small --check            some MB on whatever JAX has: does it work, bit for bit?

Warm: host memory is page-locked and every step compiled beforehand; "first" is the first transfer after that. The pages
are random ones on both sides, so that neighbours are rare. A transfer is timed from the call until the host has seen
its end. Plain: one piece of device memory, again and again from and to the next piece of the same page-locked memory,
by the same driver; and by PyTorch, from memory that it locked itself, if it is installed.

Steps meanwhile: a step that reads `--step-gb` of weights and writes to the pool is dispatched one ahead, as an engine
does, and the transfers are polled once a step; without transfers, with backups and with loads taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import as_command, machine, write_figures
from jaxcache.device.donation import donating
from jaxcache.pools.config import KVCacheConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.tiers.cuda_driver import Driver, Rows
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.transfer import Move, Ticket, Transfers

PAGE_SIZE = 16
GB = 10**9
PIECE_BYTES = 128 << 20
"""Of a plain copy."""


@dataclass(frozen=True)
class Pages:
    """What `HostMemory` has to know of full pages."""

    name: str = "full"
    stack_names: tuple[str, ...] = ("kv",)


def mha_config(size: int, is_small: bool) -> MHAConfig:
    """32 layers, 8 heads of 128: 32 KB a page, layer and array."""
    layers, heads = (4, 2) if is_small else (32, 8)
    return MHAConfig(size=size, page_size=PAGE_SIZE, dtype=jnp.bfloat16, layer_num=layers, head_num=heads, head_dim=128)


def mla_config(size: int, is_small: bool) -> MLAConfig:
    """61 layers of 512 + 64: 18 KB a page and layer."""
    layers = 5 if is_small else 61
    return MLAConfig(
        size=size,
        page_size=PAGE_SIZE,
        dtype=jnp.bfloat16,
        layer_num=layers,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
    )


MODELS: dict[str, Callable[[int, bool], KVCacheConfig]] = {"mha": mha_config, "mla": mla_config}


def page_bytes(config: KVCacheConfig) -> int:
    """Bytes of a page of all layers."""
    rows = zip(config.row_shapes, config.row_dtypes, strict=True)
    return config.layer_num * config.page_size * sum(int(np.prod(row)) * dtype.itemsize for row, dtype in rows)


@donating
def filled(pool: Any, seed: Any) -> Any:
    """Other bits in every row."""
    buffers = []
    for i, buffer in enumerate(pool.buffers):
        bits = jnp.uint16 if buffer.dtype.itemsize == 2 else jnp.uint32

        def one_layer(layer: Any, array: Any, bits: Any = bits, i: int = i) -> Any:
            key = jax.random.fold_in(jax.random.key(seed), layer * 16 + i)
            random = jax.random.bits(key, array.shape[1:], bits)
            stored = random if array.dtype == bits else jax.lax.bitcast_convert_type(random, array.dtype)
            return array.at[layer].set(stored)

        buffers.append(jax.lax.fori_loop(0, buffer.shape[0], one_layer, buffer))
    return pool.with_buffers(*buffers)


@jax.jit
def pages_that_differ(mine: Any, theirs: Any, pages: Any, targets: Any) -> Any:
    """How many of these pages of one pool are not, bit for bit, those of the other."""
    differs = jnp.zeros(pages.shape[0], bool)
    for here, there in zip(mine.buffers, theirs.buffers, strict=True):
        bits = jnp.uint16 if here.dtype.itemsize == 2 else jnp.uint32

        def one_layer(layer: Any, differs: Any, here: Any = here, there: Any = there, bits: Any = bits) -> Any:
            rows = (array[layer].reshape(-1, PAGE_SIZE, *array.shape[2:]) for array in (here, there))
            left, right = (
                jax.lax.bitcast_convert_type(array[at], bits) for array, at in zip(rows, (pages, targets), strict=True)
            )
            return differs | (left != right).any(tuple(range(1, left.ndim)))

        differs = jax.lax.fori_loop(0, here.shape[0], one_layer, differs)
    return jnp.count_nonzero(differs)


class Bench:
    """A pool, its host memory, and as many random pages as are to be moved.

    Args:
      model: Which.
      num_bytes: To move.
      layout: Of the host.
      options: The command's.
    """

    def __init__(self, model: str, num_bytes: int, layout: HostLayout, options: argparse.Namespace):
        make, self.options = MODELS[model], options
        one = page_bytes(make(PAGE_SIZE, options.small))
        self.count = max(1, num_bytes // one)
        config = make(PAGE_SIZE * (self.count + self.count // 4 + 1), options.small)
        self.pool: Any = filled(config.pool_type.create(config), np.uint32(1))
        start = time.perf_counter()
        host = HostConfig(bytes=one * (self.count + self.count // 4 + 1), layout=layout, reserve_bytes=1 << 30)
        self.memory = HostMemory.create(self.pool, [Pages()], host)
        self.start_s = time.perf_counter() - start
        self.transfers = Transfers(self.memory)
        self.host = self.memory["full"]
        self.num_bytes = self.count * self.host.page_bytes
        random = np.random.default_rng(0)
        everything = self.host.alloc(self.host.size)
        if everything is None:
            raise RuntimeError("a fresh pool is not empty")
        self.host.free(random.permutation(everything))  # what is taken from now on are no neighbours
        self.pages = (random.permutation(self.host.device_ids)[: self.count] + 1).astype(np.int32)
        self.targets = (random.permutation(self.host.device_ids)[: self.count] + 1).astype(np.int32)
        self.pool = self.transfers.warmed_up(self.pool)
        jax.block_until_ready(self.pool)

    def move(self, pages: np.ndarray, ids: np.ndarray) -> list[Move]:
        """Of full pages."""
        return [Move("full", pages, ids)]

    def finish(self, ticket: Ticket) -> None:
        """Waits, and raises what went wrong."""
        self.pool, _ = self.transfers.wait(self.pool, [ticket])
        if ticket.error is not None:
            raise ticket.error

    def there_and_back(self) -> tuple[float, float]:
        """Seconds of a backup, and of a load of the same pages to others; the pool and the link are idle before."""
        ids = self.host.alloc(self.count)
        if ids is None:
            raise RuntimeError("host pages leaked")
        jax.block_until_ready(self.pool)
        start = time.perf_counter()
        self.finish(self.transfers.backup(self.pool, self.move(self.pages, ids)))
        saved = time.perf_counter()
        self.host.evicted_on_device(ids)
        before = jax.tree.map(jnp.copy, self.pool) if self.options.check else None
        if before is not None:
            self.pool = filled(self.pool, np.uint32(2))
        jax.block_until_ready(self.pool)
        resumed = time.perf_counter()
        self.finish(self.transfers.load(self.move(self.targets, ids)))
        jax.block_until_ready(self.pool)
        loaded = time.perf_counter()
        if before is not None:
            count = int(pages_that_differ(before, self.pool, self.pages, self.targets))
            if count:
                raise RuntimeError(f"{count} of {self.count} pages came back different")
        self.host.free(ids)
        return saved - start, loaded - resumed

    # ---- the same bytes, plainly ------------------------------------------------------------------------------------

    def plain(self) -> tuple[float, float]:
        """Seconds of a plain copy of as many bytes to the host, and back."""
        buffer = max((array.buffer for array in self.host.arrays), key=len)
        piece = min(PIECE_BYTES, self.num_bytes, buffer.nbytes)
        starts = [start % (buffer.nbytes - piece + 1) for start in range(0, self.num_bytes, piece)]
        sizes = [min(piece, self.num_bytes - i * piece) for i in range(len(starts))]
        block = jax.block_until_ready(jnp.zeros(piece, jnp.uint8))
        if jax.default_backend() == "gpu":
            return self._plain_by_driver(block, buffer, starts, sizes)
        device, times = np.zeros(piece, np.uint8), []
        for is_save in (True, False):
            begin = time.perf_counter()
            for start, size in zip(starts, sizes, strict=True):
                here, there = device[:size], buffer[start : start + size]
                np.copyto(*((there, here) if is_save else (here, there)))
            times.append(time.perf_counter() - begin)
        return times[0], times[1]

    def _plain_by_driver(
        self, block: Any, buffer: np.ndarray, starts: list[int], sizes: list[int]
    ) -> tuple[float, float]:
        driver, device, times = Driver(), block.unsafe_buffer_pointer(), []
        (place,) = block.devices()
        with driver.current(driver.context(place.local_hardware_id)):
            stream = driver.stream()
            for copy in (driver.copy_to_host, driver.copy_to_device):
                begin = time.perf_counter()
                for start, size in zip(starts, sizes, strict=True):
                    copy(Rows(buffer.ctypes.data + start, device, size), stream)
                driver.drain(stream)
                times.append(time.perf_counter() - begin)
        return times[0], times[1]

    def plain_torch(self) -> tuple[float, float] | None:
        """The same by PyTorch; None if it is not installed, or has no GPU."""
        try:
            import torch
        except ImportError:
            return None
        if jax.default_backend() != "gpu" or not torch.cuda.is_available():
            return None
        piece = min(PIECE_BYTES, self.num_bytes)
        host = torch.empty(piece, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(piece, dtype=torch.uint8, device="cuda")
        times = []
        for target, source in ((host, device), (device, host)):
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(-(-self.num_bytes // piece)):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * self.num_bytes / (-(-self.num_bytes // piece) * piece))
        return times[0], times[1]

    # ---- steps meanwhile ---------------------------------------------------------------------------------------------

    def steps(self, start_transfer: Callable[[list[Ticket]], None] | None) -> list[float]:
        """Seconds of each of many steps; before each, transfers are polled and more are started."""
        took: list[float] = []
        previous = None
        for _ in range(self.options.steps):
            begin = time.perf_counter()
            if start_transfer is not None:
                self.pool, ended = self.transfers.poll(self.pool)
                start_transfer(ended)
            self.pool, result = one_step(self.pool, self.weights)
            if previous is not None:
                previous.block_until_ready()
            previous = result
            took.append(time.perf_counter() - begin)
        jax.block_until_ready(self.pool)
        return took[len(took) // 10 :]

    def measure_steps(self) -> dict[str, Any]:
        """Medians of steps alone and with transfers, in turns, and what the transfers reached."""
        width = 256 if self.options.small else 8192
        layers = max(1, int(self.options.step_gb * GB / (2 * width * width)))
        self.weights = jnp.ones((layers, width, width), jnp.bfloat16)
        turns = {"backup": Backups(self), "load": Loads(self)}
        self.steps(None)
        alone: list[float] = []
        for _ in range(self.options.rounds):
            for turn in turns.values():
                alone += self.steps(None)
                turn.begin()
                start = time.perf_counter()
                turn.took += self.steps(turn.go_on)
                turn.seconds += time.perf_counter() - start
                self.pool, ended = self.transfers.wait(self.pool)
                turn.end(ended)
        median = statistics.median(alone)
        figures: dict[str, Any] = {"step_ms": round(median * 1e3, 3), "step_p90_ms": _p90_ms(alone)}
        for name, turn in turns.items():
            figures[f"step_with_{name}_ms"] = round(statistics.median(turn.took) * 1e3, 3)
            figures[f"step_with_{name}_p90_ms"] = _p90_ms(turn.took)
            figures[f"slowed_by_{name}"] = round(statistics.median(turn.took) / median - 1, 4)
            figures[f"{name}_meanwhile_gb_per_s"] = round(turn.moved * self.host.page_bytes / turn.seconds / GB, 2)
        return figures


class Backups:
    """Keeps backups in flight, as much as there is room for.

    Args:
      bench: Whose pages.
    """

    def __init__(self, bench: Bench):
        self.bench, self.took, self.seconds, self.moved = bench, list[float](), 0.0, 0

    def begin(self) -> None:
        """Nothing is in flight."""

    def go_on(self, ended: list[Ticket]) -> None:
        """Frees what arrived, and starts more."""
        bench = self.bench
        self._arrived(ended)
        self.moved += sum(len(ticket.moves[0].host_ids) for ticket in ended)
        count = min(bench.transfers.room_for_backup("full"), bench.host.available(), bench.count)
        if count and (ids := bench.host.alloc(count)) is not None:
            bench.transfers.backup(bench.pool, bench.move(bench.pages[:count], ids))

    def end(self, ended: list[Ticket]) -> None:
        """All have ended."""
        self._arrived(ended)

    def _arrived(self, ended: list[Ticket]) -> None:
        for ticket in ended:
            if ticket.error is not None:
                raise ticket.error
            self.bench.host.free(ticket.moves[0].host_ids)


class Loads:
    """Keeps loads in flight: two batches take turns.

    Args:
      bench: Whose pages.
    """

    def __init__(self, bench: Bench):
        self.bench, self.took, self.seconds, self.moved = bench, list[float](), 0.0, 0

    def begin(self) -> None:
        """Backs up what is to be loaded."""
        bench = self.bench
        ids = bench.host.alloc(bench.count)
        if ids is None:
            raise RuntimeError("host pages leaked")
        bench.finish(bench.transfers.backup(bench.pool, bench.move(bench.pages, ids)))
        self.idle = [half for half in np.array_split(ids, 2) if len(half)]

    def go_on(self, ended: list[Ticket]) -> None:
        """Loads again what was loaded."""
        bench = self.bench
        self._arrived(ended)
        self.moved += sum(len(ticket.moves[0].host_ids) for ticket in ended)
        while self.idle:
            ids = self.idle.pop()
            bench.host.evicted_on_device(ids)
            bench.transfers.load(bench.move(bench.targets[: len(ids)], ids))

    def end(self, ended: list[Ticket]) -> None:
        """All have ended: frees them."""
        self._arrived(ended)
        for ids in self.idle:
            self.bench.host.free(ids)

    def _arrived(self, ended: list[Ticket]) -> None:
        for ticket in ended:
            if ticket.error is not None:
                raise ticket.error
            self.idle.append(ticket.moves[0].host_ids)


@donating
def one_step(pool: Any, weights: Any) -> Any:
    """Reads all weights, as a decode step of a few requests does, and writes a token to the pool."""

    def layer(x: Any, weight: Any) -> Any:
        return (x @ weight * jnp.bfloat16(1e-4)), None

    x, _ = jax.lax.scan(layer, jnp.ones((8, weights.shape[1]), jnp.bfloat16), weights)
    rows = [jnp.zeros((pool.config.layer_num, 1, *row), jnp.bfloat16) + x[0, 0] for row in pool.config.row_shapes]
    return pool.set_all_layers(jnp.full(1, PAGE_SIZE, jnp.int32), *rows), x


def measured(model: str, gb: float, layout: HostLayout, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    bench = Bench(model, int(gb * GB), layout, options)
    try:
        first = bench.there_and_back()
        ours, plain, torch = [], [], []
        for _ in range(options.rounds):
            plain.append(bench.plain())
            ours.append(bench.there_and_back())
            if (by_torch := bench.plain_torch()) is not None:
                torch.append(by_torch)
        row: dict[str, Any] = {
            "model": model,
            "layout": layout.value,
            "gb": round(bench.num_bytes / GB, 3),
            "pages": bench.count,
            "page_kb": bench.host.page_bytes // 1024,
            "start_up_s": round(bench.start_s, 3),
            "checked": options.check,
        }
        for i, name in enumerate(("backup", "load")):
            for kind, times in (("", ours), ("_plain", plain), ("_torch", torch), ("_first", [first])):
                if times:
                    seconds = statistics.median(time[i] for time in times)
                    row[f"{name}{kind}_gb_per_s"] = round(bench.num_bytes / seconds / GB, 2)
        if options.steps:
            row |= bench.measure_steps()
        return row
    finally:
        bench.pool = bench.transfers.close(bench.pool)
        bench.memory.close()


def _p90_ms(times: list[float]) -> float:
    return round(sorted(times)[len(times) * 9 // 10] * 1e3, 3)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a row at a time, and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument(
        "--layout", choices=[*(layout.value for layout in HostLayout), "all"], default="page_first_direct"
    )
    parser.add_argument("--gb", type=float, nargs="+", default=None, help="to move (default: 0.5 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of each kind and round, meanwhile; 0: none")
    parser.add_argument("--step-gb", type=float, default=8.0, help="weights that a step reads")
    parser.add_argument("--check", action="store_true", help="compare every page that came back, bit for bit")
    parser.add_argument("--small", action="store_true", help="some MB, few layers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.small:
        options.gb, options.step_gb = options.gb or [0.004], 0.0005
    sizes = options.gb or [0.5, 4.0]
    layouts = list(HostLayout) if options.layout == "all" else [HostLayout(options.layout)]
    figures = machine() | {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    for row in rows(options, sizes, layouts):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        figures["rows"].append(row)
        write_figures(options.json, figures)
    return figures


def rows(options: argparse.Namespace, sizes: list[float], layouts: list[HostLayout]) -> Iterator[dict[str, Any]]:
    """A row for each model, size and layout; one that fails is a row that says so."""
    for model in MODELS if options.model == "all" else [options.model]:
        for gb in sizes:
            for layout in layouts:
                yield measured(model, gb, layout, options)


if __name__ == "__main__":
    as_command("tiers", main)
