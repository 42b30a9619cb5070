"""Sharp edges of windows in other systems, at the allocator. By their number."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator

PRIVATE, TREE = PageState.PRIVATE, PageState.TREE


@pytest.fixture(params=[1, 4], ids=["token", "paged"])
def allocator(request):
    """Eight pages of each side."""
    return SWATokenToKVPoolAllocator(8 * request.param, 8 * request.param, request.param)


def test_s01_a_second_free_raises_on_both_sides(allocator):
    """The original asserts that no side has more free slots than it has slots, which sees some of them."""
    pages = allocator.alloc_pages(4)
    allocator.release(pages[:2], PRIVATE)
    with pytest.raises(DoubleFreeError):
        allocator.release(pages[1:], PRIVATE)
    with pytest.raises(DoubleFreeError):
        allocator.free_windows(pages[:1], PRIVATE)
    assert len(np.unique(allocator.alloc_pages(6))) == 6
    assert len(np.unique(allocator.full_to_window[1:])) == 8


def test_s03_a_free_group_holds_back_both_sides(allocator):
    """The original frees window slots at once inside a group, and loses what is pending when groups nest."""
    pages = allocator.alloc_pages(8)
    with allocator.free_group():
        allocator.free_windows(pages[:2], PRIVATE)
        with allocator.free_group():
            allocator.release(pages[2:4], PRIVATE)
        assert len(allocator.window.free_pages) == len(allocator.free_pages) == 0
    assert (len(allocator.window.free_pages), len(allocator.free_pages)) == (4, 2)


def test_s04_restore_covers_the_window_and_the_map(allocator):
    """The original has no snapshot for windows, so it cannot speculate with them."""
    kept = allocator.alloc_pages(2)
    snapshot = allocator.backup_state()
    draft = allocator.alloc_pages(3)
    allocator.restore_state(snapshot)
    assert not allocator.window_pages(draft).any()
    assert allocator.window.count(PRIVATE) == 2
    allocator.check()
    allocator.free_windows(kept[:1], PRIVATE)
    with pytest.raises(SnapshotError):
        allocator.restore_state(snapshot)


def test_s21_healing_leaves_the_trees_full_pages_where_they_are(allocator):
    """The original frees the tree's full slots, which a running request still reads, and puts fresh ones in place."""
    tree = allocator.alloc_pages(3)
    allocator.transfer(tree, PRIVATE, TREE)
    allocator.free_windows(tree, TREE)
    fresh = allocator.alloc_pages(3)
    windows = allocator.window_pages(fresh)
    allocator.move_windows(fresh, tree)
    allocator.release(fresh, PRIVATE)
    assert (allocator.owner_of(tree) == TREE).all()
    assert np.array_equal(allocator.window_pages(tree), windows)
    assert (allocator.window.owner_of(windows) == TREE).all()
    assert not np.isin(tree, allocator.free_pages).any()


def test_s21_a_page_that_is_whole_is_not_healed_again(allocator):
    tree = allocator.alloc_pages(1)
    allocator.transfer(tree, PRIVATE, TREE)
    fresh, window = allocator.alloc_pages(1), allocator.window_pages(tree)
    with pytest.raises(ValueError, match="has one"):
        allocator.move_windows(fresh, tree)
    assert np.array_equal(allocator.window_pages(tree), window)


def test_1a_06_a_group_frees_the_window_page_of_the_time_of_the_call(allocator):
    """Elsewhere the map is read when the group ends, after a recovery has put another window page in its place."""
    page = allocator.alloc_pages(1)
    allocator.transfer(page, PRIVATE, TREE)
    with allocator.free_group():
        (old,) = allocator.window_pages(page)
        allocator.free_windows(page, TREE)
        fresh = allocator.alloc_pages(1)
        (new,) = allocator.window_pages(fresh)
        assert new != old
        allocator.move_windows(fresh, page)
    assert allocator.window_pages(page) == new
    assert allocator.window.owner_of([old, new]).tolist() == [PageState.FREE, TREE]
    allocator.check()


def test_1a_07_a_tombstone_owns_no_window_page(allocator):
    """Elsewhere its entry of the map was stale, and freeing it freed the window page of somebody else."""
    size = allocator.page_size
    allocator = SWATokenToKVPoolAllocator(8 * size, 7 * size, size)
    tombstone = allocator.alloc_pages(1)
    (window,) = allocator.window_pages(tombstone)
    allocator.free_windows(tombstone, PRIVATE)
    others = allocator.alloc_pages(7)
    assert window in allocator.window_pages(others)
    allocator.release(tombstone, PRIVATE)
    assert allocator.window.count(PRIVATE) == 7
    allocator.check()


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9])
def test_1a_08_the_window_side_counts_pages_exactly(tokens):
    allocator = SWATokenToKVPoolAllocator(64, 64, 4)
    slots = allocator.alloc_extend([0], [tokens], [-1], tokens)
    pages = -(-tokens // 4)
    assert allocator.swa_available_size() == allocator.full_available_size() == 64 - 4 * pages
    allocator.free(slots)
    assert allocator.swa_available_size() == allocator.full_available_size() == 64


def test_1a_09_a_window_page_is_freed_by_its_owner_only(allocator):
    """Elsewhere a stale map freed pages that had a new owner by then."""
    page = allocator.alloc_pages(1)
    window = allocator.window_pages(page)
    allocator.transfer(page, PRIVATE, TREE)
    with pytest.raises(OwnershipError, match="is TREE"):
        allocator.release_window_pages(window, PRIVATE)
    with pytest.raises(OwnershipError, match="is TREE"):
        allocator.free_windows(page, PRIVATE)
    assert np.array_equal(allocator.window_pages(page), window)


def test_need_sort_sorts_the_side_that_is_short_and_no_other():
    """A full side that was short sorted the window side too: its next pages were others than the original's."""
    allocator = SWATokenToKVPoolAllocator(6, 12, need_sort=True)
    slots = allocator.alloc(6)
    allocator.free(slots[[5, 0]])
    assert allocator.alloc(3) is None
    assert (allocator.release_pages.tolist(), allocator.window.release_pages.tolist()) == ([6, 1], [6, 1])
    assert allocator.alloc(1).tolist() == [1]
    assert (allocator.free_pages.tolist(), allocator.release_pages.tolist()) == ([6], [])
    assert (allocator.window.free_pages.tolist(), allocator.window.release_pages.tolist()) == ([*range(8, 13)], [6, 1])
    assert allocator.window_pages([1]).tolist() == [7]
    allocator.check()
