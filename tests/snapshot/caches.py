"""Caches worth saving: what a random life left in them, with random rows, and what must be the same afterwards."""

from __future__ import annotations

import copy
import random

import numpy as np

from jaxcache.index.policies.registry import Policy
from jaxcache.manager.manager import MemoryManager
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import RecordedManager
from jaxcache.pools.stack import CpuCopy
from tests.support.recorded_lives import Life

MODEL = "tiny, revision 1"


def lived(seed: int, flavour: str = "full", policy: Policy = Policy.LRU, calls: int = 120) -> Life:
    """A life after which no request runs, and whose pool holds random rows."""
    life = Life(seed, flavour, policy).run(calls)
    for request in life.running:
        life.memory.finish(request)
    life.running.clear()
    for request in life.waiting:
        request.cpu_copy = None
    fill(life.memory, seed)
    return life


def fill(memory: MemoryManager, seed: int) -> None:
    """Puts random rows everywhere but in the sink."""
    random_rows = np.random.default_rng(seed)
    stacks = memory.pool.stacks()
    for name, pool in stacks.items():
        config = pool.config
        first = getattr(config, "page_size", 1)
        rows = np.arange(first, config.rows, dtype=np.int32)
        buffers = [
            random_rows.integers(0, 256, (config.layer_num, len(rows), int(np.prod(row)) * buffer.dtype.itemsize))
            .astype(np.uint8)
            .view(buffer.dtype)
            .reshape(config.layer_num, len(rows), *row)
            for row, buffer in zip(config.row_shapes, pool.buffers, strict=True)
        ]
        stacks[name] = pool.load_cpu_copy(CpuCopy(config, tuple(buffers)), rows)
    memory.pool = memory.pool.with_stacks(stacks)


def contents(memory: MemoryManager) -> dict[str, list[bytes]]:
    """The bits of every row in use."""
    rows = memory.cache.rows_in_use()
    stacks = memory.pool.stacks()
    return {name: [part.tobytes() for part in stacks[name].get_cpu_copy(rows[name]).buffers] for name in stacks}


def assert_same(mine: MemoryManager, theirs: MemoryManager) -> None:
    """The same books, the same order of eviction, the same rows."""
    assert fingerprint(mine) == fingerprint(theirs)
    assert mine.req_to_token_pool.free_rows == theirs.req_to_token_pool.free_rows
    assert contents(mine) == contents(theirs)
    theirs.check_memory(read_device=True)


def gone_on(life: Life, memory: MemoryManager) -> Life:
    """The same life, with the cache of another manager from now on."""
    parts = memory.pool, memory.allocator, memory.req_to_token_pool, memory.cache
    twin = copy.copy(life)
    twin.memory = RecordedManager(memory.config, *parts, max_ops=100_000)
    twin.memory.runner.compiled = life.memory.runner.compiled
    twin.waiting, twin.recent, twin.running = copy.deepcopy(life.waiting), copy.deepcopy(life.recent), []
    twin.rng, twin.prints = random.Random(1), []
    return twin
