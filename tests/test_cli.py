"""The command line: exit codes, messages on stderr, and nothing written when something is wrong."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxcache.cli.main import main
from jaxcache.replay.config import DType, Fault, PoolKind, ReplayConfig
from jaxcache.replay.trace import read_trace

JSON_KEYS = """requests prompt_tokens hit_tokens hit_rate evicted_tokens verified_slots mismatched_slots leaked_slots
    max_running chunks decode_steps retractions recompiles_after_warmup wall_s host_us page_size device_tokens policy
    pool device jax_version"""
SMALL = ["--device-tokens", "60000", "--layers", "1", "--chunk", "2048", "--concurrency", "4"]
HOST_CALLS = {"match", "admit", "plan", "insert", "evict"}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A short generated trace."""
    path = tmp_path / "chats.jsonl"
    assert main(["trace", "--requests", "12", "--out", str(path)]) == 0
    return path


def test_trace_writes_what_replay_reads(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_trace(chats)
    assert main(["trace", "--requests", "12", "--out", str(chats)]) == 0
    assert read_trace(chats) == before and len(before) == 12
    out, err = capsys.readouterr()
    assert "12 requests" in out and not err


def test_trace_depends_on_its_seed(chats: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    assert main(["trace", "--requests", "12", "--out", str(other), "--seed", "1"]) == 0
    assert other.read_text() != chats.read_text()


def test_replay_proves_a_trace_and_writes_its_figures(chats: Path, tmp_path: Path, capsys) -> None:
    figures_path, page_path = tmp_path / "figures.json", tmp_path / "page.html"
    assert main(["replay", str(chats), *SMALL, "--json", str(figures_path), "--report", str(page_path)]) == 0
    assert "slots proven</h1>" in page_path.read_text(encoding="utf-8")
    figures = json.loads(figures_path.read_text())
    assert figures.keys() >= set(JSON_KEYS.split())
    assert figures["host_us"].keys() == HOST_CALLS
    assert all(timing.keys() >= {"p50", "p99", "total_s"} for timing in figures["host_us"].values())
    assert figures["requests"] == 12
    assert figures["prompt_tokens"] == sum(request.input_length for request in read_trace(chats))
    assert figures["verified_slots"] >= figures["prompt_tokens"]
    assert figures["mismatched_slots"] == figures["leaked_slots"] == figures["recompiles_after_warmup"] == 0
    out, err = capsys.readouterr()
    assert f"All {figures['verified_slots']:,} slots proven" in out and "12/12" in err


def test_a_planted_fault_is_exit_code_one(chats: Path) -> None:
    assert main(["replay", str(chats), *SMALL, "--plant", "skip_write"]) == 1


TOO_LONG = "n" * 3000
BAD_COMMANDS = {
    "a missing trace": ("replay nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    "a directory": ("replay .", "is a directory"),
    "a malformed trace": ("replay bad.jsonl", "bad.jsonl:2: hash_ids must cover input_length"),
    "an unknown option": ("replay chats.jsonl --pages 3", "--pages"),
    "an unknown command": ("play", "play"),
    "no number": ("replay chats.jsonl --page-size many", "--page-size"),
    "page size 0": ("replay chats.jsonl --page-size 0", "--page-size must be in [1, "),
    "negative page size": ("replay chats.jsonl --page-size -16", "--page-size must be in [1, "),
    "no requests": ("replay chats.jsonl --requests 0", "--requests must be in [1, "),
    "no concurrency": ("replay chats.jsonl --concurrency 0", "--concurrency must be in [1, "),
    "no chunk": ("replay chats.jsonl --chunk 0", "--chunk must be in [1, "),
    "no room": ("replay chats.jsonl --device-tokens 0", "--device-tokens must be in [1, "),
    "more slots than int32": ("replay chats.jsonl --device-tokens 3000000000", "--device-tokens must be in [1, "),
    "less than a page": ("replay chats.jsonl --device-tokens 8", "must hold at least one page of 16 tokens, got 8"),
    "no layer": ("replay chats.jsonl --layers 0", "--layers must be in [1, "),
    "layers in words": ("replay chats.jsonl --layers many", "--layers must be a positive number or auto"),
    "no head": ("replay chats.jsonl --heads 0", "--heads must be in [1, "),
    "negative seed": ("replay chats.jsonl --seed -1", "--seed must be in [0, "),
    "an unknown pool": ("replay chats.jsonl --pool gqa", "--pool"),
    "an unknown dtype": ("replay chats.jsonl --dtype int4", "--dtype"),
    "an unknown policy": ("replay chats.jsonl --policy random", "--policy"),
    "an unknown fault": ("replay chats.jsonl --plant gremlin", "--plant"),
    "a fault nobody looks for": ("replay chats.jsonl --plant leak --no-verify", "--plant leak needs verification"),
    "figures into nowhere": ("replay chats.jsonl --json no/figures.json", "no/figures.json: cannot be written"),
    "figures into a folder": ("replay chats.jsonl --json .", "cannot be written"),
    "a report into nowhere": ("replay chats.jsonl --report no/report.html", "no/report.html: cannot be written"),
    "figures into a name too long": (f"replay chats.jsonl --json {TOO_LONG}", "cannot be written: File name too long"),
    "a report with a name too long": (
        f"replay chats.jsonl --report {TOO_LONG}",
        "cannot be written: File name too long",
    ),
    "a report into a folder": ("replay chats.jsonl --report .", "cannot be written"),
    "figures below a file": ("replay chats.jsonl --json chats.jsonl/figures.json", "cannot be written"),
    "a trace with a name too long": (f"replay {TOO_LONG}", "cannot be read: File name too long"),
    "a new trace with a name too long": (
        f"trace --requests 3 --out {TOO_LONG}",
        "cannot be written: File name too long",
    ),
    "a new trace into a folder": ("trace --requests 3 --out .", "cannot be written: Is a directory"),
    "more than there is memory": ("replay chats.jsonl --device-tokens 2000000000", "ask for fewer tokens or layers"),
    "a trace of nothing": ("trace --requests 0 --out new.jsonl", "requests must be in [1, "),
    "a trace into nowhere": ("trace --requests 3 --out no/new.jsonl", "no/new.jsonl: cannot be written"),
    "a trace without a place": ("trace --requests 3", "--out"),
    "a trace with a negative seed": ("trace --requests 3 --seed -2 --out new.jsonl", "seed must not be negative"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_input_is_exit_code_two_and_changes_nothing(name: str, chats: Path, capsys, monkeypatch) -> None:
    command, message = BAD_COMMANDS[name]
    monkeypatch.chdir(chats.parent)
    monkeypatch.setenv("COLUMNS", "400")
    lines = chats.read_text().splitlines()
    Path("bad.jsonl").write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), "hash_ids": []})]))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    capsys.readouterr()
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err and not out and len(err) < 2000
    assert len(err.splitlines()) == 1 or "Usage:" in err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out.json"), "jaxcache: out.json: No space left on device"),
        (IsADirectoryError(21, "Is a directory"), "jaxcache: a file: Is a directory"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: OSError, line: str, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("jaxcache.cli.commands.generate_chat", fail)
    assert main(["trace", "--requests", "3", "--out", "new.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nsecond line")])
