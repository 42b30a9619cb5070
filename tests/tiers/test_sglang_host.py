"""SGLang's host pools: shapes, orders, addresses and sizes that the specification gives (11.2 to 11.4)."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcache
from jaxcache.compat import host_pool as compat
from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError
from jaxcache.tiers import host_memory
from tests.pools.numpy_pool import bits, filled_pool, mha_config, mla_config

P, LAYERS, HEADS, DIM, ROW = 4, 3, 2, 8, 17
LAYOUTS = ["layer_first", "page_first", "page_first_direct"]


def mha_host(layout="page_first", ratio=2.0, gb=0.0, dtype=jnp.bfloat16):
    pool, oracle = filled_pool(mha_config(dtype, v_head_dim=DIM))
    return jaxcache.MHATokenToKVPoolHost(pool, ratio, gb, P, layout), pool, oracle


def mla_host(layout="page_first"):
    pool, oracle = filled_pool(mla_config(np.float16))
    return jaxcache.MLATokenToKVPoolHost(pool, 2.0, 0, P, layout), pool, oracle


HOSTS = {"mha": mha_host, "mla": mla_host}


@pytest.mark.parametrize("kind", HOSTS)
def test_sizes(kind):
    host, pool, _ = HOSTS[kind]()
    token = {"mha": DIM * HEADS * LAYERS * 2 * 2, "mla": ROW * LAYERS * 2}[kind]
    assert host.get_size_per_token() == token
    assert host.get_ksize_per_token() == (token // 2 if kind == "mha" else token)
    assert host.size == 48 == 2 * pool.config.size and host.page_num == 12 and host.page_size == P
    assert host.available_size() == 48 and host.dtype == pool.buffers[0].dtype


def test_gigabytes_are_of_a_thousand_and_make_whole_pages():
    host, _, _ = mha_host(gb=1e-5)  # 10,000 bytes
    assert host.size == 10_000 // host.get_size_per_token() // P * P


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_are_shaped_as_the_layout_says(layout):
    host, _, _ = mha_host(layout)
    shape = {
        "layer_first": (LAYERS, 48, HEADS, DIM),
        "page_first": (48, LAYERS, HEADS, DIM),
        "page_first_direct": (12, LAYERS, P, HEADS, DIM),
    }[layout]
    assert host.k_buffer.shape == host.v_buffer.shape == shape
    host, _, _ = mla_host(layout)
    shape = {
        "layer_first": (LAYERS, 48, 1, ROW),
        "page_first": (48, LAYERS, 1, ROW),
        "page_first_direct": (12, LAYERS, P, 1, ROW),
    }[layout]
    assert host.kv_buffer.shape == shape


def test_slots_are_taken_first_in_first_out_as_whole_pages():
    host, _, _ = mha_host()
    first = host.alloc(8)
    assert first.tolist() == list(range(8)) and host.available_size() == 40
    assert host.alloc(44) is None and host.available_size() == 40
    assert host.free(first[:4]) == 4
    assert host.alloc(40).tolist() == [*range(8, 48)]
    assert host.alloc(4).tolist() == [0, 1, 2, 3]
    for wrong in (3, -4, 4.0):
        with pytest.raises(ArgumentError, match="need_size"):
            host.alloc(wrong)
    for wrong in (np.array([1, 2, 3, 4]), np.array([0, 1, 2]), np.array([4, 5, 7, 6]), np.array([-4, -3, -2, -1])):
        with pytest.raises(ArgumentError, match="indices"):  # S-32: SGLang does not look
            host.free(wrong)
    with pytest.raises(OwnershipError):
        host.free(np.arange(48, 52))
    with pytest.raises(DoubleFreeError):
        host.free(np.concatenate([first[:4], first[:4]]))
    host.clear()
    assert host.available_size() == 48


def test_the_life_of_a_page_under_sglang_s_names():
    """S-31: in SGLang, every one of these answers True and changes nothing unless it logs at debug level."""
    host, _, _ = mha_host()
    slots = host.alloc(8)
    state = jaxcache.MemoryStateInt
    assert host.get_state(slots) is state.RESERVED and host.is_reserved(slots) and not host.is_synced(slots)
    for refused in (host.complete_io, host.update_backup, host.protect_load, host.update_synced):
        with pytest.raises(CacheError):
            refused(slots)
    host.protect_write(slots)
    assert host.is_protected(slots)
    with pytest.raises(OwnershipError, match="PROTECTED"):
        host.free(slots)
    host.complete_io(slots)
    assert host.is_synced(slots)
    host.update_backup(slots)
    assert host.is_backup(slots) and not host.is_reserved(slots)
    host.update_synced(slots)
    host.update_backup(slots[:4])
    with pytest.raises(ArgumentError, match="one state"):
        host.get_state(slots)
    host.protect_load(slots[:4])
    host.complete_io(slots[:4])
    assert host.is_synced(slots)
    fetched = host.alloc(4)
    host.update_prefetch(fetched)
    assert host.is_backup(fetched)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("back_end", ["kernel", "direct"])
def test_rows_go_to_the_host_and_come_back_to_one_layer(kind, layout, back_end):
    host, pool, oracle = HOSTS[kind](layout)
    slots, device = host.alloc(8), np.array([20, 21, 22, 23, 8, 9, 10, 11])
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        host.backup_from_device_all_layer(pool, slots, device, back_end)
    with pytest.raises(OwnershipError, match="RESERVED"):
        host.load_to_device_per_layer(pool, slots, device, 0, back_end)
    host.protect_write(slots)
    host.complete_io(slots)
    target = np.arange(4, 12)
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        loaded = host.load_to_device_per_layer(pool, slots, target, 1, back_end)
    for array, before in zip(loaded.buffers, oracle.as_they_lie(), strict=True):
        wanted = bits(before).copy()
        wanted[1, target] = bits(before)[1, device]
        np.testing.assert_array_equal(bits(array), wanted)


@pytest.mark.parametrize("kind", HOSTS)
def test_an_unknown_back_end_is_refused(kind):
    """S-33: SGLang's MLA host pool silently loads nothing."""
    host, pool, _ = HOSTS[kind]()
    slots = host.alloc(4)
    with pytest.raises(ArgumentError, match="io_backend"):
        host.backup_from_device_all_layer(pool, slots, np.arange(4, 8), "rdma")
    with pytest.raises(ArgumentError, match="io_backend"):
        host.load_to_device_per_layer(pool, slots, np.arange(4, 8), 0, "rdma")
    assert not pool.is_stale


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_are_in_the_order_of_the_layout(layout):
    host, pool, _ = mha_host(layout, dtype=np.float32)
    slots = host.alloc(8)
    host.backup_from_device_all_layer(pool, slots, np.arange(8, 16), "direct")
    page = host.get_flat_data_page(4)
    k, v = (np.asarray(array)[:, 12:16] for array in pool.buffers)  # (layers, P, heads, dim)
    order = (0, 1, 2, 3) if layout != "page_first" else (1, 0, 2, 3)
    np.testing.assert_array_equal(page, np.concatenate([k.transpose(order).ravel(), v.transpose(order).ravel()]))
    assert page.base is None or not np.shares_memory(page, host.k_buffer), "a copy"

    dummy = host.get_dummy_flat_data_page()
    assert dummy.shape == page.shape and dummy.dtype == page.dtype and not dummy.any()
    host.set_from_flat_data_page(0, page)
    np.testing.assert_array_equal(host.get_flat_data_page(0), page)
    np.testing.assert_array_equal(host.get_flat_data_page(4), page)
    for wrong in (page[1:], page.astype(np.float64), page.reshape(2, -1), list(page)):
        with pytest.raises(ArgumentError, match="data_page"):
            host.set_from_flat_data_page(0, wrong)
    for index in (1, 48, -4):
        with pytest.raises(ArgumentError, match="index"):
            host.get_flat_data_page(index)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_addresses_of_keys_and_values(layout):
    host, _, _ = mha_host(layout)
    base, half = host.k_buffer.ctypes.data, LAYERS * host.size * HEADS * DIM * 2
    page = LAYERS * P * HEADS * DIM * 2
    names, addresses, lengths = host.get_buffer_meta(["a", "b"], np.array([8, 9, 10, 11, 0, 1, 2, 3]), 1)
    assert names == ["a_1_k", "a_1_v", "b_1_k", "b_1_v"] and lengths == [page] * 4
    first = base + 8 * LAYERS * HEADS * DIM * 2
    assert addresses == [first, first + half, base, base + half]
    names, pieces, count = host.get_buffer_with_hash(["a"], np.arange(8, 12))
    assert names == ["a-k", "a-v"] and count == 2
    assert [piece.ctypes.data for piece in pieces] == [first, first + half] and pieces[0].dtype == host.dtype
    assert host.get_buffer_with_hash(["a", "b"])[::2] == (["a-k", "a-v", "b-k", "b-v"], 2)


