"""Which dtypes both frameworks have, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import torch

from jaxcache.errors import ArgumentError
from jaxcache.kernels.float8 import FLOAT8_DTYPES

TORCH_DTYPES: Mapping[np.dtype, torch.dtype] = MappingProxyType(
    {
        np.dtype(jnp.float32): torch.float32,
        np.dtype(jnp.bfloat16): torch.bfloat16,
        np.dtype(jnp.float16): torch.float16,
        np.dtype(jnp.float8_e4m3fn): torch.float8_e4m3fn,
        np.dtype(jnp.float8_e5m2): torch.float8_e5m2,
        np.dtype(jnp.int8): torch.int8,
        np.dtype(jnp.uint8): torch.uint8,
        np.dtype(jnp.uint16): torch.uint16,
        np.dtype(jnp.int32): torch.int32,
    }
)
"""What a pool may hold, the integers that stand for it in storage, and int32 for tables of pages."""

JAX_DTYPES: Mapping[torch.dtype, np.dtype] = MappingProxyType({theirs: mine for mine, theirs in TORCH_DTYPES.items()})

ARRAY_INTERFACE_TYPES: Mapping[np.dtype, str] = MappingProxyType(
    {dtype: dtype.str if dtype.isbuiltin == 1 else f"<u{dtype.itemsize}" for dtype in TORCH_DTYPES}
)
"""How the array interfaces of NumPy and CUDA name a dtype, or the integer of its width if they have no name for it."""

_RULE = f"must have a dtype that JAX and torch share, one of {', '.join(map(str, TORCH_DTYPES))}"


def torch_dtype(name: str, dtype: np.dtype) -> torch.dtype:
    """The torch dtype of the same bits. Raises ArgumentError if there is none."""
    if dtype not in TORCH_DTYPES:
        raise ArgumentError(f"{name} {_RULE}; got {dtype}")
    return TORCH_DTYPES[dtype]


def jax_dtype(name: str, dtype: torch.dtype) -> np.dtype:
    """The JAX dtype of the same bits. Raises ArgumentError if there is none."""
    if dtype not in JAX_DTYPES:
        raise ArgumentError(f"{name} {_RULE}; got {dtype}")
    return JAX_DTYPES[dtype]


def cast(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float rows in the dtype of a pool of floats; for float8 by the rule of `jaxcache.kernels.float8`."""
    if rows.dtype is dtype or JAX_DTYPES[dtype] not in FLOAT8_DTYPES:
        return rows.to(dtype)
    # In float8 itself torch cannot compare; any wider float has the largest number of both formats.
    wide = rows.float() if rows.element_size() == 1 else rows
    largest = torch.finfo(dtype).max
    return wide.clamp(-largest, largest).to(dtype)
