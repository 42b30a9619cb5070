"""The benchmark of events runs, small, on a generated trace; what it reports is consistent."""

import functools
import json

import pytest

from benchmarks import events, readme_table
from jaxcache.replay.chat import generate_chat


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("events") / "events.json"
    sizes = "--requests 60 --device-tokens 20480 --page-sizes 1 16 --repeat 1 --operations 3000 --step-ms 0.1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "measure_metrics", functools.partial(events.measure_metrics, repeat=3, calls=100))
        events.main(f"{sizes} --json {out}".split())
    return out, json.loads(out.read_text())


def test_costs(result):
    _, figures = result
    for rows in [*figures["event_cost"].values(), *figures["event_cost_beside_steps"].values()]:
        assert set(rows) == {"off", "recorded", "published"}
        assert len({row["hit_rate"] for row in rows.values()}) == 1  # events change nothing
        for row in rows.values():
            assert row["percent"] == pytest.approx(100 * (row["in_all_us"] / rows["off"]["in_all_us"] - 1))
            assert row["in_all_median_us"] == pytest.approx(row["in_all_us"])  # of one pass
    for thread in figures["thread"].values():
        assert thread["blocks"] > 0 and thread["ns_a_block"] > 0 and thread["bytes_a_block"] > 9
    assert all(ns > 0 for ns in figures["metrics"].values())


def test_proof(result):
    _, figures = result
    proof = figures["proof"]
    assert proof["operations"] >= 3000 and proof["differences"] == 0
    assert proof["checked"] > 0 and 0 < proof["dropped"] < proof["batches"]


def test_it_has_its_rows_in_the_readme(result):
    path, _ = result
    what = [row.what for row in readme_table.rows_of(path)]
    assert what == ["events, recorded and taken"] * 2 + ["metrics", "tree rebuilt from its events"]


def test_drivers_keep_their_books():
    driver = events.Recorded(20480, 16)
    events.Run(driver, generate_chat(60))
    driver.cache.check()
    assert driver.cache.take_events() == []
