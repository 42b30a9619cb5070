"""The README is short, its table has names that exist, and the measured tables are those of the committed results."""

import json
from pathlib import Path

import pytest

from benchmarks import readme_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_measured_tables_are_what_the_results_say() -> None:
    for page, new in readme_table.pages().items():
        assert page.read_text(encoding="utf-8") == new, f"{page.name}: python -m benchmarks.readme_table"


def test_the_readme_measures_five_things() -> None:
    measured = TEXT.partition(readme_table.BEGIN)[2].partition(readme_table.END)[0]
    assert sum(line.startswith("| ") for line in measured.splitlines()) == 1 + 5


REPLAY = {
    "trace": "a/chat.jsonl", "requests": 1200, "pool": "mha", "dtype": "bfloat16", "layers": 9, "page_size": 16,
    "device_tokens": 3_000_000, "verified_slots": 5_000_000, "mismatched_slots": 0, "leaked_slots": 0,
    "hit_rate": 0.1415, "recompiles_after_warmup": 0, "retractions": 3, "wall_s": 12.6, "device": "NVIDIA H200",
}  # fmt: skip
INDEX = {
    "cpu": "a CPU", "trace": "chat.jsonl", "requests": 2000, "peer": "SGLang 0.5.2",
    "page_sizes": {"16": {
        "packed keys": {"in_all_us": 20.0, "match_p50_us": 5.0}, "SGLang": {"in_all_us": 400.0, "match_p50_us": 70.0},
    }},
}  # fmt: skip


def kernel(implementation: str, us: float, is_peer: bool = False, case: str = "n=65536") -> dict:
    """A line of benchmarks.device."""
    return {
        "bench": "write_kv", "case": case, "implementation": implementation, "is_peer": is_peer, "median_us": us,
        "gb_per_s": 4000.0, "ratio_to_copy": 0.95, "device": "NVIDIA-H200",
    }  # fmt: skip


POLICIES = {
    "cpu": "a CPU",
    "optimum": "Belady",
    "device_tokens": [3_000_000],
    "traces": {"t.jsonl": {"requests": 9, "hit_rates": {"lru": [0.138], "adaptive": [0.177], "optimum": [0.35]}}},
}
HOST_STEP = {
    "bench": "host_step", "requests": 256, "context": 12_000, "plan_us": 136.7, "plan_upload_dispatch_us": 556.3,
    "upload_bytes": 13_312, "random_steps": 400, "recompiles": 0, "bare_call_us": 110.4, "device": "NVIDIA H200",
}  # fmt: skip


def test_every_kind_of_result_has_its_row(tmp_path: Path) -> None:
    (tmp_path / "H200").mkdir()
    (tmp_path / "replay.json").write_text(json.dumps(REPLAY))
    (tmp_path / "index.json").write_text(json.dumps(INDEX))
    (tmp_path / "policies.json").write_text(json.dumps(POLICIES))
    (tmp_path / "host_step.json").write_text(json.dumps(HOST_STEP))
    lines = [
        kernel("jaxcache-triton", 100.0), kernel("jaxcache-reference", 300.0), kernel("xla-scatter", 290.0, True),
        kernel("device-copy", 95.0, True), kernel("jaxcache-triton", 1.0, case="n=16"),
    ]  # fmt: skip
    (tmp_path / "H200" / "device.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = readme_table.table(readme_table.all_rows(tmp_path), tmp_path / "README.md").splitlines()[2:]
    assert len(rows) == 6
    assert "5,000,000 slots verified: 0 wrong, 0 leaked, 0 late compilations; hit rate 14.15%" in rows[0]
    assert "20.0 µs | SGLang 0.5.2, Python: 400.0 µs (**20.0x**) | [a CPU](index.json)" in rows[1]
    assert "5.0 µs | SGLang 0.5.2, Python: 70.0 µs (**14.0x**)" in rows[2]
    assert "room for 3,000,000 tokens | adaptive 17.7% | lru 13.8% |" in rows[3]
    assert "| n=65536 | 100.0 µs (triton), 4,000 GB/s (95% of a device copy) | xla-scatter 290.0 µs |" in rows[4]
    assert rows[4].endswith("[NVIDIA H200](H200/device.jsonl) |")
    assert "| 556 µs, of it 137 µs to plan | `jax.jit` alone, in the same run: 110 µs; 0 comp" in rows[5]


def test_no_result_and_strange_results(tmp_path: Path) -> None:
    assert readme_table.table(readme_table.all_rows(tmp_path)) == readme_table.NOTHING
    (tmp_path / "strange.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"strange\.json"):
        readme_table.all_rows(tmp_path)


def test_a_highlight_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"0 rows of h200/replay_mha\.json"):
        readme_table.highlights(readme_table.all_rows(tmp_path), tmp_path)


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="markers"):
        readme_table.with_table("nothing here", "table")
