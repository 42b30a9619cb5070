"""A log of what a manager was told, to be told again: for the question which call broke the books.

    memory = record(config)               a MemoryManager that writes down every call; used like any other
    ...
    replay(memory.log, until=1200)        another manager, with the books of the first after 1,200 calls
    bisect(memory.log)                    the first call after which `check_memory` fails

What the host decides follows from the calls, their order and the tokens, and from nothing else: not from time, nor from
what is in the pools. So a replay may run anywhere, over a pool of one layer; its steps do nothing. What is done to the
cache or an allocator behind the manager's back is not in the log.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxcache.errors import ArgumentError, BrokenInvariant, CacheError
from jaxcache.index.key import Namespace, RadixKey, pack
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pages.arguments import as_count
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.loop_plan import LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan


class OpKind(enum.Enum):
    """A call of a manager that changes something."""

    ADMIT = enum.auto()
    FINISH = enum.auto()
    ABORT = enum.auto()
    RETRACT = enum.auto()
    EXTEND = enum.auto()
    DECODE = enum.auto()
    RUN = enum.auto()
    CANCEL = enum.auto()
    DECODE_LOOP = enum.auto()
    RUN_LOOP = enum.auto()
    ABSORB = enum.auto()
    CANCEL_LOOP = enum.auto()
    EVICT = enum.auto()
    DROP = enum.auto()
    RESET = enum.auto()
    RELEASE = enum.auto()
    RESUME = enum.auto()


@dataclass(frozen=True)
class NewRequest:
    """What a request was when it was first mentioned: all that a replay needs of it."""

    rid: str
    tokens: bytes
    namespace: bytes
    priority: int
    tag: int
    logprob_start_len: int | None

    def request(self) -> Request:
        """A request like it."""
        tokens = np.frombuffer(self.tokens, "<i4")
        space = Namespace.decode(self.namespace)
        return Request(self.rid, tokens, space, self.priority, self.tag, self.logprob_start_len)


@dataclass(frozen=True)
class Op:
    """One call.

    Attributes:
      kind: Which.
      requests: Numbers of the requests it is about.
      sampled: For each of them, the packed tokens it sampled since it was last mentioned.
      args: The other arguments. A plan is the index of the operation that made it.
      result: What came back: a number, a checksum of the pages of a plan, the name of an error, or None.
    """

    kind: OpKind
    requests: tuple[int, ...]
    sampled: tuple[bytes, ...]
    args: tuple[Any, ...]
    result: int | str | None


class OpLog:
    """Calls in order, from the first on. Full after `max_ops`: what comes then is not in it.

    Attributes:
      config: Of the manager.
      ops: The calls.
      requests: Every request they are about; the index is its number.
      max_ops: Most calls.
    """

    def __init__(self, config: MemoryConfig, max_ops: int = 100_000):
        self.config = config
        self.max_ops = as_count("max_ops", max_ops)
        self.ops: list[Op] = []
        self.requests: list[NewRequest] = []

    @property
    def is_full(self) -> bool:
        """Whether calls are no longer written down."""
        return len(self.ops) >= self.max_ops


class RecordedManager(MemoryManager):
    """A `MemoryManager` that writes down what it is told, before it is known whether it goes well. Made by `record`.

    Attributes:
      log: What it was told.
    """

    def __init__(self, *parts: Any, max_ops: int):
        super().__init__(*parts)
        self.log = OpLog(self.config, max_ops)
        self._numbers: dict[Request, int] = {}  # of requests that are not over
        self._told_tokens: dict[int, int] = {}  # sampled tokens that are in the log, by number
        self._plans: dict[StepPlan | LoopPlan, int] = {}  # of plans that are not over: the call that made them

    def admit(self, request: Request) -> int | None:
        """See `MemoryManager.admit`."""
        return self._tell(OpKind.ADMIT, [request], (), partial(super().admit, request))

    def finish(self, request: Request) -> None:
        """See `MemoryManager.finish`."""
        self._tell(OpKind.FINISH, [request], (), partial(super().finish, request))
        self._numbers.pop(request, None)

    def abort(self, request: Request) -> None:
        """See `MemoryManager.abort`."""
        self._tell(OpKind.ABORT, [request], (), partial(super().abort, request))
        self._numbers.pop(request, None)

    def retract(self, request: Request, offload: bool = False) -> None:
        """See `MemoryManager.retract`."""
        self._tell(OpKind.RETRACT, [request], (offload,), partial(super().retract, request, offload))

    def extend(self, work: Sequence[tuple[Request, int]]) -> StepPlan | None:
        """See `MemoryManager.extend`."""
        counts = tuple(n for _, n in work)
        return self._tell(OpKind.EXTEND, [request for request, _ in work], counts, partial(super().extend, work))

    def decode(self, requests: Sequence[Request]) -> StepPlan | None:
        """See `MemoryManager.decode`."""
        return self._tell(OpKind.DECODE, requests, (), partial(super().decode, requests))

    def run(self, step: Callable, plan: StepPlan, *args: Any) -> Any:
        """See `MemoryManager.run`."""
        return self._tell_of(OpKind.RUN, plan, (), partial(super().run, step, plan, *args))

    def cancel(self, plan: StepPlan) -> None:
        """See `MemoryManager.cancel`."""
        self._tell_of(OpKind.CANCEL, plan, (), partial(super().cancel, plan))

    def decode_loop(
        self,
        requests: Sequence[Request],
        steps: int,
        width: int = 1,
        *,
        limits: Sequence[int] | None = None,
        pages: int | None = None,
    ) -> LoopPlan | None:
        """See `MemoryManager.decode_loop`."""
        args = steps, width, None if limits is None else tuple(limits), pages
        call = partial(super().decode_loop, requests, steps, width, limits=limits, pages=pages)
        return self._tell(OpKind.DECODE_LOOP, requests, args, call)

    def run_loop(self, step: Callable, plan: LoopPlan, *args: Any) -> Any:
        """See `MemoryManager.run_loop`."""
        return self._tell_of(OpKind.RUN_LOOP, plan, (), partial(super().run_loop, step, plan, *args))

    def absorb(self, replay: LoopReplay, *, read_device: bool = False) -> None:
        """See `MemoryManager.absorb`."""
        did = replace(replay, plan=LoopPlan.empty(replay.plan.shape))
        self._tell_of(OpKind.ABSORB, replay.plan, (did,), partial(super().absorb, replay, read_device=read_device))

    def cancel_loop(self, plan: LoopPlan) -> None:
        """See `MemoryManager.cancel_loop`."""
        self._tell_of(OpKind.CANCEL_LOOP, plan, (), partial(super().cancel_loop, plan))

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> int:
        """`evict` of the cache, written down."""
        amounts = num_tokens, swa_num_tokens, mamba_num
        return self._tell(OpKind.EVICT, (), amounts, partial(self.cache.evict, *amounts))

    def drop(self, extra_key: str | bytes | Namespace | None) -> int:
        """`drop` of the cache, written down."""
        return self._tell(OpKind.DROP, (), (RadixKey(b"", extra_key).namespace,), partial(self.cache.drop, extra_key))

    def reset(self) -> None:
        """See `MemoryManager.reset`."""
        self._tell(OpKind.RESET, (), (), super().reset)

    def release_memory(self, *, keep: bool = False) -> None:
        """See `MemoryManager.release_memory`."""
        self._tell(OpKind.RELEASE, (), (keep,), partial(super().release_memory, keep=keep))

    def resume_memory(self) -> None:
        """See `MemoryManager.resume_memory`."""
        self._tell(OpKind.RESUME, (), (), super().resume_memory)

    def _tell_of(self, kind: OpKind, plan: StepPlan | LoopPlan, args: tuple, call: Callable[[], Any]) -> Any:
        """A call about a plan. One that is over, or of padding, changes nothing and is not written down."""
        if plan not in self._plans:
            return call()
        out = self._tell(kind, plan.requests, (self._plans[plan], *args), call)
        if kind is not OpKind.RUN_LOOP:
            del self._plans[plan]
        return out

    def _tell(self, kind: OpKind, requests: Sequence[Request], args: tuple, call: Callable[[], Any]) -> Any:
        if self.log.is_full:
            return call()
        numbers = tuple(map(self._number, requests))
        sampled = tuple(map(self._sampled, numbers, requests))
        index = len(self.log.ops)
        try:
            out = call()
        except CacheError as error:
            self.log.ops.append(Op(kind, numbers, sampled, args, type(error).__name__))
            raise
        self.log.ops.append(Op(kind, numbers, sampled, args, _result(kind, out)))
        if isinstance(out, (StepPlan, LoopPlan)):
            self._plans[out] = index
        return out

    def _number(self, request: Request) -> int:
        if request not in self._numbers:
            key = request.key[: request.prompt_len]
            packed = key.packed[: key.element_bytes * key.length]
            fields = request.priority, request.tag, request.logprob_start_len
            self._numbers[request] = len(self.log.requests)
            self.log.requests.append(NewRequest(request.rid, packed, key.namespace, *fields))
        return self._numbers[request]

    def _sampled(self, number: int, request: Request) -> bytes:
        """The tokens that a request sampled since it was last mentioned."""
        told = self._told_tokens.get(number, 0)
        self._told_tokens[number] = max(told, len(request.output_ids))
        return pack(request.output_ids[told:])


def record(config: MemoryConfig, max_ops: int = 100_000, *, mesh: Mesh | None = None) -> RecordedManager:
    """`init_memory_pool_and_cache`, of a manager that writes down what it is told, up to so many calls."""
    return RecordedManager(config, *config.new_parts(mesh), max_ops=max_ops)


def replay(
    log: OpLog,
    until: int | None = None,
    *,
    config: MemoryConfig | None = None,
    compiled: CompiledSteps | None = None,
) -> MemoryManager:
    """Another manager that was told the same.

    Args:
      log: Of a manager that `record` made.
      until: Only so many calls; all by default.
      config: Like the log's, but for layers, heads and dtypes: a pool of one layer will do. By default the log's.
      compiled: Steps that an earlier replay with this config compiled.

    Raises:
      ArgumentError: The config differs in what decisions depend on, or the log has fewer calls than `until`.
      BrokenInvariant: A call gave another result than it had given: the host decided by something that is not in the
        log. The message says which.
    """
    calls = len(log.ops) if until is None else as_count("until", until)
    if calls > len(log.ops):
        raise ArgumentError(f"until must be at most {len(log.ops)}, the calls in the log, got {until}")
    config = log.config if config is None else config
    if _deciding(config) != _deciding(log.config):
        raise ArgumentError("config: it may differ from the log's in layers, heads and dtypes alone")
    memory = init_memory_pool_and_cache(config)
    if compiled is not None:
        memory.runner.compiled = compiled
    requests = [new.request() for new in log.requests]
    plans: dict[int, Any] = {}
    for index, op in enumerate(log.ops[:calls]):
        batch = [requests[number] for number in op.requests]
        for request, sampled in zip(batch, op.sampled, strict=True):
            request.output_ids += np.frombuffer(sampled, "<i4").tolist()
        try:
            out = _CALLS[op.kind](memory, batch, plans, *op.args)
            result = _result(op.kind, out)
        except BrokenInvariant:
            raise
        except CacheError as error:
            out, result = None, type(error).__name__
        if result != op.result:
            raise BrokenInvariant(f"call {index}, {op.kind.name}: the result was {op.result!r} and is {result!r} now")
        if isinstance(out, (StepPlan, LoopPlan)):
            plans[index] = out
    return memory


def bisect(
    log: OpLog,
    check: Callable[[MemoryManager], None] = MemoryManager.check_memory,
    *,
    config: MemoryConfig | None = None,
) -> int | None:
    """Index of the first call after which `check` raises BrokenInvariant; None if it never does.

    What is broken must stay broken. Cost: about log2(calls) replays.

    Args:
      log: As for `replay`.
      check: Called with a replayed manager.
      config: As for `replay`.
    """
    compiled = CompiledSteps()

    def is_broken(calls: int) -> bool:
        try:
            check(replay(log, calls, config=config, compiled=compiled))
        except BrokenInvariant:
            return True
        return False

    good, bad = 0, len(log.ops)
    if not is_broken(bad):
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if is_broken(middle) else (middle, bad)
    return bad - 1


def _deciding(config: MemoryConfig) -> dict[str, Any]:
    """What the host's decisions depend on: of the pools their sizes, and all else."""
    return vars(config) | {"kv": (config.kv.size, config.kv.page_size, config.window_size), "states": config.num_values}


