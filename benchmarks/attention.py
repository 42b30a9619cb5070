"""Paged attention on the present device: first whether it is right, then how fast it is, beside its peers.

    python -m benchmarks.attention [--check] [--small] [--groups NAME,...] [--cases PART,...] [--only IMPLEMENTATION]
        [--append] [--out DIR] [--commit ID] [--sglang DIR]

Each group of cases is a process of its own with a time limit, and a case that fails is a row that says so: nothing
stops the rest. `--check` checks only. `--tune` times other launches beside those of `kernels.attention.launch`.
`--small` runs on a CPU in a minute, where the numbers only show that it runs. Rows go to standard output and
to DIR/attention.jsonl as JSON, by default under benchmarks/results/<device>/.

The limit of a decode is a read of 4 GiB by a Triton kernel in the same process. Keys and values are random numbers, the
pages of a request are anywhere in the pool, and layers follow one another in one jitted step, the plan included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch in the same process

GROUPS = {"check": 280, "decode": 150, "quantized": 60, "latent": 80, "extend": 80, "shared": 50}
"""Groups in the order in which they run, with their time limits in seconds."""
TUNE = {"latent": 60, "decode": 44, "quantized": 32, "shared": 32}
"""Likewise of `--tune`: three minutes in all, the most promising first."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Paged attention: right, then timed.")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--tune", action="store_true", help="also time other launches")
    parser.add_argument("--small", action="store_true", help="tiny cases: any device")
    parser.add_argument("--groups", help=f"comma-separated, of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--cases", default="", help="comma-separated parts of names: only cases that have one of them")
    parser.add_argument("--only", default="", help="only this implementation: triton, mosaic")
    parser.add_argument("--append", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--out", type=Path, help="folder for attention.jsonl")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--sglang", type=Path, help="folder that holds the package sglang")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the group to run in this process
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        from benchmarks import attention_cases

        attention_cases.run_group(options)
        return
    names = options.groups.split(",") if options.groups else list(GROUPS)
    if options.check:
        names = ["check"]
    elif options.tune and not options.groups:
        names = list(TUNE)
    limits = GROUPS | TUNE if options.tune else GROUPS
    began, failed = time.perf_counter(), []
    for i, name in enumerate(names):
        limit = limits[name]
        arguments = [*sys.argv[1:], "--here", name] + ([] if i or options.append else ["--fresh"])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.attention", *arguments], timeout=limit, check=False
            )
            failed += [name] if done.returncode else []
        except subprocess.TimeoutExpired:
            failed.append(name)
            print(f"{name}: stopped after {limit} s", flush=True)
        print(f"[{time.perf_counter() - began:.0f} s] {name}", flush=True)
    if failed:
        sys.exit(f"these groups failed or have failed cases: {', '.join(failed)}")


if __name__ == "__main__":
    main()
