"""The index benchmark runs on a generated trace without SGLang, and says so; what it reports is consistent."""

import json

import pytest

from benchmarks import index
from benchmarks.index_drivers import Packed
from benchmarks.sglang_tree import find_sglang
from jaxcache.errors import ArgumentError, CacheError
from jaxcache.replay.chat import generate_chat


def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "find_sglang", lambda folder: None)
    out = tmp_path / "index.json"
    index.main(f"--requests 120 --device-tokens 20480 --page-sizes 1 16 --repeat 1 --nodes 3000 --json {out}".split())
    result = json.loads(out.read_text())
    assert result["requests"] == 120 and result["peer"] is None
    for rows in result["page_sizes"].values():
        assert set(rows) == set(index.CASES)
        assert len({row["hit_rate"] for row in rows.values()}) == 1  # keys of any form find the same
        for row in rows.values():
            assert 0 < row["hit_rate"] < 1
            assert row["in_all_us"] == pytest.approx(row["match_us"] + row["evict_us"] + row["insert_us"])
            assert row["match_p50_us"] <= row["match_p99_us"]
    (scale,) = result["scale"]
    assert scale["nodes"] == pytest.approx(3000, rel=0.01) and scale["gc_objects_per_node"] < 2
    assert "pip install" in capsys.readouterr().out


def test_cases_keep_their_books():
    for case in index.CASES.values():
        driver = case(20480, 16)
        run = index.Run(driver, generate_chat(120))
        driver.cache.check()
        assert 0 < run.first_eviction < 120
        if driver.cache.token_to_kv_pool_allocator is not None:
            assert driver.allocator.available_size() + driver.cache.total_size() == 20480


def test_different_hits_before_any_eviction_are_an_error():
    ours, theirs = (index.Run(Packed(1 << 20, 16), generate_chat(120)) for _ in range(2))
    index.check_hits(ours, theirs)
    theirs.hits[20] += 16
    with pytest.raises(CacheError, match="request 20"):
        index.check_hits(ours, theirs)


def test_a_folder_without_sglang_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"radix_cache\.py"):
        find_sglang(tmp_path)
