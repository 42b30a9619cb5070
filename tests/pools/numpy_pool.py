"""The oracle of the pool tests: what a KV pool holds, as NumPy arrays, written from the contract."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.pools.base import KVCache, KVCacheConfig
from jaxcache.pools.double_sparse import DoubleSparseConfig
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig

FLOATS = tuple(map(np.dtype, (np.float32, jnp.bfloat16, np.float16, jnp.float8_e4m3fn, jnp.float8_e5m2)))
DTYPES = (*FLOATS, np.dtype(np.int8), np.dtype(np.uint8))


def mha_config(dtype=np.float32, **sizes) -> MHAConfig:
    """A small pool whose values are narrower than its keys, so that mixing them up cannot go unnoticed."""
    sizes = {"size": 24, "page_size": 4, "layer_num": 3, "head_num": 2, "head_dim": 8, "v_head_dim": 4} | sizes
    return MHAConfig(dtype=dtype, **sizes)


def mla_config(dtype=np.float32, **sizes) -> MLAConfig:
    """A small pool with a rank that is no multiple of 128."""
    sizes = {"size": 24, "page_size": 4, "layer_num": 3, "kv_lora_rank": 12, "qk_rope_head_dim": 5} | sizes
    return MLAConfig(dtype=dtype, **sizes)


def double_sparse_config(dtype=np.float32, **sizes) -> DoubleSparseConfig:
    """Keys, values and labels of three widths."""
    sizes = {"size": 24, "page_size": 4, "layer_num": 3, "head_num": 2, "head_dim": 8, "v_head_dim": 4} | sizes
    return DoubleSparseConfig(dtype=dtype, **{"heavy_channel_num": 3} | sizes)


def page_major(make_config: Callable[..., KVCacheConfig]) -> Callable[..., Any]:
    """What makes the page-major configurations of a kind."""

    @functools.wraps(make_config)
    def make(dtype=np.float32, **sizes):
        return make_config(dtype, layout=Layout.PAGE_MAJOR, **sizes)

    make.__name__ = f"page_major_{make_config.__name__}"
    return make


CONFIGS = (mha_config, mla_config, double_sparse_config, page_major(mha_config), page_major(mla_config))


def make_pool(config: KVCacheConfig) -> Any:
    """A pool of zeros of the kind that the configuration belongs to."""
    return config.pool_type.create(config)


def random_rows(rng: np.random.Generator, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """Rows of every bit pattern for integers, of ordinary numbers for floats."""
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 256, shape).astype(np.uint8).view(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def filled_pool(config: KVCacheConfig, seed: int = 0) -> tuple[KVCache, NumpyPool]:
    """A pool and its oracle that hold the same random rows in every usable slot."""
    rng, oracle = np.random.default_rng(seed), NumpyPool(config)
    slots = np.arange(config.page_size, config.rows, dtype=np.int32)
    rows = [random_rows(rng, config.dtype, (config.layer_num, len(slots), *row)) for row in config.row_shapes]
    for layer in range(config.layer_num):
        oracle.write(layer, slots, [array[layer] for array in rows])
    return make_pool(config).set_all_layers(slots, *rows), oracle


class NumpyPool:
    """Rows in the pool's dtype, `(layers, slots, *row)` for each array. Slot 0 and slots outside are never written."""

    def __init__(self, config: KVCacheConfig):
        self.config = config
        shapes = [(config.layer_num, config.size + config.page_size, *row) for row in config.row_shapes]
        self.arrays = [np.zeros(shape, config.dtype) for shape in shapes]

    def write(self, index: int, slots: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Rows of one layer, token by token."""
        for array, new in zip(self.arrays, rows, strict=True):
            for slot, row in zip(slots, new, strict=True):
                if 0 < slot < array.shape[1] and 0 <= index < array.shape[0]:
                    array[index, slot] = row.astype(self.config.dtype)

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """All moves at the same instant."""
        for array in self.arrays:
            old = array.copy()
            for target, source in zip(targets, sources, strict=True):
                if target != 0:
                    array[:, target] = old[:, source]

    def as_they_lie(self) -> list[np.ndarray]:
        """The arrays in the order of the layout: pages of all layers one after another, or as they are."""
        if self.config.layout is Layout.LAYER_MAJOR:
            return self.arrays
        by_page = (np.split(array, array.shape[1] // self.config.page_size, axis=1) for array in self.arrays)
        return [np.concatenate(list(map(np.concatenate, pages)))[None] for pages in by_page]

    def expect(self, pool: KVCache) -> None:
        """Fails unless the pool holds the same bits in every slot of every layer, the sink included."""
        everything = np.arange(self.config.rows, dtype=np.int32)
        rows = pool.gather(everything)
        for mine, theirs in zip(self.arrays, rows if isinstance(rows, tuple) else (rows,), strict=True):
            assert theirs.dtype == mine.dtype
            np.testing.assert_array_equal(bits(theirs), bits(mine))


def bits(array: np.ndarray | jax.Array) -> np.ndarray:
    """The array as unsigned integers, so that NaNs and zeros compare by what they are in memory."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")
