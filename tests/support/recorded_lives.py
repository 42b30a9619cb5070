"""Random lives of a recorded manager of any flavour, and their configs."""

from __future__ import annotations

import contextlib
import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import CacheError, RequestStateError
from jaxcache.index.policies.registry import Policy
from jaxcache.manager.config import MemoryConfig
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import record
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.request import Request
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
