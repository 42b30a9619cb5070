"""Pages that come in runs: found, checked and passed on as page by page; and random lives, every call in runs."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from jaxcache.errors import DoubleFreeError, OwnershipError
from jaxcache.pages import runs
from jaxcache.pages.ownership import PageOwners, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.runs import ids_ascend, ids_of, runs_ascend, runs_of
from jaxcache.pages.token import TokenToKVPoolAllocator
from tests.pages.test_model import AllocatorLife

NUM_PAGES = 60
FREE, PRIVATE, TREE, PENDING = PageState.FREE, PageState.PRIVATE, PageState.TREE, PageState.PENDING


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs are worth their while from one page on."""
    monkeypatch.setattr(runs, "_MIN_PAGES", 2)
    monkeypatch.setattr(runs, "_MIN_RUN", 1)


class RunsLife(AllocatorLife):
    pass


TestRunsLife = RunsLife.TestCase
TestRunsLife.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

stretches = st.tuples(st.integers(-3, NUM_PAGES + 3), st.integers(1, 12)).map(lambda s: list(range(s[0], s[0] + s[1])))
lists_of_pages = st.lists(stretches, max_size=6).map(lambda parts: list(itertools.chain(*parts)))


@example(ids=[2**31 - 1, -(2**31)])
@given(ids=lists_of_pages | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
@settings(max_examples=300, deadline=None)
def test_runs_are_the_ids(ids):
    array = np.array(ids, np.int32)
    if len(ids) < 2:
        assert runs_of(array) is None
        return
    found = runs_of(array)
    assert found is not None
    pages = [page for start, stop in found for page in range(start, stop)]
    assert [(page + 2**31) % 2**32 - 2**31 for page in pages] == ids  # int32 goes round; a run there is beyond any pool
    assert all(second[0] != first[1] for first, second in itertools.pairwise(found))
    if min(ids) >= 0 and max(ids) < 2**31 - 1:
        assert ids_of(found).tolist() == ids
        assert runs_ascend(found) == ids_ascend(array) == (ids == sorted(set(ids)))


@given(
    states=st.lists(st.sampled_from([FREE, PRIVATE, TREE, PENDING]), min_size=NUM_PAGES, max_size=NUM_PAGES),
    owned=st.lists(st.tuples(st.integers(1, NUM_PAGES), st.integers(1, 12)), max_size=5),
    pages=lists_of_pages,
    strided=st.booleans(),
    in_order=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_they_are_checked_as_page_by_page(states, owned, pages, strided, in_order):
    owners = PageOwners(NUM_PAGES)
    book = [PageState.SINK, *states]
    for start, length in owned:  # so that many lists are right
        book[start : start + length] = [TREE] * len(book[start : start + length])
    owners.load(np.array(book, np.uint8))
    array = np.repeat(np.array(pages, np.int32), 2)[::2] if strided else np.array(pages, np.int32)
    outside = [page for page in pages if not 1 <= page <= NUM_PAGES]
    wrong = [page for page in pages if page not in outside and book[page] != TREE]
    if outside or wrong or len(set(pages)) < len(pages):
        if outside:
            kinds = {OwnershipError}
        elif wrong:
            kinds = {DoubleFreeError if book[page] in (FREE, PENDING) else OwnershipError for page in wrong}
        else:
            kinds = {KeyError}
        with pytest.raises(tuple(kinds)) as raised:
            owners.require("pages", array, TREE, KeyError, in_order)
        assert raised.type in kinds
        assert owners.states.tolist() == book
        return
    ids, rows = owners.require("pages", array, TREE, KeyError, in_order)
    assert ids.tolist() == (sorted(pages) if in_order else pages)
    owners.assign(rows, PRIVATE)
    assert owners.states.tolist() == [PRIVATE if page in pages else state for page, state in enumerate(book)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_prompt_in_long_runs_is_looked_up_as_it_is_in_production(monkeypatch, page_size):
    """With the real thresholds: freed in three runs out of order, one of them with a page that is somebody else's."""
    monkeypatch.undo()
    num_pages = 20_000
    make = TokenToKVPoolAllocator if page_size == 1 else lambda size: PagedTokenToKVPoolAllocator(size, page_size)
    allocator = make(num_pages * page_size)
    pages = allocator.alloc_pages(num_pages)
    mine = np.concatenate([pages[12_000:], pages[:3000], pages[5000:9000]])
    assert runs_of(mine) == [(12_001, 20_001), (1, 3001), (5001, 9001)]
    allocator.transfer(mine, PRIVATE, TREE)
    for wrong, message in [
        ([*mine.tolist(), 4000], "page 4000 is PRIVATE"),
        ([*mine.tolist(), 2000], "page 2000 is named twice"),
        ([0, *mine.tolist()], "page 0 is the sink"),
        ([*mine.tolist(), *range(19_000, 20_002)], "got page 20001"),
        ([-1, *mine.tolist()], "got page -1"),
    ]:
        with pytest.raises(OwnershipError, match=message):
            allocator.release(wrong, TREE)
    assert allocator.count(TREE) == len(mine)
    allocator.release(mine, TREE)
    assert allocator.count(FREE) == len(mine) == len(allocator.free_pages)
    expected = mine if page_size == 1 else np.sort(mine)
    assert allocator.free_pages.tolist() == expected.tolist()
    assert allocator.alloc_pages(9000).tolist() == expected[:9000].tolist()
    assert allocator.count(PRIVATE) == num_pages - len(mine) + 9000
