"""The few calls of NVIDIA's driver that transfers need, by ctypes: page-locked memory, streams, events, copies.

JAX copies only between arrays of its own, whose page-locked memory its allocator rounds up and hands out as it likes.
Pages of one large piece of host memory, which is locked once, take the driver itself. It is there wherever a GPU works;
its calls are those of CUDA 12 and later (cuda.h), and its primary context is the one that JAX uses.

Source: jaxcache's own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from jaxcache.errors import TransferError

_NOT_READY = 600
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: for every context
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream
_EVENT_FLAGS = 1 | 2  # CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING
_ON_HOST, _ON_DEVICE = 1, 2  # CU_MEMORYTYPE_
MOST_PITCH = 2**31 - 1
"""Most bytes from one of `Rows` to the next (CU_DEVICE_ATTRIBUTE_MAX_PITCH)."""


@dataclass(frozen=True)
class Rows:
    """Bytes to copy: rows that lie one behind the other on the device, and apart on the host.

    Attributes:
      host: Address of the first one.
      device: Likewise, on the device.
      width: Bytes of one.
      height: How many.
      host_pitch: Bytes from one to the next, below `MOST_PITCH`.
    """

    host: int
    device: int
    width: int
    height: int = 1
    host_pitch: int = 0


class Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D_v2 of cuda.h."""

    _fields_ = (
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_uint),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_uint),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (POINTER(Memcpy2D), c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
}
"""Arguments of each call; all return an error code, 0 for none."""


class Driver:
    """The driver. Contexts, streams and events are integers: its handles. Addresses are integers.

    Args:
      library: Has the functions of `PROTOTYPES`; by default that of the driver that is installed.

    Raises:
      TransferError: There is none, or it is too old.
    """

    def __init__(self, library: Any = None):
        if library is None:
            library = _installed()
        self._calls: dict[str, Any] = {}
        for name, arguments in PROTOTYPES.items():
            try:
                call = library[name]
            except (AttributeError, KeyError) as error:
                raise TransferError(f"NVIDIA's driver has no {name}: it is too old, install that of CUDA 12") from error
            call.argtypes, call.restype = arguments, c_int
            self._calls[name] = call
        self._call("cuInit", 0)

    def context(self, ordinal: int) -> int:
        """The primary context of a device that this process sees, by its number there."""
        device = c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return self._handle("cuDevicePrimaryCtxRetain", device)

    @contextlib.contextmanager
    def current(self, context: int) -> Iterator[None]:
        """This thread's calls are those of `context` meanwhile."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def lock(self, address: int, size: int) -> None:
        """Page-locks memory of this process, for all contexts."""
        self._call("cuMemHostRegister_v2", address, size, _PORTABLE)

    def unlock(self, address: int) -> None:
        """Undoes `lock`."""
        self._call("cuMemHostUnregister", address)

    def stream(self) -> int:
        """A new stream of the current context."""
        return self._handle("cuStreamCreate", _NON_BLOCKING)

    def after(self, array: Any, stream: int) -> None:
        """Has the stream wait until JAX has computed an array of one device. The host does not wait."""
        array.__dlpack__(stream=stream)

    def copy_to_host(self, rows: Rows, stream: int) -> None:
        """Starts to copy from the device."""
        if rows.height == 1:
            self._call("cuMemcpyDtoHAsync_v2", rows.host, rows.device, rows.width, stream)
            return
        copy = Memcpy2D(width=rows.width, height=rows.height, src_pitch=rows.width, dst_pitch=rows.host_pitch)
        copy.src_type, copy.src_device, copy.dst_type, copy.dst_host = _ON_DEVICE, rows.device, _ON_HOST, rows.host
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def copy_to_device(self, rows: Rows, stream: int) -> None:
        """Starts to copy to the device."""
        if rows.height == 1:
            self._call("cuMemcpyHtoDAsync_v2", rows.device, rows.host, rows.width, stream)
            return
        copy = Memcpy2D(width=rows.width, height=rows.height, src_pitch=rows.host_pitch, dst_pitch=rows.width)
        copy.src_type, copy.src_host, copy.dst_type, copy.dst_device = _ON_HOST, rows.host, _ON_DEVICE, rows.device
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def drain(self, stream: int) -> None:
        """Waits until a stream has done all that it was given."""
        self._call("cuStreamSynchronize", stream)

    def event(self, stream: int) -> int:
        """A new event, which has happened when all that the stream was given until now is done."""
        event = self._handle("cuEventCreate", _EVENT_FLAGS)
        self._call("cuEventRecord", event, stream)
        return event

    def has_happened(self, event: int) -> bool:
        """Whether an event has happened, without waiting."""
        return self._call("cuEventQuery", event, allowed=_NOT_READY) == 0

    def wait(self, event: int) -> None:
        """Waits for an event; other threads go on."""
        self._call("cuEventSynchronize", event)

    def end_event(self, event: int) -> None:
        """Frees an event."""
        self._call("cuEventDestroy_v2", event)

    def _handle(self, name: str, *arguments: Any) -> int:
        handle = c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def _call(self, name: str, *arguments: Any, allowed: int = 0) -> int:
        code = self._calls[name](*arguments)
        if code not in (0, allowed):
            what = c_char_p()
            self._calls["cuGetErrorName"](code, ctypes.byref(what))
            raise TransferError(f"NVIDIA's driver refused {name}: {(what.value or b'error').decode()} ({code})")
        return code


def _installed() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"NVIDIA's driver is not installed, host memory on a GPU needs it: {error}") from error
