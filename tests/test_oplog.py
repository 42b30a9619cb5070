"""The log of a manager's calls: a replay ends with the same books, and a bisection finds the call that broke them."""

from __future__ import annotations

import dataclasses
import inspect
import random

import pytest

from jaxcache.errors import ArgumentError, BrokenInvariantError
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.manager.manager import MemoryManager
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.hook import hooked
from jaxcache.oplog.log import OpKind, RecordedManager, bisect, record, replay
from jaxcache.pages.allocator import PageState
from jaxcache.request import RequestState
from jaxcache.steps.compiled import CompiledSteps
from tests.support.recorded_lives import FLAVOURS, Life, make_config


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_a_replay_has_the_same_books_at_every_point(flavour):
    life = Life(0, flavour).run(200)
    kinds = {op.kind for op in life.memory.log.ops}
    assert len(kinds) >= 13 and any(isinstance(op.result, str) for op in life.memory.log.ops)
    steps = CompiledSteps()
    config = make_config(flavour, layers=2, policy=Policy.LRU)  # other layers, the same decisions
    for until in [0, 1, *random.Random(1).sample(range(len(life.prints)), 6), len(life.prints) - 1]:
        if life.prints[until]:
            again = replay(life.memory.log, until, config=config, compiled=steps)
            assert fingerprint(again) == life.prints[until]
            again.check_memory()


def test_every_call_that_changes_something_is_written_down():
    """A method that is added to the manager has to be added to the log, or to this list."""
    changes_nothing = {"pool", "table", "next_chunk", "working_state", "get_token_info", "get_swa_token_info"}
    changes_nothing |= {"check_memory", "buckets", "room_for", "victim", "warm_up", "warm_up_offload", "warm_up_loop"}
    changes_nothing |= {"hand_over", "get_state_info"}
    public = {name for name in dir(MemoryManager) if not name.startswith("_")}
    assert public - vars(RecordedManager).keys() == changes_nothing


def test_the_hook_sees_every_argument_and_keeps_the_signature():
    class Plain:
        def act(self, what, *more, times=1):
            """Acts."""
            return [what, *more] * times

    @hooked(["act"])
    class Toy(Plain):
        def around(self, name, arguments, call):
            return name, arguments, call()

    assert Toy().act("a", "b", times=2) == ("act", {"what": "a", "more": ("b",), "times": 2}, ["a", "b"] * 2)
    assert Toy().act("a")[1] == {"what": "a", "more": (), "times": 1}
    assert inspect.signature(Toy.act) == inspect.signature(Plain.act) and Toy.act.__doc__ == "Acts."
    with pytest.raises(TypeError):
        Toy().act(times=2)


def test_an_operation_that_another_one_makes_is_not_recorded_again():
    @hooked(["reset"])
    class Thorough(RecordedManager):
        def reset(self):
            self.evict(100)
            super().reset()

    memory = Life(11).run(20).memory
    memory.__class__ = Thorough
    for request in list(memory.running.values()):
        memory.finish(request)
    before = len(memory.log.ops)
    memory.reset()
    assert [op.kind for op in memory.log.ops[before:]] == [OpKind.RESET]


@pytest.mark.parametrize("until", [-1, 1.0, "1", 1000])
def test_a_replay_of_calls_that_were_not_made_is_refused(until):
    """-1 left the last call out, and a number too large was no matter."""
    memory = Life(4).run(10).memory
    assert len(memory.log.ops) < 1000
    with pytest.raises(ArgumentError, match="until must"):
        replay(memory.log, until)


@pytest.mark.parametrize("policy", [Policy.LFU, Policy.S3FIFO, Policy.ADAPTIVE, Policy.PRIORITY])
def test_every_policy_decides_the_same_again(policy):
    life = Life(3, policy=policy).run(200)
    assert fingerprint(replay(life.memory.log)) == life.prints[-1]


def test_a_config_that_decides_otherwise_is_refused():
    life = Life(4).run(10)
    others = [{"policy": Policy.FIFO}, {"page_size": 1}, {"flavour": "window"}, {"disable_radix_cache": True}]
    for options in others:
        with pytest.raises(ArgumentError, match="layers, heads and dtypes alone"):
            replay(life.memory.log, config=make_config(**{"policy": Policy.LRU} | options))


def test_fingerprints_tell_books_apart():
    prints = Life(2).run(150).prints
    assert len(set(prints)) > len(prints) // 2


def test_a_full_log_keeps_the_beginning():
    long, short = Life(5).run(120), Life(5, max_ops=40).run(120)
    assert short.memory.log.is_full and not long.memory.log.is_full
    assert short.memory.log.ops == long.memory.log.ops[:40]
    assert fingerprint(short.memory) == fingerprint(long.memory)
    assert fingerprint(replay(short.memory.log)) == fingerprint(replay(long.memory.log, 40))
    with pytest.raises(ArgumentError, match="max_ops"):
        record(short.config, -1)


def test_requests_that_are_over_are_not_kept():
    life = Life(6).run(200)
    assert len(life.memory.log.requests) > len(life.memory._numbers) > 0
    assert all(request.state is not RequestState.DONE for request in life.memory._numbers)


def test_a_decision_that_is_not_in_the_log_is_noticed():
    life = Life(7).run(100)
    log = life.memory.log
    index, op = next((i, op) for i, op in enumerate(log.ops) if op.kind is OpKind.EXTEND and op.result)
    log.ops[index] = dataclasses.replace(op, result=op.result + 1)
    with pytest.raises(BrokenInvariantError, match=f"call {index}, EXTEND"):
        replay(log)


def test_bisecting_finds_the_first_call_that_broke_the_books(monkeypatch):
    """A fault in the tree: the ninth eviction loses a page. It is in the recorded manager, and in every replay."""
    evict = RadixTree.evict
    counts: dict[int, int] = {}

    def forgetful(tree, amount, component=0):
        gone = evict(tree, amount, component)
        if len(gone.values[0]):
            counts[id(tree)] = counts.get(id(tree), 0) + 1
            if counts[id(tree)] == 9:
                gone.values = (gone.values[0][1:], *gone.values[1:])
        return gone

    monkeypatch.setattr(RadixTree, "evict", forgetful)
    life = Life(8)
    broken = None
    while broken is None:
        life.act()
        try:
            life.memory.check_memory()
        except BrokenInvariantError:
            broken = len(life.memory.log.ops)
    for _ in range(60):
        life.act()
    keep = []  # so that no tree is made where another one was

    def check(memory: MemoryManager) -> None:
        keep.append(memory)
        memory.check_memory()

    found = bisect(life.memory.log, check)
    assert found is not None and broken - 3 <= found < broken
    assert fingerprint(replay(life.memory.log, found)) == life.prints[found] or not life.prints[found]
    assert bisect(life.memory.log, lambda memory: None) is None


def test_what_happens_behind_the_managers_back_is_not_in_the_log():
    life = Life(9).run(80)
    while not life.memory.cache.evictable_size():
        life.act()
    before = fingerprint(replay(life.memory.log))
    life.memory.cache.evict(1000)
    assert fingerprint(life.memory) != before == fingerprint(replay(life.memory.log))
    assert life.memory.allocator.count(PageState.TREE) >= 0
