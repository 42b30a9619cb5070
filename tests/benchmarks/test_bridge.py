"""The bridge's benchmark runs on a CPU, where its numbers say nothing, and its rows have their place in the README."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import readme_table
from tests.torch_bridge.tensors import ON_GPU

ROOT = Path(__file__).resolve().parents[2]


def test_it_times_what_it_should(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bridge",
        "--small",
        "--skip-checks",
        "--commit",
        "c",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "bridge.jsonl").read_text().splitlines()]
    benches = {"bridge_borrow", "bridge_share", "bridge_step", "bridge_write_mla_kv"}
    if ON_GPU:
        benches.add("bridge_write_mla_kv_call")
    assert {row["bench"] for row in rows} == benches
    assert all(row["median_us"] > 0 for row in rows if row["bench"] != "bridge_share")
    assert len(list(readme_table.rows_of(tmp_path / "bridge.jsonl"))) == len(benches)
