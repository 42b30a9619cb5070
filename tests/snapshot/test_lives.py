"""What a snapshot brings back is the cache that was saved: books, order of eviction, rows; and it goes on alike."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcache
from jaxcache.errors import ArgumentError, LockedError, RequestStateError, SnapshotError
from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import EventBatch
from jaxcache.index.key import Namespace
from jaxcache.index.policies.registry import Policy
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pools import stacks
from jaxcache.pools.double_sparse import DoubleSparseConfig
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.request import Request
from tests.snapshot.caches import MODEL, assert_same, fill, gone_on, lived
from tests.support.recorded_lives import FLAVOURS, make_config

KINDS = {
    "mha": (MHAConfig, {"head_num": 2, "head_dim": 3, "v_head_dim": 5}),
    "mla": (MLAConfig, {"kv_lora_rank": 6, "qk_rope_head_dim": 2}),
    "double sparse": (DoubleSparseConfig, {"head_num": 2, "head_dim": 4, "heavy_channel_num": 2}),
}
CASES = [("both", policy) for policy in Policy] + [(flavour, Policy.LRU) for flavour in FLAVOURS]
GO_ON = """
import sys
from jaxcache.index.policies.registry import Policy
from jaxcache.events.consumer import EventConsumer
from jaxcache.events.events import EventBatch
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.snapshot.load import load_snapshot
from tests.snapshot.caches import MODEL, gone_on, lived

for name in sys.argv[2:]:
    life = lived(3, "full", Policy(name))
    life = gone_on(life, load_snapshot(f"{sys.argv[1]}/{name}", life.config, model=MODEL))
    print(fingerprint(life.run(80).memory))
