"""The two-sided allocator: what the original answered, what it refuses, and that both sides keep together."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import (
    ArgumentError,
    BrokenInvariantError,
    CacheError,
    DoubleFreeError,
    OwnershipError,
    SnapshotError,
)
from jaxcache.pages.allocator import PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator

PRIVATE, TREE = PageState.PRIVATE, PageState.TREE


def books(allocator):
    return (
        allocator.states.tobytes(),
        allocator.free_pages.tolist(),
        allocator.release_pages.tolist(),
        allocator.full_available_size(),
        allocator.pending_size(),
        allocator.window.states.tobytes(),
        allocator.window.free_pages.tolist(),
        allocator.window.release_pages.tolist(),
        allocator.swa_available_size(),
        allocator.window.pending_size(),
        allocator.full_to_window.tobytes(),
        allocator.num_changed(),
    )


# What the original answered; with pages of one slot, as it has no others.


def test_alloc_takes_of_both_sides_and_maps_the_full_slots():
    allocator = SWATokenToKVPoolAllocator(8, 4)
    assert allocator.alloc(3).tolist() == [1, 2, 3]
    assert allocator.translate_loc_from_full_to_swa([3, 1, 0, 8]).tolist() == [3, 1, 0, 0]
    assert allocator.translate_loc_from_full_to_swa([3]).dtype == np.int32
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (5, 1)
    assert allocator.available_size() == 1
    assert (allocator.size_full, allocator.size_swa) == (8, 4)


@pytest.mark.parametrize(("size", "size_swa"), [(8, 4), (4, 8)], ids=["window is short", "full side is short"])
def test_alloc_is_none_if_either_side_is_short(size, size_swa):
    allocator = SWATokenToKVPoolAllocator(size, size_swa)
    before = books(allocator)
    assert allocator.alloc(5) is None
    assert books(allocator) == before
    assert allocator.alloc(4).tolist() == [1, 2, 3, 4]


def test_free_frees_both_sides_in_the_order_given():
    allocator = SWATokenToKVPoolAllocator(8, 6)
    allocator.alloc(6)
    allocator.free([5, 2])
    assert allocator.free_pages.tolist() == [7, 8, 5, 2]
    assert allocator.window.free_pages.tolist() == [5, 2]
    assert allocator.alloc(2).tolist() == [7, 8]
    assert allocator.translate_loc_from_full_to_swa([7, 8, 5, 2]).tolist() == [5, 2, 0, 0]


def test_free_swa_keeps_the_full_slots_and_may_be_repeated():
    allocator = SWATokenToKVPoolAllocator(8, 6)
    allocator.alloc(4)
    allocator.free_swa([3, 1, 3])
    after = books(allocator)
    assert allocator.window.free_pages.tolist() == [5, 6, 3, 1]
    assert allocator.translate_loc_from_full_to_swa([1, 2, 3, 4]).tolist() == [0, 2, 0, 4]
    assert allocator.count(PRIVATE) == 4
    allocator.free_swa([3, 1])
    assert books(allocator) == after
    allocator.free([1, 2])
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (6, 5)


def test_clear_empties_both_sides_and_the_map():
    allocator = SWATokenToKVPoolAllocator(8, 6, need_sort=True)
    allocator.take_changes(99)
    allocator.alloc(5)
    allocator.free([2])
    allocator.free_group_begin()
    allocator.take_changes(99)
    allocator.clear()
    assert not allocator.full_to_window.any()
    assert sorted(allocator.take_changes(99).index.tolist()) == [1, 3, 4, 5]  # the device still thinks otherwise
    assert (allocator.full_available_size(), allocator.swa_available_size()) == (8, 6)
    assert allocator.alloc(6).tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ArgumentError, match="free_group_end needs"):
        allocator.free_group_end()


# Pages of many slots.


def test_pages_are_paired_whatever_their_size():
    allocator = SWATokenToKVPoolAllocator(32, 16, 4)
    assert allocator.alloc_pages(3, without_window=1).tolist() == [1, 2, 3]
    assert allocator.window_pages([3, 0, 1, 2]).tolist() == [2, 0, 0, 1]
    assert allocator.translate_loc_from_full_to_swa([15, 8, 7, 3, 32]).tolist() == [11, 4, 0, 0, 0]
    allocator.free_swa([9])  # one slot stands for its page
    assert allocator.window_pages([1, 2, 3]).tolist() == [0, 0, 2]
    allocator.free([4, 12])
    assert allocator.free_pages.tolist() == [1, 3, 4, 5, 6, 7, 8]
    assert allocator.window.free_pages.tolist() == [2, 1, 3, 4]
    allocator.check()


def test_extend_and_decode_take_window_pages_with_their_pages():
    allocator = SWATokenToKVPoolAllocator(64, 32, 4)
    slots = allocator.alloc_extend([0, 0], [5, 3], [-1, -1], 8)
    assert slots.tolist() == [4, 5, 6, 7, 8, 12, 13, 14]
    assert allocator.window_pages([1, 2, 3]).tolist() == [1, 2, 3]
    assert allocator.alloc_decode([6, 4], [8, 14]).tolist() == [9, 15]
    assert allocator.extend_pages([6], [9]).tolist() == [4]
    assert allocator.window_pages([4]).tolist() == [4]
    assert allocator.alloc_extend([4], [20], [15], 16).tolist() == list(range(20, 36))
    assert allocator.alloc_extend([0], [1], [-1], 1) is None  # 8 pages of each are taken, the window has no more
    assert allocator.full_available_size() == 32


def test_a_window_larger_than_the_full_side_will_do():
    allocator = SWATokenToKVPoolAllocator(8, 16, 4)
    assert allocator.alloc(8).tolist() == list(range(4, 12))
    assert allocator.alloc(4) is None
    assert allocator.available_size() == 0


def test_transfer_and_release_take_the_window_page_along():
    allocator = SWATokenToKVPoolAllocator(16, 16, 4)
    allocator.alloc_pages(3)
    allocator.free_windows([2], PRIVATE)
    allocator.transfer([3, 2], PRIVATE, TREE)
    assert allocator.window.owner_of([1, 2, 3]).tolist() == [PRIVATE, PageState.FREE, TREE]
    allocator.release([2, 3], TREE)
    assert allocator.count(PRIVATE) == allocator.window.count(PRIVATE) == 1
    assert allocator.count(TREE) == allocator.window.count(TREE) == 0


def test_windows_are_released_by_their_own_ids():
    allocator = SWATokenToKVPoolAllocator(16, 16, 4)
    allocator.alloc_pages(3, without_window=1)
    allocator.transfer([2, 3], PRIVATE, TREE)
    allocator.release_window_pages([2], TREE)
    assert allocator.window_pages([2, 3]).tolist() == [1, 0]
    assert allocator.owner_of([3]) == TREE


def test_moved_windows_belong_to_the_tree():
    allocator = SWATokenToKVPoolAllocator(32, 32, 4)
    allocator.alloc_pages(2)
    allocator.transfer([1, 2], PRIVATE, TREE)
    allocator.free_windows([1, 2], TREE)
    fresh = allocator.alloc_pages(2)
    windows = allocator.window_pages(fresh)
    allocator.move_windows(fresh, [2, 1])
    assert np.array_equal(allocator.window_pages([2, 1]), windows)
    assert allocator.window_pages(fresh).tolist() == [0, 0]
    assert (allocator.window.owner_of(windows) == TREE).all()
    allocator.release(fresh, PRIVATE)
    assert np.array_equal(allocator.window_pages([2, 1]), windows)  # what the request gives back is its full pages
    allocator.check()


def test_groups_nest_over_both_sides():
    allocator = SWATokenToKVPoolAllocator(16, 16, 4)
    allocator.alloc_pages(4)
    with allocator.free_group():
        allocator.release([1], PRIVATE)
        with allocator.free_group():
            allocator.free_windows([2], PRIVATE)
        assert (allocator.pending_size(), allocator.window.pending_size()) == (4, 8)
        assert allocator.window_pages([1, 2]).tolist() == [0, 0]
        allocator.check()
    assert allocator.free_pages.tolist() == [1]
    assert allocator.window.free_pages.tolist() == [1, 2]


def test_what_is_pending_is_available_on_both_sides():
    allocator = SWATokenToKVPoolAllocator(16, 8, 4)
    allocator.alloc_pages(2)
    with allocator.free_group():
        allocator.release([2], PRIVATE)
        assert allocator.available_size() == 4
        assert allocator.alloc_pages(1).tolist() == [3]
        assert allocator.window_pages([3]).tolist() == [2]


def test_need_sort_sorts_both_sides():
    allocator = SWATokenToKVPoolAllocator(8, 6, need_sort=True)
    allocator.alloc(4)
    allocator.free([3, 1])
    assert (allocator.release_pages.tolist(), allocator.window.release_pages.tolist()) == ([3, 1], [3, 1])
    allocator.merge_and_sort_free()
    assert allocator.free_pages.tolist() == [1, 3, 5, 6, 7, 8]
    assert allocator.window.free_pages.tolist() == [1, 3, 5, 6]


def test_backup_and_restore_of_both_sides():
    allocator = SWATokenToKVPoolAllocator(32, 16, 4)
    allocator.alloc_pages(1)
    snapshot, before = allocator.backup_state(), books(allocator)[:-1]
    assert allocator.backup_state() is snapshot  # nothing has changed since
    for without_window in (0, 1, 2):
        taken = allocator.alloc_pages(2, without_window)
        allocator.restore_state(snapshot)
        assert books(allocator)[:-1] == before
        assert allocator.alloc_pages(2, without_window).tolist() == taken.tolist()
        allocator.restore_state(snapshot)


def test_a_backup_is_a_new_point_where_one_side_alone_has_moved():
    allocator = SWATokenToKVPoolAllocator(32, 16, 4)
    first = allocator.backup_state()
    allocator.alloc_pages(1, without_window=1)
    allocator.alloc_pages(1)
    second = allocator.backup_state()
    allocator.free_windows([2], PRIVATE)
    third = allocator.backup_state()
    allocator.alloc_pages(1, without_window=1)
    allocator.restore_state(third)
    assert allocator.count(PRIVATE) == 2
    for ended in (first, second):
        with pytest.raises(SnapshotError):
            allocator.restore_state(ended)
    allocator.restore_state(third)
    allocator.alloc_pages(1, without_window=1)
    fourth = allocator.backup_state()
    allocator.alloc_pages(1)
    allocator.restore_state(fourth)
    assert allocator.count(PRIVATE) == 3


WHAT_ENDS_A_SNAPSHOT = {
    "a free": lambda a: a.free([4]),
    "a window dropped": lambda a: a.free_windows([1], PRIVATE),
    "a window dropped by its id": lambda a: a.release_window_pages([1], PRIVATE),
    "a window moved": lambda a: a.move_windows([1], [2]),
    "what was taken since has another owner": lambda a: a.transfer([4], PRIVATE, TREE),
    "an open group": lambda a: a.free_group_begin(),
}


@pytest.mark.parametrize("case", WHAT_ENDS_A_SNAPSHOT)
def test_what_ends_a_snapshot(case):
    allocator = SWATokenToKVPoolAllocator(32, 16, 4)
    allocator.alloc_pages(3)
    allocator.transfer([2, 3], PRIVATE, TREE)
    allocator.free_windows([2], TREE)
    snapshot = allocator.backup_state()
    assert allocator.alloc_pages(1).tolist() == [4]
    WHAT_ENDS_A_SNAPSHOT[case](allocator)
    before = books(allocator)
    with pytest.raises(SnapshotError):
        allocator.restore_state(snapshot)
    assert books(allocator) == before


def test_snapshots_of_others_are_refused():
    allocator, other = SWATokenToKVPoolAllocator(8, 8), SWATokenToKVPoolAllocator(8, 8)
    allocator.backup_state()
    for snapshot in (other.backup_state(), allocator.window.backup_state()):
        with pytest.raises(SnapshotError, match="must be one of this allocator's"):
            allocator.restore_state(snapshot)


# Wrong calls.


@pytest.fixture
def allocator():
    """Pages 1-3 PRIVATE (a request of 10 tokens), 4-6 TREE, 7-9 free; 2 and 5 have no window page."""
    allocator = SWATokenToKVPoolAllocator(36, 36, 4)
    allocator.alloc_extend([0], [10], [-1], 10)
    allocator.alloc_pages(3)
    allocator.transfer([4, 5, 6], PRIVATE, TREE)
    allocator.free_windows([2], PRIVATE)
    allocator.free_windows([5], TREE)
    return allocator


WRONG_CALLS = {
    "more without a window than there are": (
        ArgumentError,
        "without_window.*n = 2, got 3",
        lambda a: a.alloc_pages(2, 3),
    ),
    "negative without a window": (ArgumentError, "without_window", lambda a: a.alloc_pages(2, -1)),
    "alloc part of a page": (ArgumentError, "need_size", lambda a: a.alloc(6)),
    "window_pages beyond": (OwnershipError, r"full_pages.*\[0, 9\], got page 10", lambda a: a.window_pages([10])),
    "window_pages below": (OwnershipError, "full_pages.*page -1", lambda a: a.window_pages([-1])),
    "translate beyond": (OwnershipError, "kv_indices.*page 10", lambda a: a.translate_loc_from_full_to_swa([40])),
    "translate below": (OwnershipError, "kv_indices.*page -1", lambda a: a.translate_loc_from_full_to_swa([-1])),
    "translate floats": (ArgumentError, "kv_indices", lambda a: a.translate_loc_from_full_to_swa([1.5])),
    "free twice": (DoubleFreeError, "page 7 is FREE", lambda a: a.free([4, 28])),
    "free the tree's": (OwnershipError, "page 4 is TREE", lambda a: a.free([4, 16])),
    "release the sink": (OwnershipError, "page 0 is the sink", lambda a: a.release([1, 0], PRIVATE)),
    "release as nobody": (ArgumentError, "owner", lambda a: a.release([1], PageState.FREE)),
    "transfer another's": (OwnershipError, "page 4 is TREE", lambda a: a.transfer([1, 4], PRIVATE, TREE)),
    "transfer twice in one": (OwnershipError, "named twice", lambda a: a.transfer([1, 3, 1], PRIVATE, TREE)),
    "transfer to nobody": (ArgumentError, "target", lambda a: a.transfer([1], PRIVATE, PageState.PENDING)),
    "free_windows of another's": (
        OwnershipError,
        "full_pages.*page 4 is TREE",
        lambda a: a.free_windows([1, 4], PRIVATE),
    ),
    "free_windows of a free page": (DoubleFreeError, "page 8 is FREE", lambda a: a.free_windows([1, 8], PRIVATE)),
    "free_windows twice in one": (
        DoubleFreeError,
        "page 1 is named twice",
        lambda a: a.free_windows([1, 3, 1], PRIVATE),
    ),
    "free_windows of the sink": (OwnershipError, "full_pages.*page 0", lambda a: a.free_windows([1, 0], PRIVATE)),
    "free_windows as a number": (ArgumentError, "owner", lambda a: a.free_windows([1], 1)),
    "free_windows floats": (ArgumentError, "full_pages", lambda a: a.free_windows([1.0], PRIVATE)),
    "free_swa of the tree's": (OwnershipError, "free_index.*page 4 is TREE", lambda a: a.free_swa([4, 16])),
    "free_swa of a free page": (DoubleFreeError, "free_index.*page 7 is FREE", lambda a: a.free_swa([4, 28])),
    "free_swa below": (OwnershipError, "free_index.*page -1", lambda a: a.free_swa([-1])),
    "release_window_pages of another's": (
        OwnershipError,
        "page 4 is TREE",
        lambda a: a.release_window_pages([1, 4], PRIVATE),
    ),
    "release_window_pages that are free": (
        DoubleFreeError,
        "page 2 is FREE",
        lambda a: a.release_window_pages([1, 2], PRIVATE),
    ),
    "release_window_pages twice in one": (
        DoubleFreeError,
        "named twice",
        lambda a: a.release_window_pages([4, 6, 4], TREE),
    ),
    "release_window_pages beyond": (OwnershipError, "page 10", lambda a: a.release_window_pages([10], TREE)),
    "move unequal lists": (ArgumentError, "source, target", lambda a: a.move_windows([1, 3], [5])),
    "move from the tree": (OwnershipError, "source.*page 4 is TREE", lambda a: a.move_windows([4], [5])),
    "move to a request": (OwnershipError, "target.*page 2 is PRIVATE", lambda a: a.move_windows([1], [2])),
    "move what there is not": (ArgumentError, "source.*page 2 has none", lambda a: a.move_windows([2], [5])),
    "move to what has one": (ArgumentError, "target.*page 6 has one", lambda a: a.move_windows([1], [6])),
    "move one twice": (OwnershipError, "source.*page 1 is named twice", lambda a: a.move_windows([1, 1], [5, 6])),
    "move to one twice": (OwnershipError, "target.*page 5 is named twice", lambda a: a.move_windows([1, 3], [5, 5])),
    "end without begin": (ArgumentError, "free_group_begin", lambda a: a.free_group_end()),
    "take a negative number of changes": (ArgumentError, "limit", lambda a: a.take_changes(-1)),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call_names_the_argument_and_changes_neither_side(allocator, case):
    error, message, call = WRONG_CALLS[case]
    before = books(allocator)
    with pytest.raises(error, match=message):
        call(allocator)
    assert books(allocator) == before
    allocator.check()
    assert allocator.alloc_pages(3).tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "extend", [lambda a: a.alloc_decode([11], [13]), lambda a: a.alloc_extend([10], [30], [13], 20)]
)
def test_a_page_that_lost_its_window_cannot_be_filled_further(allocator, extend):
    allocator.free_swa([12])
    before = books(allocator)
    with pytest.raises(ArgumentError, match="last_loc: page 3 is to be filled, but its window page was freed"):
        extend(allocator)
    assert books(allocator) == before
    assert allocator.alloc_extend([8], [9], [11], 1).tolist() == [28]  # behind a page that lost it: a fresh one


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 6, 4), "size_swa must be a positive multiple of page_size, got size_swa = 6, page_size = 4"),
        ((6, 8, 4), "size must be a positive multiple of page_size, got size = 6"),
        ((8, 0, 4), "size_swa must be a positive multiple"),
        ((0, 8, 4), "size must be a positive multiple"),
        ((8, 8, 0), "page_size = 0"),
        ((8, -8, 4), "size_swa must not be negative"),
        ((8, 8.0, 4), "size_swa must be an int"),
        (("8", 8, 4), "size must be an int"),
        ((2**31, 8, 4), r"2\*\*31"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ArgumentError, match=message):
        SWATokenToKVPoolAllocator(*sizes)


def test_the_caller_keeps_its_arrays():
    allocator = SWATokenToKVPoolAllocator(8, 8)
    allocator.take_changes(99)
    pages = allocator.alloc_pages(3)
    pages[:] = 7
    source = allocator.alloc_pages(1)
    allocator.free_windows(source, PRIVATE)
    source[:] = 0
    assert allocator.take_changes(99).index.tolist() == [1, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="read-only"):
        allocator.full_to_window[1] = 3


def test_debug_print_tells_of_both_sides(allocator):
    assert "9 pages of 4: 3 free, 3 private, 3 tree" in allocator.debug_print()
    assert "window: PagedTokenToKVPoolAllocator: 9 pages of 4: 5 free, 2 private, 2 tree" in allocator.debug_print()


# What `check` sees: somebody changed the window side behind the map's back.

BEHIND_ITS_BACK = {
    "a window page nobody mapped": (lambda a: a.window.alloc_pages(1), "window pages .5.*do not agree"),
    "a mapped window page freed": (lambda a: a.window.release([1], PRIVATE), "window pages .1.*do not agree"),
    "a window page of another owner": (
        lambda a: a.window.transfer([1], PRIVATE, TREE),
        "full page 1 is PRIVATE, but its window page 1 is TREE",
    ),
}


@pytest.mark.parametrize("case", BEHIND_ITS_BACK)
def test_check_sees_what_does_not_agree(allocator, case):
    change, message = BEHIND_ITS_BACK[case]
    allocator.check()
    change(allocator)
    with pytest.raises(BrokenInvariantError, match=message):
        allocator.check()


@pytest.mark.parametrize(
    ("direction", "entry", "value"),
    [
        ("_full_to_window", 1, 3),
        ("_full_to_window", 2, 3),
        ("_full_to_window", 7, 3),
        ("_full_to_window", 7, 8),
        ("_full_to_window", 4, 0),
        ("_window_to_full", 1, 3),
        ("_window_to_full", 4, 0),
        ("_window_to_full", 5, 2),
    ],
)
def test_check_sees_a_map_that_is_no_bijection(allocator, direction, entry, value):
    getattr(allocator._map, direction)[entry] = value
    with pytest.raises(BrokenInvariantError):
        allocator.check()


@pytest.mark.parametrize("page_size", [1, 4])
def test_nothing_is_a_fine_amount(page_size):
    allocator = SWATokenToKVPoolAllocator(16, 16, page_size)
    before = books(allocator)
    for pages in (allocator.alloc(0), allocator.alloc_pages(0), allocator.window_pages([])):
        assert pages.shape == (0,)
        assert pages.dtype == np.int32
    assert allocator.translate_loc_from_full_to_swa([]).dtype == np.int32
    allocator.free([])
    allocator.free_swa([])
    allocator.free_windows([], TREE)
    allocator.release_window_pages([], TREE)
    allocator.move_windows([], [])
    allocator.transfer([], PRIVATE, TREE)
    assert books(allocator) == before


def test_every_error_is_a_cache_error():
    assert all(issubclass(error, CacheError) for error, _, _ in WRONG_CALLS.values())


def test_whoever_reads_windows_hears_of_those_that_are_gone():
    """`translate_loc_from_full_to_swa` says 0 of them, which is a page that can be read."""
    allocator = SWATokenToKVPoolAllocator(size=32, size_swa=16, page_size=4)
    pages = allocator.alloc_pages(3)
    slots = np.array([0, 3, *range(4, 16)], np.int32)  # two of the sink, which are nobody's
    expected = allocator.translate_loc_from_full_to_swa(slots)
    np.testing.assert_array_equal(allocator.require_window_slots("read", slots), expected)
    allocator.free_windows(pages[1:2], PageState.PRIVATE)
    with pytest.raises(ArgumentError, match=r"read: the window page .* of page 2 is gone"):
        allocator.require_window_slots("read", slots)
    np.testing.assert_array_equal(allocator.require_window_slots("read", slots[:6]), expected[:6])
    with pytest.raises(OwnershipError, match="none of this allocator"):
        allocator.require_window_slots("read", [40])
