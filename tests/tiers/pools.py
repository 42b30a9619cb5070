"""Device pools of every kind, and what stands in each of their pages: an oracle that knows their arrays only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import Layout, MambaConfig, SWAConfig
from jaxcache.pools.base import KVCache
from jaxcache.pools.config import KVCacheConfig
from jaxcache.pools.hybrid import HybridConfig
from jaxcache.pools.mha import HeadsConfig
from tests.pools.numpy_pool import double_sparse_config, mha_config, mla_config
from tests.support.meshes import make_mesh


@dataclass(frozen=True)
class Part:
    """As much of a component as host memory asks for."""

    name: str
    stack_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(HeadsConfig):
    """A pool that a user might add: int8 keys and values, and a float32 scale for each head of each."""

    @property
    def row_shapes(self) -> Any:
        return *super().row_shapes, (self.head_num,), (self.head_num,)

    @property
    def row_dtypes(self) -> Any:
        return (np.dtype(np.int8),) * 2 + (np.dtype(np.float32),) * 2

    @property
    def pool_type(self) -> Any:
        return ScaledPool


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("k", "v", "k_scale", "v_scale"), meta_fields=("config",)
)
@dataclass(frozen=True)
class ScaledPool(KVCache):
    config: ScaledConfig
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any

    get_key_buffer = get_value_buffer = set_kv_buffer = get_kv_size_bytes = None


def scaled_config(**sizes: Any) -> ScaledConfig:
    sizes = {"size": 24, "page_size": 4, "layer_num": 3, "head_num": 2, "head_dim": 8, "v_head_dim": 4} | sizes
    return ScaledConfig(dtype=np.int8, **sizes)


def states_config(**sizes: Any) -> MambaConfig:
    sizes = {"num_states": 6, "conv_dtype": jnp.bfloat16, "temporal_dtype": np.float32} | sizes
    return MambaConfig(layer_num=2, conv_shape=(4, 3), temporal_shape=(2, 4, 5), **sizes)


def swa_config(make: Callable[..., KVCacheConfig] = mha_config, **sizes: Any) -> SWAConfig:
    full, window = make(layer_num=2, **sizes), make(layer_num=3, **{"size": 12} | sizes)
    return SWAConfig(full=full, window=window, full_layers=(0, 3), window_layers=(1, 2, 4))


_CUT = {"axis_name": "tp", "shards": 2}
FULL, STATES = (Part("full", ("kv",)),), (Part("state", ("states",)),)
BOTH_SIDES = (Part("full", ("full",)), Part("window", ("window",)))
KINDS: dict[str, tuple[Callable[[], Any], tuple[Part, ...]]] = {
    "mha": (lambda: mha_config(jnp.bfloat16), FULL),
    "mha_page_major": (lambda: mha_config(layout=Layout.PAGE_MAJOR), FULL),
    "mla": (lambda: mla_config(jnp.float8_e4m3fn), FULL),
    "mla_page_major": (lambda: mla_config(layout=Layout.PAGE_MAJOR), FULL),
    "one_token_pages": (lambda: mha_config(page_size=1, size=6), FULL),
    "double_sparse": (double_sparse_config, FULL),
    "scaled": (scaled_config, FULL),
    "swa": (swa_config, BOTH_SIDES),
    "states": (states_config, (Part("state", ("kv",)),)),
    "hybrid": (lambda: HybridConfig(kv=mla_config(), states=states_config()), FULL + STATES),
    "mha_sharded": (lambda: mha_config(**_CUT), FULL),
    "mla_sharded": (lambda: mla_config(**_CUT), FULL),
    "swa_sharded": (lambda: swa_config(layout=Layout.PAGE_MAJOR, **_CUT), BOTH_SIDES),
    "hybrid_sharded": (lambda: HybridConfig(kv=mha_config(**_CUT), states=states_config(**_CUT)), FULL + STATES),
}


def pool_of(kind: str) -> tuple[Any, tuple[Part, ...]]:
    """A pool of the kind, with random bits in every array, and its components."""
    make, parts = KINDS[kind]
    config = make()
    mesh = make_mesh(2) if kind.endswith("_sharded") else None
    return filled(config.pool_type.create(config, mesh=mesh)), parts


def filled(pool: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    stacks = pool.stacks()
    for name, stack in stacks.items():
        arrays = []
        for buffer in stack.buffers:
            random = rng.integers(0, 256, (*buffer.shape[:-1], buffer.shape[-1] * buffer.dtype.itemsize), np.uint8)
            arrays.append(jax.device_put(random.view(buffer.dtype), buffer.sharding))
        stacks[name] = stack.with_buffers(*arrays)
    return pool.with_stacks(stacks)


def values(pool: Any, part: Part) -> np.ndarray:
    """What the device has of a component: uint8 `(ids + 1, bytes)`, each in the order that all layouts share."""
    columns = []
    for name in part.stack_names:
        stack = pool.stacks()[name]
        config = stack.config
        rows = config.page_size if isinstance(config, KVCacheConfig) else 1
        for buffer in stack.buffers:
            array = np.asarray(buffer)
            if isinstance(config, KVCacheConfig) and config.layout is Layout.PAGE_MAJOR:
                array = array.reshape(-1, config.layer_num, rows, *array.shape[2:])
            else:
                array = array.reshape(config.layer_num, -1, rows, *array.shape[2:]).swapaxes(0, 1)
            shards = config.shards if config.cuts_rows else 1
            columns += [_bytes(shard) for shard in np.split(array, shards, axis=3)]
    return np.concatenate(columns, axis=1)


def _bytes(array: np.ndarray) -> np.ndarray:
    """`(ids, bytes)`."""
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
