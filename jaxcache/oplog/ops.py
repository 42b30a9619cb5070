"""What an op log is made of: the operations of a manager, calls of them, and the requests they were about."""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxcache.arguments import as_count
from jaxcache.index.key import Namespace
from jaxcache.index.media import MediaRange
from jaxcache.manager.config import MemoryConfig
from jaxcache.request import Request
from jaxcache.steps.loop_plan import LoopPlan, LoopReplay
from jaxcache.steps.plan import StepPlan


class OpKind(enum.Enum):
    """An operation that changes something; the value is the method's name."""

    ADMIT = "admit"
    FINISH = "finish"
    ABORT = "abort"
    RETRACT = "retract"
    FORK = "fork"
    EXTEND = "extend"
    DECODE = "decode"
    RUN = "run"
    COMMIT = "commit"
    HOST_BATCH = "host_batch"
    CANCEL = "cancel"
    DECODE_LOOP = "decode_loop"
    RUN_LOOP = "run_loop"
    ABSORB = "absorb"
    CANCEL_LOOP = "cancel_loop"
    EVICT = "evict"
    DROP = "drop"
    RESET = "reset"
    RELEASE = "release_memory"
    RESUME = "resume_memory"


OF_THE_CACHE = frozenset((OpKind.EVICT, OpKind.DROP))
"""Operations of the manager's cache; all others are the manager's own."""
ENDS_REQUEST = frozenset((OpKind.FINISH, OpKind.ABORT))
ENDS_PLAN = frozenset((OpKind.RUN, OpKind.COMMIT, OpKind.CANCEL, OpKind.ABSORB, OpKind.CANCEL_LOOP))
DEVICE_ONLY = frozenset(("step", "args", "read_device"))
"""Arguments that concern what is on the device; no decision of the host depends on them."""


@dataclass(frozen=True)
class NewRequest:
    """What a request was when it was first mentioned: all that a replay needs of it."""

    rid: str
    tokens: bytes
    namespace: bytes
    priority: int
    tag: int
    logprob_start_len: int | None
    media: tuple[MediaRange, ...] = ()

    @classmethod
    def of(cls, request: Request) -> NewRequest:
        """That of a request."""
        key = request.key[: request.prompt_len]
        packed = key.packed[: key.element_bytes * key.length]
        fixed = (request.rid, packed, key.namespace, request.priority, request.tag, request.logprob_start_len)
        return cls(*fixed, key.media)

    def request(self) -> Request:
        """A request like it."""
        tokens = np.frombuffer(self.tokens, "<i4")
        space = Namespace.decode(self.namespace)
        return Request(self.rid, tokens, space, self.priority, self.tag, self.logprob_start_len, media=self.media)


@dataclass(frozen=True)
class RequestRef:
    """A request among the arguments of a call, by its number in the log."""

    number: int


@dataclass(frozen=True)
class PlanRef:
    """A plan among the arguments of a call, by the index of the call that returned it."""

    op: int


@dataclass(frozen=True, eq=False)
class LoopRef:
    """What a loop did, and its plan, which `did` has not."""

    plan: PlanRef
    did: LoopReplay

    @classmethod
    def of(cls, plan: PlanRef, did: LoopReplay) -> LoopRef:
        """That of an argument of `absorb`."""
        return cls(plan, replace(did, plan=LoopPlan.empty(did.plan.shape)))


@dataclass(frozen=True)
class Op:
    """One call.

    Attributes:
      kind: Which operation.
      requests: Numbers of the requests it is about, and behind them of those that it made.
      sampled: For each of them, the packed tokens it sampled since it was last mentioned.
      args: The arguments by name, but for those in `DEVICE_ONLY`, with references for requests and plans.
      result: What came back: a number, a checksum of the pages of a plan, the name of an error, or None.
    """

    kind: OpKind
    requests: tuple[int, ...]
    sampled: tuple[bytes, ...]
    args: dict[str, Any]
    result: int | str | None


class OpLog:
    """Calls in order, from the first on. Full after `max_ops`: later calls are not recorded.

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
        """Whether calls are no longer recorded."""
        return len(self.ops) >= self.max_ops


def result_of(kind: OpKind, out: Any) -> int | None:
    """What of a call's result must be the same in a replay; what a step computes need not be."""
    if isinstance(out, StepPlan):
        return zlib.crc32(out.new_pages.tobytes())
    if isinstance(out, LoopPlan):
        return zlib.crc32(out.window.tobytes())
    if kind is OpKind.FORK:
        return None if out is None else len(out)
    return None if kind in (OpKind.RUN, OpKind.RUN_LOOP, OpKind.HOST_BATCH) else out