def test_a_device_without_room_is_one_line(error: Exception, chats: Path, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("jaxcache.replay.run.init_memory_pool_and_cache", fail)
    capsys.readouterr()
    assert main(["replay", str(chats), *SMALL]) == 2
    assert "--device-tokens 60000: no room for such a pool" in capsys.readouterr().err.splitlines()[-1]


def test_python_m_jaxcache() -> None:
    done = subprocess.run([sys.executable, "-m", "jaxcache", "replay", "nowhere.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("jaxcache: nowhere.jsonl: cannot be read") and len(done.stderr.splitlines()) == 1


def test_help_names_both_commands(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "replay" in out and "trace" in out


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_named(package: str, monkeypatch, capsys) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    assert main(["replay"]) == 2
    assert f"needs {package}: pip install 'jaxcache[cli]'" in capsys.readouterr().err


def test_config_defaults_follow_the_device() -> None:
    cpu, gpu = ReplayConfig().for_platform("cpu"), ReplayConfig().for_platform("gpu")
    assert (cpu.dtype, gpu.dtype) == (DType.FLOAT32, DType.BFLOAT16)
    assert (gpu.heads, gpu.head_dim, gpu.rank, gpu.rope_dim) == (8, 128, 512, 64)
    chosen = ReplayConfig(dtype=DType.FLOAT16, heads=3, pool=PoolKind.MLA).for_platform("gpu")
    assert (chosen.dtype, chosen.heads, chosen.pool) == (DType.FLOAT16, 3, PoolKind.MLA)


def test_config_rounds_the_pool_down_to_whole_pages() -> None:
    assert ReplayConfig(device_tokens=1000, page_size=64).pool_tokens == 960


def test_config_generates_a_trace_when_none_is_given() -> None:
    assert len(ReplayConfig(requests=7).load_requests()) == 7
    assert len(ReplayConfig().load_requests()) == 200


def test_every_documented_fault_can_be_planted() -> None:
    documented = "free_early wrong_page wrong_namespace off_by_one_position skip_write double_own leak"
    documented += " stale_state wrong_window stale_length"
    assert {fault.value for fault in Fault} == set(documented.split())
