"""A log of what a manager was told, to be replayed: for the question which call broke an invariant.

    memory = record(config)               a MemoryManager that records every call; used like any other
    ...
    replay(memory.log, until=1200)        another manager, in the state of the first after 1,200 calls
    bisect(memory.log)                    the first call after which `check_memory` fails

What the host decides follows from the calls, their order and the tokens, and from nothing else: not from time, nor from
what is in the pools. So a replay may run anywhere, over a pool of one layer; its steps compute nothing. What is done to
the cache or an allocator other than through the manager is not in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxcache.errors import CacheError
from jaxcache.index.key import Namespace, pack
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager
from jaxcache.oplog.hook import hooked
from jaxcache.oplog.ops import (
    DEVICE_ONLY,
    ENDS_PLAN,
    ENDS_REQUEST,
    LoopRef,
    NewRequest,
    Op,
    PlanRef,
    RequestRef,
    result_of,
)
from jaxcache.oplog.ops import OpKind as OpKind
from jaxcache.oplog.ops import OpLog as OpLog
from jaxcache.oplog.replay import bisect as bisect
from jaxcache.oplog.replay import replay as replay
from jaxcache.request import Request
from jaxcache.steps.loop_plan import LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan


class _Unrecorded(Exception):
    """A plan among the arguments is over, or of padding: the call changes nothing."""


@hooked(kind.value for kind in OpKind)
class RecordedManager(MemoryManager):
    """A `MemoryManager` that records each call of `OpKind`, also one that raises. Made by `record`.

    Attributes:
      log: The calls.
    """

    def __init__(self, *parts: Any, max_ops: int):
        super().__init__(*parts)
        self.log = OpLog(self.config, max_ops)
        self._is_calling = False
        self._numbers: dict[Request, int] = {}  # of requests that are not over
        self._told_tokens: dict[int, int] = {}  # sampled tokens that are in the log, by number
        self._plans: dict[StepPlan | LoopPlan, int] = {}  # of plans that are not over: the call that made them

    def evict(self, num_tokens: int, swa_num_tokens: int = 0, mamba_num: int = 0) -> int:
        """`evict` of the cache, recorded."""
        return self.cache.evict(num_tokens, swa_num_tokens, mamba_num)

    def drop(self, extra_key: str | bytes | Namespace | None) -> int:
        """`drop` of the cache, recorded."""
        return self.cache.drop(extra_key)

    def around(self, name: str, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Records one call of an operation, unless another one makes it; see `hook.Around`."""
        if self.log.is_full or self._is_calling:
            return call()
        mentioned: list[Request] = []
        try:
            args = {key: self._encoded(value, mentioned) for key, value in arguments.items() if key not in DEVICE_ONLY}
        except _Unrecorded:
            return call()
        kind, numbers = OpKind(name), tuple(map(self._number, mentioned))
        sampled = tuple(map(self._sampled, numbers, mentioned))
        index = len(self.log.ops)
        self._is_calling = True
        try:
            out = call()
        except CacheError as error:
            self.log.ops.append(Op(kind, numbers, sampled, args, type(error).__name__))
            raise
        finally:
            self._is_calling = False
        if kind is OpKind.RUN:
            rows = arguments["plan"].row
            args["sampled"] = bool(self.req_to_token_pool.has_next[rows].any())
        if kind is OpKind.FORK:
            made = tuple(map(self._number_made, out or ()))
            numbers, sampled = numbers + made, sampled + (b"",) * len(made)
        self.log.ops.append(Op(kind, numbers, sampled, args, result_of(kind, out)))
        self._follow(kind, index, arguments, out)
        return out

    def _follow(self, kind: OpKind, index: int, arguments: dict[str, Any], out: Any) -> None:
        """Keeps the plan that a call returned; forgets the request or plan that it ended."""
        if isinstance(out, (StepPlan, LoopPlan)):
            self._plans[out] = index
        if kind in ENDS_REQUEST:
            self._numbers.pop(arguments["request"], None)
        if kind in ENDS_PLAN:
            ended = arguments["replay"].plan if kind is OpKind.ABSORB else arguments["plan"]
            del self._plans[ended]

    def _encoded(self, value: Any, mentioned: list[Request]) -> Any:
        """An argument for the log; requests that it mentions are appended to `mentioned`."""
        if isinstance(value, Request):
            mentioned.append(value)
            return RequestRef(self._number(value))
        if isinstance(value, (StepPlan, LoopPlan)):
            if value not in self._plans:
                raise _Unrecorded
            mentioned.extend(value.requests)
            return PlanRef(self._plans[value])
        if isinstance(value, LoopReplay):
            return LoopRef.of(self._encoded(value.plan, mentioned), value)
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return tuple([self._encoded(part, mentioned) for part in value])
        return value

    def _number(self, request: Request) -> int:
        if request not in self._numbers:
            self._numbers[request] = len(self.log.requests)
            self.log.requests.append(NewRequest.of(request))
        return self._numbers[request]

    def _number_made(self, request: Request) -> int:
        """The number of a request that a call made, with all the tokens that it has."""
        number = self._number(request)
        self._told_tokens[number] = len(request.output_ids)
        return number

    def _sampled(self, number: int, request: Request) -> bytes:
        """The tokens that a request sampled since it was last mentioned."""
        told = self._told_tokens.get(number, 0)
        self._told_tokens[number] = max(told, len(request.output_ids))
        return pack(request.output_ids[told:])


def record(config: MemoryConfig, max_ops: int = 100_000, *, mesh: Mesh | None = None) -> RecordedManager:
    """`init_memory_pool_and_cache`, of a manager that records what it is told, up to so many calls."""
    return RecordedManager(config, *config.new_parts(mesh), max_ops=max_ops)
