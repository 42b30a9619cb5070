"""States as pages of one slot: taken and freed one at a time, by their owner only."""

from __future__ import annotations

import pytest

from jaxcache.errors import ArgumentError, DoubleFreeError, OwnershipError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator


def test_every_state_is_handed_out_once_and_never_the_sink():
    states = StateAllocator(5)
    taken = [states.alloc_track_slot() for _ in range(6)]
    assert taken == [1, 2, 3, 4, 5, None]
    assert all(type(state) is int for state in taken[:5])
    assert (states.owner_of([1, 2, 3, 4, 5]) == PageState.PRIVATE).all()
    states.free_track_slot(3)
    assert states.available_size() == 1
    assert states.alloc_track_slot() == 3


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (2, DoubleFreeError, "page 2 is FREE"),
        (1, OwnershipError, "page 1 is TREE"),
        (0, OwnershipError, "page 0 is the sink"),
        (9, OwnershipError, "none of this allocator's"),
        ("a", ArgumentError, "slot must be an integer, got str"),
        ([3], ArgumentError, "slot must be an integer, got list"),
        (None, ArgumentError, "slot must be an integer, got NoneType"),
    ],
)
def test_only_the_owner_of_a_state_may_free_it(state, error, message):
    states = StateAllocator(5)
    states.transfer([states.alloc_track_slot()], PageState.PRIVATE, PageState.TREE)
    before = states.states.tolist()
    with pytest.raises(error, match=message):
        states.free_track_slot(state)
    assert states.states.tolist() == before
    assert states.available_size() == 4
