"""Who waits for whom: the order of what JAX and torch do to one memory.

Torch after JAX: on a GPU, torch's current stream waits for an event of JAX's, which DLPack hands over; on a CPU, the
host waits until JAX's arrays are ready. JAX after torch: on a GPU, JAX imports a few bytes of torch's, a token, which
is ready when torch's current stream is, and the next program takes it as an argument; on a CPU, torch's operations are
done when they return.

On a GPU nothing here blocks the host. "Torch" means torch's current stream: code that uses another stream makes the
current one wait for it, as in torch alone. "JAX" means its programs; a bare copy of a buffer to the host, such as
`np.asarray(pool.k)`, is none: read through `gather` or `get_cpu_copy`.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import torch
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]

_TOKEN_BYTES = 16
_LEGACY_STREAM = 1
"""How DLPack names CUDA's default stream, whose own handle, 0, it forbids."""
_DLPACK_CUDA = 2


class Order(abc.ABC):
    """The order of both frameworks on one device."""

    @abc.abstractmethod
    def torch_after(self, arrays: Iterable[jax.Array]) -> list[Any]:
        """What torch is given from now on runs after the programs that compute `arrays`.

        Returns:
          What holds them: for as long as it is kept, JAX does not update the arrays in place. A GPU refuses to donate
          them, a CPU copies.
        """

    @abc.abstractmethod
    def torch_after_all(self, array: jax.Array) -> None:
        """What torch is given from now on runs after everything JAX was given on the device of `array`, reads too."""

    @abc.abstractmethod
    def token(self) -> Any:
        """An array, for a program of JAX's to take: ready when all that torch was given so far is done."""

    @abc.abstractmethod
    def jax_after_torch(self) -> None:
        """What JAX is given from now on runs after what torch was given so far."""


class HostOrder(Order):
    """On a CPU: the host waits for JAX, and torch is never behind."""

    def torch_after(self, arrays: Iterable[jax.Array]) -> list[Any]:
        return [array.block_until_ready().__dlpack__() for array in arrays]

    def torch_after_all(self, array: jax.Array) -> None:
        # Whatever still reads the memory computes an array that is alive, or one that is never looked at.
        for each in jax.live_arrays("cpu"):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another's failed computation
                each.block_until_ready()

    def token(self) -> Any:
        return np.zeros((), np.uint8)

    def jax_after_torch(self) -> None:
        pass


class CudaOrder(Order):
    """On a GPU: the streams wait for each other, the host for neither. Also a DLPack producer: of its token."""

    def __init__(self, device: torch.device):
        self._device = device
        self._bytes = torch.empty(_TOKEN_BYTES, dtype=torch.uint8, device=device)
        self._event = torch.cuda.Event()
        self._streams: dict[int, torch.cuda.Stream] = {}  # by handle: to ask for one costs more than a wait
        self._token: jax.Array | None = None

    def torch_after(self, arrays: Iterable[jax.Array]) -> list[Any]:
        stream = self._handle() or _LEGACY_STREAM
        return [array.__dlpack__(stream=stream) for array in arrays]  # pyright: ignore[reportCallIssue]

    def torch_after_all(self, array: jax.Array) -> None:
        self.torch_after([_first_element(array)])

    def token(self) -> Any:
        if self._token is None or not self._current().query():
            self._token = jax.dlpack.from_dlpack(self)
        return self._token

    def jax_after_torch(self) -> None:
        if not self._current().query():
            _touch(self.token())  # a device runs JAX's programs one after another

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self._device.index

    def __dlpack__(self, *, stream: int, **_: Any) -> Any:
        self._event.record(self._current())
        self._stream(stream).wait_event(self._event)
        return to_dlpack(self._bytes)

    def _handle(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def _current(self) -> torch.cuda.Stream:
        return self._stream(self._handle())

    def _stream(self, handle: int) -> torch.cuda.Stream:
        if handle not in self._streams:
            known = (
                torch.cuda.ExternalStream(handle, self._device) if handle else torch.cuda.default_stream(self._device)
            )
            self._streams[handle] = known
        return self._streams[handle]


@functools.cache
def order_on(device: torch.device) -> Order:
    """The order of both frameworks on `device`, of which a process needs one."""
    return CudaOrder(device) if device.type == "cuda" else HostOrder()


@jax.jit
def _first_element(array: jax.Array) -> Any:
    return array[(0,) * array.ndim]


@jax.jit
def _touch(token: jax.Array) -> jax.Array:
    return token + 1  # a program of its own: JAX runs none for the identity
