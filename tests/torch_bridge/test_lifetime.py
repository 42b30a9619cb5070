"""Nothing leaks and nothing dangles, whoever goes first."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcache import MHATokenToKVPool
from tests.pools import numpy_pool
from tests.support.waiting import wait_until
from torch_bridge import adopt, borrow, share

CYCLES = 10_000


def growth_of(cycle) -> tuple[int, int]:
    """Bytes of Python, and of arrays that are alive, that `CYCLES` of it leave behind."""
    for _ in range(50):
        cycle()
    gc.collect()
    tracemalloc.start()
    before, arrays = tracemalloc.get_traced_memory()[0], len(jax.live_arrays())
    for _ in range(CYCLES):
        cycle()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before, len(jax.live_arrays()) - arrays


def test_borrowing_ten_thousand_times_leaves_nothing():
    pool = numpy_pool.make_pool(numpy_pool.mha_config(np.float32))

    def cycle():
        with borrow(pool) as kv:
            kv.k[0, 4] += 1

    python_bytes, arrays = growth_of(cycle)
    assert python_bytes < 100_000 and arrays == 0  # ten bytes a cycle
    assert len(pool.views) <= 1
    assert pool.gather([4], 0)[0].ravel()[0] == CYCLES + 50


def test_the_process_does_not_grow_either():
    pool = numpy_pool.make_pool(numpy_pool.mha_config(np.float32, size=4096))

    def cycle():
        with borrow(pool) as kv:
            kv.k.sum()
        share(pool).close()
        adopt(torch.zeros(64))

    for _ in range(200):
        cycle()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        cycle()
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
    )  # KiB; a leak of the pool is 5,000 times more


def test_a_view_and_its_pool_are_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        pool = MHATokenToKVPool.create(numpy_pool.mha_config(np.float32))
        array, kv = weakref.ref(pool.k), share(pool)
        piece = kv.k[0]
        pool = pool.set_kv_buffer(0, [4], np.ones((1, 2, 8)), np.ones((1, 2, 4)))
        array = weakref.ref(pool.k)
        del pool, kv
        assert array() is not None and piece.sum() == 16
        del piece
        assert array() is None
    finally:
        gc.enable()


def test_consumer_before_producer():
    pool = numpy_pool.make_pool(numpy_pool.mha_config(np.float32))
    kv = share(pool)
    del kv
    assert all(ref() is None for ref in pool.views)
    pool = pool.set_kv_buffer(0, [4], np.ones((1, 2, 8)), np.ones((1, 2, 4)))
    assert pool.gather([4], 0)[0].sum() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adopted_memory_goes_with_the_array(dtype):
    tensor = torch.zeros(1 << 12, dtype=dtype)
    storage = weakref.ref(tensor.untyped_storage())
    array = adopt(tensor)
    del tensor
    gc.collect()
    assert storage() is not None and jnp.sum(array) == 0
    del array
    gc.collect()
    wait_until(lambda: storage() is None)  # XLA's thread may still hold what the sum has read


PROGRAM = """
import numpy as np, torch, jax
from jaxcache import MHAConfig, MHATokenToKVPool
from torch_bridge import borrow, share, adopt
pool = MHATokenToKVPool.create(MHAConfig(size=64, page_size=16, dtype=np.float32, layer_num=1, head_num=1, head_dim=8))
kv, array, block = share(pool), adopt(torch.zeros(64)), borrow(pool)
k, entered = kv.k, block.__enter__()
print(k.sum().item())
"""


def test_a_process_may_end_with_everything_alive():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")
