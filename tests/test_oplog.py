"""The log of a manager's calls: a replay ends with the same books, and a bisection finds the call that broke them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, BrokenInvariant, CacheError, RequestStateError
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.manager.manager import MemoryConfig, MemoryManager
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.hook import hooked
from jaxcache.oplog.log import OpKind, RecordedManager, bisect, record, replay
from jaxcache.pages.allocator import PageState
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.request import Request, RequestState
from jaxcache.steps.compiled import CompiledSteps

FLAVOURS = {"full": (False, False), "window": (True, False), "state": (False, True), "both": (True, True)}
compiled: dict[str, CompiledSteps] = {}


def make_config(flavour="full", page_size=4, layers=1, **options):
    has_window, has_states = FLAVOURS[flavour]
    side = {"page_size": page_size, "dtype": jnp.float32, "layer_num": layers, "head_num": 1, "head_dim": 2}
    kv = MHAConfig(size=24 * page_size, **side)
    if has_window:
        window = MHAConfig(size=20 * page_size, **side)
        full_layers, window_layers = tuple(range(layers)), tuple(range(layers, 2 * layers))
        kv = SWAConfig(full=kv, window=window, full_layers=full_layers, window_layers=window_layers)
    shapes = {"conv_shape": (1, 1), "temporal_shape": (1, 1), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
    return MemoryConfig(
        kv,
        max_running=3,
        max_context_len=12 * page_size,
        chunk=16,
        sliding_window_size=page_size + 1 if has_window else None,
        states=MambaConfig(num_states=8, layer_num=1, **shapes) if has_states else None,
        **options,
    )


def nothing(pool, batch):
    return pool, None


def nothing_at_all(pool, loop):
    return pool, loop, None


class Life:
    """Random calls of a recorded manager, wrong ones among them."""

    def __init__(self, seed, flavour="full", policy=Policy.LRU, max_ops=100_000):
        self.rng = random.Random(seed)
        self.config = make_config(flavour, policy=policy)
        self.memory = record(self.config, max_ops)
        self.memory.runner.compiled = compiled.setdefault(flavour, CompiledSteps())
        self.waiting, self.running, self.recent = [], [], [[]]
        self.has_states = FLAVOURS[flavour][1]
        self.prints = [fingerprint(self.memory)]  # after so many calls in the log

    def act(self):
        name = self.rng.choices(
            ["admit", "extend", "decode", "finish", "retract", "abort", "cancel", "loop", "evict", "drop", "wrong"],
            [6, 9, 9, 2, 2, 1, 2, 3, 2, 0.3, 1],
        )[0]
        before = len(self.memory.log.ops)
        getattr(self, name)()
        after = len(self.memory.log.ops)
        self.prints += [""] * (after - before - 1) + [fingerprint(self.memory)] * (after > before)

    def admit(self):
        if not self.waiting or self.rng.random() < 0.5:
            base = self.rng.choice(self.recent)
            prompt = base[: self.rng.randint(0, len(base))] + [
                self.rng.randrange(3) for _ in range(self.rng.randint(1, 8))
            ]
            prompt = prompt[:30]
            self.recent = [*self.recent[-7:], prompt]
            self.waiting.append(Request(f"r{len(self.recent)}", prompt, self.rng.choice([None, None, "a"])))
        request = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        where = self.waiting if self.memory.admit(request) is None else self.running
        where.append(request)

    def prefilling(self):
        return [
            request for request in self.running if request.num_tokens - request.kv_len > 1 or not request.output_ids
        ]

    def extend(self):
        work = [r for r in self.prefilling() if r.num_tokens > r.kv_len][: self.rng.randint(1, 2)]
        plan = (
            self.memory.extend([(r, self.memory.next_chunk(r, self.rng.randint(1, 8))) for r in work]) if work else None
        )
        if plan is not None:
            self.memory.run(nothing, plan)
            for request in work:
                if request.kv_len == request.num_tokens:
                    request.output_ids.append(self.rng.randrange(3))

    def decoding(self):
        longest = self.config.max_context_len
        return [r for r in self.running if r.output_ids and r.num_tokens == r.kv_len + 1 and r.num_tokens < longest]

    def decode(self):
        batch = self.decoding()
        plan = self.memory.decode(batch) if batch else None
        if plan is not None:
            self.memory.run(nothing, plan)
            for request in batch:
                request.output_ids.append(self.rng.randrange(3))

    def cancel(self):
        batch = self.decoding()
        plan = self.memory.decode(batch) if batch else None
        if plan is not None:
            self.memory.cancel(plan)

    def loop(self):
        batch = [r for r in self.decoding() if r.num_tokens + 6 < self.config.max_context_len]
        width = 1 if self.has_states else self.rng.randint(1, 2)
        plan = self.memory.decode_loop(batch, 2, width, pages=self.rng.choice([None, 2])) if batch else None
        if plan is None:
            return
        if self.rng.random() < 0.2:
            self.memory.cancel_loop(plan)
            return
        self.memory.run_loop(nothing_at_all, plan)
        accepted = np.array([[self.rng.randint(1, width) for _ in batch] for _ in range(2)])
        stopped = np.array([[self.rng.random() < 0.2 for _ in batch] for _ in range(2)])
        did = plan.replay(accepted, stopped)
        for request, count in zip(batch, did.accepted.sum(axis=0).tolist(), strict=True):
            request.output_ids += [self.rng.randrange(3) for _ in range(count)]
        self.memory.absorb(did)

    def finish(self):
        if self.running:
            self.memory.finish(self.running.pop(self.rng.randrange(len(self.running))))

    def abort(self):
        if self.running:
            self.memory.abort(self.running.pop(self.rng.randrange(len(self.running))))

    def retract(self):
        if self.running:
            request = self.running.pop(self.rng.randrange(len(self.running)))
            self.memory.retract(request, offload=self.rng.random() < 0.5)
            self.waiting.append(request)

    def evict(self):
        self.memory.evict(self.rng.randint(0, 20), self.rng.randint(0, 8), self.rng.randint(0, 1) * self.has_states)

    def drop(self):
        with contextlib.suppress(CacheError):
            self.memory.drop("a")

    def wrong(self):
        """What raises is a call too, and changes nothing."""
        with pytest.raises(RequestStateError):
            self.memory.finish(Request("never admitted", [1]))
        if self.running:
            with pytest.raises(RequestStateError):
                self.memory.admit(self.running[0])

    def run(self, calls):
        for _ in range(calls):
            self.act()
        self.memory.check_memory()
        return self


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
    changes_nothing |= {"check_memory", "warm_up", "warm_up_offload", "warm_up_loop"}
    public = {name for name in vars(MemoryManager) if not name.startswith("_")}
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
    with pytest.raises(BrokenInvariant, match=f"call {index}, EXTEND"):
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
        except BrokenInvariant:
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
