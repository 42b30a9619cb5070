"""A snapshot fits any mesh that the pool fits on: rows are saved whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxcache
from jaxcache.errors import ArgumentError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools import stacks
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from tests.snapshot.caches import MODEL, assert_same, fill

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


@pytest.mark.parametrize(("source", "target"), [(8, 2), (2, 0), (0, 8), (1, 4)])
@pytest.mark.parametrize("kv", [MHA, MLA, PAGES], ids=["mha", "mla", "page-major"])
def test_from_one_mesh_to_another(kv, source, target, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "PART_BYTES", 10_000)
    memory = cached(*place(kv, source))
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    config, mesh = place(kv, target)
    restored = jaxcache.load_snapshot(tmp_path, config, model=MODEL, mesh=mesh)
    assert_same(memory, restored)
    assert restored.pool.mesh == mesh
    assert all(len(buffer.sharding.device_set) == max(target, 1) for buffer in restored.pool.buffers)


def test_onto_a_mesh_of_explicit_axes(tmp_path):
    memory = cached(*place(MHA, 0))
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    config, mesh = place(MHA, 2, AxisType.Explicit)
    assert_same(memory, jaxcache.load_snapshot(tmp_path, config, model=MODEL, mesh=mesh))


def test_a_mesh_that_it_does_not_fit_on_is_refused(tmp_path):
    jaxcache.save_snapshot(tmp_path, cached(*place(MHA, 0)), model=MODEL)
    config, _ = place(MHA, 2)
    with pytest.raises(ArgumentError, match="mesh"):
        jaxcache.load_snapshot(tmp_path, config, model=MODEL)
