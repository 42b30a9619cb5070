"""The memory that a replay runs in, from its options."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.manager.config import MemoryConfig
from jaxcache.pools.base import KVCacheConfig
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.replay.config import CacheKind, PoolKind, ReplayConfig
from jaxcache.replay.trace import TraceRequest

MEMORY_FRACTION = 0.9
"""Part of a GPU's free memory that `--layers auto` fills."""
STATE_LAYERS = 2


def memory_config(config: ReplayConfig, requests: list[TraceRequest]) -> MemoryConfig:
    """Sizes and kinds of everything, for `init_memory_pool_and_cache`.

    Raises:
      ArgumentError: The memory cannot hold the longest request, or the device has no room for it.
    """
    longest = max(request.input_length + request.output_length for request in requests)
    if longest > config.pool_tokens:
        raise ArgumentError(f"--device-tokens {config.device_tokens} cannot hold the longest request, {longest} tokens")
    states = _state_config() if config.cache.has_states else None
    kv = _kv_config(config, states)
    _require_room(config, kv)
    return MemoryConfig(
        kv=kv,
        states=None if states is None else states(config.num_states),
        sliding_window_size=config.window if config.cache.has_window else None,
        max_running=config.concurrency,
        max_context_len=longest + 1,
        chunk=config.chunk,
        policy=config.policy,
        enable_lora=config.cache is CacheKind.LORA,
        disable_radix_cache=config.cache is CacheKind.CHUNK,
    )


def _state_config() -> Callable[[int], MambaConfig]:
    """Real widths on a GPU, small ones on a CPU."""
    real = jax.default_backend() == "gpu"
    shapes = {"conv_shape": (4096, 3), "temporal_shape": (16, 128, 64)}
    small = {"conv_shape": (6, 3), "temporal_shape": (2, 4, 3)}
    dtypes = {"conv_dtype": jnp.bfloat16, "temporal_dtype": jnp.float32}
    chosen: dict[str, Any] = (shapes if real else small) | dtypes
    return lambda num_states: MambaConfig(num_states=num_states, layer_num=STATE_LAYERS, **chosen)


def _kv_config(config: ReplayConfig, states: Callable[[int], MambaConfig] | None) -> KVCacheConfig | SWAConfig:
    """As many layers of KV as asked for, or as fit beside the states. With windows, as many window layers again."""
    one_layer = _side(config, config.pool_tokens, 1)
    layer_bytes = _bytes(one_layer)
    if config.cache.has_window:
        layer_bytes += _bytes(_side(config, config.window_pool_tokens, 1))
    layers = config.layers or _layers_that_fit(layer_bytes, config.num_states if states is not None else 0)
    if not config.cache.has_window:
        return _side(config, config.pool_tokens, layers)
    return SWAConfig(
        full=_side(config, config.pool_tokens, layers),
        window=_side(config, config.window_pool_tokens, layers),
        full_layers=tuple(range(0, 2 * layers, 2)),
        window_layers=tuple(range(1, 2 * layers, 2)),
    )


def _side(config: ReplayConfig, size: int, layers: int) -> KVCacheConfig:
    dtype = jnp.dtype(config.dtype.value if config.dtype is not None else "float32")
    sizes: dict[str, Any] = {"size": size, "page_size": config.page_size, "dtype": dtype, "layer_num": layers}
    sizes["layout"] = config.layout
    if config.pool is PoolKind.MHA:
        return MHAConfig(head_num=config.heads or 1, head_dim=config.head_dim or 1, **sizes)
    return MLAConfig(kv_lora_rank=config.rank or 1, qk_rope_head_dim=config.rope_dim or 1, **sizes)


def _bytes(config: KVCacheConfig) -> int:
    buffers = config.abstract_buffers(jax.default_backend())
    return sum(int(np.prod(buffer.shape)) * buffer.dtype.itemsize for buffer in buffers)


def _require_room(config: ReplayConfig, kv: KVCacheConfig | SWAConfig) -> None:
    """Raises ArgumentError if the pool is larger than the memory there is: the device's; for a CPU, the host's."""
    needed = sum(map(_bytes, (kv.full, kv.window) if isinstance(kv, SWAConfig) else (kv,)))
    room = _room()
    if room is not None and needed > room:
        raise ArgumentError(
            f"--device-tokens {config.device_tokens} with {kv.layer_num} layers takes {needed / 2**30:,.1f} GiB, "
            f"{room / 2**30:,.1f} GiB are there: ask for fewer tokens or layers"
        )


def _room() -> int | None:
    """Bytes that a pool may take; None where it is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        return math.prod(map(os.sysconf, names)) if os.sysconf_names.keys() >= set(names) else None
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def _layers_that_fit(layer_bytes: int, num_states: int) -> int:
    """As many layers as a GPU's memory has room for; two on a CPU, which is enough to mix them up."""
    free = _room()
    if jax.default_backend() == "cpu" or free is None:
        return 2
    config = _state_config()(num_states or 1)
    states = config.state_bytes * config.rows if num_states else 0
    room = MEMORY_FRACTION * free - states
    return max(1, int(room // layer_bytes))
