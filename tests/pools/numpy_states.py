"""The oracle of the state pool's tests: what it holds, as NumPy arrays, written from the contract."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxcache.pools.mamba import MambaConfig, MambaPool
from tests.pools.numpy_pool import bits, random_rows


def mamba_config(**sizes) -> MambaConfig:
    """A small pool whose parts differ in rank, shape and dtype, so that mixing them up cannot go unnoticed."""
    parts = {"conv_shape": (8, 3), "temporal_shape": (4, 2, 5), "conv_dtype": jnp.bfloat16, "temporal_dtype": "float32"}
    return MambaConfig(**({"num_states": 9, "layer_num": 3} | parts | sizes))


def random_parts(rng: np.random.Generator, config: MambaConfig, *lead: int) -> list[np.ndarray]:
    """Both parts of states, in the pool's dtypes, with these leading dimensions."""
    parts = zip(config.row_shapes, config.row_dtypes, strict=True)
    return [random_rows(rng, dtype, (*lead, *shape)) for shape, dtype in parts]


class NumpyStates:
    """`(layers, num_states + 1, *part)` for each part. State 0 and states outside are never written."""

    def __init__(self, config: MambaConfig):
        self.config = config
        parts = zip(config.row_shapes, config.row_dtypes, strict=True)
        self.arrays = [np.zeros((config.layer_num, config.num_states + 1, *s), d) for s, d in parts]

    def write(self, states: Sequence[int], index: int, parts: Sequence[np.ndarray]) -> None:
        """Both parts of one layer, state by state."""
        for array, rows in zip(self.arrays, parts, strict=True):
            for state, row in zip(states, rows, strict=True):
                if 0 < state < array.shape[1] and 0 <= index < array.shape[0]:
                    array[index, state] = row.astype(array.dtype)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All copies at the same instant."""
        for array in self.arrays:
            old = array.copy()
            for source, target in zip(sources, targets, strict=True):
                if target != 0:
                    array[:, target] = old[:, source]

    def expect(self, pool: MambaPool) -> None:
        """Fails unless the pool holds the same bits in every state of every layer, the sink included."""
        for layer in range(self.config.layer_num):
            rows = pool.read(np.arange(self.config.num_states + 1), self.config.start_layer + layer)
            for mine, theirs in zip(self.arrays, rows, strict=True):
                assert theirs.dtype == mine.dtype
                np.testing.assert_array_equal(bits(theirs), bits(mine[layer]))


def filled_states(config: MambaConfig, seed: int = 0) -> tuple[MambaPool, NumpyStates]:
    """A pool and its oracle that hold the same random rows in every usable state."""
    rng, oracle, pool = np.random.default_rng(seed), NumpyStates(config), MambaPool.create(config)
    states = np.arange(1, config.num_states + 1)
    for layer in range(config.layer_num):
        parts = random_parts(rng, config, config.num_states)
        oracle.write(states, layer, parts)
        pool = pool.write(states, config.start_layer + layer, *parts)
    return pool, oracle
