"""The torch bridge on the present device: first whether it is right, then what it costs.

    python -m benchmarks.bridge [--small] [--out DIR] [--commit ID] [--skip-checks] [--sglang DIR]

Right: one address on both sides for every dtype, a spin in front of each side's work, and JAX and torch writing to one
pool in turns, 100,000 times, compared with NumPy. Costs: host time of `borrow`, of what `share` adds to a step, and
the write of latent rows launched from torch, beside SGLang's kernel where it is installed, or unpacked in DIR. Runs on
a CPU with --small. Writes DIR/bridge.jsonl, by default under benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch in the same process

import jax
import torch

from benchmarks import bridge_checks
from benchmarks.bridge_checks import fresh_pool, on_gpu, settle, touch
from benchmarks.device import current_commit
from benchmarks.device_writes import random_slots
from benchmarks.peers import Peers, find_peers, measure_copy, random_torch, to_torch
from benchmarks.timing import Report, Time, time_torch_graph
from jaxcache import MHATokenToKVPool, MLATokenToKVPool
from torch_bridge import borrow, share

SAMPLES = 15
BORROWS = 50
"""Calls in a sample."""
STEPS = 12
"""The same for steps: few enough that no queue is full, for then the host would wait."""
PAIRS = 43
"""Samples of steps with and without sharing, which take turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The torch bridge: right, then timed.")
    parser.add_argument("--small", action="store_true", help="small pools and few steps: any device, under a minute")
    parser.add_argument("--out", type=Path, help="folder for bridge.jsonl")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    parser.add_argument("--sglang", type=Path, help="folder that holds the package sglang")
    options = parser.parse_args()
    name, began = jax.devices()[0].device_kind, time.perf_counter()
    folder = options.out or Path(__file__).parent / "results" / name.replace("NVIDIA ", "").replace(" ", "-").lower()
    print(f"jax {jax.__version__}, torch {torch.__version__} on {name}", flush=True)
    if not options.skip_checks:
        for line in bridge_checks.check_everything(alternations=500 if options.small else 100_000):
            print(f"right: {line}  [{time.perf_counter() - began:.0f} s]", flush=True)
        print(f"with nobody waiting, wrong: {', '.join(bridge_checks.control()) or 'nothing'}", flush=True)
    report = Report(folder / "bridge.jsonl", name, options.commit or current_commit())
    peers = find_peers(options.sglang) if on_gpu() else Peers()
    bench_borrow(report, options.small)
    bench_share(report, options.small)
    bench_write_mla_kv(report, options.small, peers)
    print(f"{len(report.rows)} rows in {report.path}  [{time.perf_counter() - began:.0f} s]")


def time_host(call: Callable[[], Any], calls: int) -> Time:
    """Host time of one call, so many in a row."""
    samples = [_sample(call, calls=calls) for _ in range(SAMPLES)]
    settle()
    return Time.of(samples[2:])


def _sample(call: Callable[..., Any], *args: Any, calls: int = STEPS) -> float:
    """Microseconds of one call of several, on a device that has nothing to do."""
    settle()
    began = time.perf_counter()
    for _ in range(calls):
        call(*args)
    return (time.perf_counter() - began) / calls * 1e6


def bench_borrow(report: Report, small: bool) -> None:
    """An empty block around a pool of 61 layers: all that a borrow does."""
    for kind in (MLATokenToKVPool, MHATokenToKVPool):
        pool = fresh_pool(kind, 61, 1024 if small else 16_384)

        def block(pool: Any = pool) -> None:
            with borrow(pool) as kv:
                kv.buffers  # noqa: B018

        report.add("bridge_borrow", f"{kind.__name__}, 61 layers", "jaxcache-host", time_host(block, BORROWS))


