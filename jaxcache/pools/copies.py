"""Rows outside their pool: what they are, and what they are of."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from jaxcache.pools.config import PoolConfig, require

if TYPE_CHECKING:
    from jaxtyping import Shaped


class PoolCopy(abc.ABC):
    """What `get_cpu_copy` of some kind of pool returns: rows, and the sizes of the pool that they come from.

    A pool takes it back if its rows are of the same layers, kind, shapes and dtypes: see `jaxcache.pools.identity`.
    """

    config: Any
    """Sizes of that pool."""

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """Tokens copied; of a pool of states, states."""

    @abc.abstractmethod
    def tokens(self, start: int, stop: int) -> Self:
        """Tokens `[start, stop)` of the copy, in the same memory."""


@dataclass(frozen=True, eq=False)
class CpuCopy(PoolCopy):
    """Rows of some tokens (or states) in host memory, independent of the pool they came from.

    Attributes:
      config: The configuration of that pool.
      buffers: `(layers, tokens, *row)` for each array of the pool, in its storage dtype. Owned by this object. While
        the rows are on their way (`start_copy`, `placed`) these are JAX arrays.

    Raises:
      ArgumentError: The buffers are not rows of a pool of this config.
    """

    config: PoolConfig
    buffers: tuple[np.ndarray | Shaped[jax.Array, "layers tokens *row"], ...]

    def __post_init__(self) -> None:
        shapes, dtypes = self.config.row_shapes, self.config.row_dtypes
        require(len(self.buffers) == len(shapes), "buffers", f"must be {len(shapes)} arrays", len(self.buffers))
        tokens = self.buffers[0].shape[1:2]
        for buffer, row, dtype in zip(self.buffers, shapes, dtypes, strict=True):
            shape, itemsize = (self.config.layer_num, *tokens, *row), np.dtype(dtype).itemsize
            is_of = len(tokens) == 1 and buffer.shape == shape and buffer.dtype.itemsize == itemsize
            rule = f"must be (layers, tokens, *row), {shape} of {itemsize} bytes an element"
            require(is_of, "buffers", rule, f"{buffer.dtype}{list(buffer.shape)}")

    @property
    def num_tokens(self) -> int:
        return self.buffers[0].shape[1]

    def tokens(self, start: int, stop: int) -> CpuCopy:
        return CpuCopy(self.config, tuple(buffer[:, start:stop] for buffer in self.buffers))


@dataclass(frozen=True, eq=False)
class SWACpuCopy(PoolCopy):
    """Rows of some tokens in host memory, those of the window's layers for the tokens that had a window page.

    Attributes:
      config: The `SWAConfig` of the pool they came from.
      full: Rows of the layers of full attention.
      window: Rows of the window's layers.
      has_window: Which of the tokens `window` holds, in their order.

    Raises:
      ArgumentError: The parts do not fit together.
    """

    config: Any
    full: CpuCopy
    window: CpuCopy
    has_window: np.ndarray

    def __post_init__(self) -> None:
        is_mask = self.has_window.shape == (self.full.num_tokens,) and self.has_window.dtype == bool
        require(is_mask, "has_window", f"must be {self.full.num_tokens} bools, one a token", self.has_window.shape)
        count = int(np.count_nonzero(self.has_window))
        require(self.window.num_tokens == count, "window", f"must hold {count} tokens", self.window.num_tokens)

    @property
    def num_tokens(self) -> int:
        return self.full.num_tokens

    def tokens(self, start: int, stop: int) -> SWACpuCopy:
        before, until = (int(np.count_nonzero(self.has_window[:i])) for i in (start, stop))
        window = self.window.tokens(before, until)
        return SWACpuCopy(self.config, self.full.tokens(start, stop), window, self.has_window[start:stop])
