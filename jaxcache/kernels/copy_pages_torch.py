"""Moves of rows for PyTorch callers: the kernel of `copy_pages_triton`, launched on torch tensors, in place.

As in `write_kv_torch`, the tensors are contiguous, on one device, and not checked. Imports no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxcache.kernels import copy_pages_triton
from jaxcache.kernels.triton_call import torch_call

if TYPE_CHECKING:
    import torch


def move_rows(pool: torch.Tensor, tgt: torch.Tensor, src: torch.Tensor) -> None:
    """Copies slot `src[i]` to slot `tgt[i]` in every layer; at most `copy_kv.MAX_MOVE`. See `copy_kv.move_rows`."""
    if not tgt.shape[0]:
        return
    torch_call(
        copy_pages_triton.move_rows_kernel,
        (pool, tgt, src),
        (tgt.shape[0], pool.shape[1]),
        num_updates=1,
        **copy_pages_triton.move_launch(tgt.shape[0], pool.shape[0], math.prod(pool.shape[2:]), pool.element_size()),
    )
