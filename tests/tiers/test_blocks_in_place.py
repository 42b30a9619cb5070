"""What a load writes goes into the pool in place, and a backup's gather takes no more memory than its block.

The pools have no memory: steps are compiled, never run; where an H200's compiler is, for an H200 too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache import Layout
from jaxcache.kernels.in_place import inspect_compiled, prove_in_place
from jaxcache.tiers.blocks import gathered, scattered
from jaxcache.tiers.host_layout import HostLayout
from tests.kernels import h200
from tests.pools.numpy_pool import mha_config, mla_config
from tests.support.meshes import make_mesh
from tests.tiers.pools import scaled_config, states_config, swa_config

COUNT = 4
KINDS = {
    "mha": lambda **cut: mha_config(jnp.bfloat16, size=4096, **cut),
    "mha_page_major": lambda **cut: mha_config(size=4096, layout=Layout.PAGE_MAJOR, **cut),
    "mla": lambda **cut: mla_config(jnp.bfloat16, size=4096, **cut),
    "scaled": lambda **cut: scaled_config(size=4096, **cut),
    "swa": lambda **cut: swa_config(size=4096, **cut),
    "states": lambda **cut: states_config(num_states=512, **cut),
}
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def arguments(kind, platform, mesh=None, layout=HostLayout.PAGE_FIRST_DIRECT):
    """An abstract pool, ids and blocks of its first stack, and what is static."""
    config = KINDS[kind](**({} if mesh is None else {"axis_name": "tp", "shards": 2}))
    pool = config.pool_type.abstract(config, platform=platform, mesh=mesh)
    name, stack = next(iter(pool.stacks().items()))
    rows = stack.config.page_size if kind != "states" else 1
    inner = (rows, stack.config.layer_num) if layout is HostLayout.PAGE_FIRST else (stack.config.layer_num, rows)
    blocks = [
        jax.ShapeDtypeStruct((COUNT, *inner, *row), buffer.dtype)
        for buffer, row in zip(stack.buffers, stack.config.row_shapes, strict=True)
    ]
    ids = jax.ShapeDtypeStruct((COUNT,), np.int32)
    return pool, ids, blocks, {"names": (name,), "layout": layout, "mesh": mesh}


@BY_KIND
@pytest.mark.parametrize("layout", [HostLayout.PAGE_FIRST_DIRECT, HostLayout.PAGE_FIRST])
def test_loads_are_written_in_place(kind, layout):
    pool, ids, blocks, static = arguments(kind, jax.default_backend(), layout=layout)
    report = prove_in_place(scattered, pool, ids, *blocks, **static)
    assert report.ok, report.why
    assert sum(buffer.size_bytes for buffer in report.buffers) == pool.size_bytes


@pytest.mark.parametrize("kind", ["mha", "mla", "states"])
def test_loads_are_written_in_place_on_every_device(kind):
    mesh = make_mesh(2)
    pool, ids, blocks, static = arguments(kind, "cpu", mesh)
    report = prove_in_place(scattered, pool, ids, *blocks, **static)
    assert report.ok, report.why


@pytest.mark.h200
@pytest.mark.parametrize("shards", [1, 2])
@BY_KIND
def test_blocks_compiled_for_an_h200(kind, shards):
    mesh = h200.h200_mesh(2, "tp") if shards == 2 else None
    pool, ids, blocks, static = arguments(kind, "gpu", mesh)

    def write(pool, ids, *blocks):
        return scattered(pool, ids, *blocks, **static)

    report = inspect_compiled(h200.compile_for_h200(write, pool, ids, *blocks, donate=(0,), mesh=mesh))
    assert report.ok, report.why
    read = h200.compile_for_h200(lambda pool, ids: gathered(pool, ids, **static), pool, ids, mesh=mesh)
    memory, block_bytes = read.memory_analysis(), sum(b.size * b.dtype.itemsize for b in blocks)
    assert memory.temp_size_in_bytes <= block_bytes + 4096, "a copy of the pool would be more"
