"""Allocators and prefix caches that take and return torch tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxcache import ArgumentError, DoubleFreeError, PagedTokenToKVPoolAllocator, RadixCache, TokenToKVPoolAllocator
from torch_bridge import TorchAllocator, TorchPrefixCache
from torch_bridge.slots import slots_to_host


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_slots_are_int64_tensors_and_the_books_are_the_hosts():
    mine, theirs = TorchAllocator(PagedTokenToKVPoolAllocator(64, 4), "cpu"), PagedTokenToKVPoolAllocator(64, 4)
    slots = mine.alloc(8)
    assert slots is not None and slots.dtype == torch.int64 and slots.device == mine.device
    assert slots.tolist() == theirs.alloc(8).tolist()
    more = mine.alloc_extend(tensor([0, 6]), tensor([3, 9]), tensor([-1, int(slots[5])]), 6)
    expected = theirs.alloc_extend([0, 6], [3, 9], [-1, int(slots[5])], 6)
    assert more.tolist() == expected.tolist()
    assert (
        mine.alloc_decode(tensor([4, 10]), more[[2, 5]]).tolist()
        == theirs.alloc_decode([4, 10], expected[[2, 5]]).tolist()
    )
    assert mine.available_size() == mine.host.available_size() == theirs.available_size()
    mine.free(slots)
    with pytest.raises(DoubleFreeError):
        mine.free(slots)


def test_a_shortage_is_none():
    allocator = TorchAllocator(TokenToKVPoolAllocator(4), "cpu")
    assert allocator.alloc(5) is None
    assert allocator.alloc(4) is not None
    assert allocator.alloc_extend(tensor([0]), tensor([1]), tensor([-1]), 1) is None
    assert allocator.alloc_decode(tensor([1]), tensor([-1])) is None


def test_what_the_host_hands_out_is_not_the_tensors_memory():
    allocator = TorchAllocator(TokenToKVPoolAllocator(8), "cpu")
    slots = allocator.alloc(4)
    slots.fill_(7)
    assert allocator.alloc(4).tolist() == [5, 6, 7, 8]


def test_a_cache_of_tensors():
    allocator = PagedTokenToKVPoolAllocator(64, 4)
    cache = TorchPrefixCache(RadixCache(None, allocator, 4), "cpu")
    slots = TorchAllocator(allocator, "cpu").alloc(8)
    key = tensor(range(100, 108))
    assert cache.insert(key, slots) == 0
    found = cache.match_prefix(tensor(range(100, 120)))
    assert found.device_indices.dtype == torch.int64 and found.device_indices.tolist() == slots.tolist()
    assert found.host.prefix_len == 8
    assert cache.match_prefix(list(range(100, 105))).device_indices.tolist() == slots[:4].tolist()
    assert cache.match_prefix(tensor([1])).device_indices.shape == (0,)
    receipt = cache.host.inc_lock_ref(found.host.last_device_node)
    assert cache.host.evict(8) == 0
    cache.host.dec_lock_ref(receipt)
    assert cache.host.evict(8) == 8


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (torch.zeros(3), "free_index must hold integers, got torch.float32"),
        (torch.zeros(3, dtype=torch.complex64), "must hold integers"),
        (torch.zeros(3, 2, dtype=torch.int64), "must be one-dimensional"),
        (tensor([2**31]), "must fit int32"),
        (tensor([-(2**40)]), "must fit int32"),
        (np.array([1.5]), "must hold integers"),
    ],
)
def test_what_is_no_list_of_slots_is_refused(values, match):
    with pytest.raises(ArgumentError, match=match):
        slots_to_host("free_index", values)


def test_any_integers_will_do():
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        assert slots_to_host("x", torch.tensor([3, 1], dtype=dtype)).tolist() == [3, 1]
    assert slots_to_host("x", [2, 4]).dtype == np.int32
    assert slots_to_host("x", torch.tensor([], dtype=torch.int64)).tolist() == []
