"""The memory of a pool, as both frameworks use it: what keeps it alive, where it lies, and who may look there.

    torch tensor -> its storage -> PoolMemory -> the pool and its arrays        (each keeps the next one alive)
                                      ^ . . . . . the pool                      (weakly, to tell it of each step)

So the memory outlives whichever side is dropped first. A pool that consists of pools has one memory for each: a step
may update one of them by itself.

The tensors are made from the address, not through DLPack: a DLPack view would forbid every donated step for as long as
the last slice of it lives. When a view ends, its tensors are dead: on a CPU they ask before each use, on a GPU torch
marks their storage and refuses. What was made of their address is beyond that: NumPy arrays, CUDA graphs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from jaxcache.device.pool import DevicePool
from jaxcache.errors import ArgumentError, DeadViewError, ShardingError, UnsupportedError
from jaxcache.pools.stack import LayerStack
from torch_bridge.dtypes import ARRAY_INTERFACE_TYPES, torch_dtype
from torch_bridge.streams import order_on


class PoolMemory:
    """The memory of the arrays that are `pool`'s own, followed through every step that `donating` makes of it.

    Attributes:
      pool: The pool that is in the memory now.
      device: Where torch finds it.
      order: The order of the two frameworks there.

    Raises:
      StalePoolError: if the pool was consumed.
      ShardingError: if it lies on several devices.
      ArgumentError: if it is being traced, or an array has no torch dtype or lies in no order that torch has.
      UnsupportedError: if torch cannot reach its device.
    """

    def __init__(self, pool: DevicePool):
        self._arrays = _lendable_arrays(pool)
        self._addresses = [array.unsafe_buffer_pointer() for array in self._arrays]
        self.pool = pool
        some_array = self._arrays[0] if self._arrays else pool.buffers[0]
        self.device = _torch_device(next(iter(some_array.devices())), some_array.sharding.memory_kind)
        self.order = order_on(self.device)
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._why_dead: str | None = None
        pool.add_view(self)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """A tensor over each array, in the dtype that its rows have for the caller. To be called once."""
        return tuple(map(self._tensor, self._arrays, self._addresses, _row_dtypes(self.pool, self._arrays)))

    def _tensor(self, array: jax.Array, start: int, dtype: np.dtype) -> torch.Tensor:
        wanted = torch_dtype("pool", dtype)
        address = _Address(array, start, self)
        if self.device.type == "cpu":
            tensor = torch.from_numpy(np.asarray(address))
        else:
            tensor = torch.as_tensor(address, device=self.device)
            self._storages.append(weakref.ref(tensor.untyped_storage()))
        return tensor if tensor.dtype == wanted else tensor.view(wanted)

    def torch_after_jax(self) -> list[Any]:
        """Torch comes after the steps that made the pool and those that read it; see `Order.torch_after`."""
        last_read = self.pool.last_read
        return self.order.torch_after(self._arrays if last_read is None else (*self._arrays, last_read))

    def lent(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which is one of `tensors` or a part of one, as the caller may have it."""
        if self.device.type != "cpu":
            return tensor
        lent = tensor.as_subclass(LentTensor)
        lent.memory = self
        return lent

    def require_alive(self) -> None:
        """Raises DeadViewError if torch must not look into the memory any more."""
        if self._why_dead is not None:
            raise DeadViewError(self._why_dead)
        if any(array.is_deleted() for array in self._arrays):
            raise DeadViewError(
                "the pool that this torch view follows was consumed by a step which was not made by donating: make "
                "steps with jaxcache.donating, and share the pool that the step returned"
            )

    def end(self, why: str) -> None:
        """From now on using a tensor of this memory raises, and says `why`."""
        self._why_dead = why
        self.pool.remove_view(self)
        for storage in filter(None, (ref() for ref in self._storages)):
            # What torch itself does to the outputs of a CUDA graph that has been replayed.
            torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, why)

    # What `donating` and `reading` tell: see `jaxcache.device.pool.PoolView`.

    def before_step(self) -> Any:
        """JAX comes after what torch was given, which is nothing that matters once the view has ended."""
        return self.order.token()

    def after_step(self, step: str, returned: Sequence[DevicePool]) -> None:
        """Follows the pool into the one that the step returned, if that is where it was; torch comes after the step."""
        if self._why_dead is not None:
            return
        for pool in returned:
            if type(pool) is not type(self.pool):
                continue
            arrays = _own_arrays(pool)
            if [array.unsafe_buffer_pointer() for array in arrays] == self._addresses:
                self.pool, self._arrays = pool, arrays
                pool.add_view(self)
                self.order.torch_after(
                    arrays[:1]
                )  # one program returned them all; last, for it may have to be waited for
                return
        self.end(
            f"step {step} returned no {type(self.pool).__name__} in the memory that this torch view looks into: it "
            "copied the pool, or did not return it; prove_in_place says why, then share the pool again"
        )

    def after_read(self, done: jax.Array) -> None:
        """Torch comes after the read."""
        if self._why_dead is None:
            self.order.torch_after([done])


