"""What the benchmarks of the host have in common.

The trace they are given, what is said of it and of the machine, the file of figures, and errors on one line.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache.errors import CacheError
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.trace import TraceRequest, read_trace


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def requests_of(options: argparse.Namespace) -> list[TraceRequest]:
    """The first requests of the trace that was asked for, or a generated chat."""
    return read_trace(options.trace, options.requests) if options.trace else generate_chat(options.requests)


def measured_on(options: argparse.Namespace, requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """The machine, the trace, and with how much room and how often it was run."""
    return machine() | {
        "trace": options.trace.name if options.trace else "generated chat",
        "requests": len(requests),
        "device_tokens": options.device_tokens,
        "repeat": options.repeat,
    }


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes them as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def as_command(name: str, main: Callable[[], Any]) -> None:
    """Runs a benchmark; what is wrong with a trace or an option is one line, and exit code 2."""
    try:
        main()
    except CacheError as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
