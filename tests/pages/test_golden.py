"""What the original code answered, call by call."""

import numpy as np
import pytest

from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator


def test_token_allocator_recycles_first_in_first_out():
    allocator = TokenToKVPoolAllocator(6)
    assert allocator.alloc(4).tolist() == [1, 2, 3, 4]
    allocator.free([2, 3])
    assert allocator.alloc(3).tolist() == [5, 6, 2]
    assert allocator.free_pages.tolist() == [3]
    assert allocator.alloc(2) is None
    assert allocator.available_size() == 1


def test_sorted_token_allocator_merges_only_when_short():
    allocator = TokenToKVPoolAllocator(6, need_sort=True)
    assert allocator.alloc(4).tolist() == [1, 2, 3, 4]
    allocator.free([3, 1])
    assert allocator.available_size() == 4
    assert allocator.alloc(2).tolist() == [5, 6]
    assert allocator.release_pages.tolist() == [3, 1]
    assert allocator.alloc(1).tolist() == [1]
    assert allocator.free_pages.tolist() == [3]
    assert allocator.release_pages.tolist() == []


def test_paged_allocator_extends_decodes_restores_and_frees():
    allocator = PagedTokenToKVPoolAllocator(36, 4)
    first = allocator.alloc_extend([0, 0, 0], [5, 3, 8], [-1, -1, -1], 16)
    assert first.tolist() == [4, 5, 6, 7, 8, 12, 13, 14, *range(16, 24)]
    assert allocator.free_pages.tolist() == [6, 7, 8, 9]
    second = allocator.alloc_extend([5, 3, 8], [14, 4, 8], [8, 14, 23], 10)
    assert second.tolist() == [9, 10, 11, 24, 25, 26, 27, 28, 29, 15]
    assert allocator.free_pages.tolist() == [8, 9]

    snapshot = allocator.backup_state()
    assert allocator.alloc_decode([15, 5, 9], [29, 15, 23]).tolist() == [30, 32, 36]
    assert allocator.free_pages.tolist() == []
    allocator.restore_state(snapshot)
    assert allocator.free_pages.tolist() == [8, 9]

    allocator.free([25, 12, 13])
    assert allocator.free_pages.tolist() == [3, 6, 8, 9]


def test_decode_with_one_free_page_and_two_needed_is_short():
    allocator = PagedTokenToKVPoolAllocator(36, 4)
    allocator.alloc_extend([0, 0, 0], [14, 4, 8], [-1, -1, -1], 26)
    allocator.alloc_pages(1)
    assert allocator.available_size() == 4
    before = allocator.states.copy()
    assert allocator.alloc_decode([15, 5, 9], [17, 23, 31]) is None
    assert allocator.free_pages.tolist() == [9]
    assert np.array_equal(allocator.states, before)


def test_paged_free_order_is_last_in_first_out_and_ascending_inside_a_call():
    allocator = PagedTokenToKVPoolAllocator(16, 4)
    allocator.alloc(16)
    allocator.free([12, 13, 14, 15])
    allocator.free([5])
    assert allocator.free_pages.tolist() == [1, 3]


def test_sorted_paged_allocator_puts_later_calls_first_and_keeps_them_apart():
    allocator = PagedTokenToKVPoolAllocator(24, 4, need_sort=True)
    allocator.alloc(12)
    allocator.free([4, 12])
    allocator.free([8])
    assert allocator.release_pages.tolist() == [2, 1, 3]
    assert allocator.free_pages.tolist() == [4, 5, 6]
    assert allocator.alloc(8).tolist() == list(range(16, 24))
    assert allocator.alloc(8).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert allocator.free_pages.tolist() == [3, 6]
    assert allocator.release_pages.tolist() == []


@pytest.mark.parametrize(("num_tokens", "page"), [(7, 4), (8, 1)])
def test_sorted_extend_merges_as_soon_as_it_might_be_short(num_tokens, page):
    """It needs 2 pages of the 3 that are free, but sorts once num_tokens // 4 + bs + 1 is above 3."""
    allocator = PagedTokenToKVPoolAllocator(24, 4, need_sort=True)
    allocator.free(allocator.alloc(12))
    assert allocator.extend_pages([0], [num_tokens]).tolist() == [page, page + 1]


@pytest.mark.parametrize(("batch", "page"), [(3, 5), (4, 1)])
def test_sorted_decode_merges_once_the_batch_is_larger_than_the_free_list(batch, page):
    """Page 1 is released, 3 pages are free, and only the first request needs one."""
    allocator = PagedTokenToKVPoolAllocator((1 + batch + 3) * 4, 4, need_sort=True)
    first = allocator.alloc(4)
    lengths = np.asarray([4, 1, 2, 1][:batch])
    slots = allocator.alloc_extend([0] * batch, lengths, [-1] * batch, lengths.sum())
    allocator.free(first)
    assert allocator.alloc_decode(lengths + 1, slots[lengths.cumsum() - 1])[0] == page * 4


def test_decode_at_page_starts_and_inside_pages():
    allocator = PagedTokenToKVPoolAllocator(160 * 4, 4)
    pages = [100, 126, 151]  # Slots 403, 504, 607 are the last of 4, 5 and 8 tokens.
    held = allocator.alloc_pages(160)
    allocator.release(np.setdiff1d(held, pages), PageState.PRIVATE)
    assert allocator.free_pages[:2].tolist() == [1, 2]
    assert allocator.alloc_decode([5, 6, 9], [403, 504, 607]).tolist() == [4, 505, 8]


@pytest.mark.parametrize("page_size", [1, 4])
def test_allocating_nothing_gives_an_empty_int32_array(page_size):
    allocator = PagedTokenToKVPoolAllocator(16, page_size)
    for slots in (
        allocator.alloc(0),
        allocator.alloc_pages(0),
        allocator.alloc_extend([], [], [], 0),
        allocator.alloc_decode([], []),
        allocator.extend_pages([], []),
    ):
        assert slots.shape == (0,)
        assert slots.dtype == np.int32
    allocator.free([])
    allocator.release([], PageState.TREE)
    assert allocator.available_size() == 16
