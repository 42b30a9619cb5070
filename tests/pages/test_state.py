"""The in-graph allocator against its host twin: same slots and same free list, whatever the sequence of calls."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcache.errors import ArgumentError
from jaxcache.pages.allocator import FreeOrder, PageState
from jaxcache.pages.graph import PageAllocatorState, state_of
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator

ROWS, TOKENS, MAX_FREED = 4, 48, 16


@functools.partial(jax.jit, static_argnames="num_tokens")
def alloc_extend(state, prefix_lens, seq_lens, last_loc, num_tokens=TOKENS):
    return state.alloc_extend(prefix_lens, seq_lens, last_loc, num_tokens=num_tokens)


alloc_decode = jax.jit(PageAllocatorState.alloc_decode)
free = jax.jit(PageAllocatorState.free)


def free_list(state):
    size = len(state.ring)
    return [int(state.ring[(int(state.head) + i) % size]) for i in range(int(state.count))]


def padded(values, length, fill=0):
    return np.asarray([*values] + [fill] * (length - len(values)), np.int32)


def make_allocator(page_size, num_pages):
    if page_size == 1:
        return TokenToKVPoolAllocator(num_pages)
    return PagedTokenToKVPoolAllocator(page_size * num_pages, page_size)


class Twins:
    """A host allocator and its state, fed the same calls."""

    def __init__(self, page_size, num_pages):
        self.host = make_allocator(page_size, num_pages)
        self.state = state_of(self.host)
        self.requests: list[list[int]] = [[] for _ in range(ROWS)]

    def last_loc(self):
        return [request[-1] if request else -1 for request in self.requests]

    def extend(self, extensions):
        prefix_lens = [len(request) for request in self.requests]
        seq_lens = [p + e for p, e in zip(prefix_lens, extensions, strict=True)]
        expected = self.host.alloc_extend(prefix_lens, seq_lens, self.last_loc(), sum(extensions))
        rows = [np.asarray(row, np.int32) for row in (prefix_lens, seq_lens, self.last_loc())]
        self.state, slots, ok = alloc_extend(self.state, *rows)
        assert bool(ok) == (expected is not None)
        expected = [] if expected is None else expected.tolist()
        assert np.asarray(slots).tolist() == padded(expected, TOKENS).tolist()
        for request, extension in zip(self.requests, extensions if ok else [], strict=bool(ok)):
            request += expected[:extension]
            expected = expected[extension:]

    def decode(self, active):
        rows = [i for i in range(ROWS) if active[i]]
        seq_lens = [len(self.requests[i]) + 1 if active[i] else 0 for i in range(ROWS)]
        last_loc = self.last_loc()
        expected = self.host.alloc_decode([seq_lens[i] for i in rows], [last_loc[i] for i in rows])
        self.state, slots, ok = alloc_decode(self.state, np.asarray(seq_lens, np.int32), np.asarray(last_loc, np.int32))
        assert bool(ok) == (expected is not None)
        by_row = dict(zip(rows, expected, strict=True)) if ok else {}
        assert np.asarray(slots).tolist() == [by_row.get(i, 0) for i in range(ROWS)]
        for i, slot in by_row.items():
            self.requests[i].append(int(slot))

    def finish(self, row, backwards):
        pages = list(dict.fromkeys(slot // self.host.page_size for slot in self.requests[row]))[:MAX_FREED]
        pages = pages[::-1] if backwards else pages
        self.requests[row] = []
        self.host.release(pages, PageState.PRIVATE)
        self.state = free(self.state, padded(pages, MAX_FREED), len(pages))


extensions = st.lists(st.integers(0, TOKENS // ROWS), min_size=ROWS, max_size=ROWS)
calls = st.one_of(
    st.tuples(st.just("extend"), extensions),
    st.tuples(st.just("decode"), st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("finish"), st.integers(0, ROWS - 1), st.booleans()),
)


@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 16), (2, 7), (4, 10)])
@settings(max_examples=60, deadline=None)
@given(life=st.lists(calls, max_size=25))
def test_state_equals_its_host_twin(page_size, num_pages, life):
    twins = Twins(page_size, num_pages)
    for name, *arguments in life:
        getattr(twins, name)(*arguments)
        assert free_list(twins.state) == twins.host.free_pages.tolist()
        assert 0 <= int(twins.state.head) < num_pages  # It must not creep towards 2**31.


def test_multi_step_decode_in_a_scan_is_absorbed_by_the_host():
    host = PagedTokenToKVPoolAllocator(64, 4)
    prompt = host.alloc_extend([0, 0, 0], [5, 4, 3], [-1, -1, -1], 12)
    seq_lens, last_loc = np.asarray([5, 4, 3, 0], np.int32), padded(prompt[[4, 8, 11]], 4)

    def step(carry, _):
        state, lengths, last = carry
        lengths = jnp.where(lengths > 0, lengths + 1, 0)
        state, slots, ok = state.alloc_decode(lengths, last)
        return (state, lengths, slots), (slots, ok)

    (state, _, _), (slots, ok) = jax.jit(lambda carry: jax.lax.scan(step, carry, length=9))(
        (state_of(host), seq_lens, last_loc)
    )
    assert ok.all()
    lengths, last = seq_lens[:3], last_loc[:3]
    for row in np.asarray(slots):
        lengths = lengths + 1
        last = host.alloc_decode(lengths, last)
        assert row.tolist() == [*last, 0]
    assert free_list(state) == host.free_pages.tolist()


@pytest.mark.parametrize(
    ("prefix_lens", "seq_lens", "why"),
    [
        ([0, 0], [30, 30], "16 pages are needed, 15 are free"),
        ([0, 5], [4, 4], "a length shrinks"),
        ([-1, 0], [4, 4], "a length is negative"),
        ([0, 0], [24, 25], "one token more than num_tokens"),
    ],
)
def test_extend_that_cannot_work_changes_nothing(prefix_lens, seq_lens, why):
    state = state_of(PagedTokenToKVPoolAllocator(60, 4))
    last_loc = np.asarray([-1, -1], np.int32)
    num_tokens = 60 if "pages" in why else TOKENS
    lengths = np.asarray(prefix_lens, np.int32), np.asarray(seq_lens, np.int32)
    after, slots, ok = alloc_extend(state, *lengths, last_loc, num_tokens=num_tokens)
    assert not ok, why
    assert not slots.any()
    assert free_list(after) == free_list(state)


def test_decode_that_cannot_work_changes_nothing():
    host = PagedTokenToKVPoolAllocator(8, 4)
    state = state_of(host)
    for seq_lens in ([1, 1, 1], [1, -3, 0]):
        after, slots, ok = alloc_decode(state, np.asarray(seq_lens, np.int32), np.full(3, -1, np.int32))
        assert not ok
        assert not slots.any()
        assert free_list(after) == free_list(state)


@pytest.mark.parametrize("free_order", FreeOrder)
def test_freeing_more_than_can_be_in_use_frees_nothing(free_order):
    state = dataclasses.replace(state_of(PagedTokenToKVPoolAllocator(12, 4)), free_order=free_order)
    after = free(state, np.asarray([2, 0], np.int32), 1)
    assert free_list(after) == [1, 2, 3]
    assert free_list(free(state, np.asarray([2, 0], np.int32), -1)) == [1, 2, 3]


def test_state_is_a_pytree_of_three_arrays():
    state = state_of(PagedTokenToKVPoolAllocator(12, 4))
    leaves, treedef = jax.tree.flatten(state)
    assert [leaf.shape for leaf in leaves] == [(3,), (), ()]
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert jax.tree.unflatten(treedef, leaves).page_size == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.head = 3


def test_nothing_recompiles_as_pages_come_and_go():
    traces = []

    @jax.jit
    def step(state, seq_lens, last_loc):
        traces.append(1)
        state, slots, _ = state.alloc_decode(seq_lens, last_loc)
        return state.free(slots, 1)

    state = state_of(TokenToKVPoolAllocator(12))
    for length in range(1, 6):
        state = step(state, np.asarray([length, 0], np.int32), np.asarray([length - 2, -1], np.int32))
    assert len(traces) == 1


def test_state_of_refuses_what_a_graph_cannot_do():
    with pytest.raises(ArgumentError, match="need_sort"):
        state_of(TokenToKVPoolAllocator(4, need_sort=True))
    allocator = TokenToKVPoolAllocator(4)
    slots = allocator.alloc(2)
    with allocator.free_group():
        allocator.free(slots)
        with pytest.raises(ArgumentError, match="pending"):
            state_of(allocator)
    assert free_list(state_of(allocator)) == [3, 4, 1, 2]
