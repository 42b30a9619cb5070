"""The benchmark of snapshots runs, and says what it must."""

from __future__ import annotations

import json

from benchmarks import snapshot


def test_it_measures_all_there_is_to_compare(tmp_path):
    out = tmp_path / "out.json"
    result = snapshot.main(["--small", "--rounds", "1", "--folder", str(tmp_path), "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["pool_bytes"] <= result["file_bytes"] + (1 << 16)
    assert set(result["of_plain"]) == {"save", "load cold", "load warm"}
    assert len(result["gb_per_s"]) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_it_measures_releasing():
    result = snapshot.main(["--small", "--rounds", "2", "--release"])
    assert set(result["gb_per_s"]) == {
        f"{what}, {turn}" for what in ("release, kept", "resume") for turn in ("first", "later")
    }
