"""Random lives of an allocator beside a model of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxcache.errors import SnapshotError
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from tests.pages.model import PRIVATE, TREE, Model


def as_list(slots):
    return None if slots is None else slots.tolist()


class AllocatorLife(RuleBasedStateMachine):
    """Requests are lists of slots; a request may lend its first full pages to the tree and go on behind them."""

    @initialize(page_size=st.sampled_from([1, 1, 2, 4, 16]), num_pages=st.integers(1, 40), need_sort=st.booleans())
    def construct(self, page_size, num_pages, need_sort):
        size = page_size * num_pages
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(size, need_sort=need_sort)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(size, page_size, need_sort=need_sort)
        self.model = Model(num_pages, page_size, lifo=page_size > 1, need_sort=need_sort)
        self.requests: list[list[int]] = []
        self.tree: list[int] = []
        self.snapshots: list[tuple] = []

    def page(self, slot):
        return slot // self.model.page_size

    def last_loc(self, rows):
        return [self.requests[row][-1] if self.requests[row] else -1 for row in rows]

    def choose_rows(self, data, new):
        self.requests += [[] for _ in range(new)]
        rows = data.draw(st.lists(st.sampled_from(range(len(self.requests))), unique=True, max_size=5))
        return rows, [len(self.requests[row]) for row in rows]

    @rule(n=st.integers(0, 5))
    def alloc(self, n):
        slots = self.allocator.alloc(n * self.model.page_size)
        assert as_list(slots) == self.model.alloc(n * self.model.page_size)
        if slots is not None:
            self.requests.append(slots.tolist())

    @rule(n=st.integers(0, 5))
    def alloc_pages(self, n):
        pages = self.allocator.alloc_pages(n)
        assert as_list(pages) == self.model.take(n, n)
        if pages is not None:
            P = self.model.page_size
            self.requests.append([page * P + k for page in pages.tolist() for k in range(P)])

    @rule(data=st.data(), new=st.integers(1, 3))
    def extend(self, data, new):
        rows, prefix_lens = self.choose_rows(data, new)
        seq_lens = [prefix + data.draw(st.integers(0, 2 * self.model.page_size + 1)) for prefix in prefix_lens]
        last_loc, total = self.last_loc(rows), sum(seq_lens) - sum(prefix_lens)
        slots = as_list(self.allocator.alloc_extend(prefix_lens, seq_lens, last_loc, total))
        assert slots == self.model.alloc_extend(prefix_lens, seq_lens, last_loc)
        for row, prefix, length in zip(rows, prefix_lens, seq_lens, strict=True):
            if slots is not None:
                self.requests[row] += slots[: length - prefix]
                slots = slots[length - prefix :]

    @rule(data=st.data(), new=st.integers(1, 2))
    def decode(self, data, new):
        rows, prefix_lens = self.choose_rows(data, new)
        seq_lens, last_loc = [prefix + 1 for prefix in prefix_lens], self.last_loc(rows)
        slots = as_list(self.allocator.alloc_decode(seq_lens, last_loc))
        assert slots == self.model.alloc_decode(seq_lens, last_loc)
        for row, slot in zip(rows, slots or [], strict=slots is not None):
            self.requests[row].append(slot)

    @rule(tokens=st.lists(st.integers(0, 40), max_size=4))
    def extend_pages_of_new_requests(self, tokens):
        pages = as_list(self.allocator.extend_pages([0] * len(tokens), tokens))
        assert pages == self.model.extend_pages([0] * len(tokens), tokens)
        if pages is not None:
            P = self.model.page_size
            self.requests.append([page * P + k for page in pages for k in range(P)])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        slots = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        private = data.draw(st.permutations([s for s in slots if self.model.owner[self.page(s)] == PRIVATE]))
        self.allocator.free(private)
        self.model.free(private)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def insert_into_tree(self, data):
        slots = data.draw(st.sampled_from(self.requests))
        full = len(slots) // self.model.page_size
        pages = dict.fromkeys(self.page(s) for s in slots[: full * self.model.page_size])
        adopted = [page for page in pages if self.model.owner[page] == PRIVATE]
        self.allocator.transfer(adopted, PageState.PRIVATE, PageState.TREE)
        for page in adopted:
            self.model.owner[page] = TREE
        self.tree += adopted

    @precondition(lambda self: self.tree)
    @rule(data=st.data())
    def evict(self, data):
        used = {self.page(slot) for slots in self.requests for slot in slots}
        victims = data.draw(st.permutations([page for page in self.tree if page not in used]))
        self.allocator.release(victims, PageState.TREE)
        self.model.release(list(victims))
        self.tree = [page for page in self.tree if page in used]

    @precondition(lambda self: self.model.depth < 2)
    @rule()
    def open_group(self):
        self.allocator.free_group_begin()
        self.model.depth += 1

    @precondition(lambda self: self.model.depth)
    @rule()
    def close_group(self):
        self.allocator.free_group_end()
        self.model.depth -= 1
        if self.model.depth == 0:
            self.model.join_pending()

    @rule()
    def merge_and_sort(self):
        self.allocator.merge_and_sort_free()
        self.model.merge_and_sort()

    @rule()
    def backup(self):
        self.snapshots.append((self.allocator.backup_state(), list(self.model.free_pages), self.model.reordered))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data):
        snapshot, free_then, reordered_then = data.draw(st.sampled_from(self.snapshots))
        free_now = self.model.free_pages
        taken = free_then[: len(free_then) - len(free_now)]
        exact = (
            self.model.depth == 0
            and reordered_then == self.model.reordered
            and all(self.model.owner[page] == PRIVATE for page in taken)
        )
        if not exact:
            with pytest.raises(SnapshotError):
                self.allocator.restore_state(snapshot)
            return
        self.allocator.restore_state(snapshot)
        self.model.free_pages = free_then
        for page in taken:
            self.model.owner[page] = 0
        self.requests = [[s for s in slots if self.page(s) not in taken] for slots in self.requests]
        self.snapshots = [
            kept for kept in self.snapshots if kept[2] < self.model.reordered or len(kept[1]) >= len(free_then)
        ]

    @rule(die=st.integers(0, 9))
    def clear(self, die):
        if die:  # Seldom, or nothing ever fills up.
            return
        self.allocator.clear()
        reordered = self.model.reordered
        self.model.clear()
        self.model.reordered = reordered + 1
        self.requests, self.tree = [], []

    @invariant()
    def same_books(self):
        if not hasattr(self, "allocator"):
            return
        assert self.allocator.free_pages.tolist() == self.model.free_pages
        assert self.allocator.release_pages.tolist() == self.model.release_pages
        assert self.allocator.states.tolist() == self.model.owner
        assert self.allocator.available_size() == self.model.available()
        assert self.allocator.pending_size() == len(self.model.pending) * self.model.page_size
