"""The calls of a log, made again: to a point in it, or to the first call that broke an invariant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxcache.arguments import as_count
from jaxcache.errors import ArgumentError, BrokenInvariantError, CacheError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.oplog.ops import OF_THE_CACHE, LoopRef, Op, OpKind, OpLog, PlanRef, RequestRef, result_of
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.loop_plan import LoopPlan
from jaxcache.steps.plan import StepPlan


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
      BrokenInvariantError: A call gave another result than it had given: the host decided by something that is not in
        the log. The message says which.
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
        for number, sampled in zip(op.requests, op.sampled, strict=True):
            requests[number].output_ids += np.frombuffer(sampled, "<i4").tolist()
        try:
            out = _call(memory, op, requests, plans)
            result = result_of(op.kind, out)
        except BrokenInvariantError:
            raise
        except CacheError as error:
            out, result = None, type(error).__name__
        if result != op.result:
            raise BrokenInvariantError(
                f"call {index}, {op.kind.name}: the result was {op.result!r} and is {result!r} now"
            )
        if isinstance(out, (StepPlan, LoopPlan)):
            plans[index] = out
        if isinstance(out, list):  # requests that the call made
            for number, request in zip(op.requests[1:], out, strict=True):
                requests[number] = request
    return memory


def bisect(
    log: OpLog,
    check: Callable[[MemoryManager], None] = MemoryManager.check_memory,
    *,
    config: MemoryConfig | None = None,
) -> int | None:
    """Index of the first call after which `check` raises BrokenInvariantError; None if it never does.

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
        except BrokenInvariantError:
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


def _call(memory: MemoryManager, op: Op, requests: list[Request], plans: dict[int, Any]) -> Any:
    """Makes a call again, with the requests and plans of the replay in place of references."""

    def decoded(value: Any) -> Any:
        if isinstance(value, RequestRef):
            return requests[value.number]
        if isinstance(value, PlanRef):
            return plans[value.op]
        if isinstance(value, LoopRef):
            return replace(value.did, plan=plans[value.plan.op])
        return tuple(map(decoded, value)) if isinstance(value, tuple) else value

    arguments = {name: decoded(value) for name, value in op.args.items()}
    if op.kind in _STEPS:
        arguments["step"] = _sampling_step if arguments.pop("sampled", False) else _STEPS[op.kind]
    return getattr(memory.cache if op.kind in OF_THE_CACHE else memory, op.kind.value)(**arguments)


def _no_step(pool: Any, batch: Any) -> tuple[Any, None]:
    """A step that computes nothing."""
    return pool, None


def _sampling_step(pool: Any, batch: Any) -> tuple[Any, None, Any]:
    """A step that computes nothing, and has sampled something."""
    return pool, None, batch.row


def _no_loop(pool: Any, loop: Any) -> tuple[Any, Any, None]:
    """A decode loop that computes nothing."""
    return pool, loop, None


_STEPS: dict[OpKind, Callable[..., Any]] = {OpKind.RUN: _no_step, OpKind.RUN_LOOP: _no_loop}
