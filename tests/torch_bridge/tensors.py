"""NumPy arrays of any dtype as torch tensors and back, by their bits; and where torch makes its tensors."""

import jax
import numpy as np
import torch

from jaxcache import DeadViewError
from torch_bridge.dtypes import torch_dtype

ON_GPU = jax.default_backend() == "gpu"
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DEAD = (DeadViewError, RuntimeError) if ON_GPU else DeadViewError
"""What using a tensor of a view that has ended raises: on a GPU torch itself refuses."""


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy, where torch makes its tensors."""
    raw = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).clone()  # aligned, as torch does it
    return raw.to(DEVICE).view(torch_dtype("array", array.dtype)).view(array.shape)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, flat."""
    return tensor.clone().contiguous().view(torch.uint8).cpu().numpy().reshape(-1)


def random(*shape: int, seed: int) -> torch.Tensor:
    """The same normal values on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)
