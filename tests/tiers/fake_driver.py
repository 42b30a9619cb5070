"""A driver in this process, behind the prototypes of the real one: streams that run late, locks, and errors to plant.

The copies are real and go through the same structures; a stream carries them out only when somebody asks for an event
or waits, so that whoever looks too early sees old bytes.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_char_p, c_int, c_void_p
from typing import Any

import jax

from jaxcache.tiers.cuda_driver import PROTOTYPES, Driver, Memcpy2D

INVALID, NOT_READY = 1, 600


class FakeDriver(Driver):
    """`Driver` over `FakeLibrary`; JAX's own stream is waited for by the host."""

    def __init__(self, library: FakeLibrary | None = None):
        self.library = FakeLibrary() if library is None else library
        super().__init__(self.library.functions)

    def after(self, array: Any, stream: int) -> None:
        jax.block_until_ready(array)


class FakeLibrary:
    """What `libcuda` does, in Python.

    Attributes:
      lag: How many times an event is asked for before its copies are made.
      errors: By call, the code that its next calls return.
      calls: How often each was called.
      locked: Locked memory: address and bytes.
      contexts: Those that are current, the last one on top.
      events: Those that are alive.
    """

    def __init__(self, lag: int = 1):
        self.lag, self.errors, self.calls = lag, {}, Counter()
        self.locked: dict[int, int] = {}
        self.contexts: list[int] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, list[Any]] = {}  # stream, copies that come before, times asked
        self._handles = iter(range(1000, 10**9))
        self._kept = {name: self._function(name, arguments) for name, arguments in PROTOTYPES.items()}
        self.functions = dict(self._kept)

    def _function(self, name: str, arguments: tuple[Any, ...]) -> Any:
        do = vars(FakeLibrary)[name.removesuffix("_v2")]

        def call(*given: Any) -> int:
            self.calls[name] += 1
            return self.errors[name] if name in self.errors else do(self, *given) or 0

        return CFUNCTYPE(c_int, *arguments)(call)

    # ---- calls -------------------------------------------------------------------------------------------------------

    def cuInit(self, flags):
        return INVALID if flags else 0

    def cuGetErrorName(self, code, name):
        name[0] = c_char_p(b"CUDA_ERROR_PLANTED")

    def cuDeviceGet(self, device, ordinal):
        device[0] = ordinal

    def cuDevicePrimaryCtxRetain(self, context, device):
        context[0] = c_void_p(10 + device)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)

    def cuCtxPopCurrent(self, context):
        context[0] = c_void_p(self.contexts.pop())

    def cuMemHostRegister(self, address, size, flags):
        if flags != 1 or not self.contexts or address in self.locked:
            return INVALID
        self.locked[address] = size

    def cuMemHostUnregister(self, address):
        return 0 if self.contexts and self.locked.pop(address, None) else INVALID

    def cuStreamCreate(self, stream, flags):
        stream[0] = c_void_p(next(self._handles))
        self.streams[stream[0]] = []

    def cuStreamSynchronize(self, stream):
        self._run(stream)

    def cuMemcpyHtoDAsync(self, device, host, size, stream):
        return self._copy(stream, [(device, host, size)], host, size)

    def cuMemcpyDtoHAsync(self, host, device, size, stream):
        return self._copy(stream, [(host, device, size)], host, size)

    def cuMemcpy2DAsync(self, copy, stream):
        its: Memcpy2D = copy[0]
        to_host = (its.src_type, its.dst_type) == (2, 1)
        if not to_host and (its.src_type, its.dst_type) != (1, 2):
            return INVALID
        source, target = (its.src_device, its.dst_host) if to_host else (its.src_host, its.dst_device)
        rows = [(target + i * its.dst_pitch, source + i * its.src_pitch, its.width) for i in range(its.height)]
        host, pitch = (its.dst_host, its.dst_pitch) if to_host else (its.src_host, its.src_pitch)
        if its.width > min(its.src_pitch, its.dst_pitch):
            return INVALID
        return self._copy(stream, rows, host, pitch * (its.height - 1) + its.width)

    def cuEventCreate(self, event, flags):
        event[0] = c_void_p(next(self._handles))
        self.events[event[0]] = [None, 0, 0]

    def cuEventRecord(self, event, stream):
        self.events[event][:2] = [stream, len(self.streams[stream])]

    def cuEventQuery(self, event):
        its = self.events[event]
        its[2] += 1
        if its[2] <= self.lag:
            return NOT_READY
        self._run(its[0])

    def cuEventSynchronize(self, event):
        its = self.events[event]
        its[2] = self.lag
        self._run(its[0])

    def cuEventDestroy(self, event):
        return 0 if self.events.pop(event, None) else INVALID

    # ---- streams -----------------------------------------------------------------------------------------------------

    def _copy(self, stream: int, rows: list[tuple[int, int, int]], host: int, size: int) -> int:
        is_locked = any(start <= host and host + size <= start + length for start, length in self.locked.items())
        if not is_locked or stream not in self.streams or not self.contexts:
            return INVALID
        self.streams[stream].append(lambda: [ctypes.memmove(*row) for row in rows])
        return 0

    def _run(self, stream: int) -> None:
        copies, self.streams[stream] = self.streams[stream], []
        for copy in copies:
            copy()
