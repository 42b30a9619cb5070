"""How things are timed, and the row that a measurement becomes.

A time is the median over `SAMPLES` of the time of one sample divided by the repeats inside it. JAX: the repeats are
unrolled in one jitted call, so that host dispatch is paid once a sample; what XLA's runtime needs to launch each kernel
is in the number. PyTorch: the repeats are captured in one CUDA graph and timed by CUDA events, which is the kernel
alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

StateT = TypeVar("StateT")

SAMPLES = 15
WARM_UPS = 3


@dataclass(frozen=True)
class Row:
    """One measurement, one line of JSON. `ratio_to_copy` is against a device copy of the same bytes: 1 is a copy."""

    bench: str
    case: str
    implementation: str
    is_peer: bool
    median_us: float
    gb_per_s: float | None
    ratio_to_copy: float | None
    device: str
    jax_version: str
    commit: str


class Report:
    """Prints each row when it is there and appends it to a JSONL file, so that a run cut short loses nothing."""

    def __init__(self, path: Path, device: str, commit: str):
        self.path, self.device, self.commit = path, device, commit
        self.rows: list[Row] = []
        self.copy_us: dict[int, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(
        self, bench: str, case: str, implementation: str, us: float, *, moved: int | None = None, is_peer: bool = False
    ) -> None:
        """Records a median time in us. `moved` counts the bytes read and written, if they are what bounds the op."""
        copy_us = self.copy_us.get(moved) if moved else None
        row = Row(
            bench=bench,
            case=case,
            implementation=implementation,
            is_peer=is_peer,
            median_us=round(us, 2),
            gb_per_s=round(moved / us / 1e3, 1) if moved else None,
            ratio_to_copy=round(copy_us / us, 3) if copy_us else None,
            device=self.device,
            jax_version=jax.__version__,
            commit=self.commit,
        )
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:9.1f} GB/s"
        ratio = "" if row.ratio_to_copy is None else f"{row.ratio_to_copy:6.2f} x copy"
        print(f"{bench:14}{case:34}{implementation:24}{row.median_us:11.2f} us {speed} {ratio}", flush=True)


def time_jax(step: Callable[..., Any], *args: Any, repeats: int = 1) -> float:
    """Median us of one repeat of a jitted `step` that does not consume its arguments."""
    return _median_us(lambda: jax.block_until_ready(step(*args)), repeats)


def time_jax_donated(step: Callable[..., StateT], state: StateT, *args: Any, repeats: int = 1) -> tuple[float, StateT]:
    """Median us of one repeat of a jitted `step(state, *args) -> state` that donates `state`, and the last state."""

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, *args))

    median_us = _median_us(run, repeats)
    return median_us, state


def time_torch_graph(work: Callable[[], Any], repeats: int = 1) -> float:
    """Median us of one repeat of `work`, which launches `repeats` of them, captured in a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(WARM_UPS + SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[WARM_UPS:]) / repeats


def _median_us(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(WARM_UPS + SAMPLES):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[WARM_UPS:]) / repeats
