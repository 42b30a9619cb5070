"""Random lives of the two-sided allocator against its oracle: both sides, the map, and what the device heard of it."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule

from jaxcache.errors import SnapshotError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from tests.pages.model import FREE, PRIVATE, TREE
from tests.pages.swa_model import SWAModel
from tests.support.allocator_lives import AllocatorLife, as_list


class SWAAllocatorLife(AllocatorLife):
    """What `AllocatorLife` does, and: windows are dropped from either end, healed, and sent to a device."""

    @initialize(
        page_size=st.sampled_from([1, 1, 2, 4, 16]),
        num_pages=st.integers(1, 30),
        num_windows=st.integers(1, 30),
        need_sort=st.booleans(),
    )
    def construct(self, page_size, num_pages, num_windows, need_sort):
        self.allocator = SWATokenToKVPoolAllocator(
            page_size * num_pages, page_size * num_windows, page_size, need_sort=need_sort
        )
        self.model = SWAModel(num_pages, page_size, page_size > 1, need_sort, num_windows)
        self.requests: list[list[int]] = []
        self.tree: list[int] = []
        self.snapshots: list[tuple] = []
        self.device = [0] * (num_pages + 1)

    def draw_pages(self, data, owner):
        """Some pages of an owner, but none that a request is going to fill: those must keep their window."""
        partial = {self.page(slots[-1]) for slots in self.requests if len(slots) % self.model.page_size}
        pages = [p for p, who in enumerate(self.model.owner) if who == owner and p not in partial]
        return data.draw(st.lists(st.sampled_from(pages), unique=True, min_size=1)) if pages else []

    @rule(n=st.integers(0, 5), data=st.data())
    def alloc_some_without_window(self, n, data):
        without = data.draw(st.integers(0, n))
        pages = as_list(self.allocator.alloc_pages(n, without))
        assert pages == self.model.take(n, n, without)
        if pages is not None:
            P = self.model.page_size
            self.requests.append([page * P + k for page in pages for k in range(P)])

    @rule(data=st.data(), owner=st.sampled_from([PageState.PRIVATE, PageState.TREE]))
    def drop_windows_of_full_pages(self, data, owner):
        pages = self.draw_pages(data, owner)
        self.allocator.free_windows(pages, owner)
        self.model.free_windows(pages)

    @rule(data=st.data(), owner=st.sampled_from([PageState.PRIVATE, PageState.TREE]))
    def drop_windows_by_their_own_ids(self, data, owner):
        pages = [page for page in self.draw_pages(data, owner) if page in self.model.window_of]
        self.allocator.release_window_pages([self.model.window_of[page] for page in pages], owner)
        self.model.free_windows(pages)

    @rule(data=st.data())
    def drop_windows_of_slots(self, data):
        P = self.model.page_size
        slots = [page * P + data.draw(st.integers(0, P - 1)) for page in self.draw_pages(data, PRIVATE)]
        self.allocator.free_swa(slots + slots)
        self.model.free_windows([slot // P for slot in slots])

    @rule(data=st.data())
    def give_to_the_tree(self, data):
        pages = self.draw_pages(data, PRIVATE)
        self.allocator.transfer(pages, PageState.PRIVATE, PageState.TREE)
        for page in pages:
            self.model.owner[page] = TREE
        self.tree += pages

    def tombstones(self):
        return [page for page, who in enumerate(self.model.owner) if who == TREE and page not in self.model.window_of]

    @precondition(lambda self: self.tombstones())
    @rule(data=st.data())
    def heal(self, data):
        """A request computes the tokens of some tombstones again: its window pages are moved over."""
        target = data.draw(st.lists(st.sampled_from(self.tombstones()), unique=True, min_size=1))
        self.alloc_pages(len(target))
        source = [page for page in self.draw_pages(data, PRIVATE) if page in self.model.window_of]
        n = min(len(source), len(target))
        self.allocator.move_windows(source[:n], target[:n])
        self.model.move_windows(source[:n], target[:n])

    @precondition(lambda self: self.model.depth)
    @rule()
    def close_group(self):
        super().close_group()
        if self.model.depth == 0:
            self.model.window.join_pending()

    @rule()
    def backup(self):
        model = self.model
        state = list(model.free_pages), list(model.window.free_pages), dict(model.window_of), model.epoch()
        self.snapshots.append((self.allocator.backup_state(), *state))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data):
        snapshot, free_then, windows_then, window_of_then, epoch_then = data.draw(st.sampled_from(self.snapshots))
        model = self.model
        taken = free_then[: len(free_then) - len(model.free_pages)]
        exact = model.depth == 0 and epoch_then == model.epoch() and all(model.owner[page] == PRIVATE for page in taken)
        if not exact:
            with pytest.raises(SnapshotError):
                self.allocator.restore_state(snapshot)
            return
        self.allocator.restore_state(snapshot)
        model.free_pages, model.window.free_pages, model.window_of = free_then, windows_then, dict(window_of_then)
        for page in taken:
            model.owner[page] = FREE
        self.requests = [[s for s in slots if self.page(s) not in taken] for slots in self.requests]
        self.snapshots = [
            kept
            for kept in self.snapshots
            if kept[4] != model.epoch() or (len(kept[1]) >= len(free_then) and len(kept[2]) >= len(windows_then))
        ]

    @rule(die=st.integers(0, 9))
    def clear(self, die):
        reordered, moves = self.model.window.reordered, self.model.moves
        super().clear(die)
        if not die:
            self.model.window.reordered, self.model.moves = reordered, moves + 1

    @rule(limit=st.integers(0, 20), arrives=st.booleans())
    def tell_the_device(self, limit, arrives):
        changes = self.allocator.take_changes(limit)
        if not arrives:
            self.allocator.give_back(changes)
            return
        for page, window in zip(changes.index.tolist(), changes.page.tolist(), strict=True):
            self.device[page] = window

    @invariant()
    def same_books(self):
        if not hasattr(self, "allocator"):
            return
        allocator, model = self.allocator, self.model
        for side, expected in ((allocator, model), (allocator.window, model.window)):
            assert side.free_pages.tolist() == expected.free_pages
            assert side.release_pages.tolist() == expected.release_pages
            assert side.pending_size() == len(expected.pending) * model.page_size
        assert allocator.states.tolist() == model.owner
        assert allocator.window.states[1:].tolist() == model.window_states()
        assert allocator.full_available_size() == model.available()
        assert allocator.swa_available_size() == model.window.available()
        assert allocator.available_size() == min(model.available(), model.window.available())
        expected_map = [model.window_of.get(page, 0) for page in range(model.num_pages + 1)]
        assert allocator.full_to_window.tolist() == expected_map
        slots = np.arange((model.num_pages + 1) * model.page_size, dtype=np.int32)
        assert allocator.translate_loc_from_full_to_swa(slots).tolist() == list(map(model.translate, slots.tolist()))
        allocator.check()
        self.device_lacks_only_what_waits(expected_map)

    def device_lacks_only_what_waits(self, expected_map):
        changes = self.allocator.take_changes(10**9)
        self.allocator.give_back(changes)
        lacks = {page for page, window in enumerate(expected_map) if self.device[page] != window}
        assert lacks <= set(changes.index.tolist())
        assert changes.page.tolist() == [expected_map[page] for page in changes.index.tolist()]


TestSWAAllocatorLife = SWAAllocatorLife.TestCase
TestSWAAllocatorLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
