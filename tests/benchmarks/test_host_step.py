"""The benchmark of a step's host time: every figure is there, and nothing compiles after the warm-up."""

from __future__ import annotations

import pytest

from benchmarks.host_step import measure
from benchmarks.readme_table import host_row

US = ("plan_us", "plan_upload_dispatch_us", "check_us", "changes_us", "pack_us", "call_us", "commit_us")
FLOORS = ("bare_call_us", "bare_call_numpy_us", "loop_step_us", "fastest_tenth_us")


@pytest.fixture(scope="module")
def figures():
    return measure(requests=5, context=40, steps=8, random_steps=60)


def test_every_figure_is_measured(figures, tmp_path):
    assert all(figures[name] > 0 for name in (*US, *FLOORS))
    assert figures["upload_bytes"] == 4 * (6 * 5 + 5 + 2 * (5 + 512))
    assert "of it" in str(host_row(figures, tmp_path))


def test_batches_of_random_size_compile_nothing(figures):
    assert (figures["random_steps"], figures["recompiles"]) == (60, 0)
