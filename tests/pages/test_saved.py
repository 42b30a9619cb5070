"""An allocator that is saved and restored hands out the pages that it would have handed out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jaxcache.errors import SnapshotError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.state_dict import Columns

KINDS = {
    "token": lambda need_sort: TokenToKVPoolAllocator(40, need_sort=need_sort),
    "paged": lambda need_sort: PagedTokenToKVPoolAllocator(160, 4, need_sort=need_sort),
    "window": lambda need_sort: SWATokenToKVPoolAllocator(160, 120, 4, need_sort=need_sort),
    "state": lambda need_sort: StateAllocator(40, need_sort=need_sort),
}


def live(allocators: list[BaseTokenToKVPoolAllocator], held: list[int], dice: random.Random, calls: int) -> None:
    """The same calls of all of them, with the same results; what is held is the tree's."""
    for _ in range(calls):
        count = dice.randint(1, 6)
        if dice.random() < 0.5:
            taken = [allocator.alloc_pages(count) for allocator in allocators]
            if taken[0] is None:
                assert not any(pages is not None for pages in taken)
                continue
            assert all(pages is not None and pages.tolist() == taken[0].tolist() for pages in taken)
            for allocator in allocators:
                allocator.transfer(taken[0], PageState.PRIVATE, PageState.TREE)
            held += taken[0].tolist()
        else:
            given = [held.pop(dice.randrange(len(held))) for _ in range(min(count, len(held)))]
            for allocator in allocators:
                if isinstance(allocator, SWATokenToKVPoolAllocator) and held:
                    allocator.free_windows(held[:1], PageState.TREE)
                allocator.release(given, PageState.TREE)


@pytest.mark.parametrize("need_sort", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_it_goes_on_alike(kind, need_sort, seed):
    dice, held = random.Random(seed), []
    old, new = KINDS[kind](need_sort), KINDS[kind](need_sort)
    live([old], held, dice, dice.randint(0, 60))
    new.load_state_dict(Columns(old.state_dict()))
    assert new.states.tolist() == old.states.tolist()
    assert (new.free_pages.tolist(), new.release_pages.tolist()) == (
        old.free_pages.tolist(),
        old.release_pages.tolist(),
    )
    assert new.available_size() == old.available_size()
    live([old, new], held, dice, 80)
    if isinstance(new, SWATokenToKVPoolAllocator) and isinstance(old, SWATokenToKVPoolAllocator):
        new.check()
        assert new.full_to_window.tolist() == old.full_to_window.tolist()


def test_the_device_hears_of_the_whole_map():
    old, new = KINDS["window"](False), KINDS["window"](False)
    assert isinstance(old, SWATokenToKVPoolAllocator) and isinstance(new, SWATokenToKVPoolAllocator)
    pages = old.alloc_pages(5, without_window=2)
    old.transfer(pages, PageState.PRIVATE, PageState.TREE)
    new.load_state_dict(Columns(old.state_dict()))
    for _ in range(2):
        changes = new.take_changes(100)
        copy = np.zeros_like(new.full_to_window)
        copy[changes.index] = changes.page
        assert copy.tolist() == old.full_to_window.tolist()
        assert new.num_changed() == 0
        new.send_all()


@pytest.mark.parametrize("state", [PageState.PRIVATE, PageState.IN_FLIGHT])
def test_pages_of_somebody_who_will_be_gone_are_refused(state):
    allocator = KINDS["paged"](False)
    pages = allocator.alloc_pages(2)
    allocator.transfer(pages[:1], PageState.PRIVATE, state)
    allocator.release(pages[1:], PageState.PRIVATE)
    with pytest.raises(SnapshotError, match=rf"1 pages are neither free nor the tree's: page 1 is {state.name}"):
        allocator.state_dict()


def test_pages_in_an_open_free_group_are_refused_and_withheld_ones_stay_withheld():
    allocator, again = KINDS["paged"](False), KINDS["paged"](False)
    pages = allocator.alloc_pages(2)
    allocator.free_group_begin()
    allocator.release(pages[:1], PageState.PRIVATE)
    allocator.transfer(pages[1:], PageState.PRIVATE, PageState.QUARANTINED)
    with pytest.raises(SnapshotError, match="is PENDING"):
        allocator.state_dict()
    allocator.free_group_end()
    again.load_state_dict(Columns(allocator.state_dict()))
    assert again.owner_of([1, 2]).tolist() == [PageState.FREE, PageState.QUARANTINED]
