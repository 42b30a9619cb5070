"""Managers of every flavour for decode loops."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.steps.compiled import CompiledSteps

WINDOW = 6


_compiled = functools.cache(lambda page_size: CompiledSteps())
"""What is compiled for pages of a size, by any test; JAX tells the pools apart."""


def make_manager(page_size, has_window, has_states, layout=Layout.LAYER_MAJOR):
    side = {"page_size": page_size, "dtype": jnp.float32, "layer_num": 2, "head_num": 1, "head_dim": 4}
    side["layout"] = layout
    kv = MHAConfig(size=320, **side)
    if has_window:
        kv = SWAConfig(full=kv, window=MHAConfig(size=160, **side), full_layers=(0, 2), window_layers=(1, 3))
    shapes = {"conv_shape": (3, 2), "temporal_shape": (2, 4), "conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
    manager = init_memory_pool_and_cache(
        MemoryConfig(
            kv,
            max_running=4,
            max_context_len=64,
            chunk=32,
            sliding_window_size=WINDOW if has_window else None,
            states=MambaConfig(num_states=12, layer_num=2, **shapes) if has_states else None,
        )
    )
    manager.runner.compiled = _compiled(page_size)
    return manager
