"""Sliding-window pools for torch: window layers are written and read through the map, as JAX does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcache import ArgumentError, BorrowedError, SWAConfig, SWAKVPool, donating
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import DEAD, to_tensor
from torch_bridge import TorchSWAPool, borrow, share


def swa_pool(dtype=np.float32, make=numpy_pool.mha_config) -> SWAKVPool:
    """Layers 0 and 3 are full, 1, 2 and 4 have a window; pages 1, 2 and 5 have window pages 3, 1 and 2."""
    full, window = make(dtype, layer_num=2), make(dtype, layer_num=3, size=12)
    pool = SWAKVPool.create(SWAConfig(full=full, window=window, full_layers=(0, 3), window_layers=(1, 2, 4)))
    return pool.with_window_map(np.array([1, 2, 5], np.int32), np.array([3, 1, 2], np.int32))


def slots(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def same(mine: SWAKVPool, theirs: SWAKVPool) -> None:
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(numpy_pool.bits(a), numpy_pool.bits(b))


def test_slots_are_translated_as_jax_does():
    pool, loc = swa_pool(), [0, 4, 7, 8, 12, 16, 20, 23]
    with borrow(pool) as kv:
        assert isinstance(kv, TorchSWAPool)
        window = kv.translate_loc_from_full_to_swa(slots(loc))
        assert window.dtype == torch.int32
        assert window.tolist() == pool.translate_loc_from_full_to_swa(loc).tolist() == [0, 12, 15, 4, 0, 0, 8, 11]
        assert kv.translate_loc_from_full_to_swa(slots([-1, 28, 2**40])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float8_e5m2], ids=str)
@pytest.mark.parametrize("layer", range(5))
def test_writes_and_moves_are_jaxs(dtype, layer):
    mine, theirs, rng = swa_pool(dtype), swa_pool(dtype), np.random.default_rng(layer)
    loc = [5, 21, 13, 0, 9]
    rows = [numpy_pool.random_rows(rng, np.dtype(dtype), (5, 2, dim)) for dim in (8, 4)]
    with borrow(mine) as kv:
        kv.set_kv_buffer(layer, slots(loc), *map(to_tensor, rows))
        kv.move_kv_cache(slots([6, 14, 22, 0]), slots([5, 21, 9, 5]))
    theirs = theirs.set_kv_buffer(layer, loc, *rows).move_kv_cache([6, 14, 22, 0], [5, 21, 9, 5])
    same(mine, theirs)


def test_latent_rows_go_through_the_map_too():
    mine, theirs = (swa_pool(make=numpy_pool.mla_config) for _ in range(2))
    rows = np.random.default_rng(0).standard_normal((2, 17), dtype=np.float32)
    with borrow(mine) as kv:
        kv.set_kv_buffer(4, slots([5, 13]), to_tensor(rows))
        assert kv.get_kv_size_bytes() == mine.get_kv_size_bytes()
    same(mine, theirs.set_kv_buffer(4, [5, 13], rows))


def test_getters_give_the_side_of_the_layer():
    pool = swa_pool(jnp.bfloat16)
    with borrow(pool) as kv:
        assert (
            kv.get_key_buffer(3).data_ptr()
            == kv.full.k[1].data_ptr()
            == pool.full.k.unsafe_buffer_pointer() + (kv.full.k[0].nbytes)
        )
        assert kv.get_kv_buffer(4)[1].data_ptr() == kv.window.v[2].data_ptr()
        assert kv.get_paged_buffers(1)[0].shape == (4, 4, 2, 8)
        assert kv.full_to_window.tolist() == pool.full_to_window.tolist()
        assert kv.get_kv_size_bytes() == pool.get_kv_size_bytes()
        infos, expected = kv.get_contiguous_buf_infos(), pool.get_contiguous_buf_infos()
        assert infos.data_lens == [info.size_bytes for info in expected]
        assert infos.item_lens == [info.page_bytes for info in expected]
        with pytest.raises(ArgumentError, match="layer must be one of"):
            kv.get_key_buffer(5)
        with pytest.raises(ArgumentError, match="loc must be a torch tensor"):
            kv.set_kv_buffer(1, [4], torch.zeros(1, 2, 8), torch.zeros(1, 2, 4))


def test_it_is_borrowed_as_a_whole():
    pool = swa_pool()
    with borrow(pool) as kv:
        k = kv.window.k
        for part in (pool, pool.full, pool.window):
            with pytest.raises(BorrowedError):
                donating(lambda pool: pool)(part)
    for use in (lambda: k.sum(), lambda: kv.full.k, lambda: kv.full_to_window, lambda: kv.get_key_buffer(1)):
        with pytest.raises(DEAD):
            use()


def test_a_shared_one_is_followed_through_every_kind_of_update():
    kv = share(swa_pool())
    ones = np.ones((1, 2, 8), np.float32), np.ones((1, 2, 4), np.float32)
    pool = kv.pool.set_kv_buffer(1, [4], *ones)  # the whole
    assert kv.get_key_buffer(1)[12].sum() == 16
    pool = pool.with_window(pool.window.set_kv_buffer(0, [13], *ones))  # a side by itself
    assert kv.get_key_buffer(1)[13].sum() == 16
    pool = pool.with_full(pool.full.set_kv_buffer(0, [13], *ones)).with_window_map(
        np.array([3], np.int32), np.array([3], np.int32)
    )
    assert kv.full.k[0, 13].sum() == 16
    assert kv.full_to_window.tolist() == [0, 3, 1, 3, 0, 2, 0]
    kv.set_kv_buffer(1, slots([12]), *map(to_tensor, ones), k_scale=0.5)
    assert pool.gather([12], 1)[0].sum() == 32
    assert all(a is b for a, b in zip(jax.tree.leaves(kv.pool), jax.tree.leaves(pool), strict=True))


def test_rows_go_to_the_host_and_come_back_elsewhere():
    with share(swa_pool()) as kv:
        rows = torch.full((2, 2, 8), 3.0), torch.full((2, 2, 4), 4.0)
        for layer in (0, 1):
            kv.set_kv_buffer(layer, slots([4, 9]), *rows)
        kv.load_cpu_copy(kv.get_cpu_copy(slots([4, 9])), slots([21, 5]))
        assert kv.get_key_buffer(0)[[21, 5]].unique().tolist() == [3.0]
        assert kv.get_value_buffer(1)[kv.translate_loc_from_full_to_swa(slots([21, 5])).long()].unique().tolist() == [
            4.0
        ]
        kv.set_kv_buffer(0, slots([6]), rows[0][:1], rows[1][:1])  # the view goes on
        assert kv.pool.gather([6], 0)[0].sum() == 48
