"""The README's examples run, its links lead somewhere, and its numbers are those of the committed results."""

import contextlib
import io
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxcache
from benchmarks import readme_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def printed(tmp_path: Path) -> Callable[[str], str]:
    """What an example prints when it stands alone in a file."""

    def run(source: str) -> str:
        path, out = tmp_path / "example.py", io.StringIO()
        path.write_text(source, encoding="utf-8")
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(path))
        return out.getvalue()

    return run


def test_the_step_example_finds_the_first_request(printed) -> None:
    assert printed(EXAMPLES[0]) == "first 0\nsecond 96\n"


def test_the_donation_example_meets_a_stale_pool(printed) -> None:
    out = printed(EXAMPLES[1]).rstrip()
    assert "consumed by an earlier donated step" in out and out.endswith("use the pool which that step returned")


def test_the_loop_example_decodes_32_steps(printed) -> None:
    assert printed(EXAMPLES[2]) == "35 36\n"


def test_the_hybrid_example_goes_on_from_a_saved_state(printed) -> None:
    assert printed(EXAMPLES[3]) == "first 0\nsecond 192\n"


def test_the_sharded_example_is_refused_outside_its_shard_map(printed) -> None:
    assert "call it inside jax.shard_map(step, mesh=mesh" in printed(EXAMPLES[4])


def test_the_snapshot_example_finds_what_was_saved(printed) -> None:
    pytest.importorskip("safetensors")
    assert printed(EXAMPLES[5]) == "96\n"


def test_the_torch_example_reads_what_torch_wrote(printed) -> None:
    pytest.importorskip("torch")
    refused, read = printed(EXAMPLES[6]).splitlines()
    assert refused.endswith("end the borrow first") and read == "2"


def test_the_kernel_example_says_why(printed) -> None:
    picked, refused = printed(EXAMPLES[7]).splitlines()
    assert "the table's choice for write_kv" in picked
    assert refused.endswith("'cpu'. Leave implementation=None for the table's choice.")


def test_there_is_no_other_example() -> None:
    assert len(EXAMPLES) == 8


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_names_of_the_tables_exist() -> None:
    tables = "\n".join(line for line in TEXT.splitlines() if line.startswith("| "))
    tables = tables.partition("| what | case |")[0]
    names = set(re.findall(r"`([A-Z]\w+|[a-z_]+)`", tables)) - {"jaxcache", "ValueError"}
    extras = {
        "cli",
        "viz",
        "torch",
        "transformers",
        "events",
        "metrics",
        "snapshot",
        "test",
        "dev",
        "triton",
        "torch_bridge",
    }
    extras |= set(re.findall(r" import (\w+) as \1\n", (ROOT / "torch_bridge" / "__init__.py").read_text()))
    assert {"RadixCache", "donating", "StalePoolError"} <= names
    assert sorted(name for name in names - extras if name not in dir(jaxcache)) == []


def test_every_error_has_its_line() -> None:
    errors = {value.__name__ for value in vars(jaxcache.errors).values() if isinstance(value, type)}
    assert {name for name in errors if f"`{name}`" not in TEXT} <= {"CacheError"}


def test_the_measured_table_is_what_the_results_say() -> None:
    assert readme_table.with_table(TEXT, readme_table.table()) == TEXT


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
    rows = readme_table.table(tmp_path, tmp_path).splitlines()[2:]
    assert len(rows) == 6
    assert "5,000,000 slots verified: 0 wrong, 0 leaked, 0 late compilations; hit rate 14.15%" in rows[0]
    assert "20.0 µs | SGLang 0.5.2, Python: 400.0 µs (**20.0x**) | [a CPU](index.json)" in rows[1]
    assert "5.0 µs | SGLang 0.5.2, Python: 70.0 µs (**14.0x**)" in rows[2]
    assert "room for 3,000,000 tokens | adaptive 17.7% | lru 13.8% |" in rows[3]
    assert "| n=65536 | 100.0 µs (triton), 4,000 GB/s (95% of a device copy) | xla-scatter 290.0 µs |" in rows[4]
    assert rows[4].endswith("[NVIDIA H200](H200/device.jsonl) |")
    assert "| 556 µs, of it 137 µs to plan | `jax.jit` alone, in the same run: 110 µs; 0 comp" in rows[5]


def test_no_result_and_strange_results(tmp_path: Path) -> None:
    assert readme_table.table(tmp_path, tmp_path) == readme_table.NOTHING
    (tmp_path / "strange.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"strange\.json"):
        readme_table.table(tmp_path, tmp_path)


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="markers"):
        readme_table.with_table("nothing here", "table")
