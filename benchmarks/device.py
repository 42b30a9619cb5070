"""The kernels on the present device: first whether they are right to the bit, then how fast they are.

    python -m benchmarks.device [--small] [--out DIR] [--commit ID] [--skip-checks] [--sglang DIR]

Beside each op stand what one would write by hand in XLA, PyTorch's `pool[loc] = rows`, SGLang's kernel where it is
installed, or unpacked in DIR, and a device copy of the same bytes, which is what the hardware allows. PyTorch rows need
torch with CUDA. All data are random bits: a GPU moves zeros faster. Runs on a CPU with --small, where the numbers only
show that it runs. Writes DIR/device.jsonl, by default under benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch in the same process

import jax

from benchmarks import checks, device_loops, device_pages, device_writes
from benchmarks.peers import Peers, find_peers
from benchmarks.timing import Report


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels: right to the bit, then timed.")
    parser.add_argument("--small", action="store_true", help="small pools and few cases: any device, a minute or two")
    parser.add_argument("--out", type=Path, help="folder for device.jsonl")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    parser.add_argument("--sglang", type=Path, help="folder that holds the package sglang")
    options = parser.parse_args()
    device = jax.devices()[0]
    is_gpu, name = device.platform == "gpu", device.device_kind
    folder = options.out or Path(__file__).parent / "results" / name.replace("NVIDIA ", "").replace(" ", "-").lower()
    began = time.perf_counter()
    print(f"jax {jax.__version__} on {name}", flush=True)
    if not options.skip_checks:
        checked = checks.check_everything(huge=is_gpu and not options.small)
        for line in itertools.chain(checked, device_loops.check_decode_loops(small=options.small)):
            print(f"bit-exact: {line}  [{time.perf_counter() - began:.0f} s]", flush=True)
    report = Report(folder / "device.jsonl", name, options.commit or current_commit())
    peers = find_peers(options.sglang) if is_gpu else Peers()
    for bench in (*device_writes.BENCHES, *device_pages.BENCHES, *device_loops.BENCHES):
        bench(report, options.small, peers)
        print(f"[{time.perf_counter() - began:.0f} s]", flush=True)
    print(f"{len(report.rows)} rows in {report.path}")


def current_commit() -> str:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
