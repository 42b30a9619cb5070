"""The policy benchmark runs, and its optimum is the optimum."""

import itertools
import json

import pytest

from benchmarks.policies import OPTIMUM, lost_to_lru, main, optimum
from benchmarks.policy_traces import generated_traces
from jaxcache.index.policies.registry import Policy
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.trace import TraceRequest, write_trace


def test_it_measures_every_policy_and_writes_figures_and_a_drawing(tmp_path, capsys):
    trace = tmp_path / "chat.jsonl"
    write_trace(trace, generate_chat(60, 3))
    figures, drawing = tmp_path / "out.json", tmp_path / "out.svg"
    main([str(trace), "--device-tokens", "20000", "60000", "--json", str(figures), "--plot", str(drawing)])
    result = json.loads(figures.read_text())["traces"]["chat.jsonl"]
    rates = result["hit_rates"]
    assert set(rates) == {policy.value for policy in Policy} | {OPTIMUM}
    assert all(0 < small <= large < 1 for small, large in rates.values())
    assert max(rates, key=lambda name: rates[name][0]) == OPTIMUM
    assert all(name in drawing.read_text() for name in rates)
    assert "adaptive" in capsys.readouterr().out


def test_every_generated_trace_is_one(tmp_path):
    for name, requests in generated_traces(30).items():
        assert len(requests) == 30, name
        write_trace(tmp_path / "trace.jsonl", requests)


def test_lost_to_lru_is_the_worst_of_all_sizes():
    assert lost_to_lru({"lru": [0.5, 0.5], "x": [0.4, 0.6]}) == {"lru": 0.0, "x": pytest.approx(0.1)}


def brute_force(sequence, room):
    """The most hits that any choice of what to keep gives, for requests of one block each."""
    best = {frozenset(): 0}
    for block in sequence:
        following = {}
        for kept, hits in best.items():
            hits += block in kept
            there = kept | {block}
            for n in range(min(room, len(there)) + 1):
                for keep in itertools.combinations(sorted(there), n):
                    following[frozenset(keep)] = max(following.get(frozenset(keep), 0), hits)
        best = following
    return max(best.values())


@pytest.mark.parametrize("sequence", ["abcabcabc", "aabbccddab", "abacadabacad", "abcdeabcde"])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_optimum_is_what_brute_force_finds(sequence, room):
    requests = [TraceRequest(i, 512, 1, (ord(letter),)) for i, letter in enumerate(sequence)]
    assert optimum(requests, 512 * room) == 512 * brute_force(sequence, room)
