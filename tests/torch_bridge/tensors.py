"""NumPy arrays of any dtype as torch tensors and back, by their bits."""

import numpy as np
import torch

from torch_bridge.dtypes import torch_dtype


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy, on the CPU."""
    raw = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).clone()  # aligned, as torch does it
    return raw.view(torch_dtype("array", array.dtype)).view(array.shape)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, flat."""
    return tensor.clone().contiguous().view(torch.uint8).cpu().numpy().reshape(-1)
