"""How things are timed, and the row that a measurement becomes.

A time is the median over `SAMPLES` of the time of one sample divided by the repeats inside it; the fastest and the
slowest sample stand beside it. JAX: the repeats (the layers of a step) are unrolled in one jitted call, and a sample is
so many calls, one dispatched after another as an engine does, that the one wait at the end, of 0.1 to 0.6 ms, hardly
counts; what XLA's runtime needs to launch the kernels is in the number, and for small kernels is most of it. What the
kernels alone take is asked of JAX's profiler. PyTorch: the repeats are captured in one CUDA graph and timed by CUDA
events, which is the kernel alone.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

StateT = TypeVar("StateT")

SAMPLES = 9
WARM_UPS = 2
SAMPLE_S = 0.03
"""Least length of a sample of JAX calls."""
GRAPH_US = 2000
"""Least length of a sample of PyTorch, as far as it can be known beforehand."""
FEWEST_CALLS, MOST_CALLS = 8, 256
PROFILED_CALLS = 8


@dataclass(frozen=True)
class Time:
    """What one repeat took, in us, over all samples.

    `first_call_s` is the first call of a JAX step, which traces and compiles; `kernel_us` is what its kernels took.
    """

    median_us: float
    min_us: float
    max_us: float
    first_call_s: float | None = None
    kernel_us: float | None = None

    @classmethod
    def of(cls, samples_us: Sequence[float], first_call_s: float | None = None) -> Time:
        return cls(statistics.median(samples_us), min(samples_us), max(samples_us), first_call_s)


@dataclass(frozen=True)
class Row:
    """One measurement, one line of JSON. `ratio_to_copy` is against a device copy of the same bytes: 1 is a copy."""

    bench: str
    case: str
    implementation: str
    is_peer: bool
    median_us: float
    min_us: float
    max_us: float
    kernel_us: float | None
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
        took: Time,
        *,
        moved: int | None = None,
        is_peer: bool = False,
    ) -> None:
        """Records a time. `moved` counts the bytes read and written, if they are what bounds the op."""
        us, copy_us = took.median_us, self.copy_us.get(moved) if moved else None
        row = Row(
            bench=bench,
            case=case,
            implementation=implementation,
            is_peer=is_peer,
            median_us=round(us, 2),
            min_us=round(took.min_us, 2),
            max_us=round(took.max_us, 2),
            kernel_us=_rounded(took.kernel_us, 2),
            gb_per_s=round(moved / us / 1e3, 1) if moved else None,
            ratio_to_copy=round(copy_us / us, 3) if copy_us else None,
            first_call_s=_rounded(took.first_call_s, 2),
            device=self.device,
            jax_version=jax.__version__,
            commit=self.commit,
        )
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:9.1f} GB/s"
        ratio = "" if row.ratio_to_copy is None else f"{row.ratio_to_copy:6.2f} x copy"
        kernel = "" if row.kernel_us is None else f"  kernels {row.kernel_us:.2f} us"
        first = "" if row.first_call_s is None else f"  first call {row.first_call_s:.2f} s"
        times = f"{row.median_us:9.2f} us [{row.min_us:.2f}, {row.max_us:.2f}]"
        print(f"{bench:17}{case:70}{implementation:24}{times} {speed} {ratio}{kernel}{first}", flush=True)


def time_jax(step: Callable[..., Any], *args: Any, repeats: int = 1) -> Time:
    """One repeat of a jitted `step` that does not consume its arguments."""
    took, _ = time_jax_donated(lambda _, *args: step(*args), None, *args, repeats=repeats)
    return took


def time_jax_donated(step: Callable[..., StateT], state: StateT, *args: Any, repeats: int = 1) -> tuple[Time, StateT]:
    """One repeat of a jitted `step(state, *args) -> state` that donates `state`, and the last state."""

    def sample(state: StateT, calls: int) -> tuple[float, StateT]:
        began = time.perf_counter()
        for _ in range(calls):
            state = step(state, *args)
        jax.block_until_ready(state)
        return time.perf_counter() - began, state

    first_call_s, state = sample(state, 1)
    for _ in range(WARM_UPS):
        seconds, state = sample(state, FEWEST_CALLS)
    calls = min(max(math.ceil(FEWEST_CALLS * SAMPLE_S / seconds), FEWEST_CALLS), MOST_CALLS)
    samples_us = []
    for _ in range(SAMPLES):
        seconds, state = sample(state, calls)
        samples_us.append(seconds * 1e6 / calls / repeats)
    return Time.of(samples_us, first_call_s), state


def with_kernel_time(took: Time, step: Callable[..., StateT], state: StateT, *args: Any, repeats: int = 1) -> Time:
    """`took` with what the kernels of a repeat take by JAX's profiler, where it sees a GPU. The state is consumed."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED_CALLS):
                state = jax.block_until_ready(step(state, *args))
        traces = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    lines = [line for trace in traces for plane in trace.planes if "GPU" in plane.name for line in plane.lines]
    ns = sum(event.duration_ns for line in lines if line.name.startswith("Stream") for event in line.events)
    return replace(took, kernel_us=ns / 1e3 / PROFILED_CALLS / repeats or None)


def time_torch_graph(work: Callable[[], Any], repeats: int = 1) -> Time:
    """One repeat of `work`, which launches `repeats` of them, captured in a CUDA graph.

    So often that it takes a while: what launching a graph takes, some 8 us, then hardly counts.
    """
    import torch

    def elapsed_us(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
        stream.synchronize()
        times = min(math.ceil(GRAPH_US / elapsed_us(work)), MOST_CALLS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    samples_us = [elapsed_us(graph.replay) / times / repeats for _ in range(WARM_UPS + SAMPLES)]
    return Time.of(samples_us[WARM_UPS:])


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
