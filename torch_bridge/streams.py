"""Who waits for whom: the order of what JAX and torch do to one memory.

Torch after JAX: on a GPU, torch's current stream waits for an event of JAX's, which DLPack hands over; on a CPU, the
host waits until JAX's arrays are ready. JAX after torch: on a GPU, JAX imports a few bytes of torch's, which are ready
when torch's current stream is, and touches them, and what it is given later comes later, for a device runs JAX's
programs one after another; on a CPU, torch's operations are done when they return.

On a GPU nothing here blocks the host. "Torch" means torch's current stream: whoever uses another stream makes the
current one wait for it, as in torch alone. JAX means its programs; a bare copy of a buffer to the host, such as
`np.asarray(pool.k)`, is none: read through `gather` or `get_cpu_copy`.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import torch

_TOKEN_BYTES = 16
_LEGACY_STREAM = 1
"""How DLPack names CUDA's default stream, whose own handle, 0, it forbids."""


class Order(abc.ABC):
    """The order of both frameworks on one device."""

    @abc.abstractmethod
    def torch_after(self, arrays: Sequence[jax.Array]) -> None:
        """What torch is given from now on runs after the programs that compute `arrays`."""

    @abc.abstractmethod
    def torch_after_all(self, array: jax.Array) -> None:
        """What torch is given from now on runs after everything JAX was given on the device of `array`, reads too."""

    @abc.abstractmethod
    def jax_after_torch(self) -> None:
        """What JAX is given from now on runs after what torch was given so far."""


class HostOrder(Order):
    """On a CPU: the host waits for JAX, and torch is never behind."""

    def torch_after(self, arrays: Sequence[jax.Array]) -> None:
        jax.block_until_ready(arrays)

    def torch_after_all(self, array: jax.Array) -> None:
        # Whatever still reads the memory computes an array that is alive, or one that nobody will ever look at.
        for each in jax.live_arrays("cpu"):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody else's failed computation
                each.block_until_ready()

    def jax_after_torch(self) -> None:
        pass


class CudaOrder(Order):
    """On a GPU: the streams wait for each other, and the host for nobody."""

    def __init__(self, device: torch.device):
        self._device = device

    def torch_after(self, arrays: Sequence[jax.Array]) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream or _LEGACY_STREAM
        for array in arrays:
            # The capsule is dropped at once: only the wait is wanted.
            array.__dlpack__(stream=stream)  # pyright: ignore[reportCallIssue]

    def torch_after_all(self, array: jax.Array) -> None:
        self.torch_after([_first_element(array)])

    def jax_after_torch(self) -> None:
        if torch.cuda.current_stream(self._device).query():
            return  # all done: there is nothing to wait for
        with torch.cuda.device(self._device):
            token = torch.empty(_TOKEN_BYTES, dtype=torch.uint8, device=self._device)
            _touch(jax.dlpack.from_dlpack(token))


def order_on(device: torch.device) -> Order:
    """The order of both frameworks on `device`."""
    return CudaOrder(device) if device.type == "cuda" else HostOrder()


@jax.jit
def _first_element(array: jax.Array) -> Any:
    return array[(0,) * array.ndim]


@jax.jit
def _touch(token: jax.Array) -> jax.Array:
    return token + 1  # a program of its own: JAX runs none for the identity
