"""What all tests share: what a marked test needs to run, and a run in which nothing may be skipped."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import jax
import pytest

# Must come before anything imports jaxcache. JAXCACHE_SHAPES=0 is for a machine without jaxtyping and beartype.
if os.environ.get("JAXCACHE_SHAPES", "0") not in ("", "0"):
    from tests import shapes

    shapes.install()

from tests.kernels import h200

# These need torch throughout, and a run that may skip nothing has none.
NEED_TORCH = ["benchmarks/test_bridge.py", "benchmarks/test_device.py", "kernels/attention/test_torch.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH
if not all(map(importlib.util.find_spec, ("openai", "starlette", "uvicorn"))):
    collect_ignore.append("serve/test_server.py")

# Property tests take as long as compiling takes.
hypothesis.settings.register_profile("jaxcache", deadline=None, print_blob=True)
hypothesis.settings.load_profile("jaxcache")

# Devices to shard over, for a machine with one CPU. Must come before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

# LLVM makes machine code in half the time without its optimiser; the HLO that it makes it of, which the in-place proofs
# read, is the same. Not where H200s are compiled for, whose code this would spoil.
if os.environ.get("JAX_PLATFORMS") == "cpu" and h200.missing() is not None:
    jax.config.update("jax_disable_most_optimizations", True)

# What keeps tests with this mark from running here, or None. Asked only if a test has the mark.
MISSING: dict[str, Callable[[], str | None]] = {
    "gpu": lambda: None if jax.default_backend() == "gpu" else "needs an NVIDIA GPU",
    "h200": h200.missing,
    "mosaic": lambda: None if jax.__version_info__ >= (0, 11) else "Mosaic GPU's interpreter needs JAX 0.11 or newer",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs something that is missing."""
    for mark, missing in MISSING.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = missing() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Where JAXCACHE_NO_SKIP is set, a skip is a failure: what was to be tested was not."""
    expected_to_fail = getattr(report, "wasxfail", None) is not None
    if report.skipped and not expected_to_fail and os.environ.get("JAXCACHE_NO_SKIP", "0") not in ("", "0"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"JAXCACHE_NO_SKIP is set, and this was skipped: {reason}"


# Linux allows a process 65,530 memory mappings by default, and each function that XLA compiles for a CPU keeps a
# handful: a process that runs half of this suite would come to its end there, without a word.
MAPPINGS = 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled functions between modules, once there are many."""
    maps = Path("/proc/self/maps")
    if nextitem is not None and nextitem.path != item.path and maps.exists():
        with maps.open("rb") as lines:
            mappings = sum(1 for _ in lines)
        if mappings > MAPPINGS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def on_cpu() -> Generator[None]:
    """For tests on a mesh of simulated devices: what they do outside its shard_map is for a CPU too."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
