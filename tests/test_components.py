"""What it takes to add a kind of memory: a toy one, in this file alone, through all that a manager does.

The toy is what a sparse indexer keeps: a small row a token, in a stack of its own, which follows the full pages. So
that nobody can get away with taking full slots for it, it lies there back to front.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.components.base import MemoryComponent, used_slots
from jaxcache.components.state import RecurrentStates
from jaxcache.components.window import WindowPages
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pools.base import KVCacheConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request
from jaxcache.slots import page_slots
from jaxcache.snapshot.load import load_snapshot
from jaxcache.snapshot.save import save_snapshot
from jaxcache.steps.compiled import CompiledSteps

PAGE, SIZE = 4, 96
SIZES: dict[str, Any] = {"size": SIZE, "page_size": PAGE, "dtype": jnp.float32, "layer_num": 2}
KV = MHAConfig(head_num=1, head_dim=2, **SIZES)
INDEX = MLAConfig(kv_lora_rank=2, qk_rope_head_dim=1, **SIZES)
_compiled = CompiledSteps()


def mirrored(slots):
    """Where the toy has the row of a slot; 0 for the sink."""
    return (SIZE + 2 * PAGE - 1 - slots) * (slots >= PAGE)


class IndexRows(MemoryComponent):
    """The whole of the toy, as everybody else sees it."""

    name = "index"
    stack_names = ("index",)

    def __init__(self, allocator):
        self._allocator = allocator

    def rows_in_use(self):
        return mirrored(used_slots(self._allocator))[::-1]

    def token_rows(self, row, pages, start, stop):
        return mirrored(page_slots(pages, PAGE)[: stop - start])


@dataclass(frozen=True, kw_only=True)
class IndexedConfig:
    kv: KVCacheConfig
    index: MLAConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kv", "index"), meta_fields=("config",))
@dataclass(frozen=True)
class IndexedPool(MemoryPool):
    """A pool with one stack more, and nothing that a manager does not ask for."""

    config: Any
    kv: Any
    index: Any

    @classmethod
    def create(cls, config, *, device=None, mesh=None):
        kv = MHATokenToKVPool.create(config.kv, device=device, mesh=mesh)
        return cls(config, kv, MLATokenToKVPool.create(config.index, device=device, mesh=mesh))

    @property
    def mesh(self):
        return self.kv.mesh

    def stacks(self):
        return {"kv": self.kv, "index": self.index}

    def with_stacks(self, stacks):
        return self.replaced(**stacks)

    abstract = partition_specs = get_cpu_copy = load_cpu_copy = None  # no manager asks for them
    get_kv_size_bytes = get_contiguous_buf_infos = None


@dataclass(frozen=True)
class IndexedMemory(MemoryConfig):
    """The only other thing that there is to write: which parts there are."""

    def new_pool(self, mesh=None):
        return IndexedPool.create(IndexedConfig(kv=self.kv, index=INDEX), mesh=mesh)

    def new_cache(self, table, allocator, states):
        return RadixCache(table, allocator, self.kv.page_size, followers=(IndexRows(allocator),))


def new_manager() -> MemoryManager:
    manager = init_memory_pool_and_cache(IndexedMemory(kv=KV, max_running=3, max_context_len=64, chunk=16))
    manager.runner.compiled = _compiled
    return manager


def content(tokens, positions, width: int):
    """What the row of a token must hold."""
    return (tokens * 100 + positions)[:, None] + np.arange(width, dtype=np.float32) / 8


def indexer_step(pool, batch):
    """A model that writes what `content` says, into both stacks of both layers."""
    kv, index = pool.kv, pool.index
    row = content(batch.tokens.astype(jnp.float32), batch.positions.astype(jnp.float32), 3)
    for layer in range(2):
        kv = kv.set_kv_buffer(layer, batch.slots, row[:, None, :2], row[:, None, :2])
        index = index.set_kv_buffer(layer, mirrored(batch.slots), row + layer)
    return pool.replaced(kv=kv, index=index), None


def assert_right(manager, request):
    """Every token of a running request has its row, in every layer."""
    table = manager.req_to_token_pool
    count = request.kv_len
    slots = page_slots(table.row_pages(request.req_pool_idx, 0, request.num_pages), PAGE)[:count]
    expected = content(np.asarray(request.key.token_ids[:count], np.float32), np.arange(count, dtype=np.float32), 3)
    rows = np.asarray(manager.pool.index.gather(mirrored(slots)))
    for layer in range(2):
        np.testing.assert_array_equal(rows[layer], expected + layer)
    manager.check_memory(read_device=True)


def compute(manager, request):
    while request.kv_len < request.num_tokens:
        manager.run(indexer_step, manager.extend([(request, manager.next_chunk(request, 16))]))
    assert_right(manager, request)


def computed(manager, tokens, found=0):
    request = Request("r", tokens)
    assert manager.admit(request) == found
    compute(manager, request)
    return request


def overwritten(manager):
    """Nothing is cached, and every free row holds what nobody wants."""
    manager.cache.evict(SIZE)
    assert all(len(rows) == 0 for rows in manager.cache.rows_in_use().values())
    manager.finish(computed(manager, [7] * 60))
    manager.cache.evict(SIZE)


def test_it_is_computed_found_and_evicted_with_its_pages():
    manager = new_manager()
    request = computed(manager, list(range(30)))
    request.output_ids.append(50)
    manager.run(indexer_step, manager.decode([request]))
    assert_right(manager, request)
    assert manager.cache.rows_in_use()["index"].tolist() == sorted(mirrored(manager.cache.rows_in_use()["kv"]))
    manager.finish(request)
    twin = computed(manager, [*range(20), 90, 91, 92], found=20)
    assert_right(manager, twin)
    manager.finish(twin)
    assert len(manager.cache.rows_in_use()["index"]) > 0
    manager.cache.evict(SIZE)
    assert len(manager.cache.rows_in_use()["index"]) == 0
    manager.check_memory()


@pytest.mark.parametrize("cached", [0, 16])
def test_it_comes_back_with_a_retracted_request(cached):
    """Nothing of it is cached any more, or a part of its prefix."""
    manager = new_manager()
    request = computed(manager, list(range(27)))
    request.output_ids.append(50)
    manager.retract(request, offload=True)
    overwritten(manager)
    if cached:
        manager.finish(computed(manager, list(range(cached + 1))))
    assert manager.admit(request) == 27
    assert (request.cached_tokens, request.resumed_tokens, request.loaded_tokens) == (0, cached, 27 - cached)
    assert_right(manager, request)
    compute(manager, request)


def test_a_host_copy_without_it_is_refused():
    manager = new_manager()
    plain = init_memory_pool_and_cache(MemoryConfig(kv=KV, max_running=1, max_context_len=64, chunk=16))
    request = Request("r", list(range(9)))
    plain.admit(request)
    plain.run(lambda pool, batch: (pool, None), plain.extend([(request, 9)]))
    request.output_ids.append(1)
    plain.retract(request, offload=True)
    with pytest.raises(ValueError, match="it has \\['kv'\\], this pool has \\['index', 'kv'\\]"):
        manager.admit(request)
    manager.check_memory()
    assert manager.req_to_token_pool.available_size() == 3
    request.cpu_copy = None
    assert manager.admit(request) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_its_memory_is_released_and_comes_back(keep):
    manager = new_manager()
    manager.finish(computed(manager, list(range(20))))
    manager.release_memory(keep=keep)
    manager.resume_memory()
    request = computed(manager, list(range(23)), found=20 if keep else 0)
    assert_right(manager, request)


def test_it_is_saved_and_restored(tmp_path):
    manager = new_manager()
    manager.finish(computed(manager, list(range(21))))
    manifest = save_snapshot(tmp_path / "saved", manager, model="toy")
    assert len(manifest.parts["index"]) == 1
    other = load_snapshot(tmp_path / "saved", manager.config, model="toy")
    other.runner.compiled = _compiled
    assert fingerprint(other) == fingerprint(manager)
    request = computed(other, list(range(24)), found=20)
    assert_right(other, request)


def test_every_component_has_a_name_and_stacks_of_its_own():
    manager = new_manager()
    parts = manager.cache.components
    names = [part.name for part in parts] + [WindowPages.name, RecurrentStates.name]
    assert len(set(names)) == len(names)
    stacks = [name for part in parts for name in part.stack_names]
    assert sorted(stacks) == sorted(manager.pool.stacks())