class LentTensor(torch.Tensor):
    """A tensor on the CPU that asks its memory before each use, and so do its slices. What is computed from it is free.

    Torch has such a check of its own on a GPU only.
    """

    memory: PoolMemory

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries out `func` on plain tensors, unless the time of one of them is over."""
        kwargs = {} if kwargs is None else kwargs
        lent = [leaf for leaf in jax.tree_util.tree_leaves((args, kwargs)) if isinstance(leaf, LentTensor)]
        for tensor in lent:
            tensor.memory.require_alive()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            return jax.tree_util.tree_map(lambda part: _lent_like(part, lent), result)


def _lent_like(part: Any, lent: Sequence[LentTensor]) -> Any:
    """`part` of a result: lent as well, if it lies in the memory of one of the lent tensors."""
    if not isinstance(part, torch.Tensor) or any(part is tensor for tensor in lent):
        return part
    for tensor in lent:
        if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            return tensor.memory.lent(part)
    return part


def _lendable_arrays(pool: DevicePool) -> Sequence[jax.Array]:
    """The arrays of `pool` itself. Raises unless torch can look into every one; see `PoolMemory`."""
    if not isinstance(pool, DevicePool):
        raise ArgumentError(f"pool must be a pool of jaxcache (DevicePool), got {type(pool).__name__}")
    arrays = _own_arrays(pool)
    for array in arrays:
        if not isinstance(array, jax.Array) or isinstance(array, Tracer):
            raise ArgumentError(
                "pool must hold arrays with memory; this one is traced or abstract: lend it outside jit"
            )
        if array.is_deleted():
            pool.require_live()
        if array.sharding.num_devices > 1:
            raise ShardingError(
                f"pool lies on {array.sharding.num_devices} devices, and a torch tensor on one: lend a pool of one "
                "device, in each process its own"
            )
        layout = array.format.layout  # pyright: ignore[reportAttributeAccessIssue]
        if layout is not None and layout.major_to_minor != tuple(range(array.ndim)):
            raise ArgumentError(
                f"pool must lie in row-major order, got dimensions in the order {layout.major_to_minor}: copy it first"
            )
    return arrays


def _own_arrays(pool: DevicePool) -> Sequence[jax.Array]:
    """The arrays of `pool` itself, not of its parts."""
    if isinstance(pool, LayerStack):
        return pool.buffers
    nodes = jax.tree_util.tree_leaves(pool, is_leaf=lambda node: node is not pool and isinstance(node, DevicePool))
    return [node for node in nodes if not isinstance(node, DevicePool)]


def _row_dtypes(pool: DevicePool, arrays: Sequence[jax.Array]) -> Sequence[np.dtype]:
    """What the arrays hold for the caller, which is not always what they are stored as."""
    return pool.config.row_dtypes if isinstance(pool, LayerStack) else [np.dtype(array.dtype) for array in arrays]


@functools.cache
def _torch_device(device: Any, memory_kind: str | None) -> torch.device:
    """Torch's name of a device of JAX's.

    Raises:
      UnsupportedError: if torch cannot reach it, or the memory is another than the device's own.
    """
    if memory_kind not in (None, device.default_memory().kind):
        raise UnsupportedError(f"pool must lie in the memory of its device, got {memory_kind}")
    if device.platform == "cpu":
        return torch.device("cpu")
    if device.platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda", device.local_hardware_id)
    raise UnsupportedError(f"this build of torch, {torch.__version__}, cannot reach JAX's device {device}")


class _Address:
    """Where an array lies, as the array interfaces of NumPy and CUDA state it. Keeps `memory` alive."""

    def __init__(self, array: jax.Array, start: int, memory: PoolMemory):
        self.memory = memory
        self.__array_interface__ = self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": ARRAY_INTERFACE_TYPES[np.dtype(array.dtype)],
            "data": _place(start),
            "version": 3,
        }


@functools.lru_cache(maxsize=4096)
def _place(start: int) -> tuple[int, bool]:
    """An address that may be written to: one tuple each, for torch keeps a reference to every one that it is given."""
    return start, False