def _absorb(memory: MemoryManager, batch: list[Request], plans: dict[int, Any], plan: int, did: LoopReplay) -> None:
    memory.absorb(replace(did, plan=plans[plan]))


def _decode_loop(memory: MemoryManager, batch: list[Request], plans: dict[int, Any], *args: Any) -> LoopPlan | None:
    steps, width, limits, pages = args
    return memory.decode_loop(batch, steps, width, limits=limits, pages=pages)


# How a call is made again: (manager, requests, plans by the call that made them, other arguments) -> what it returns.
_CALLS: dict[OpKind, Callable[..., Any]] = {
    OpKind.ADMIT: lambda memory, batch, plans: memory.admit(*batch),
    OpKind.FINISH: lambda memory, batch, plans: memory.finish(*batch),
    OpKind.ABORT: lambda memory, batch, plans: memory.abort(*batch),
    OpKind.RETRACT: lambda memory, batch, plans, offload: memory.retract(*batch, offload),
    OpKind.EXTEND: lambda memory, batch, plans, *counts: memory.extend(list(zip(batch, counts, strict=True))),
    OpKind.DECODE: lambda memory, batch, plans: memory.decode(batch),
    OpKind.RUN: lambda memory, batch, plans, plan: memory.run(_no_step, plans[plan]),
    OpKind.CANCEL: lambda memory, batch, plans, plan: memory.cancel(plans[plan]),
    OpKind.DECODE_LOOP: _decode_loop,
    OpKind.RUN_LOOP: lambda memory, batch, plans, plan: memory.run_loop(_no_loop, plans[plan]),
    OpKind.ABSORB: _absorb,
    OpKind.CANCEL_LOOP: lambda memory, batch, plans, plan: memory.cancel_loop(plans[plan]),
    OpKind.EVICT: lambda memory, batch, plans, *amounts: memory.cache.evict(*amounts),
    OpKind.DROP: lambda memory, batch, plans, space: memory.cache.drop(Namespace.decode(space)),
    OpKind.RESET: lambda memory, batch, plans: memory.reset(),
    OpKind.RELEASE: lambda memory, batch, plans, keep: memory.release_memory(keep=keep),
    OpKind.RESUME: lambda memory, batch, plans: memory.resume_memory(),
}


def _no_step(pool: Any, batch: Any) -> tuple[Any, None]:
    """A step that computes nothing."""
    return pool, None


def _no_loop(pool: Any, loop: Any) -> tuple[Any, Any, None]:
    """A decode loop that computes nothing."""
    return pool, loop, None


def _result(kind: OpKind, out: Any) -> int | None:
    """What of a call's result must be the same in a replay; what a step computes need not be."""
    if isinstance(out, StepPlan):
        return zlib.crc32(out.new_pages.tobytes())
    if isinstance(out, LoopPlan):
        return zlib.crc32(out.window.tobytes())
    return None if kind in (OpKind.RUN, OpKind.RUN_LOOP) else out
