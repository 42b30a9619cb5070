"""Pools with SGLang's method names for torch: what they write, move, show and refuse, against NumPy."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcache import ArgumentError, Layout, UnsupportedError
from tests.kernels.conftest import INTERPRETS
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import DEVICE, bits, to_tensor
from torch_bridge import TorchMHAPool, TorchMLAPool, borrow, share

MAKERS = numpy_pool.mha_config, numpy_pool.mla_config
CONFIGS = [make(dtype) for dtype in numpy_pool.DTYPES for make in MAKERS]
CONFIGS += [dataclasses.replace(config, layout=Layout.PAGE_MAJOR) for config in CONFIGS[2:6]]


def slots(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def write(kv, layer, loc, rows) -> None:
    """Rows of an oracle, by the setter that fits."""
    tensors = [to_tensor(array) for array in rows]
    if isinstance(kv, TorchMHAPool):
        kv.set_kv_buffer(layer, loc, *tensors)
    else:
        rank = kv.config.kv_lora_rank
        kv.set_mla_kv_buffer(layer, loc, tensors[0][:, :rank], tensors[0][:, rank:])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.dtype}-{c.layout.value}")
@settings(max_examples=15)
@given(data=st.data())
def test_writes_and_moves_against_numpy(config, data):
    pool, oracle = numpy_pool.filled_pool(config)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    with borrow(pool) as kv:
        for _ in range(3):
            n, layer = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 2))
            loc = data.draw(st.permutations(range(1, config.rows)))[:n]
            loc = [data.draw(st.sampled_from([slot, slot, 0, -1, config.rows, 2**31, -(2**40)])) for slot in loc]
            rows = [numpy_pool.random_rows(rng, config.dtype, (n, *row)) for row in config.row_shapes]
            write(kv, layer, slots(loc), rows)
            oracle.write(layer, loc, rows)
            moves = data.draw(st.permutations(range(1, config.rows)))[: 2 * n]
            targets = [data.draw(st.sampled_from([slot, slot, 0])) for slot in moves[:n]]
            kv.move_kv_cache(slots(targets), slots(moves[: len(targets)][::-1]))
            oracle.move(targets, moves[: len(targets)][::-1])
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", [numpy_pool.mha_config, numpy_pool.page_major(numpy_pool.mha_config)])
def test_targets_outside_are_dropped_and_sources_outside_are_zeros(make_config):
    pool, oracle = numpy_pool.filled_pool(make_config(np.float32))
    with borrow(pool) as kv:
        kv.move_kv_cache(slots([5, -1, 100, 6, 2**40]), slots([9, 5, 5, 2**40, 5]))
    oracle.move([5, 6], [9, 0])
    oracle.expect(pool)


def test_a_pool_that_torch_has_no_setter_for_says_so():
    pool, oracle = numpy_pool.filled_pool(numpy_pool.double_sparse_config(np.float32))
    with borrow(pool) as kv:
        assert [tensor.shape[3] for tensor in kv.buffers] == [8, 4, 3]
        with pytest.raises(UnsupportedError, match="no setter for a DoubleSparseTokenToKVPool: write with its own"):
            kv.set_kv_buffer(0, slots([4]), *(torch.zeros(1, *row) for row in pool.config.row_shapes))
        kv.move_kv_cache(slots([5]), slots([9]))
    oracle.move([5], [9])
    oracle.expect(pool)


def test_int32_slots_will_do():
    with borrow(numpy_pool.make_pool(numpy_pool.mha_config(np.float32))) as kv:
        kv.set_kv_buffer(0, torch.tensor([4, 0], dtype=torch.int32), torch.ones(2, 2, 8), torch.ones(2, 2, 4))
        assert kv.k.sum() == 16 and kv.v[0, 4].sum() == 8


def test_rows_are_cast_and_scaled_and_the_callers_are_untouched():
    with borrow(numpy_pool.make_pool(numpy_pool.mha_config(jnp.float8_e4m3fn))) as kv:
        k, v = torch.full((1, 2, 8), 3.0), torch.full((1, 2, 4), 8.0, dtype=torch.bfloat16)
        kv.set_kv_buffer(0, slots([4]), k, v, k_scale=2.0, v_scale=torch.tensor([[4.0], [2.0]]))
        assert kv.k[0, 4].float().unique().tolist() == [1.5]
        assert kv.v[0, 4].float()[:, 0].tolist() == [2.0, 4.0]
        assert (k == 3).all() and (v == 8).all()


@pytest.mark.parametrize("dtype", numpy_pool.FLOATS, ids=str)
def test_casts_round_as_jax_does(dtype):
    rows = np.random.default_rng(0).standard_normal((20, 2, 8)).astype(np.float32) * 10
    mine, theirs = (numpy_pool.make_pool(numpy_pool.mha_config(dtype, v_head_dim=8)) for _ in range(2))
    with borrow(mine) as kv:
        kv.set_kv_buffer(1, torch.arange(4, 24), to_tensor(rows), to_tensor(rows), 4.0, 0.5)
    theirs = theirs.set_kv_buffer(1, np.arange(4, 24), rows, rows, np.float32(4.0), np.float32(0.5))
    for mine_rows, their_rows in zip(mine.gather(range(28)), theirs.gather(range(28)), strict=True):
        np.testing.assert_array_equal(numpy_pool.bits(mine_rows), numpy_pool.bits(their_rows))


def test_rows_need_not_be_contiguous():
    qkv = torch.randn(3, 2, 24)
    with borrow(numpy_pool.make_pool(numpy_pool.mha_config(np.float32, v_head_dim=8))) as kv:
        kv.set_kv_buffer(2, slots([4, 5, 6]), qkv[..., 8:16], qkv[..., 16:])
        torch.testing.assert_close(kv.k[2, 4:7].clone(), qkv[..., 8:16])
        torch.testing.assert_close(kv.v[2, 4:7].clone(), qkv[..., 16:])


def test_layers_are_global_ids_or_objects_that_have_one():
    pool = numpy_pool.make_pool(numpy_pool.mha_config(np.float32, start_layer=10))
    rows = torch.ones(1, 2, 8), torch.ones(1, 2, 4)
    with borrow(pool) as kv:
        kv.set_kv_buffer(SimpleNamespace(layer_id=11), slots([4]), *rows)
        kv.set_kv_buffer(0, slots([5]), *rows, layer_id_override=12)
        assert kv.get_key_buffer(11)[4].sum() == 16 and kv.get_kv_buffer(12)[1][5].sum() == 8
        assert kv.k[0].sum() == 0
        for layer in (9, 13, SimpleNamespace(layer_id=0)):
            with pytest.raises(ArgumentError, match=r"layer must be in \[10, 13\); got"):
                kv.set_kv_buffer(layer, slots([5]), *rows)
            with pytest.raises(ArgumentError, match="layer must be in"):
                kv.get_key_buffer(layer)


def test_an_mla_pool_has_sglangs_shapes_and_takes_both():
    pool = numpy_pool.make_pool(numpy_pool.mla_config(np.float32))
    nope, rope = torch.full((2, 12), 1.0), torch.full((2, 5), 2.0)
    with borrow(pool) as kv:
        assert isinstance(kv, TorchMLAPool)
        kv.set_mla_kv_buffer(0, slots([4, 5]), nope, rope)
        kv.set_mla_kv_buffer(1, slots([4, 5]), nope[:, None], rope[:, None])
        kv.set_kv_buffer(2, slots([4, 5]), torch.cat([nope, rope], dim=1)[:, None], None)
        assert kv.get_key_buffer(0).shape == (28, 1, 17) and kv.get_value_buffer(0).shape == (28, 1, 12)
        assert kv.get_value_buffer(1).data_ptr() == kv.kv.data_ptr() + 28 * 17 * 4
        for layer in range(3):
            assert kv.kv[layer, 4].tolist() == [1.0] * 12 + [2.0] * 5


@pytest.mark.parametrize("make_config", [numpy_pool.mha_config, numpy_pool.page_major(numpy_pool.mha_config)])
def test_sizes_and_addresses_are_those_of_the_memory(make_config):
    config = make_config(jnp.bfloat16)
    pool = numpy_pool.make_pool(config)
    with borrow(pool) as kv:
        infos = kv.get_contiguous_buf_infos()
        expected = pool.get_contiguous_buf_infos()
        starts = {name: getattr(pool, name).unsafe_buffer_pointer() for name in ("k", "v")}
        assert infos.data_ptrs == [starts[info.name] + info.offset_bytes for info in expected]
        assert infos.data_lens == [info.size_bytes for info in expected]
        assert infos.item_lens == [info.page_bytes for info in expected]
        assert kv.get_kv_size_bytes() == pool.get_kv_size_bytes()
        assert kv.size_bytes == pool.size_bytes
        assert kv.maybe_get_custom_mem_pool() is None
        assert kv.device == DEVICE
    latent = numpy_pool.make_pool(numpy_pool.mla_config())
    with borrow(latent) as kv:
        assert kv.get_kv_size_bytes() == latent.get_kv_size_bytes()


def test_rows_go_to_the_host_and_come_back_elsewhere():
    pool, oracle = numpy_pool.filled_pool(numpy_pool.mha_config(jnp.bfloat16))
    with share(pool) as kv:
        kv.k[0, 7] = 5.0
        copy = kv.get_cpu_copy(slots([7, 8]))
        kv.load_cpu_copy(copy, slots([20, 21]))
        oracle.arrays[0][0, 7] = 5.0
        oracle.move([20, 21], [7, 8])
        np.testing.assert_array_equal(bits(kv.k), numpy_pool.bits(oracle.arrays[0]).view(np.uint8).reshape(-1))
        oracle.expect(kv.pool)


GOOD: dict[str, Any] = {
    "layer": 0,
    "loc": slots([4, 5]),
    "cache_k": torch.zeros(2, 2, 8),
    "cache_v": torch.zeros(2, 2, 4),
}
BAD = {
    "float slots": ({"loc": torch.zeros(2)}, r"loc must be one-dimensional int64 or int32; got torch.float32\[2\]"),
    "slots of two dimensions": ({"loc": torch.zeros(2, 1, dtype=torch.int64)}, "loc must be one-dimensional"),
    "NumPy slots": ({"loc": np.array([4, 5])}, "loc must be a torch tensor, got ndarray: use torch.as_tensor"),
    "slots elsewhere": ({"loc": slots([4, 5]).to("meta")}, f"loc must lie on {DEVICE}, where the pool is; got meta"),
    "rows elsewhere": ({"cache_k": torch.zeros(2, 2, 8, device="meta")}, f"k must lie on {DEVICE}"),
    "rows of JAX": ({"cache_v": jnp.zeros((2, 2, 4))}, "v must be a torch tensor, got ArrayImpl"),
    "too few rows": ({"cache_k": torch.zeros(1, 2, 8)}, r"k must have shape \(2, 2, 8\); got \(1, 2, 8\)"),
    "values like keys": ({"cache_v": torch.zeros(2, 2, 8)}, r"v must have shape \(2, 2, 4\)"),
    "integers": ({"cache_k": torch.zeros(2, 2, 8, dtype=torch.int32)}, "k must be floats"),
    "layer": ({"layer": 3}, r"layer must be in \[0, 3\); got 3"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD.keys())
def test_what_is_refused_writes_nothing(change, match):
    pool = numpy_pool.make_pool(numpy_pool.mha_config(jnp.bfloat16))
    with borrow(pool) as kv:
        kv.k[0, 4] = 7.0
        with pytest.raises(ArgumentError, match=match):
            kv.set_kv_buffer(**{**GOOD, **change})
        assert kv.k.sum() == 7 * 16 and kv.v.sum() == 0


def test_a_pool_of_integers_takes_them_as_they_are():
    with borrow(numpy_pool.make_pool(numpy_pool.mha_config(jnp.int8))) as kv:
        rows = torch.ones(2, 2, 8), torch.ones(2, 2, 4)
        with pytest.raises(ArgumentError, match=r"k must be quantised to the pool's torch\.int8 by the caller"):
            kv.set_kv_buffer(0, slots([4, 5]), *rows)
        with pytest.raises(ArgumentError, match="and not be scaled"):
            kv.set_kv_buffer(0, slots([4, 5]), *(r.to(torch.int8) for r in rows), k_scale=2.0)
        kv.set_kv_buffer(0, slots([4, 5]), *(r.to(torch.int8) for r in rows))
        assert kv.k[0, 4:6].sum() == 32


def test_moves_must_be_pairs():
    with borrow(numpy_pool.make_pool(numpy_pool.mha_config())) as kv:
        with pytest.raises(ArgumentError, match="tgt_loc must be as many as src_loc, 1; got 2"):
            kv.move_kv_cache(slots([4, 5]), slots([4]))
        with pytest.raises(ArgumentError, match="src_loc must be a torch tensor"):
            kv.move_kv_cache(slots([4]), [4])


@pytest.mark.parametrize(
    ("nope", "rope", "match"),
    [
        (torch.zeros(2, 11), torch.zeros(2, 5), r"cache_k_nope must have shape \(2, 12\)"),
        (torch.zeros(2, 12), torch.zeros(2, 2, 5), r"cache_k_rope must have shape \(2, 5\)"),
        (np.zeros((2, 12)), torch.zeros(2, 5), "cache_k_nope must be a torch tensor"),
    ],
)
def test_latent_rows_that_do_not_fit_are_refused(nope, rope, match):
    with borrow(numpy_pool.make_pool(numpy_pool.mla_config(np.float32))) as kv:
        with pytest.raises(ArgumentError, match=match):
            kv.set_mla_kv_buffer(0, slots([4, 5]), nope, rope)
        with pytest.raises(ArgumentError, match=r"cache_k must have rows of 12 \+ 5"):
            kv.set_kv_buffer(0, slots([4]), torch.zeros(1, 12))


@pytest.mark.parametrize("make", MAKERS)
def test_triton_source_writes_and_moves_the_same(make):
    """The kernels that a GPU runs, interpreted on these very tensors."""
    pytest.importorskip("triton")
    if not INTERPRETS:
        pytest.skip("this process compiles Triton source")
    from jaxcache.kernels import copy_pages_torch, write_kv_torch

    pool, oracle = numpy_pool.filled_pool(make(np.float32))
    rng, loc = np.random.default_rng(2), [9, 0, 27, 100, 4]
    rows = [numpy_pool.random_rows(rng, np.dtype(np.float32), (5, *row)) for row in oracle.config.row_shapes]
    with borrow(pool) as kv:
        tensors, layer = kv._tensors, kv._on_device(1)
        if make is numpy_pool.mha_config:
            write_kv_torch.write_kv(*tensors, layer, slots(loc), *map(to_tensor, rows))
        else:
            parts = to_tensor(rows[0]).split([12, 5], dim=1)
            write_kv_torch.write_mla_kv(*tensors, layer, slots(loc), *(part.contiguous() for part in parts))
        oracle.write(1, loc, rows)
        for tensor in tensors:
            copy_pages_torch.move_rows(tensor, slots([8, 9, 10, 0]), slots([9, 10, 8, 7]))
            copy_pages_torch.move_rows(tensor, slots([]), slots([]))
        oracle.move([8, 9, 10, 0], [9, 10, 8, 7])
    oracle.expect(pool)