def bench_share(report: Report, small: bool) -> None:
    """What sharing a pool adds to a donated step of one row, with torch idle, and with an op of torch's before each.

    "JAX to torch" is an idle torch's: it waits for the step. "Both ways" is a step between ops of torch's, where JAX
    waits as well. The same loops on a pool that is not shared, where nobody waits, are subtracted: samples of the two
    take turns, and what is reported as added is the median of their differences.
    """
    for kind in (MLATokenToKVPool, MHATokenToKVPool):
        alone, shared = ([fresh_pool(kind, 61, 1024 if small else 16_384)] for _ in range(2))
        cell = torch.zeros(8, device=_torch_device())

        def step(pools: list[Any]) -> None:
            pools[0] = touch(pools[0])

        def op_and_step(pools: list[Any], cell: torch.Tensor = cell) -> None:
            cell.add_(1)
            pools[0] = touch(pools[0])

        with share(shared[0]):
            for name, loop in (("JAX to torch", step), ("both ways", op_and_step)):
                pairs = [(_sample(loop, alone), _sample(loop, shared)) for _ in range(PAIRS)][3:]
                case = f"{kind.__name__}, 61 layers, {name}"
                rows = ("not shared", [a for a, _ in pairs]), ("shared", [b for _, b in pairs])
                for how, samples in rows:
                    report.add("bridge_step", f"{case}, {how}", "jaxcache-host", Time.of(samples))
                report.add("bridge_share", case, "jaxcache-host", Time.of([b - a for a, b in pairs]))


def _torch_device() -> str:
    return "cuda" if on_gpu() else "cpu"


def bench_write_mla_kv(report: Report, small: bool, peers: Peers) -> None:
    """Latent rows of 512 + 64 written from torch: the kernel alone in a CUDA graph, and what a call costs the host."""
    layers, slots = 4, 4096 if small else 262_144
    kv = share(fresh_pool(MLATokenToKVPool, layers, slots))
    for n, loc in random_slots(small, slots):
        case, moved = f"rows={n},width=512+64,dtype=bfloat16,slots=random", 4 * n * 576
        rows = _random_rows(n, kv.device)
        nope, rope, index = rows[:, :512].contiguous(), rows[:, 512:].contiguous(), to_index(loc, kv.device)

        def ours(args: Any = (index, nope, rope)) -> None:
            for layer in range(layers):
                kv.set_mla_kv_buffer(layer, *args)

        if not on_gpu():
            report.add("bridge_write_mla_kv", case, "jaxcache-torch-host", _a_layer(time_host(ours, 3), layers))
            continue
        measure_copy(report, "bridge_write_mla_kv", case, moved, peers.torch)
        report.add("bridge_write_mla_kv", case, "jaxcache-triton-torch", time_torch_graph(ours, layers), moved=moved)
        report.add("bridge_write_mla_kv_call", case, "jaxcache-host", _a_layer(time_host(ours, STEPS), layers))
        if peers.sglang:
            write, pools = peers.sglang.set_mla_kv_buffer, kv.kv.unbind(0)

            def theirs(write: Any = write, pools: Any = pools, args: Any = (index, nope, rope)) -> None:
                for pool in pools:
                    write(pool, *args)

            took = time_torch_graph(theirs, layers)
            report.add("bridge_write_mla_kv", case, "sglang-triton", took, moved=moved, is_peer=True)
            took = _a_layer(time_host(theirs, STEPS), layers)
            report.add("bridge_write_mla_kv_call", case, "sglang-host", took, is_peer=True)
    kv.close()


def _a_layer(took: Time, layers: int) -> Time:
    return Time(took.median_us / layers, took.min_us / layers, took.max_us / layers)


def _random_rows(n: int, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return random_torch(torch, (n, 576), torch.bfloat16)
    return torch.randn(n, 576, dtype=torch.bfloat16)


def to_index(loc: Any, device: torch.device) -> torch.Tensor:
    """Slots as torch callers have them."""
    return to_torch(torch, loc).long() if device.type == "cuda" else torch.from_dlpack(loc).long()


if __name__ == "__main__":
    main()
