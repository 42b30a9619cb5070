"""What torch writes into a float8 pool is what JAX writes there: one rule, on a CPU and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxcache import Layout
from tests.kernels import oracles
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import to_tensor
from torch_bridge import TorchMHAPool, borrow

LOC = np.array([5, 9, 4, 27])
SOURCES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2]
FORMATS = pytest.mark.parametrize("dtype", oracles.FLOAT8_DTYPES, ids=lambda d: d.__name__)


def written(config, rows: list[torch.Tensor], **scales) -> tuple[np.ndarray, ...]:
    """What is in layer 1 behind torch's write."""
    pool = numpy_pool.make_pool(config)
    with borrow(pool) as kv:
        if isinstance(kv, TorchMHAPool):
            kv.set_kv_buffer(1, torch.as_tensor(LOC), *rows, **scales)
        else:
            kv.set_mla_kv_buffer(1, torch.as_tensor(LOC), rows[0][:, :12], rows[0][:, 12:])
    found = pool.gather(LOC, layer=1)
    return tuple(map(np.asarray, found if isinstance(found, tuple) else (found,)))


@FORMATS
@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("make_config", [numpy_pool.mha_config, numpy_pool.mla_config])
@pytest.mark.parametrize("layout", Layout)
def test_torch_saturates_as_jax_does(make_config, layout, source, dtype):
    config = make_config(dtype, layout=layout)
    edges = to_tensor(oracles.float8_edges(dtype))
    rows = [edges[torch.arange(4 * int(np.prod(row))) % 128].reshape(4, *row).to(source) for row in config.row_shapes]
    for got, mine in zip(written(config, rows), rows, strict=True):
        want = mine.float().cpu().numpy()
        if source is torch.float8_e5m2 and np.dtype(dtype).name == "float8_e5m2":
            np.testing.assert_array_equal(got.view(np.uint8), mine.view(torch.uint8).cpu().numpy())  # bits are kept
        else:
            oracles.assert_same_float8(got, oracles.saturated(want, dtype))


@FORMATS
def test_scaled_rows_saturate_behind_the_scale(dtype):
    config = numpy_pool.mha_config(dtype, v_head_dim=8)
    rows = np.resize(oracles.float8_edges(dtype), (4, 2, 8))
    k, v = written(config, [to_tensor(rows)] * 2, k_scale=0.25, v_scale=torch.tensor([[4.0], [0.5]]))
    with np.errstate(over="ignore"):
        oracles.assert_same_float8(k, oracles.saturated(rows / np.float32(0.25), dtype))
        oracles.assert_same_float8(v, oracles.saturated(rows / np.float32([[4.0], [0.5]]), dtype))


@FORMATS
def test_both_frameworks_make_the_same_bits_of_every_number(dtype):
    """Every bfloat16 that is a number."""
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rows = rows[~rows.isnan()]
    rows = rows[: len(rows) // 64 * 64].reshape(-1, 2, 32)
    n = len(rows)
    config = numpy_pool.mha_config(dtype, size=n, page_size=1, layer_num=1, head_dim=32, v_head_dim=32)
    mine, theirs, loc = numpy_pool.make_pool(config), numpy_pool.make_pool(config), np.arange(1, n + 1)
    with borrow(mine) as kv:
        kv.set_kv_buffer(0, torch.as_tensor(loc), rows, rows)
    values = rows.float().cpu().numpy()
    theirs = theirs.set_kv_buffer(0, loc, values, values)
    for got, want in zip(mine.gather(loc, layer=0), theirs.gather(loc, layer=0), strict=True):
        np.testing.assert_array_equal(numpy_pool.bits(got), numpy_pool.bits(want))
