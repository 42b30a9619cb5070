"""A snapshot in a manager of other sizes or of another policy: what is there is right, and it is the most valuable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxcache
from jaxcache.errors import SnapshotError
from jaxcache.index.policies.registry import Policy
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pools.swa import SWAConfig
from tests.snapshot.caches import MODEL, lived

FLAVOURS = ["full", "window", "state", "both"]


def contents_by_prefix(memory):
    """The bits of every page and state that the tree holds, by component, namespace and tokens before its end."""
    stacks, found = memory.pool.stacks(), {}
    tree, page_size = memory.cache.tree, memory.page_size
    for node in tree.nodes():
        path, above = [], node
        while above.parent is not None:
            path.append(above.key)
            above = above.parent
        packed = b"".join(reversed(path))
        for i, part in enumerate(memory.cache.tree_components):
            values = node.slot(i).value
            for j, value in enumerate([] if values is None else values.tolist()):
                pages = len(node.value) - j - 1 if part.name != "state" else 0
                end = len(packed) - pages * page_size * tree.element_bytes
                size = 1 if part.name == "state" else page_size
                rows = np.arange(value * size, (value + 1) * size, dtype=np.int32)
                bits = [
                    buffer.tobytes() for name in part.stack_names for buffer in stacks[name].get_cpu_copy(rows).buffers
                ]
                found[part.name, above.namespace, packed[:end]] = bits
    return found


def resized(config, factor):
    """The config with every pool so many times as large."""

    def sized(kv):
        return dataclasses.replace(kv, size=max(1, int(kv.size // kv.page_size * factor)) * kv.page_size)

    kv, states = config.kv, config.states
    if isinstance(kv, SWAConfig):
        kv = dataclasses.replace(kv, full=sized(kv.full), window=sized(kv.window))
    else:
        kv = sized(kv)
    if states is not None:
        states = dataclasses.replace(states, num_states=max(2, int(states.num_states * factor)))
    return dataclasses.replace(config, kv=kv, states=states)


@pytest.fixture(params=FLAVOURS)
def saved(request, tmp_path):
    life = lived(7, request.param)
    jaxcache.save_snapshot(tmp_path / "s", life.memory, model=MODEL)
    return tmp_path / "s", life.memory


def loaded(saved, config):
    reports = []
    memory = jaxcache.load_snapshot(saved[0], config, model=MODEL, report=reports.append)
    memory.check_memory(read_device=True)
    return memory, reports[0]


def assert_part(part, whole):
    """Everything that is there is what was saved; returns how much is missing."""
    mine, theirs = contents_by_prefix(part), contents_by_prefix(whole)
    assert mine.keys() <= theirs.keys()
    assert all(mine[name] == theirs[name] for name in mine)
    return len(theirs) - len(mine)


def test_a_larger_pool_loads_everything(saved):
    memory, report = loaded(saved, resized(saved[1].config, 2))
    assert assert_part(memory, saved[1]) == 0
    assert report.is_complete and report.tokens == report.saved_tokens == len(saved[1].cache.tree) * memory.page_size


@pytest.mark.parametrize("factor", [0.75, 0.5, 0.1])
def test_a_smaller_pool_loads_what_fits(saved, factor):
    config = resized(saved[1].config, factor)
    memory, report = loaded(saved, config)
    missing = assert_part(memory, saved[1])
    assert sum(report.saved_values.values()) - sum(report.values.values()) == missing
    assert report.tokens == len(memory.cache.tree) * memory.page_size <= config.kv.size


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.LRU])
def test_another_policy_loads_everything(saved, policy):
    memory, report = loaded(saved, dataclasses.replace(saved[1].config, policy=policy))
    assert assert_part(memory, saved[1]) == 0 and report.is_complete
    memory.cache.evict(10**6, 10**6, 10**6)
    memory.check_memory()


def test_what_was_used_last_is_what_stays(saved):
    """As many pages as the saved cache would have kept, had it evicted what is short itself: and the very same."""
    config = resized(saved[1].config, 0.5)
    memory, _ = loaded(saved, config)
    tree = jaxcache.load_snapshot(saved[0], saved[1].config, model=MODEL).cache
    for i, part in enumerate(memory.cache.tree_components):
        amounts = [0] * len(memory.cache.tree_components)
        amounts[i] = max(0, tree.tree.evictable[i] - part.size())
        tree.evict_values(amounts)
    assert {(node.end, node.key) for node in tree.tree.nodes()} == {
        (node.end, node.key) for node in memory.cache.tree.nodes()
    }


def test_another_policy_keeps_the_order_of_use(saved):
    """LRU to FIFO: what would have gone first goes first."""
    same = jaxcache.load_snapshot(saved[0], saved[1].config, model=MODEL)
    other, _ = loaded(saved, dataclasses.replace(saved[1].config, policy=Policy.FIFO))
    for memory in (same, other):
        memory.cache.evict(len(memory.cache.tree) // 2 * memory.page_size)
    assert {(node.end, node.key) for node in same.cache.tree.nodes()} == {
        (node.end, node.key) for node in other.cache.tree.nodes()
    }


def test_need_sort_may_differ(saved):
    memory, report = loaded(saved, dataclasses.replace(saved[1].config, need_sort=True))
    assert assert_part(memory, saved[1]) == 0 and report.is_complete


def test_the_same_config_reports_all_and_stays_bit_for_bit(saved):
    memory, report = loaded(saved, saved[1].config)
    assert fingerprint(memory) == fingerprint(saved[1]) and report.is_complete


def test_made_up_sizes_are_refused(saved):
    config = saved[1].config
    if config.sliding_window_size is None:
        pytest.skip("no window")
    with pytest.raises(SnapshotError, match="sliding_window_size"):
        loaded(saved, dataclasses.replace(config, sliding_window_size=config.sliding_window_size + 4))