"""


@pytest.mark.parametrize(("flavour", "policy"), CASES)
def test_a_restored_cache_lives_on_as_the_saved_one_does(flavour, policy, tmp_path):
    life = lived(7, flavour, policy)
    jaxcache.save_snapshot(tmp_path / "s", life.memory, model=MODEL)
    restored = jaxcache.load_snapshot(tmp_path / "s", life.config, model=MODEL)
    assert_same(life.memory, restored)
    twin = gone_on(life, restored)
    life.rng = random.Random(1)
    for _ in range(80):
        life.act()
        twin.act()
        assert fingerprint(twin.memory) == fingerprint(life.memory)


def test_it_lives_on_in_another_process(tmp_path):
    """What a policy remembers of nodes let go must not hang on how one process hashes."""
    policies = [Policy.ADAPTIVE, Policy.S3FIFO]
    prints = []
    for policy in policies:
        life = lived(3, "full", policy)
        jaxcache.save_snapshot(tmp_path / policy.value, life.memory, model=MODEL)
        life.rng = random.Random(1)
        prints.append(fingerprint(life.run(80).memory))
    command = [sys.executable, "-c", GO_ON, str(tmp_path), *[policy.value for policy in policies]]
    environment = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == prints


@pytest.mark.parametrize("seed", range(4))
def test_saving_changes_nothing_and_many_parts_are_one_snapshot(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "PART_BYTES", 40)
    life = lived(seed, "both", Policy.ADAPTIVE, calls=60)
    before = fingerprint(life.memory)
    manifest = jaxcache.save_snapshot(tmp_path, life.memory, model=MODEL, threads=2)
    assert fingerprint(life.memory) == before
    rows, sizes = life.memory.cache.rows_in_use(), manifest.rows_per_part
    assert {stack: len(manifest.parts[stack]) for stack in rows} == {s: -(-len(rows[s]) // sizes[s]) for s in rows}
    assert sizes == {"full": 2, "window": 2, "states": 5}
    assert_same(life.memory, jaxcache.load_snapshot(tmp_path, life.config, model=MODEL, threads=1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("kind", KINDS)
def test_pools_of_every_dtype_and_layout(kind, layout, dtype, tmp_path):
    side = {"size": 64, "page_size": 4, "dtype": dtype, "layer_num": 2, "start_layer": 3, "layout": layout}
    config_type, row = KINDS[kind]
    config = MemoryConfig(config_type(**side, **row), max_running=2, max_context_len=32)
    memory = init_memory_pool_and_cache(config)
    fill(memory, 5)
    for i in range(3):
        memory.cache.insert_pages(np.arange(12) + i, memory.allocator.alloc_pages(3))
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    assert_same(memory, jaxcache.load_snapshot(tmp_path, config, model=MODEL))
    other = Layout.PAGE_MAJOR if layout is Layout.LAYER_MAJOR else Layout.LAYER_MAJOR
    elsewhere = dataclasses.replace(config, kv=dataclasses.replace(config.kv, layout=other))
    with pytest.raises(SnapshotError, match=r"config.kv.layout is .*, but the snapshot in .* was made with"):
        jaxcache.load_snapshot(tmp_path, elsewhere, model=MODEL)


def test_namespaces_hashes_priorities_and_pairs_come_back(tmp_path):
    config = make_config(policy=Policy.PRIORITY, is_eagle=True, enable_kv_cache_events=True)
    memory = init_memory_pool_and_cache(config)
    spaces = [None, "a", Namespace(lora_id=b"x", cache_salt="secret", media=(b"m" * 32, b"nn"))]

    def nothing(pool, batch):
        return pool, None

    for i, space in enumerate(spaces):
        request = Request(f"r{i}", list(range(13)), space, priority=i - 1)
        memory.admit(request)
        memory.run(nothing, memory.extend([(request, 13)]))
        memory.finish(request)
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    restored = jaxcache.load_snapshot(tmp_path, config, model=MODEL)
    assert_same(memory, restored)
    assert sorted(restored.cache.tree.roots) == sorted(Request("", [1], space).key.namespace for space in spaces)
    mine, theirs = ([list(node.hashes) for node in m.cache.tree.nodes()] for m in (memory, restored))
    assert mine == theirs and len(mine) == 3
    consumer = EventConsumer()  # of somebody who hears of the restored cache only
    consumer.receive(0, EventBatch(0.0, restored.cache.take_events()))
    assert consumer.is_complete and len(consumer.blocks()) == len(restored.cache.tree) == 9
    assert restored.cache.events.overflows == 0 and restored.cache.take_events() == []


def test_an_empty_cache_comes_back_empty(tmp_path):
    config = make_config("both")
    memory = init_memory_pool_and_cache(config)
    jaxcache.save_snapshot(tmp_path, memory, model=MODEL)
    assert_same(memory, jaxcache.load_snapshot(tmp_path, config, model=MODEL))


def test_a_table_with_more_rows_hands_out_the_old_ones_first(tmp_path):
    life = lived(4)
    jaxcache.save_snapshot(tmp_path, life.memory, model=MODEL)
    order = life.memory.req_to_token_pool.free_rows
    for rows in (2, 3, 5):
        other = jaxcache.load_snapshot(tmp_path, dataclasses.replace(life.config, max_running=rows), model=MODEL)
        assert other.req_to_token_pool.free_rows == [*[r for r in order if r < rows], *range(3, rows)]


def test_what_somebody_still_owns_is_refused_and_nothing_is_written(tmp_path):
    memory = lived(5).memory
    request = Request("r", list(range(9)))
    memory.admit(request)
    with pytest.raises(RequestStateError, match="1 requests are running: finish, retract or abort"):
        jaxcache.save_snapshot(tmp_path / "s", memory, model=MODEL)
    memory.retract(request)
    pages = memory.allocator.alloc_pages(1)
    with pytest.raises(SnapshotError, match="is PRIVATE"):
        jaxcache.save_snapshot(tmp_path / "s", memory, model=MODEL)
    memory.cache.insert_pages(np.array([90, 91, 92, 93]), pages)
    receipt = memory.cache.inc_lock_ref(memory.cache.match_prefix(np.array([90, 91, 92, 93])))
    with pytest.raises(LockedError, match="give every receipt back"):
        jaxcache.save_snapshot(tmp_path / "s", memory, model=MODEL)
    memory.cache.dec_lock_ref(receipt)
    with pytest.raises(ArgumentError, match="model must name the weights"):
        jaxcache.save_snapshot(tmp_path / "s", memory, model="")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="path must be a folder"):
        jaxcache.save_snapshot(tmp_path / "file", memory, model=MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    jaxcache.save_snapshot(tmp_path / "s", memory, model=MODEL)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
