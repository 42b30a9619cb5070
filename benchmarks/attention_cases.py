"""The cases of `benchmarks.attention`: batches over pools as large as they are in use, ops over all their layers."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_checks, attention_peers
from benchmarks.device import current_commit
from benchmarks.timing import Time, time_jax, with_kernel_time
from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent, PageOrder, Sequences
from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.attention.fit import wgmma_extend, wgmma_latents
from jaxcache.kernels.attention.launch import Launches, heads_launches, latent_launches
from jaxcache.kernels.attention.mla import mla_decode, mla_extend
from jaxcache.kernels.attention.plan import SharedPrefix, make_plan
from jaxcache.kernels.dispatch import Implementation, Op, current_target, why_not

MIN_BYTES = 512 << 20
"""Layers of a step hold at least so much together: less would stay in the L2 cache."""
MAX_LAYERS = 32
"""Layers of a step, as a model has: the plan, made once a step, is then what it is in use."""
STEP_S = 0.02
"""About as long as a step may take: slower layers are fewer."""


@dataclass(frozen=True)
class Case:
    """One measurement. Lengths are of each request before and in the step."""

    name: str
    seq: tuple[int, ...]
    new: int = 1
    page: int = 16
    heads: int = 8  # KV heads; 0 for latent rows
    q_heads: int = 32
    dim: int = 128  # of latent rows, rank and rope
    rank: int = 512
    dtype: Any = jnp.bfloat16
    scales: str = "none"
    window: int | None = None
    shared: int = 0  # tokens that all requests have in common
    most_layers: int = MAX_LAYERS

    @property
    def is_extend(self) -> bool:
        return self.new > 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in one layer, scales included."""
        itemsize = np.dtype(self.dtype).itemsize
        if not self.heads:
            return self.dim * itemsize
        return self.heads * 2 * (self.dim * itemsize + (4 if self.scales == "row" else 0))

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that a layer attends to, each counted for each request."""
        return self.row_bytes * sum(min(s, self.window or s) for s in self.seq)

    @property
    def layers(self) -> int:
        """Layers of the pool."""
        once = self.row_bytes * (sum(self.seq) - self.shared * (len(self.seq) - 1) if self.shared else sum(self.seq))
        return min(max(math.ceil(MIN_BYTES / once), 2), self.most_layers)

    @property
    def steps(self) -> int:
        """Layers of the step, which go around those of the pool."""
        about = max(self.read_bytes / 4e12, self.flops / 4e14)
        return min(max(int(STEP_S / about), self.layers), self.most_layers)

    @property
    def flops(self) -> int:
        """Operations of a layer."""
        pairs = sum(self.new * (s - self.new) + self.new * (self.new + 1) // 2 for s in self.seq)
        return 2 * self.q_heads * pairs * (2 * self.dim if self.heads else self.dim + self.rank)


def uniform(batch: int, context: int, **options: Any) -> Case:
    size = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    name = options.pop("name", "")
    return Case(f"{batch} x {size}{' ' + name if name else ''}", (context,) * batch, **options)


def ragged(batch: int, low: int, high: int) -> Case:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(low), np.log(high), batch)).astype(int)
    return Case(f"{batch} ragged {low} .. {high}", tuple(map(int, lengths)))


def cases_of(group: str, small: bool) -> list[Case]:
    """The cases of a group, the small ones in front."""
    latent = dict(heads=0, dim=576, page=64, q_heads=16)
    if small:
        tiny = dict(heads=2, q_heads=4, dim=16, most_layers=2)
        tiny_latent = dict(heads=0, dim=24, rank=16, q_heads=4, most_layers=2)
        return {
            "decode": [uniform(2, 64, **tiny), uniform(2, 64, window=20, **tiny)],
            "quantized": [uniform(2, 64, dtype=np.int8, scales="row", **tiny)],
            "latent": [uniform(2, 64, **tiny_latent), uniform(2, 64, new=8, **tiny_latent)],
            "extend": [uniform(2, 64, new=16, **tiny)],
            "shared": [uniform(4, 600, shared=512, **tiny)],
        }[group]
    k = 1024
    return {
        "decode": [
            uniform(8, k),
            uniform(8, 8 * k),
            uniform(64, k),
            uniform(64, 8 * k),
            ragged(64, 128, 16 * k),
            uniform(256, k),
            uniform(1, 32 * k),
            uniform(64, 8 * k, page=64, name="page 64"),
            uniform(64, 8 * k, heads=1, q_heads=8, name="1 KV head"),
            uniform(64, 32 * k, window=4 * k, name="window 4k"),
            uniform(8, 32 * k),
            uniform(64, 32 * k),
        ],
        "quantized": [
            uniform(64, 8 * k, dtype=jnp.float8_e4m3fn, scales="tensor", name="e4m3"),
            uniform(64, 8 * k, dtype=jnp.float8_e5m2, scales="tensor", name="e5m2"),
            uniform(64, 8 * k, dtype=np.int8, scales="row", name="int8 row scales"),
        ],
        "latent": [
            uniform(8, 8 * k, name="16 heads", **latent),
            uniform(64, 8 * k, name="16 heads", **latent),
            uniform(8, 8 * k, name="128 heads", **latent | dict(q_heads=128)),
            uniform(64, k, name="128 heads", **latent | dict(q_heads=128)),
            uniform(64, 8 * k, name="128 heads", **latent | dict(q_heads=128)),
            uniform(64, 8 * k, name="16 heads e4m3", **latent | dict(dtype=jnp.float8_e4m3fn)),
            uniform(4, 4 * k, new=512, name="128 heads, 512 new", **latent | dict(q_heads=128)),
        ],
        "extend": [
            uniform(8, 10 * k, new=2 * k, name="2k new"),
            uniform(8, 10 * k, new=2 * k, page=64, name="2k new, page 64"),
            uniform(1, 8 * k, new=8 * k, name="prompt"),
            uniform(64, 8 * k, new=4, name="4 drafts"),
        ],
        "shared": [uniform(64, 8 * k + 512, shared=8 * k, name="8k shared")],
    }[group]


@dataclass(frozen=True)
class Problem:
    """A case on the device."""

    case: Case
    q: jax.Array
    kv: PagedKV | PagedLatent
    sequences: Sequences
    masking: Masking


def build(case: Case) -> Problem:
    """Random keys and values, and pages anywhere in the pool."""
    rng = np.random.default_rng(0)
    seq = np.array(case.seq, np.int32)
    counts = -(-seq // case.page)
    own = counts - case.shared // case.page
    pages = int(own.sum()) + case.shared // case.page + 1
    free = 1 + rng.permutation(pages - 1)
    table = np.zeros((len(seq), int(counts.max()) + 8), np.int32)
    table[:, : case.shared // case.page] = free[: case.shared // case.page]
    at = case.shared // case.page
    for b in range(len(seq)):
        table[b, case.shared // case.page : counts[b]] = free[at : at + own[b]]
        at += own[b]
    order = PageOrder(case.layers, pages, case.page)
    rows = (case.layers, pages * case.page)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    new = np.full(len(seq), case.new, np.int32)
    first = np.arange(len(seq), dtype=np.int32) * case.new
    sequences = jax.tree.map(jnp.asarray, Sequences(table, np.arange(len(seq), dtype=np.int32), seq - new, seq, first))
    q_dtype = case.dtype if np.dtype(case.dtype).itemsize > 1 else jnp.bfloat16
    q = jax.random.normal(next(keys), (len(seq) * case.new, case.q_heads, case.dim), q_dtype)
    masking = Masking(case.dim**-0.5, case.window)
    dtype = np.dtype(case.dtype)
    if not case.heads:
        scale = None if dtype.itemsize > 1 else jnp.float32(1)
        latent = PagedLatent(_numbers(next(keys), (*rows, case.dim), dtype), scale, order, dtype, case.rank)
        return Problem(case, q, latent, sequences, masking)
    k, v = (_numbers(next(keys), (*rows, case.heads, case.dim), dtype) for _ in range(2))
    k_scale, v_scale = (_scale(next(keys), case.scales, (*rows, case.heads)) for _ in range(2))
    return Problem(case, q, PagedKV(k, v, k_scale, v_scale, order, dtype), sequences, masking)


@partial(jax.jit, static_argnums=(1, 2))
def _numbers(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    def layer(key: jax.Array) -> jax.Array:
        if dtype == np.int8:
            return jax.random.randint(key, shape[1:], -127, 128, jnp.int8)
        return jax.random.normal(key, shape[1:], jnp.bfloat16).astype(dtype)

    return jax.lax.map(layer, jax.random.split(key, shape[0]))


def _scale(key: jax.Array, kind: str, rows: tuple[int, ...]) -> jax.Array | None:
    if kind == "none":
        return None
    return jax.random.uniform(key, () if kind == "tensor" else rows, jnp.float32, 0.01, 0.02)


def launches_of(case: Case, implementation: Implementation = Implementation.TRITON) -> Launches:
    """What `kernels.attention.launch` says."""
    capability, itemsize, n = current_target().compute_capability(), np.dtype(case.dtype).itemsize, len(case.seq)
    if not case.heads:
        return latent_launches(n, case.q_heads, case.dim, itemsize, capability, implementation)
    group = case.q_heads // case.heads
    return heads_launches(n, case.heads, group, 2 * case.dim, itemsize, capability, implementation)


def attend(problem: Problem, implementation: Implementation, launches: Launches, shares: bool) -> Callable[..., Any]:
    """The jitted step: a plan, and the op in each layer, which waits for the one before."""
    case, masking = problem.case, problem.masking
    ops: dict[tuple[bool, bool], Any] = {
        (True, False): paged_decode,
        (True, True): paged_extend,
        (False, False): mla_decode,
        (False, True): mla_extend,
    }
    op = partial(ops[case.heads > 0, case.is_extend], implementation=implementation)

    def step(q: jax.Array, kv: Any, sequences: Sequences, layers: int) -> jax.Array:
        shared = None
        if shares:
            n = len(case.seq)
            shared = SharedPrefix(jnp.zeros(n, jnp.int32), jnp.full(n, case.shared, jnp.int32))
        plan = make_plan(sequences, q.shape[0], case.page, launches, window=case.window, shared=shared)
        out, ahead = q, jnp.int32(0)
        for layer in range(layers):
            out, lse = op(q, kv, layer % case.layers + ahead, plan, masking)
            if case.heads:
                q = out
            else:  # results are narrower than queries: the next layer waits for a number of this one
                ahead = (lse[0, 0] > 1e30).astype(jnp.int32)
        return out

    return jax.jit(step, static_argnums=3)


def run_group(options: argparse.Namespace) -> None:
    """Checks, or times, the cases of one group; exits with 1 if one failed."""
    from benchmarks import attention_tune

    group, device = options.here, jax.devices()[0]
    name = device.device_kind
    folder = options.out or Path(__file__).parent / "results" / name.replace("NVIDIA ", "").replace(" ", "-").lower()
    report = Report(folder / "attention.jsonl", options, name)
    is_small = options.small or device.platform != "gpu"
    if group == "check":
        report.each("check", attention_checks.checks(small=is_small, only=options.only, among=options.cases))
        raise SystemExit(report.failures > 0)
    limit = attention_peers.read_limit() if device.platform == "gpu" else None
    if limit:
        report.row(bench=group, case="read 4 GiB", implementation="triton", gb_per_s=round(limit, 1))
    cases = cases_of(group, options.small)
    for case in [case for case in cases if any(part in case.name for part in options.cases.split(","))]:
        if not options.tune:
            report.each(group, time_case(group, case, options, limit))
        elif case.name in attention_tune.TUNED:
            report.each(f"tune {group}", attention_tune.tune_case(case, limit))
    raise SystemExit(report.failures > 0)


def time_case(group: str, case: Case, options: argparse.Namespace, limit: float | None) -> Iterator[dict[str, Any]]:
    """A row for each implementation and peer."""
    problem = build(case)
    op = {
        (True, False): Op.PAGED_DECODE,
        (True, True): Op.PAGED_EXTEND,
        (False, False): Op.MLA_DECODE,
        (False, True): Op.MLA_EXTEND,
    }[case.heads > 0, case.is_extend]
    base = launches_of(case)
    want = np.asarray(attend(problem, Implementation.REFERENCE, base, False)(*arguments(problem), 1), np.float32)
    for implementation in Implementation:
        if implementation is Implementation.REFERENCE and current_target().platform != "cpu":
            continue
        if why_not(op, implementation, current_target()) or options.only not in ("", implementation.value):
            continue
        if implementation is Implementation.MOSAIC and not is_for_wgmma(case):
            continue
        base = launches_of(case, implementation)
        for shares in {False, case.shared > 0}:
            name = f"jaxcache-{implementation.value}{' shared' if shares else ''}"
            yield {"case": case.name, "implementation": name} | measure(
                problem, implementation, base, shares, want, limit
            )
    for peer, took, error in attention_peers.measure(problem, want, options.sglang):
        yield {"case": case.name, "implementation": peer, "is_peer": True, "error": error} | _speeds(case, took, limit)


def is_for_wgmma(case: Case) -> bool:
    """Whether the Mosaic kernels take the case."""
    order, dtype = PageOrder(case.layers, 1, case.page), np.dtype(case.dtype)
    if case.heads:
        tokens = len(case.seq) * case.new
        return wgmma_extend(case.dim, case.dim, case.q_heads, case.heads, dtype, order, tokens) is None
    return wgmma_latents(case.rank, case.dim - case.rank, case.q_heads, dtype, order, case.window) is None


def measure(problem: Problem, implementation: Any, launches: Launches, shares: bool, want: Any, limit: Any) -> dict:
    """What one implementation takes for a layer, and its error."""
    case = problem.case
    step = attend(problem, implementation, launches, shares)
    error = attention_peers.relative_error(step(*arguments(problem), 1), want)
    took = time_jax(step, *arguments(problem), case.steps, repeats=case.steps)
    if current_target().platform == "gpu":
        took = with_kernel_time(
            took, lambda _, *args: step(*args), None, *arguments(problem), case.steps, repeats=case.steps
        )
    return {"error": error, "launch": launch_name(case, launches)} | _speeds(case, took, limit)


def launch_name(case: Case, launches: Launches) -> str:
    """The launch in one word: block, warps, stages, and programs or tokens of a tile."""
    one: Any = launches.extend if case.is_extend else launches.decode
    return f"{one.block}/{one.warps}/{one.stages}/{one.tokens if case.is_extend else one.programs}"


def arguments(problem: Problem) -> tuple[Any, ...]:
    """What the step takes."""
    return problem.q, problem.kv, problem.sequences


def _speeds(case: Case, took: Time, limit: float | None) -> dict[str, Any]:
    us = took.median_us
    kernel = took.kernel_us or us
    return {
        "us": round(us, 2),
        "min_us": round(took.min_us, 2),
        "kernel_us": None if took.kernel_us is None else round(kernel, 2),
        "gb_per_s": round(case.read_bytes / kernel / 1e3, 1),
        "of_limit": None if limit is None else round(case.read_bytes / kernel / 1e3 / limit, 3),
        "tflops": round(case.flops / kernel / 1e6, 1),
        "layers": case.steps,
        "first_call_s": None if took.first_call_s is None else round(took.first_call_s, 2),
    }


class Report:
    """Prints each row when it is there and appends it to a file, with the machine and the versions."""

    def __init__(self, path: Path, options: argparse.Namespace, device: str):
        self.path, self.failures = path, 0
        self.facts = {
            "device": device,
            "host": platform.machine(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            **{name: _version(name) for name in ("triton", "jax-triton", "torch", "numpy")},
            "commit": options.commit or current_commit(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.fresh:
            path.write_text("")

    def row(self, **row: Any) -> None:
        print(json.dumps(row), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row | self.facts) + "\n")

    def each(self, bench: str, rows: Iterator[dict[str, Any]]) -> None:
        """All rows of an iterator; if it fails, a row that says why, and the next iterator goes on."""
        began = time.perf_counter()
        try:
            for row in rows:
                self.row(bench=bench, **row, seconds=round(time.perf_counter() - began, 1))
                self.failures += row.get("failed") is not None
        except Exception as error:  # noqa: BLE001  one case must not stop the others, whatever it raises
            self.failures += 1
            traceback.print_exc()
            self.row(bench=bench, failed=f"{type(error).__name__}: {str(error)[:400]}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
