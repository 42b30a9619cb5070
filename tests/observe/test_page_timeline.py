"""A timeline of pages shows at every moment whose each page was, and changes nothing."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxcache import ArgumentError, PagedTokenToKVPoolAllocator, PageState
from jaxcache.observe.draw import PageTimeline
from tests.support.drawings import SVG


def owners(timeline: PageTimeline) -> dict[tuple[int, int], str]:
    """(page, moment) to whoever had it, from what hovering over the bars shows."""
    found = {}
    for title in ET.fromstring(timeline.draw().source).iter(f"{SVG}title"):
        page, start, stop, name = re.match(r"page (\d+), moments (\d+)-(\d+): (.*)", title.text or "").groups()  # type: ignore[union-attr]
        for moment in range(int(start), int(stop) + 1):
            assert (int(page), moment) not in found
            found[int(page), moment] = name
    return found


def taken(allocator: PagedTokenToKVPoolAllocator, n: int) -> np.ndarray:
    """So many pages."""
    pages = allocator.alloc_pages(n)
    assert pages is not None
    return pages


def lived(allocator: PagedTokenToKVPoolAllocator) -> PageTimeline:
    """Two requests: `a` leaves a page to the tree, which `b` reads, and frees the other."""
    timeline = PageTimeline(allocator)
    timeline.mark("nobody")
    a = taken(allocator, 2)
    timeline.mark("a comes", {"a": a})
    allocator.transfer(a[:1], PageState.PRIVATE, PageState.TREE)
    timeline.mark("a shares", {"a": a})
    allocator.release(a[1:], PageState.PRIVATE)
    timeline.mark("a ends", {})
    b = taken(allocator, 1)
    timeline.mark("b comes", {"b": [*a[:1], *b]})
    return timeline


def test_every_page_has_its_owner_at_every_moment() -> None:
    timeline = lived(PagedTokenToKVPoolAllocator(4 * 8, 8))
    assert owners(timeline) == {
        (1, 2): "a",
        (2, 2): "a",
        (1, 3): "tree, being read",
        (2, 3): "a",
        (1, 4): "tree",
        (1, 5): "tree, being read",
        (2, 5): "b",
    }
    assert repr(timeline) == "4 pages, 5 moments"


def test_captions_and_names_are_shown_as_text() -> None:
    allocator = PagedTokenToKVPoolAllocator(8, 8)
    timeline = PageTimeline(allocator)
    timeline.mark("<b>", {"<a>": taken(allocator, 1)})
    shown = [text.text for text in ET.fromstring(timeline.draw().source).iter(f"{SVG}text")]
    assert shown == ["<a>", "<b>", "p 1", "<a>"]


def test_requests_have_colours_of_their_own() -> None:
    allocator = PagedTokenToKVPoolAllocator(64, 8)
    timeline = PageTimeline(allocator)
    timeline.mark("", {name: taken(allocator, 1) for name in "abcdefgh"})
    bars = [rect for rect in ET.fromstring(timeline.draw().source).iter(f"{SVG}rect") if len(rect)]
    assert len({rect.get("fill") for rect in bars}) == 8


def test_of_many_requests_the_legend_names_none() -> None:
    allocator = PagedTokenToKVPoolAllocator(32 * 8, 8)
    timeline = PageTimeline(allocator)
    timeline.mark("", {f"request {i}": taken(allocator, 1) for i in range(30)})
    shown = [text.text for text in ET.fromstring(timeline.draw().source).iter(f"{SVG}text")]
    assert shown[:2] == ["requests, colours repeat", "p 1"]
    assert owners(timeline)[30, 1] == "request 29"


def test_what_nobody_claims_is_private() -> None:
    allocator = PagedTokenToKVPoolAllocator(64, 8)
    allocator.alloc_pages(1)
    timeline = PageTimeline(allocator)
    timeline.mark()
    assert owners(timeline) == {(1, 1): "private"}


def test_a_page_that_went_back_is_nobodys_whatever_a_reader_says() -> None:
    allocator = PagedTokenToKVPoolAllocator(64, 8)
    timeline = PageTimeline(allocator)
    timeline.mark("", {"a": [0, 3, *taken(allocator, 1)]})
    assert owners(timeline) == {(1, 1): "a"}


def test_a_timeline_without_moments_is_a_picture() -> None:
    timeline = PageTimeline(PagedTokenToKVPoolAllocator(64, 8))
    assert owners(timeline) == {} and repr(timeline) == "8 pages, 0 moments"


def test_pages_that_are_none_are_refused_and_nothing_is_marked() -> None:
    timeline = PageTimeline(PagedTokenToKVPoolAllocator(64, 8))
    with pytest.raises(ArgumentError, match=r"readers: a has pages outside \[0, 8\], got \[9\]"):
        timeline.mark("", {"a": [9]})
    assert repr(timeline) == "8 pages, 0 moments"


def test_many_pages_fit_a_screen() -> None:
    timeline = lived(PagedTokenToKVPoolAllocator(400, 1))
    assert float(ET.fromstring(timeline.draw().source).get("height", "inf")) < 1000
