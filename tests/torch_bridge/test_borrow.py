"""borrow: the same memory for a block, and nothing of it afterwards."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcache import (
    ArgumentError,
    BorrowedError,
    CacheError,
    DeadViewError,
    HybridConfig,
    HybridKVPool,
    Layout,
    MambaConfig,
    MHATokenToKVPool,
    ReqToTokenPool,
    ShardingError,
    StalePoolError,
    UnsupportedError,
    donating,
)
from jaxcache.device.pool import DevicePool
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import DEAD, ON_GPU, bits
from torch_bridge import TorchMHAPool, TorchMLAPool, borrow
from torch_bridge.dtypes import ARRAY_INTERFACE_TYPES, TORCH_DTYPES, torch_dtype

CONFIGS = [make(dtype) for dtype in numpy_pool.DTYPES for make in (numpy_pool.mha_config, numpy_pool.mla_config)]
CONFIGS += [dataclasses.replace(config, layout=Layout.PAGE_MAJOR) for config in CONFIGS[2:6]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Anything(DevicePool):
    """A pool of one array, whatever it is."""

    values: jax.Array


def mha_pool(dtype=jnp.bfloat16, **sizes) -> MHATokenToKVPool:
    return MHATokenToKVPool.create(numpy_pool.mha_config(dtype, **sizes))


@donating
def bump(pool):
    return jax.tree.map(lambda values: values + 1, pool)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.dtype}-{c.layout.value}")
def test_one_address_whole_by_layer_and_by_page(config):
    pool, oracle = numpy_pool.filled_pool(config)
    is_page_major = config.layout is Layout.PAGE_MAJOR
    with borrow(pool) as kv:
        assert isinstance(kv, (TorchMHAPool, TorchMLAPool))
        for i, (tensor, buffer) in enumerate(zip(kv.buffers, pool.buffers, strict=True)):
            address = buffer.unsafe_buffer_pointer()
            assert tensor.data_ptr() == address
            assert (tensor.dtype, tensor.shape) == (torch_dtype("pool", np.dtype(config.dtype)), buffer.shape)
            lying = oracle.as_they_lie()[i]
            np.testing.assert_array_equal(bits(tensor), numpy_pool.bits(lying).view(np.uint8).reshape(-1))
            of_a_layer = tensor[0, : config.page_size].nbytes if is_page_major else tensor[0].nbytes
            for layer in range(config.layer_num):
                pages = kv.get_paged_buffers(layer)[i]
                assert pages.data_ptr() == address + layer * of_a_layer
                assert pages.shape == (config.rows // config.page_size, config.page_size, *buffer.shape[2:])
                expected = numpy_pool.bits(oracle.arrays[i][layer]).view(np.uint8)
                np.testing.assert_array_equal(bits(pages), expected.reshape(-1))
        if is_page_major:
            for get in (kv.get_key_buffer, kv.get_value_buffer, kv.get_kv_buffer):
                with pytest.raises(UnsupportedError, match=r"use get_paged_buffers\(layer\)"):
                    get(1)
        else:
            assert kv.get_key_buffer(1).data_ptr() == kv.buffers[0].data_ptr() + kv.buffers[0][0].nbytes


def test_what_torch_writes_is_in_the_pool_afterwards():
    pool = mha_pool()
    with borrow(pool) as kv:
        kv.k[1, 7] = 3.0
        kv.get_value_buffer(2)[9, 0] = -1.5
    k, v = pool.gather([7, 9])
    assert (k[1, 0] == 3).all() and not k[0].any() and not k[2].any()
    assert (v[2, 1, 0] == -1.5).all() and not v[2, 1, 1].any() and not v[:2].any()
    assert jax.jit(lambda pool: pool.gather([7], 1)[0])(pool).sum() == 3 * 2 * 8


def test_donating_in_the_block_is_refused_before_anything_happens():
    pool, rows = mha_pool(), (np.ones((1, 2, 8), np.float32), np.ones((1, 2, 4), np.float32))
    with borrow(pool) as kv:
        for donate in (
            lambda: bump(pool),
            lambda: pool.set_kv_buffer(0, [4], *rows),
            lambda: pool.move_kv_cache([4], [5]),
            lambda: pool.load_cpu_copy(pool.get_cpu_copy([4]), [5]),
            lambda: kv.load_cpu_copy(pool.get_cpu_copy([4]), torch.tensor([5])),
        ):
            with pytest.raises(BorrowedError, match="end the borrow first"):
                donate()
        assert pool.gather([4], 0)[0].sum() == 0  # reading is no donation
        kv.k[0, 4] = 2.0
        assert pool.gather([4], 0)[0].sum() == 2 * 16
    pool = pool.set_kv_buffer(0, [4], *rows)
    assert pool.gather([4], 0)[0].sum() == 16


def test_a_pool_may_be_borrowed_twice_at_once():
    pool = mha_pool()
    with borrow(pool) as first:
        with borrow(pool) as second:
            assert first.k.data_ptr() == second.k.data_ptr()
        with pytest.raises(DeadViewError):
            second.k.sum()
        with pytest.raises(BorrowedError):
            bump(pool)
        assert first.k.sum() == 0
    bump(pool)


USES = {
    "the view": lambda kv, k, layer, piece: kv.k,
    "a getter": lambda kv, k, layer, piece: kv.get_kv_buffer(1),
    "a setter": lambda kv, k, layer, piece: kv.set_kv_buffer(0, torch.tensor([4]), k[0, :1], k[0, :1, :, :4]),
    "the pool": lambda kv, k, layer, piece: kv.pool,
    "the fence": lambda kv, k, layer, piece: kv.fence(),
    "addresses": lambda kv, k, layer, piece: kv.get_contiguous_buf_infos(),
    "the whole tensor": lambda kv, k, layer, piece: k.sum(),
    "a row of a layer": lambda kv, k, layer, piece: layer[0, 0].sum(),
    "a slice": lambda kv, k, layer, piece: piece.add_(1),
    "as an operand": lambda kv, k, layer, piece: torch.zeros(2, 2, 8) + piece,
    "in a list": lambda kv, k, layer, piece: torch.cat([torch.zeros(2, 2, 8), piece]),
    "by keyword": lambda kv, k, layer, piece: torch.add(torch.zeros(2, 2, 8), 1, out=piece),
    "its address": lambda kv, k, layer, piece: piece.data_ptr(),
    "on the host": lambda kv, k, layer, piece: piece.cpu(),
    "its text": lambda kv, k, layer, piece: repr(piece),
}
if not ON_GPU:  # there a part of a dead tensor is made, and refuses when it is used
    USES["a layer"] = lambda kv, k, layer, piece: layer[0, 0]
    USES["as a NumPy array"] = lambda kv, k, layer, piece: piece.numpy()


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_after_the_block_every_use_raises(use):
    pool = mha_pool(np.float32)
    with borrow(pool) as kv:
        k, layer, piece = kv.k, kv.get_key_buffer(0), kv.k[1, 3:5]
        computed = piece + 1
    with pytest.raises(DEAD, match="was closed"):
        use(kv, k, layer, piece)
    assert computed.sum() == 2 * 2 * 8  # what was computed is nobody's memory
    assert type(computed) is torch.Tensor
    assert not pool.gather([4])[0].any()


def test_parts_of_a_tensor_are_views_and_results_are_not():
    with borrow(mha_pool(np.float32)) as kv:
        view_of = kv.k.data_ptr()
        parts = [kv.k[0], kv.k.unbind(0)[0], kv.k.view(3, -1), kv.k.transpose(0, 1), kv.k.detach(), kv.k.split(1)[0]]
        fresh = [kv.k.clone(), kv.k[torch.tensor([0])], kv.k * 2, kv.k.to(torch.float64), torch.stack([kv.k[0]])]
        assert all(part.data_ptr() == view_of for part in parts)
        assert kv.k.add_(1) is not None
        kept = parts[0].mul_(2)
    for part in (*parts, kept):
        with pytest.raises(DEAD):
            part.sum()
    assert all(type(tensor) is torch.Tensor and tensor.sum() == 0 for tensor in fresh)


def test_an_exception_ends_the_borrow():
    pool = mha_pool()
    with pytest.raises(ZeroDivisionError), borrow(pool) as kv:
        kv.k[0, 4] = 1.0
        raise ZeroDivisionError
    with pytest.raises(DeadViewError):
        kv.k.sum()
    assert pool.borrow_count == 0
    address = pool.k.unsafe_buffer_pointer()
    new = bump(pool)
    assert new.k.unsafe_buffer_pointer() == address  # nothing holds it any more


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what JAX does on a CPU")
def test_a_jit_of_your_own_copies_on_a_cpu_and_torch_keeps_the_old_rows():
    pool = mha_pool(np.float32)
    own = jax.jit(lambda pool: jax.tree.map(lambda values: values + 1, pool), donate_argnums=0)
    with borrow(pool) as kv:
        new = own(pool)
        assert new.k.unsafe_buffer_pointer() != kv.k.data_ptr()
        assert kv.k.sum() == 0
    assert new.k.sum() == new.k.size


def refused(error, match, pool):
    with pytest.raises(error, match=match), borrow(pool):
        pass
    assert not isinstance(pool, DevicePool) or all(part.borrow_count == 0 for part in pool.with_parts())


def test_a_consumed_pool_is_refused():
    pool = mha_pool()
    bump(pool)
    refused(StalePoolError, "use the pool which that step returned", pool)


def test_a_deleted_array_is_refused():
    pool = mha_pool()
    pool.v.delete()
    refused(StalePoolError, "arrays are gone", pool)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_sharded_pool_is_refused():
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    config = numpy_pool.mha_config(axis_name="tp", shards=2)
    refused(ShardingError, "2 devices", MHATokenToKVPool.create(config, mesh=mesh))
    states = MambaConfig(
        num_states=3, layer_num=2, conv_shape=(4, 3), temporal_shape=(2, 4, 4), conv_dtype=jnp.bfloat16,
        temporal_dtype=np.float32, axis_name="tp", shards=2,
    )  # fmt: skip
    refused(ShardingError, "2 devices", HybridKVPool.create(HybridConfig(kv=config, states=states), mesh=mesh))


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.float4_e2m1fn, jnp.complex64, jnp.bool_], ids=str)
def test_a_dtype_that_the_bridge_does_not_have_is_refused(dtype):
    refused(ArgumentError, "a dtype that JAX and torch share", Anything(jnp.zeros(8, dtype)))


def test_an_array_in_another_order_is_refused():
    transposed = jax.dlpack.from_dlpack(torch.zeros(16, 32).t(), copy=False)
    refused(ArgumentError, r"row-major order, got dimensions in the order \(1, 0\)", Anything(transposed))


@pytest.mark.parametrize("thing", [np.zeros(3), jnp.zeros(3), None, torch.zeros(3)], ids=lambda t: type(t).__name__)
def test_what_is_no_pool_is_refused(thing):
    refused(ArgumentError, "must be a pool of jaxcache", thing)


def test_a_pool_without_memory_is_refused():
    config = numpy_pool.mha_config()
    refused(ArgumentError, "lend it outside jit", MHATokenToKVPool.abstract(config, platform="cpu"))
    refused(ArgumentError, "lend it outside jit", Anything(np.zeros(3)))

    def step(pool):
        with borrow(pool):
            return pool

    with pytest.raises(ArgumentError, match="lend it outside jit"):
        jax.jit(step)(mha_pool())


def test_pools_of_any_kind_can_be_borrowed():
    table = ReqToTokenPool(4, 64, 16).device_table()
    with borrow(table) as view:
        assert view.buffers[0].dtype == torch.int32
        assert view.buffers[0].data_ptr() == table.pages.unsafe_buffer_pointer()


def test_a_pool_of_pools_is_borrowed_as_a_whole():
    states = MambaConfig(
        num_states=3, layer_num=2, conv_shape=(4, 3), temporal_shape=(2, 4, 4), conv_dtype=jnp.bfloat16,
        temporal_dtype=np.float32,
    )  # fmt: skip
    pool = HybridKVPool.create(HybridConfig(kv=numpy_pool.mha_config(), states=states))
    with borrow(pool) as view:
        kv, mamba = view.parts.values()
        assert isinstance(kv, TorchMHAPool)
        assert [tensor.dtype for tensor in mamba.buffers] == [torch.bfloat16, torch.float32]
        assert [t.data_ptr() for t in view.buffers] == [b.unsafe_buffer_pointer() for b in pool.buffers]
        kv.k[0, 5] = 4.0
        for part in (pool, pool.kv, pool.states):
            with pytest.raises(BorrowedError):
                bump(part)
    assert pool.kv.gather([5], 0)[0].sum() == 4 * 16
    with pytest.raises(DeadViewError):
        mamba.buffers[0].sum()
    bump(pool)


def test_the_pool_may_go_before_the_block_ends():
    pool = mha_pool(np.float32)
    with borrow(pool) as kv:
        kv.k[0, 4] = 2.0
        del pool
        gc.collect()
        churn = [jnp.ones((3, 28, 2, 8)) for _ in range(20)]  # would take the memory, were it free
        assert kv.k.sum() == 2 * 16
        del churn
        assert kv.pool.gather([4], 0)[0].sum() == 2 * 16


def test_dead_tensors_keep_the_pool_from_nothing():
    pool = mha_pool(np.float32)
    address = pool.k.unsafe_buffer_pointer()
    kept = []
    for _ in range(5):
        with borrow(pool) as kv:
            kept.append(kv.k[0])
        pool = bump(pool)
        assert pool.k.unsafe_buffer_pointer() == address
    errors = [raised(tensor) for tensor in kept]
    assert ON_GPU or all(isinstance(error, CacheError) for error in errors)


def test_a_block_that_is_over_holds_nothing_even_if_somebody_keeps_it():
    pool = mha_pool()
    block = borrow(pool)
    with block:
        pass
    address = pool.k.unsafe_buffer_pointer()
    assert bump(pool).k.unsafe_buffer_pointer() == address
    assert block is not None


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_the_array_interfaces_know_every_dtype(dtype):
    named = np.dtype(ARRAY_INTERFACE_TYPES[dtype])
    assert named.isbuiltin == 1 and named.itemsize == dtype.itemsize  # NumPy and torch know no others by name


def raised(tensor):
    with pytest.raises(DEAD) as info:
        tensor.sum()
    return info.value


def test_a_view_belongs_to_its_block_only():
    pool = mha_pool()
    with borrow(pool) as first:
        pass
    with borrow(pool) as second:
        with pytest.raises(DeadViewError):
            first.k.sum()
        assert second.k.sum() == 0
