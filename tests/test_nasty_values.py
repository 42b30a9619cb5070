"""Nasty values at every public call: success, CacheError or TypeError, and where it raised nothing has changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache
from jaxcache.errors import CacheError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from tests.support.loop_managers import make_manager

MAX_MESSAGE = 1100


class World:
    """A manager with windows and states, two running requests and one that waits."""

    def __init__(self) -> None:
        self.memory = make_manager(4, True, True)
        self.requests = [Request("r", list(range(30)), tag=1), Request("q", list(range(100, 120)), tag=2)]
        for request in self.requests:
            self.memory.admit(request)
            while request.kv_len < request.num_tokens:
                plan = self.memory.extend([(request, self.memory.next_chunk(request, 32))])
                self.memory.run(write_step, plan)
        self.waiting = Request("w", [5] * 9)

    def state(self):
        lives = [(r.state, r.kv_len, r.num_pages, r.req_pool_idx, list(r.output_ids)) for r in self.requests]
        return fingerprint(self.memory), lives, self.waiting.state

    def values(self):
        deleted = jax.device_put(np.arange(3, dtype=np.int32))
        deleted.delete()
        running = self.requests[0]
        return {
            "a generator": iter(range(2)),
            "a set": {1, 2},
            "None": None,
            "text": "x",
            "NaN": float("nan"),
            "infinite": float("inf"),
            "huge": 10**40,
            "negative": -1,
            "flags": np.array([True, False]),
            "an array": np.array([1, 0]),
            "objects": np.array([object()]),
            "deleted": deleted,
            "nested": [[1], [2, 3]],
            "long text": "n" * 5000,
            "a long list": list(range(3000)),
            "an object": object(),
            "a dict": {},
            "a request and text": [running, "x"],
            "a pair": [(running, "x")],
            "a short pair": [(running,)],
            "one that waits": [(self.waiting, 3)],
            "bytes": b"ab",
        }


@functools.cache
def world() -> World:
    return World()


CHANGES_EVERYTHING = {"reset", "resume_memory", "warm_up", "warm_up_offload", "warm_up_loop", "clear"}
POOL_CALLS = ("gather", "get_cpu_copy", "move_kv_cache", "pages", "set_kv_buffer")


def calls() -> list[str]:
    memory = world().memory
    found = [
        f"{owner}.{name}"
        for owner, thing in (("memory", memory), ("cache", memory.cache))
        for name, _ in inspect.getmembers(type(thing), inspect.isfunction)
        if not name.startswith("_") and name not in CHANGES_EVERYTHING
    ]
    return found + [f"pool.{name}" for name in POOL_CALLS if name in dir(memory.pool)]


def target(name: str):
    owner, method = name.split(".")
    memory = world().memory
    return getattr({"memory": memory, "cache": memory.cache, "pool": memory.pool}[owner], method)


def required(call) -> int:
    parameters = inspect.signature(call).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(sum(p.default is p.empty for p in positional), min(1, len(positional)))


@pytest.mark.parametrize("name", calls())
def test_a_value_that_is_none_is_refused_and_nothing_has_changed(name):
    call = target(name)
    for what in world().values():
        _try(call, [world().values()[what] for _ in range(required(call))], what)


@settings(max_examples=200)
@given(st.sampled_from(calls()), st.lists(st.sampled_from(sorted(World().values())), min_size=4, max_size=4))
def test_any_mix_of_them(name, kinds):
    call = target(name)
    _try(call, [world().values()[kind] for kind in kinds[: required(call)]], kinds)


def _try(call, arguments, what) -> None:
    before = world().state()
    try:
        call(*arguments)
    except CacheError as error:
        assert len(str(error)) < MAX_MESSAGE
    except TypeError:
        pass
    except Exception as error:
        raise AssertionError(f"{call.__qualname__} of {what}: {type(error).__name__}: {error}") from error
    else:
        return
    assert world().state() == before, f"{call.__qualname__} of {what} raised, and has changed something"


def sizes() -> Iterator[tuple[type, dict]]:
    for name in ("MHAConfig", "MLAConfig", "MambaConfig"):
        kind = getattr(jaxcache, name)
        yield kind, {p.name: p.default for p in inspect.signature(kind).parameters.values()}


@pytest.mark.parametrize("kind", [kind for kind, _ in sizes()])
def test_sizes_of_configs(kind):
    for what, value in world().values().items():
        arguments = {p.name: value for p in inspect.signature(kind).parameters.values() if p.default is p.empty}
        with pytest.raises((CacheError, TypeError)) as error:
            kind(**arguments)
        assert len(str(error.value)) < MAX_MESSAGE, what


@pytest.mark.parametrize("field", ["max_running", "max_context_len", "chunk"])
def test_sizes_of_a_manager(field):
    sizes = {
        "kv": world().memory.config.kv,
        "sliding_window_size": 6,
        "max_running": 4,
        "max_context_len": 64,
        "chunk": 32,
    }
    for what, value in world().values().items():
        if what != "huge":
            with pytest.raises((CacheError, TypeError)) as error:
                jaxcache.init_memory_pool_and_cache(jaxcache.MemoryConfig(**sizes | {field: value}))
            assert len(str(error.value)) < MAX_MESSAGE, what


@pytest.mark.parametrize("step", [None, 3, "x", np.array([1])], ids=["None", "a number", "text", "an array"])
def test_a_step_that_is_none_changes_nothing(step):
    """States were copied for a step before it was looked at."""
    own = World()
    memory, request = own.memory, own.requests[0]
    request.output_ids.append(1)
    plan = memory.decode([request])
    before = own.state()
    with pytest.raises(CacheError, match="step must be a function"):
        memory.run(step, plan)
    assert own.state() == before
    memory.cancel(plan)
    loop = memory.decode_loop([request], 2)
    before = own.state()
    with pytest.raises(CacheError, match="step must be a function"):
        memory.run_loop(step, loop)
    assert own.state() == before
    memory.cancel_loop(loop)
