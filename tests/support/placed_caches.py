"""Caches on a mesh or on one device, with something in them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from tests.snapshot.caches import fill

SIDE = {"size": 64, "page_size": 4, "dtype": jnp.bfloat16, "layer_num": 2}


MHA = MHAConfig(**SIDE, head_num=8, head_dim=4)


MLA = MLAConfig(**SIDE, kv_lora_rank=12, qk_rope_head_dim=4)


PAGES = dataclasses.replace(MHA, layout=Layout.PAGE_MAJOR)


def place(kv, shards: int, axis_type: AxisType = AxisType.Auto) -> tuple[MemoryConfig, Mesh | None]:
    """Config and mesh of a pool over so many devices; 0: no mesh."""
    mesh = Mesh(np.array(jax.devices("cpu")[:shards]), ("tp",), axis_types=(axis_type,)) if shards else None
    kv = dataclasses.replace(kv, axis_name="tp", shards=shards) if shards else kv
    return MemoryConfig(kv, max_running=2, max_context_len=32), mesh


def cached(config: MemoryConfig, mesh: Mesh | None) -> MemoryManager:
    memory = init_memory_pool_and_cache(config, mesh=mesh)
    fill(memory, 1)
    for i in range(4):
        memory.cache.insert_pages(np.arange(12) + i, memory.allocator.alloc_pages(3))
    memory.cache.evict(12)
    return memory
