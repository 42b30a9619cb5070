"""Sharp edges of the original allocators, which must not cut here. One test or more for each, by its number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, DoubleFreeError, OwnershipError, SnapshotError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import AscendPagedTokenToKVPoolAllocator, PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator

PRIVATE, TREE = PageState.PRIVATE, PageState.TREE


def paged(num_pages=4, page_size=4, **options):
    return PagedTokenToKVPoolAllocator(num_pages * page_size, page_size, **options)


BOTH = pytest.mark.parametrize("make", [lambda: TokenToKVPoolAllocator(16), paged], ids=["token", "paged"])


def books(allocator):
    return allocator.states.tobytes(), allocator.free_pages.tolist(), allocator.release_pages.tolist()


# S-01: double, foreign and sink frees were accepted, and a slot was later given to two requests.


@BOTH
def test_s01_a_second_free_raises_and_no_slot_is_given_twice(make):
    allocator = make()
    slots = allocator.alloc(8)
    allocator.free(slots[:4])
    before = books(allocator)
    with pytest.raises(DoubleFreeError, match=r"free_index.*is FREE"):
        allocator.free(slots[:4])
    with pytest.raises(DoubleFreeError):
        allocator.free(slots)  # Half of it is still owned: that half stays so.
    assert books(allocator) == before
    handed_out = allocator.alloc(12)
    assert len(np.unique(handed_out)) == 12
    assert not np.isin(handed_out, slots[4:]).any()


@BOTH
@pytest.mark.parametrize("slot", [0, -1, 20, 10**6], ids=["sink", "negative", "behind the last", "far"])
def test_s01_foreign_slots_raise(make, slot):
    allocator = make()
    slots = allocator.alloc(16)
    before = books(allocator)
    with pytest.raises(OwnershipError, match="free_index"):
        allocator.free([*slots, slot])
    assert books(allocator) == before


def test_s01_the_golden_case_pages_1_3_then_1_again():
    allocator = paged()
    allocator.alloc(16)
    allocator.free([12, 13, 14, 15])
    allocator.free([4])
    with pytest.raises(DoubleFreeError):
        allocator.free([4])
    assert allocator.free_pages.tolist() == [1, 3]
    assert allocator.available_size() == 8


@pytest.mark.parametrize("need_sort", [False, True])
def test_s01_a_double_free_is_caught_wherever_the_page_waits(need_sort):
    allocator = paged(need_sort=need_sort)
    slots = allocator.alloc(8)
    allocator.free(slots[:4])  # With need_sort, among the released pages.
    with pytest.raises(DoubleFreeError):
        allocator.free(slots[:1])
    with allocator.free_group():
        allocator.free(slots[4:])
        with pytest.raises(DoubleFreeError, match="PENDING"):
            allocator.free(slots[4:])
    assert allocator.available_size() == 16


# S-02: freeing one slot of a page freed the page, also under somebody else's live tokens.


def test_s02_a_page_of_the_tree_cannot_be_freed_through_a_requests_slot():
    allocator = paged()
    slots = allocator.alloc_extend([0], [7], [-1], 7)
    allocator.transfer([1], PRIVATE, TREE)
    with pytest.raises(OwnershipError, match="page 1 is TREE"):
        allocator.free(slots)
    allocator.free(slots[4:])
    assert allocator.owner_of([1, 2]).tolist() == [TREE, PageState.FREE]


def test_s02_a_page_has_one_owner_and_two_requests_cannot_fill_it():
    allocator = paged()
    slots = allocator.alloc_extend([0], [2], [-1], 2)
    with pytest.raises(OwnershipError, match="named twice"):
        allocator.alloc_decode([3, 3], [slots[-1], slots[-1]])


# S-03: a nested group lost its frees, and pending frees could not be allocated or seen.


def test_s03_groups_nest_and_lose_nothing():
    allocator = paged()
    slots = allocator.alloc(16)
    with allocator.free_group():
        allocator.free(slots[8:12])
        with allocator.free_group():
            allocator.free(slots[:4])
        assert allocator.free_pages.tolist() == []
        assert allocator.pending_size() == 8
        allocator.free(slots[4:8])
    assert allocator.free_pages.tolist() == [1, 2, 3]  # Ordered once, together.
    assert allocator.pending_size() == 0


def test_s03_one_group_of_small_frees_is_one_free():
    token = TokenToKVPoolAllocator(6)
    token.alloc(6)
    with token.free_group():
        token.free([5])
        token.free([2, 3])
    assert token.free_pages.tolist() == [5, 2, 3]


def test_s03_pending_pages_count_and_can_be_allocated():
    allocator = paged()
    slots = allocator.alloc(16)
    with allocator.free_group():
        allocator.free(slots[4:12])
        assert allocator.available_size() == 8
        assert allocator.alloc(4).tolist() == [8, 9, 10, 11]
        assert allocator.pending_size() == 0
        allocator.free(slots[12:])
        assert allocator.alloc(16) is None
        assert allocator.pending_size() == 4  # It could not have helped, so nothing moved.
    assert allocator.free_pages.tolist() == [4, 3]


def test_s03_a_group_ends_when_its_block_raises():
    allocator = paged()
    slots = allocator.alloc(16)
    with pytest.raises(RuntimeError, match="engine"), allocator.free_group():
        allocator.free(slots[:4])
        raise RuntimeError("engine")
    allocator.free(slots[4:8])
    assert allocator.free_pages.tolist() == [2, 1]


def test_s03_clear_ends_open_groups():
    allocator = paged()
    slots = allocator.alloc(16)
    with allocator.free_group(), allocator.free_group():
        allocator.free(slots[:4])
        allocator.clear()
    allocator.free(allocator.alloc(4))
    assert allocator.free_pages.tolist() == [1, 2, 3, 4]
    assert allocator.pending_size() == 0


# S-04: restore silently undid frees, and knew nothing of groups.


def drop_a_free(allocator, held):
    allocator.release(held[:1], PRIVATE)


def free_and_take_again(allocator, held):
    allocator.release(held[:1], PRIVATE)
    allocator.alloc_pages(1)


def free_in_a_closed_group(allocator, held):
    with allocator.free_group():
        allocator.release(held[:1], PRIVATE)


def drain_a_group(allocator, held):
    allocator.free_group_begin()
    allocator.release(held[:1], PRIVATE)
    allocator.alloc_pages(allocator.available_size() // allocator.page_size)
    allocator.free_group_end()


def give_to_the_tree(allocator, held):
    allocator.transfer(allocator.alloc_pages(1), PRIVATE, TREE)


def stay_in_a_group(allocator, held):
    allocator.free_group_begin()


def clear(allocator, held):
    allocator.clear()


@pytest.mark.parametrize(
    "between",
    [
        drop_a_free,
        free_and_take_again,
        free_in_a_closed_group,
        drain_a_group,
        give_to_the_tree,
        stay_in_a_group,
        clear,
    ],
)
def test_s04_restore_refuses_what_it_cannot_undo(between):
    allocator = paged(num_pages=8)
    held = allocator.alloc_pages(3)
    snapshot = allocator.backup_state()
    allocator.alloc_pages(2)
    between(allocator, held)
    before = books(allocator)
    with pytest.raises(SnapshotError):
        allocator.restore_state(snapshot)
    assert books(allocator) == before


def test_s04_a_snapshot_inside_a_group_dies_with_the_group():
    allocator = paged()
    slots = allocator.alloc(8)
    with allocator.free_group():
        allocator.free(slots[:4])
        snapshot = allocator.backup_state()
    with pytest.raises(SnapshotError):
        allocator.restore_state(snapshot)
    assert allocator.free_pages.tolist() == [1, 3, 4]


def test_s04_sorting_ends_a_mark():
    allocator = paged(need_sort=True)
    slots = allocator.alloc(12)
    allocator.free(slots[4:])
    snapshot = allocator.backup_state()
    assert allocator.alloc(8).tolist() == [8, 9, 10, 11, 12, 13, 14, 15]  # Sorted 2, 3 before 4.
    with pytest.raises(SnapshotError, match="sorted"):
        allocator.restore_state(snapshot)
    assert allocator.free_pages.tolist() == [4]


def test_s04_a_foreign_snapshot_raises():
    one, other = paged(), paged()
    snapshot = other.backup_state()
    one.backup_state()
    with pytest.raises(SnapshotError):
        one.restore_state(snapshot)


def test_s04_restoring_an_older_snapshot_ends_the_newer_ones():
    allocator = paged()
    older = allocator.backup_state()
    allocator.alloc_pages(1)
    newer = allocator.backup_state()
    allocator.restore_state(older)
    allocator.alloc_pages(3)  # One allocation across the newer snapshot: it must not be cut in two.
    with pytest.raises(SnapshotError):
        allocator.restore_state(newer)


def test_s04_restore_makes_the_next_allocations_the_same_again_and_again():
    allocator = paged(num_pages=8)
    allocator.release(allocator.alloc_pages(6), PRIVATE)
    held = allocator.alloc_pages(1)
    outer = allocator.backup_state()
    first = allocator.alloc_pages(2)
    inner = allocator.backup_state()
    drafts = []
    for _ in range(3):
        drafts.append(allocator.alloc_extend([0, 0], [5, 3], [-1, -1], 8).tolist())
        allocator.restore_state(inner)
    assert drafts[0] == drafts[1] == drafts[2]
    allocator.restore_state(outer)
    assert allocator.alloc_pages(2).tolist() == first.tolist()
    assert allocator.owner_of(held).tolist() == [PRIVATE]
    assert allocator.available_size() == 5 * 4


def test_s04_speculation_without_frees_keeps_no_growing_list():
    allocator = paged()
    snapshots = set()
    for _ in range(100):
        snapshots.add(allocator.backup_state())
        allocator.alloc_pages(2)
        allocator.restore_state(allocator.backup_state())
        allocator.restore_state(next(iter(snapshots)))
    assert len(snapshots) == 1


# S-05: a need that is not whole pages was rounded down in silence.


@pytest.mark.parametrize("need_size", [1, 3, 7, 15])
def test_s05_part_of_a_page_raises(need_size):
    allocator = paged()
    with pytest.raises(ArgumentError, match=f"need_size must be a multiple of page_size = 4, got {need_size}"):
        allocator.alloc(need_size)
    assert allocator.available_size() == 16


# S-06: slots were computed from a free list too short, and extend_num_tokens was trusted.


def test_s06_shortage_is_found_before_anything_is_computed():
    allocator = paged()
    slots = allocator.alloc_extend([0], [6], [-1], 6)
    before = books(allocator)
    assert allocator.alloc_extend([6, 0], [16, 5], [slots[-1], -1], 15) is None
    assert allocator.extend_pages([6, 0], [16, 5]) is None
    assert allocator.alloc_extend([0], [2**30], [-1], 2**30) is None  # Not 4 GiB of slots first.
    assert books(allocator) == before
    assert allocator.alloc_extend([6, 0], [16, 0], [slots[-1], -1], 10).tolist() == [10, 11, *range(12, 20)]


@pytest.mark.parametrize("claimed", [0, 7, 9, 10**9])
def test_s06_the_number_of_tokens_is_checked(claimed):
    allocator = paged()
    with pytest.raises(ArgumentError, match=f"extend_num_tokens.*= 8, got {claimed}"):
        allocator.alloc_extend([0, 0], [5, 3], [-1, -1], claimed)
    assert allocator.available_size() == 16


def test_s06_the_cost_does_not_grow_with_the_pool():
    """A pool of 4 million pages: a scan of it, or a rebuilt free list, would be 4 MiB or more of scratch."""
    allocator = PagedTokenToKVPoolAllocator(2**22 * 16, 16)
    last = allocator.alloc_extend([0] * 8, [16] * 8, [-1] * 8, 128)[15::16]
    tracemalloc.start()
    try:
        snapshot = allocator.backup_state()
        allocator.alloc_decode([17] * 8, last)
        allocator.alloc_extend([17], [40], allocator.alloc_extend([0], [17], [-1], 17)[-1:], 23)
        allocator.extend_pages([17], [40])
        allocator.restore_state(snapshot)
        pages = allocator.alloc_pages(100)
        allocator.transfer(pages, PRIVATE, TREE)
        with allocator.free_group():
            allocator.release(pages, TREE)
        allocator.free(allocator.alloc(160))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**17


# S-07: with one slot a page, decode allocated nothing and returned the neighbour's slot.


@pytest.mark.parametrize("make", [TokenToKVPoolAllocator, lambda size: AscendPagedTokenToKVPoolAllocator(size, 1)])
def test_s07_decode_and_extend_with_pages_of_one_slot(make):
    allocator = make(10)
    assert allocator.alloc_extend([0, 0], [2, 3], [-1, -1], 5).tolist() == [1, 2, 3, 4, 5]
    slots = allocator.alloc_decode([3, 4], [2, 5])
    assert slots.tolist() == [6, 7]
    assert slots.dtype == np.int32
    assert allocator.alloc_extend([3, 4], [4, 6], [6, 7], 3).tolist() == [8, 9, 10]
    assert allocator.alloc_decode([5], [8]) is None


# S-08: decode indexed past the free list when it was exactly used up.


def test_s08_decode_uses_the_last_page_and_later_rows_need_none():
    allocator = AscendPagedTokenToKVPoolAllocator(12, 4)
    allocator.alloc_extend([0, 0], [4, 2], [-1, -1], 6)
    assert allocator.alloc_decode([5, 3], [7, 9]).tolist() == [12, 10]
    assert allocator.available_size() == 0
    assert allocator.alloc_decode([6, 4], [12, 10]).tolist() == [13, 11]
    assert allocator.alloc_decode([7, 5], [13, 11]) is None
    assert allocator.alloc_extend([6, 4], [8, 4], [13, 11], 2).tolist() == [14, 15]


# S-09: a size that is not whole pages lost the rest in silence.


@pytest.mark.parametrize(("size", "page_size"), [(18, 4), (3, 4), (0, 4), (-4, 4), (8, 0), (8, -4), (8.0, 4)])
def test_s09_size_must_be_whole_pages(size, page_size):
    with pytest.raises(ArgumentError, match="size"):
        PagedTokenToKVPoolAllocator(size, page_size)


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_s09_every_slot_is_handed_out_once_and_lies_in_the_buffer(page_size):
    allocator = PagedTokenToKVPoolAllocator(192, page_size)
    slots = allocator.alloc(192)
    assert np.array_equal(np.sort(slots), np.arange(page_size, 192 + page_size))
    assert allocator.alloc(page_size) is None


# An alloc that was refused sorted the free list all the same: that ended marks, and changed the order of the next one.

REFUSED = {
    "alloc": lambda a: a.alloc(3 * a.page_size),
    "alloc_pages": lambda a: a.alloc_pages(3),
    "alloc_extend": lambda a: a.alloc_extend([0], [3 * a.page_size], [-1], 3 * a.page_size),
    "extend_pages": lambda a: a.extend_pages([0], [3 * a.page_size]),
    "alloc_decode": lambda a: a.alloc_decode([1, 1, 1], [-1, -1, -1]),
}
SORTED_KINDS = {
    "token": lambda: TokenToKVPoolAllocator(4, need_sort=True),
    "state": lambda: StateAllocator(4, need_sort=True),
    "paged": lambda: paged(need_sort=True),
    "pair": lambda: SWATokenToKVPoolAllocator(16, 16, 4, need_sort=True),
    "pair, the window is short": lambda: SWATokenToKVPoolAllocator(32, 16, 4, need_sort=True),
    "pair, the full side is short": lambda: SWATokenToKVPoolAllocator(16, 32, 4, need_sort=True),
}


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.parametrize("kind", SORTED_KINDS)
def test_a_refused_alloc_sorts_nothing_and_keeps_marks(kind, call, in_group):
    allocator = SORTED_KINDS[kind]()
    sides = [allocator, allocator.window] if isinstance(allocator, SWATokenToKVPoolAllocator) else [allocator]
    pages = allocator.alloc_pages(4)
    allocator.release(pages[2:3], PRIVATE)
    if in_group:
        allocator.free_group_begin()
    allocator.release(pages[:1], PRIVATE)
    mark = allocator.backup_state()
    before = [(books(side), side.available_size(), side.pending_size()) for side in sides]
    assert REFUSED[call](allocator) is None
    assert [(books(side), side.available_size(), side.pending_size()) for side in sides] == before
    assert allocator.backup_state() is mark
    if not in_group:
        allocator.restore_state(mark)
        assert [(books(side), side.available_size(), side.pending_size()) for side in sides] == before
