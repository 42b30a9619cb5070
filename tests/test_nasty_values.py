"""Nasty values at every public call: success, CacheError or TypeError, and where it raised nothing has changed."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache
from jaxcache.caches.chunk import ChunkCache, SWAChunkCache
from jaxcache.caches.lora_radix import LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.multimodal import MultiModalCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import CacheError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pages.ownership import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from jaxcache.snapshot.manifest import FILE_NAME
from jaxcache.steps.loop_plan import LoopPlan
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool
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
    if not _succeeds(call, arguments, what):
        assert world().state() == before, f"{call.__qualname__} of {what} raised, and has changed something"


def _succeeds(call, arguments, what) -> bool:
    """Whether it does; it may raise CacheError, with a message that can be read, or TypeError."""
    try:
        call(*arguments)
    except CacheError as error:
        assert len(str(error)) < MAX_MESSAGE
    except TypeError:
        pass
    except Exception as error:
        raise AssertionError(f"{call} of {what}: {type(error).__name__}: {error}") from error
    else:
        return True
    return False


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


# ---- the parts, called without a manager -----------------------------------------------------------------------------


def _token() -> TokenToKVPoolAllocator:
    allocator = TokenToKVPoolAllocator(16)
    allocator.alloc(3)
    return allocator


def _paged() -> PagedTokenToKVPoolAllocator:
    allocator = PagedTokenToKVPoolAllocator(32, 4, need_sort=True)
    allocator.free(allocator.alloc(8)[:4])
    return allocator


def _pair() -> SWATokenToKVPoolAllocator:
    allocator = SWATokenToKVPoolAllocator(32, 16, 4)
    allocator.alloc_pages(3, without_window=1)
    return allocator


def _states() -> StateAllocator:
    states = StateAllocator(4)
    states.alloc_track_slot()
    return states


def _table(kind: type[ReqToTokenPool] = ReqToTokenPool) -> ReqToTokenPool:
    table = kind(3, 32, 4)
    table.alloc(2)
    table.append_pages(np.array([0, 1]), np.array([1, 2], np.int32))
    table.commit(np.array([0, 1]), np.array([3, 2], np.int32))
    return table


def _hybrid_table() -> ReqToTokenPool:
    table = _table(HybridReqToTokenPool)
    table.set_state(0, 1, NO_COPY)
    return table


def _cache(kind, *further, table=ReqToTokenPool, allocator=None):
    """A cache with two pages of tokens, whose owner is this thread by now."""
    allocator = PagedTokenToKVPoolAllocator(32, 4) if allocator is None else allocator
    cache = kind(table(3, 32, 4), allocator, *further)
    if kind is RadixCache or kind is LoRARadixCache:
        cache.insert(range(8), allocator.alloc(8))
    cache.match_prefix(range(4))
    return cache


def _loop_plan() -> LoopPlan:
    own = World()
    for request in own.requests:
        request.output_ids.append(1)
    plan = own.memory.decode_loop(own.requests, 2)
    plan.pack()  # works out its layout, once
    return plan


PARTS = {
    "pages of a slot": _token,
    "pages": _paged,
    "pairs of pages": _pair,
    "states": _states,
    "table": _table,
    "hybrid table": _hybrid_table,
    "ChunkCache": lambda: _cache(ChunkCache, 4),
    "SWAChunkCache": lambda: _cache(SWAChunkCache, 4, 6, allocator=_pair()),
    "RadixCache": lambda: _cache(RadixCache, 4),
    "SWARadixCache": lambda: _cache(SWARadixCache, 6, 4, allocator=_pair()),
    "MambaRadixCache": lambda: _cache(MambaRadixCache, StateAllocator(4), 4, table=HybridReqToTokenPool),
    "LoRARadixCache": lambda: _cache(LoRARadixCache, 4),
    "MultiModalCache": lambda: MultiModalCache(1000),
    "LoopPlan": _loop_plan,
}
FITTING = {
    "one": 1,
    "zero": 0,
    "rows": np.array([0, 1]),
    "ids": np.array([1, 2], np.int32),
    "private": PageState.PRIVATE,
}
SNAPSHOTS_TAKE = {
    "path": {"text"},
    "model": {"text", "long text"},
    "mesh": {"None"},
    "threads": {"None", "huge"},
    "report": {"None"},
}
SCRATCH = {"_tags", "guard", "_own_guard"}


def _frozen(value, seen: dict[int, int]):
    """All that can be reached from a value, as something to compare: an oracle that knows no class."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, np.generic)):
        return repr(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(_frozen(k, seen), _frozen(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [_frozen(each, seen) for each in value]
    if not type(value).__module__.startswith("jaxcache."):
        return type(value).__name__
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    names = [name for name in (*slots, *getattr(value, "__dict__", ())) if name not in SCRATCH]
    return type(value).__name__, [(name, _frozen(getattr(value, name), seen)) for name in names]


def _methods() -> list[tuple[str, str]]:
    return [
        (what, name)
        for what, make in PARTS.items()
        for name, _ in inspect.getmembers(type(make()), inspect.isfunction)
        if not name.startswith("_")
    ]


@pytest.mark.parametrize(("part", "name"), _methods())
def test_a_part_refuses_it_too_and_has_not_changed(part, name):
    for what in world().values():
        call = getattr(PARTS[part](), name)
        _try_part(part, name, [world().values()[what] for _ in range(required(call))], what)


@settings(max_examples=300)
@given(st.sampled_from(_methods()), st.lists(st.sampled_from([*sorted(World().values()), *FITTING]), min_size=4))
def test_any_mix_of_them_in_a_part(method, kinds):
    values = world().values() | FITTING
    _try_part(*method, [values[kind] for kind in kinds[:4]], kinds)


def _try_part(part, name, arguments, what) -> None:
    owner = PARTS[part]()
    call = getattr(owner, name)
    before = _frozen(owner, {})
    if not _succeeds(call, arguments[: required(call)], what):
        assert _frozen(owner, {}) == before, f"{part}.{name} of {what} raised, and has changed something"


# ---- snapshots -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A manager, and where its cache was saved."""
    memory, path = make_manager(4, False, False), tmp_path_factory.mktemp("nasty") / "saved"
    jaxcache.save_snapshot(path, memory, model="m")
    return memory, path


SNAPSHOTS = {
    jaxcache.save_snapshot: ("path", "manager", "model", "threads"),
    jaxcache.load_snapshot: ("path", "config", "model", "mesh", "threads", "report"),
    jaxcache.verify_snapshot: ("path", "threads"),
}


@pytest.mark.parametrize(("call", "argument"), [(call, name) for call, names in SNAPSHOTS.items() for name in names])
def test_arguments_of_snapshots(call, argument, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where text is a folder
    memory, path = saved
    known = {"path": path, "manager": memory, "config": memory.config, "model": "m", "threads": 1}
    if call is jaxcache.save_snapshot:
        known["path"] = tmp_path / "own"
    given = {name: known.get(name) for name in SNAPSHOTS[call]}
    before = (path / FILE_NAME).read_bytes()
    for what, value in world().values().items():
        if _succeeds(functools.partial(call, **given | {argument: value}), (), f"{argument} {what}"):
            assert what in SNAPSHOTS_TAKE.get(argument, ()), f"{call.__name__} took {argument} = {what}"
    assert (path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "path", ["a\0b", "\ud800", "d/" + "n" * 300, b"ab"], ids=["null", "surrogate", "long", "bytes"]
)
def test_paths_that_no_file_system_has(path, saved):
    memory, _ = saved
    for call in (
        functools.partial(jaxcache.save_snapshot, manager=memory, model="m"),
        functools.partial(jaxcache.load_snapshot, config=memory.config, model="m"),
        jaxcache.verify_snapshot,
    ):
        with pytest.raises(jaxcache.ArgumentError, match="path must be"):
            call(path)
