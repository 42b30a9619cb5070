"""The benchmark of transfers runs, compares every page, and says what it must."""

from __future__ import annotations

import json

import pytest

from benchmarks import tiers, tiers_overlap


def test_it_measures_all_there_is_to_compare(tmp_path):
    out = tmp_path / "out.json"
    options = ["--small", "--gb", "0.001", "--rounds", "1", "--steps", "4", "--check", "--json", str(out)]
    figures = tiers.main(options)
    assert json.loads(out.read_text()) == figures
    assert [(row["model"], row["layout"]) for row in figures["rows"]] == [
        ("mha", "page_first_direct"),
        ("mla", "page_first_direct"),
    ]
    for row in figures["rows"]:
        assert row["checked"]
        for name in ("backup", "load"):
            assert row[f"{name}_gb_per_s"] > 0 and row[f"{name}_plain_gb_per_s"] > 0
            assert f"slowed_by_{name}" in row and f"{name}_meanwhile_gb_per_s" in row


def test_a_page_that_comes_back_different_is_found(monkeypatch):
    finish, count = tiers.Bench.finish, []

    def wrong(self, ticket):
        finish(self, ticket)
        count.append(ticket)
        if len(count) == 1:  # the first backup
            self.host.arrays[0].buffer[:] ^= 1

    monkeypatch.setattr(tiers.Bench, "finish", wrong)
    with pytest.raises(RuntimeError, match="came back different"):
        tiers.main(["--small", "--gb", "0.001", "--rounds", "1", "--steps", "0", "--check", "--model", "mha"])


def test_ways_to_overlap_compute_the_same(tmp_path):
    out = tmp_path / "out.json"
    figures = tiers_overlap.main(["--small", "--rounds", "1", "--json", str(out)])
    assert json.loads(out.read_text()) == figures
    (row,) = figures["rows"]
    for name in ("first", "in_step", "groups_of_4", "groups_of_1", "link", "step"):
        assert row[f"{name}_ms"] > 0
    assert set(row) > {"hidden_in_step", "hidden_groups_of_4", "hidden_groups_of_1"}
