"""How things are timed, and the row that a measurement becomes.

A time is the median over `SAMPLES` of the time of one sample divided by the repeats inside it. JAX: the repeats (the
layers of a step) are unrolled in one jitted call, and a sample is `IN_FLIGHT` calls, one dispatched after another as an
engine does, with one wait at the end, since a wait alone takes 0.1 to 0.6 ms; what XLA's runtime needs to launch the
kernels is in the number. PyTorch: the repeats are captured in one CUDA graph and timed by CUDA events, which is the
kernel alone.
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

SAMPLES = 11
WARM_UPS = 3
IN_FLIGHT = 8


class Time(float):
    """Median us of one repeat, and beside it the seconds of the first call, which traces and compiles."""

    first_call_s: float

    def __new__(cls, us: float, first_call_s: float) -> Time:
        self = super().__new__(cls, us)
        self.first_call_s = first_call_s
        return self


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
    first_call_s: float | None
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
        self,
        bench: str,
        case: str,
        implementation: str,
        us: float,
        *,
        moved: int | None = None,
        is_peer: bool = False,
    ) -> None:
        """Records a time in us. `moved` counts the bytes read and written, if they are what bounds the op."""
        first_call_s = us.first_call_s if isinstance(us, Time) else None
        copy_us = self.copy_us.get(moved) if moved else None
        row = Row(
            bench=bench,
            case=case,
            implementation=implementation,
            is_peer=is_peer,
            median_us=round(float(us), 2),
            gb_per_s=round(moved / us / 1e3, 1) if moved else None,
            ratio_to_copy=round(copy_us / us, 3) if copy_us else None,
            first_call_s=None if first_call_s is None else round(first_call_s, 2),
            device=self.device,
            jax_version=jax.__version__,
            commit=self.commit,
        )
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:9.1f} GB/s"
        ratio = "" if row.ratio_to_copy is None else f"{row.ratio_to_copy:6.2f} x copy"
        first = "" if first_call_s is None else f"  first call {first_call_s:.2f} s"
        print(f"{bench:17}{case:70}{implementation:24}{row.median_us:9.2f} us {speed} {ratio}{first}", flush=True)


def time_jax(step: Callable[..., Any], *args: Any, repeats: int = 1) -> Time:
    """One repeat of a jitted `step` that does not consume its arguments."""
    time, _ = time_jax_donated(lambda _, *args: step(*args), None, *args, repeats=repeats)
    return time


def time_jax_donated(step: Callable[..., StateT], state: StateT, *args: Any, repeats: int = 1) -> tuple[Time, StateT]:
    """One repeat of a jitted `step(state, *args) -> state` that donates `state`, and the last state."""
    began = time.perf_counter()
    state = jax.block_until_ready(step(state, *args))
    first_call_s, times = time.perf_counter() - began, []
    for _ in range(WARM_UPS + SAMPLES):
        began = time.perf_counter()
        for _ in range(IN_FLIGHT):
            state = step(state, *args)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) * 1e6)
    return Time(statistics.median(times[WARM_UPS:]) / repeats / IN_FLIGHT, first_call_s), state


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
