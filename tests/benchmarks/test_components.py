"""The benchmark of components runs on a generated trace; what it reports is consistent."""

import json

import pytest

from benchmarks import components
from jaxcache.index.check import check
from jaxcache.replay.chat import generate_chat


def test_smoke(tmp_path, capsys):
    out = tmp_path / "components.json"
    components.main(f"--requests 60 --device-tokens 20480 --window 64 --repeat 1 --nodes 500 --json {out}".split())
    result = json.loads(out.read_text())
    cases = components.flavours(64)
    assert set(result["flavours"]) == set(cases) and result["requests"] == 60
    for row in result["flavours"].values():
        base = result["flavours"][row["beside"]]
        assert row["in_all_us"] == pytest.approx(sum(row[f"{figure}_us"] for figure in components.OPERATIONS))
        assert row["insert_ratio"] == pytest.approx(row["insert_us"] / base["insert_us"])
    grown = [(row["tree"], row["component"]) for row in result["growth"]]
    assert grown == [(name, c.name) for name, case in cases.items() if not case.is_in_parts for c in case.components]
    assert "window and state" in capsys.readouterr().out


@pytest.mark.parametrize("name", components.flavours(64))
def test_every_case_evicts_and_keeps_its_books(name):
    case = components.flavours(64)[name]
    nanoseconds, tree = components.run(case, components.keys_of(generate_chat(60)), 16, 1000)
    check(tree)
    assert (nanoseconds > 0).all() and not any(tree.protected)
    assert 0 < len(tree) <= 1000
    holes = sum(slot.value is None for node in tree.nodes() for slot in node.others[:1])
    assert bool(holes) == (name == "state")  # what a split cuts off has no state


def test_trees_in_parts_have_the_same_nodes_and_more_of_them():
    keys = components.keys_of(generate_chat(60))
    cases = components.flavours(64)
    full, *in_parts = [
        sorted(node.start for node in components.run(cases[name], keys, 16, 1000)[1].nodes())
        for name in ("full", "full, in two parts", "window, in two parts")
    ]
    assert in_parts[0] == in_parts[1] and len(in_parts[0]) > len(full)


@pytest.mark.parametrize("name", components.flavours(64))
def test_a_forest_is_filled_again_after_each_eviction(name):
    components_of_it = components.flavours(64)[name].components
    forest = components.Forest(components_of_it, 2000, 16)
    size = len(forest.tree)
    for c in range(len(components_of_it)):
        forest.evict(c)
        assert size <= len(forest.tree) < size + 4
