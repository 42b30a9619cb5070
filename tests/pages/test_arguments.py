"""Wrong calls: a typed error that names the argument, and nothing changed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, CacheError, DoubleFreeError, OwnershipError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, FreeListAllocator, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator

LARGE = 2**40


@pytest.fixture
def allocator():
    """Pages 1-3 PRIVATE (a request of 10 tokens, slots 4-13), 4 TREE, 5 QUARANTINED, 6-9 free."""
    allocator = PagedTokenToKVPoolAllocator(36, 4)
    allocator.alloc_extend([0], [10], [-1], 10)
    pages = allocator.alloc_pages(2)
    allocator.transfer(pages[:1], PageState.PRIVATE, PageState.TREE)
    allocator.transfer(pages[1:], PageState.PRIVATE, PageState.QUARANTINED)
    return allocator


def books(allocator):
    return (
        allocator.states.tobytes(),
        allocator.free_pages.tolist(),
        allocator.release_pages.tolist(),
        allocator.available_size(),
        allocator.pending_size(),
    )


WRONG_CALLS = {
    # Amounts.
    "alloc negative": (ArgumentError, "need_size", lambda a: a.alloc(-4)),
    "alloc float": (ArgumentError, "need_size", lambda a: a.alloc(4.0)),
    "alloc bool": (ArgumentError, "need_size must be an int", lambda a: a.alloc(True)),
    "alloc part of a page": (ArgumentError, "need_size.*page_size = 4, got 7", lambda a: a.alloc(7)),
    "alloc_pages negative": (ArgumentError, "n must", lambda a: a.alloc_pages(-1)),
    "alloc_pages None": (ArgumentError, "n must", lambda a: a.alloc_pages(None)),
    # Index arrays.
    "free floats": (ArgumentError, "free_index.*float64", lambda a: a.free([4.0, 5.0])),
    "free bools": (ArgumentError, "free_index.*bool", lambda a: a.free(np.ones(9, bool))),
    "free a matrix": (ArgumentError, "free_index.*shape", lambda a: a.free(np.ones((2, 2), int))),
    "free a scalar": (ArgumentError, "free_index.*shape", lambda a: a.free(4)),
    "free None": (ArgumentError, "free_index", lambda a: a.free(None)),
    "free text": (ArgumentError, "free_index", lambda a: a.free("45")),
    "free a ragged list": (ArgumentError, "free_index", lambda a: a.free([[4], [5, 6]])),
    "free beyond int32": (ArgumentError, "free_index.*int32", lambda a: a.free([4, LARGE + 4])),
    "free beyond int64": (ArgumentError, "free_index", lambda a: a.free([2**70])),
    "release floats": (ArgumentError, "pages.*float", lambda a: a.release(np.float32([1]), PageState.PRIVATE)),
    # Owners.
    "release as free": (ArgumentError, "owner.*FREE", lambda a: a.release([6], PageState.FREE)),
    "release as sink": (ArgumentError, "owner.*SINK", lambda a: a.release([0], PageState.SINK)),
    "release as a number": (ArgumentError, "owner", lambda a: a.release([1], 1)),
    "release by the tree what is private": (
        OwnershipError,
        "pages.*TREE.*page 1 is PRIVATE",
        lambda a: a.release([4, 1], PageState.TREE),
    ),
    "transfer to free": (ArgumentError, "target", lambda a: a.transfer([1], PageState.PRIVATE, PageState.FREE)),
    "transfer from pending": (ArgumentError, "source", lambda a: a.transfer([1], PageState.PENDING, PageState.TREE)),
    "transfer of another's": (
        OwnershipError,
        "page 4 is TREE",
        lambda a: a.transfer([1, 4], PageState.PRIVATE, PageState.TREE),
    ),
    "transfer twice in one": (
        OwnershipError,
        "page 1 is named twice",
        lambda a: a.transfer([1, 2, 1], PageState.PRIVATE, PageState.TREE),
    ),
    "owner_of beyond": (OwnershipError, r"\[0, 9\], got page 10", lambda a: a.owner_of([10])),
    "owner_of below": (OwnershipError, "got page -1", lambda a: a.owner_of([-1])),
    # Batches.
    "lengths differ": (ArgumentError, "seq_lens", lambda a: a.alloc_extend([0, 0], [4], [-1, -1], 4)),
    "last_loc too short": (ArgumentError, "last_loc", lambda a: a.alloc_extend([0, 0], [4, 4], [-1], 8)),
    "prefix negative": (ArgumentError, "row 1 has prefix_lens = -1", lambda a: a.extend_pages([0, -1], [4, 4])),
    "length shrinks": (ArgumentError, "row 0 has.*seq_lens = 4", lambda a: a.extend_pages([10], [4])),
    "length near 2**31": (ArgumentError, "seq_lens", lambda a: a.extend_pages([0], [2**31 - 2])),
    "total too small": (ArgumentError, "extend_num_tokens.*4, got 3", lambda a: a.alloc_extend([0], [4], [-1], 3)),
    "total too large": (ArgumentError, "extend_num_tokens", lambda a: a.alloc_extend([0], [4], [-1], 5)),
    "total negative": (ArgumentError, "extend_num_tokens", lambda a: a.alloc_extend([0], [4], [-1], -4)),
    "empty prefix with a slot": (ArgumentError, "last_loc must be -1", lambda a: a.alloc_extend([0], [4], [7], 4)),
    "prefix without a slot": (ArgumentError, "last_loc must be -1", lambda a: a.alloc_extend([4], [8], [-1], 4)),
    "last_loc out of step": (ArgumentError, "modulo page_size = 4", lambda a: a.alloc_extend([10], [11], [12], 1)),
    "last_loc in a free page": (OwnershipError, "page 6 is FREE", lambda a: a.alloc_extend([4], [8], [27], 4)),
    "last_loc in the sink": (OwnershipError, "last_loc.*page 0", lambda a: a.alloc_extend([4], [8], [3], 4)),
    "last_loc beyond": (OwnershipError, "last_loc.*page 10", lambda a: a.alloc_extend([4], [8], [43], 4)),
    "last_loc below": (OwnershipError, "last_loc.*page -1", lambda a: a.alloc_extend([1], [2], [-4], 1)),
    "last_loc at the end of int32": (CacheError, "last_loc", lambda a: a.alloc_extend([4], [8], [2**31 - 1], 4)),
    "filling the tree's page": (OwnershipError, "page 4 is TREE", lambda a: a.alloc_extend([2], [4], [17], 2)),
    "filling one page twice": (
        OwnershipError,
        "last_loc.*page 3 is named twice",
        lambda a: a.alloc_extend([10, 10], [11, 11], [13, 13], 2),
    ),
    "decode to length 0": (ArgumentError, "row 1 has seq_lens = 0", lambda a: a.alloc_decode([11, 0], [13, -1])),
    "decode out of step": (ArgumentError, "last_loc", lambda a: a.alloc_decode([11], [14])),
    "decode in the tree's page": (OwnershipError, "page 4 is TREE", lambda a: a.alloc_decode([3], [17])),
    "decode in a free page": (OwnershipError, "page 6 is FREE", lambda a: a.alloc_decode([3], [25])),
    # Groups and the pool.
    "end without begin": (ArgumentError, "free_group_begin", lambda a: a.free_group_end()),
    "copy without a pool": (ArgumentError, "kvcache", lambda a: a.get_cpu_copy([4])),
    "load without a pool": (ArgumentError, "kvcache", lambda a: a.load_cpu_copy(None, [4])),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call_names_the_argument_and_changes_nothing(allocator, case):
    error, message, call = WRONG_CALLS[case]
    before = books(allocator)
    with pytest.raises(error, match=message):
        call(allocator)
    assert books(allocator) == before
    assert allocator.alloc_pages(4).tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("prefix", "length", "last"),
    [(4, 6, 19), (2, 2, 17), (4, 4, 19)],
    ids=["behind a full page of the tree", "nothing to write", "nothing at all"],
)
def test_a_prefix_may_end_in_the_trees_page(allocator, prefix, length, last):
    assert allocator.alloc_extend([prefix], [length], [last], length - prefix).tolist() == [24, 25][: length - prefix]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_any_integer_dtype_will_do(allocator, dtype):
    allocator.free(np.asarray([13, 4], dtype))
    assert allocator.free_pages[:2].tolist() == [1, 3]


def test_lists_and_device_arrays_will_do(allocator):
    allocator.free(jnp.asarray([13, 4], jnp.int32))
    allocator.free([8])
    assert allocator.free_pages[:3].tolist() == [2, 1, 3]


def test_caller_keeps_its_arrays(allocator):
    """Neither does the allocator write to an argument, nor does it read one after the call."""
    pages = np.asarray([3, 1], np.int32)
    with allocator.free_group():
        allocator.release(pages, PageState.PRIVATE)
        assert pages.tolist() == [3, 1]
        pages[:] = 7
    assert allocator.free_pages.tolist() == [1, 3, 6, 7, 8, 9]
    handed_out, listed = allocator.alloc_pages(2), allocator.free_pages
    allocator.release([2], PageState.PRIVATE)
    assert handed_out.tolist() == [1, 3]
    assert listed.tolist() == [6, 7, 8, 9]
    handed_out[:], listed[:] = 0, 0
    assert allocator.free_pages.tolist() == [2, 6, 7, 8, 9]


def test_last_loc_in_a_pending_page(allocator):
    with allocator.free_group():
        allocator.free([8])
        with pytest.raises(OwnershipError, match=r"last_loc.*page 2 is PENDING"):
            allocator.alloc_extend([4], [8], [11], 4)


def test_states_cannot_be_written(allocator):
    with pytest.raises(ValueError, match="read-only"):
        allocator.states[1] = PageState.FREE


def test_counts_and_owners(allocator):
    assert allocator.count(PageState.PRIVATE) == 3
    assert allocator.owner_of([0, 1, 4, 5, 9]).tolist() == [6, 1, 2, 4, 0]
    assert "3 private" in allocator.debug_print()
    assert "4 free" in allocator.debug_print()


def test_slots_must_fit_int32():
    with pytest.raises(ArgumentError, match=r"2\*\*31"):
        PagedTokenToKVPoolAllocator(2**31, 2**20)


@pytest.mark.parametrize("kind", [BaseTokenToKVPoolAllocator, FreeListAllocator])
def test_the_base_classes_have_no_free_order(kind):
    with pytest.raises(TypeError, match="free_order"):
        kind(8, 4)


def test_any_page_size_one_double_in_one_call():
    allocator = TokenToKVPoolAllocator(8)
    slots = allocator.alloc(3)
    before = books(allocator)
    with pytest.raises(DoubleFreeError, match=r"free_index.*page 2 is named twice"):
        allocator.free([2, 3, 2])
    assert books(allocator) == before
    allocator.free(slots)
    assert allocator.available_size() == 8


class FakePool:
    """A functional pool that remembers what it was asked."""

    def __init__(self, log=()):
        self.log = log

    def get_cpu_copy(self, indices):
        return ("copy of", *indices)

    def load_cpu_copy(self, cpu_copy, indices):
        return FakePool((*self.log, (cpu_copy, tuple(indices))))


def test_cpu_copies_go_to_the_pool_and_the_new_pool_is_kept():
    pool = FakePool()
    allocator = TokenToKVPoolAllocator(8, kvcache=pool)
    assert allocator.get_kvcache() is pool
    assert allocator.get_cpu_copy([1, 2]) == ("copy of", 1, 2)
    loaded = allocator.load_cpu_copy("bytes", [3, 4])
    assert loaded.log == (("bytes", (3, 4)),)
    assert allocator.get_kvcache() is loaded


def test_the_pool_of_a_followed_holder_is_held_by_it_alone():
    class Holder:
        pool = FakePool()

    holder, allocator = Holder(), TokenToKVPoolAllocator(8, kvcache=FakePool())
    allocator.follow_pool(holder)
    assert allocator.get_kvcache() is holder.pool
    holder.pool = FakePool(("after a step",))
    assert allocator.kvcache is holder.pool
    assert allocator.load_cpu_copy("bytes", [3]) is holder.pool
    assert holder.pool.log == ("after a step", ("bytes", (3,)))
