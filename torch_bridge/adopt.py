"""Torch tensors as JAX arrays, and pools in memory that torch allocated."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import torch

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.pools.base import KVCache, KVCacheConfig
from jaxcache.pools.config import require, storage_dtype
from torch_bridge.dtypes import TORCH_DTYPES, jax_dtype, torch_dtype
from torch_bridge.memory import LentTensor
from torch_bridge.slots import slots_to_host

_ALIGNMENT = {"cpu": 64, "cuda": 16}
"""Bytes: what XLA asks of the memory that it is given."""
_PLATFORM = {"cpu": "cpu", "cuda": "gpu"}


def adopt(tensor: torch.Tensor, *, donatable: bool = False) -> jax.Array:
    """A JAX array in the memory of `tensor`, which it keeps alive. JAX's programs come after torch's writes so far.

    Slots are an exception, for torch's are int64 and JAX's are int32: a one-dimensional int64 tensor is checked and
    copied.

    Args:
      tensor: Contiguous, on a CPU or a GPU that JAX uses, in a dtype that JAX has.
      donatable: The array is meant to be donated, so that steps update torch's memory in place. Only a GPU can: on a
        CPU JAX copies what it does not own when it is donated, and says nothing.

    Raises:
      ArgumentError: if it is no torch tensor, strided, misaligned, needs a gradient, or of a dtype or on a device that
        JAX has not; or if slots do not fit int32.
      UnsupportedError: if `donatable` and the tensor is on a CPU.

    Cost: some 90 us on a GPU, 40 us on a CPU. Slots are read back to be checked.
    """
    _require_adoptable(tensor)
    if tensor.dtype == torch.int64:
        require(not donatable, "donatable", "must be False for int64, which JAX has only as a copy in int32", donatable)
        slots = slots_to_host("tensor", tensor)
        return jax.device_put(slots, _jax_device(tensor.device))
    dtype = jax_dtype("tensor", tensor.dtype)
    if donatable and tensor.device.type == "cpu":
        raise UnsupportedError(
            "donatable=True needs a GPU: on a CPU JAX copies memory that it does not own when it is donated, so torch "
            "would not see the update. Let JAX allocate, and share the pool"
        )
    _require_address(tensor)
    _jax_device(tensor.device)
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        array = jax.dlpack.from_dlpack(tensor.detach(), copy=False)
    if array.dtype != dtype or (tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr()):
        raise UnsupportedError(
            f"tensor: JAX {jax.__version__} copied this {tensor.dtype} tensor instead of adopting it"
        )
    return array


def adopt_pool(config: KVCacheConfig, *tensors: torch.Tensor) -> KVCache:
    """A pool in memory that torch allocated; donated steps update it there. The tensors remain valid views of it.

    `share` the pool to have the two frameworks ordered, and the tensors' place checked after each step.

    Args:
      config: Sizes of the pool, on one device.
      *tensors: `(layers, size + page_size, *row)` for each array of the pool, in its dtype: keys and values, or latent
        rows; page-major, as `config.placement.dims` says. Page 0 is the sink, and is zeroed.

    Raises:
      ArgumentError: on a wrong number, shape or dtype of tensors, or a sharded config.
      ArgumentError, UnsupportedError: as `adopt` with `donatable=True`; so on every CPU.
    """
    require(config.axis_name is None, "config", "must be that of a pool on one device", f"axis {config.axis_name!r}")
    shapes = config.row_shapes
    require(len(tensors) == len(shapes), "tensors", f"must be {len(shapes)}, one an array of the pool", len(tensors))
    for i, (tensor, row, dtype) in enumerate(zip(tensors, shapes, config.row_dtypes, strict=True)):
        _require_adoptable(tensor)
        shape = *config.placement.dims, *row
        require(tuple(tensor.shape) == shape, f"tensors[{i}]", f"must have shape {shape}", tuple(tensor.shape))
        wanted = torch_dtype("config", dtype)
        require(tensor.dtype == wanted, f"tensors[{i}]", f"must be {wanted}, as the config says", tensor.dtype)
    platform = _PLATFORM[tensors[0].device.type]
    stored = [TORCH_DTYPES[storage_dtype(dtype, platform)] for dtype in config.row_dtypes]
    views = [tensor.view(dtype) for tensor, dtype in zip(tensors, stored, strict=True)]
    arrays = [adopt(view, donatable=True) for view in views]
    sink = config.page_size * config.layer_num // config.placement.dims[0]
    for view in views:
        view[:, :sink] = 0
    return config.pool_type(config, *arrays)  # pyright: ignore[reportReturnType]


def _require_adoptable(tensor: Any) -> None:
    """Raises ArgumentError unless this is a dense tensor with memory of its own."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"tensor must be a torch tensor, got {type(tensor).__name__}")
    if isinstance(tensor, LentTensor):
        raise ArgumentError("tensor is a view of a pool, which JAX has already: use the pool's own arrays")
    is_known = tensor.device.type in _PLATFORM
    require(is_known, "tensor", "must lie on a CPU or an NVIDIA GPU; move it there with .to()", tensor.device)
    require(tensor.layout is torch.strided, "tensor", "must be dense; use .to_dense()", tensor.layout)
    require(not tensor.requires_grad, "tensor", "must not require a gradient; use .detach()", "requires_grad=True")
    is_plain = not (tensor.is_conj() or tensor.is_neg())
    require(is_plain, "tensor", "must not be lazily conjugated or negated; use .resolve_conj().resolve_neg()", "a view")


def _require_address(tensor: torch.Tensor) -> None:
    """Raises ArgumentError unless the memory is in an order and at an address that XLA takes."""
    rule = "must be contiguous, as .contiguous() makes it"
    require(tensor.is_contiguous(), "tensor", rule, f"strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    alignment = _ALIGNMENT[tensor.device.type]
    rest = tensor.data_ptr() % alignment
    rule = f"must begin at a multiple of {alignment} bytes, as a fresh tensor does; use .clone()"
    require(rest == 0, "tensor", rule, f"an address {rest} bytes past one")


def _jax_device(device: torch.device) -> Any:
    """JAX's device of that name. Raises ArgumentError if JAX does not use it."""
    platform = _PLATFORM[device.type]
    try:
        candidates = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise ArgumentError(f"tensor must lie on a device that JAX uses, got {device}: {error}") from error
    found = [mine for mine in candidates if platform == "cpu" or mine.local_hardware_id == device.index]
    require(len(found) > 0, "tensor", f"must lie on a device that JAX uses, one of {candidates}", device)
    return found[0]
