"""A snapshot fits any mesh that the pool fits on: rows are saved whole."""

from __future__ import annotations

import pytest
from jax.sharding import AxisType

import jaxcache
from jaxcache.errors import ArgumentError
from jaxcache.pools import stacks
from tests.snapshot.caches import MODEL, assert_same
from tests.support.placed_caches import MHA, MLA, PAGES, cached, place


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