def test_addresses_of_latent_rows():
    host, _, _ = mla_host()
    names, addresses, lengths = host.get_buffer_meta(["a"], np.arange(4, 8), 3)
    assert names == ["a_k"] and lengths == [P * LAYERS * ROW * 2]
    assert addresses == [host.kv_buffer.ctypes.data + lengths[0]]
    names, pieces, count = host.get_buffer_with_hash(["a"], np.arange(4, 8))
    assert (names, count) == (["a"], 1) and pieces[0].ctypes.data == addresses[0]


def test_a_layer_first_page_has_no_one_address():
    host, _, _ = mha_host("layer_first")
    with pytest.raises(ArgumentError, match="page_first"):
        host.get_buffer_meta(["a"], np.arange(4), 0)
    with pytest.raises(ArgumentError, match="page_first"):
        host.get_buffer_with_hash(["a"], np.arange(4))
    host, _, _ = mha_host()
    for keys, slots in ((["a"], np.arange(8)), (["a"], np.arange(48, 52))):
        with pytest.raises(ArgumentError):
            host.get_buffer_meta(keys, slots, 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"page_size": 8}, "page_size"),
        ({"layout": "token_first"}, "layout"),
        ({"device": "cuda"}, "device"),
        ({"host_to_device_ratio": 0.0}, "ratio"),
        ({"device_pool": "none"}, "device_pool"),
    ],
)
def test_what_a_host_pool_cannot_be_made_of(changed, words):
    pool, _ = filled_pool(mha_config())
    arguments = dict(device_pool=pool, host_to_device_ratio=2.0, host_size=0, page_size=P, layout="page_first")
    with pytest.raises(ArgumentError, match=words):
        jaxcache.MHATokenToKVPoolHost(**arguments | changed)
    other, _ = filled_pool(mla_config())
    with pytest.raises(ArgumentError, match="MHATokenToKVPool"):
        jaxcache.MHATokenToKVPoolHost(**arguments | {"device_pool": other})


def test_memory_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 30)
    with pytest.raises(ArgumentError, match="does not fit"):
        mha_host(gb=1.0)


def test_synchronized_holds_the_lock_and_always_runs():
    """S-31: with debug_only, SGLang's returns True and does not run."""

    class Counter:
        def __init__(self):
            self.lock, self.count = threading.RLock(), 0

        @jaxcache.synchronized(debug_only=True)
        def add(self):
            assert not self.taken_elsewhere()
            self.again()
            return self.count

        @compat.synchronized()
        def again(self):
            self.count += 1

        def taken_elsewhere(self):
            got = []
            thread = threading.Thread(target=lambda: got.append(self.lock.acquire(blocking=False)))
            thread.start()
            thread.join()
            return got[0]

    counter = Counter()
    assert counter.add() == 1 and counter.add.__name__ == "add"
