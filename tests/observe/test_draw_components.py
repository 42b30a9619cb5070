"""Windows and states in the drawing of a tree: what is there, what was let go, and where a lookup may stop."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxcache import FULL, Component, RadixKey, RadixTree
from jaxcache.observe.draw import tree_map
from jaxcache.observe.look import LOCKED, looks
from tests.support.drawings import SVG

PAGE = 2
WINDOW, STATE = Component("window", 4), Component("state", 1, spans=False)
SHORT, LONG = RadixKey([1, 2, 3, 4]), RadixKey([1, 2, 3, 4, 5, 6, 7, 8, 9, 9])


def cells(tree: RadixTree) -> list[tuple[str, str]]:
    """Every box that is not a node: what hovering over it shows, and its colour."""
    drawn = ET.fromstring(tree_map(tree).source)
    return [
        (title.text or "", rect.get("fill", ""))
        for rect in drawn.iter(f"{SVG}rect")
        if (title := rect.find(f"{SVG}title")) is not None
    ]


def marks(tree: RadixTree) -> list[float]:
    """The tokens at which triangles stand."""
    scale = (920 - 24) / max(node.end for node in tree.nodes())
    places = (path.get("d", "") for path in ET.fromstring(tree_map(tree).source).iter(f"{SVG}path"))
    corners = [float(re.match(r"M([\d.]+) ", place).group(1)) for place in places]  # type: ignore[union-attr]
    return sorted(round((corner + 5 - 12) / scale, 1) for corner in corners)


def with_windows() -> RadixTree:
    """10 tokens in two nodes, with a window page for each page."""
    tree = RadixTree(PAGE, (FULL, WINDOW))
    tree.insert(SHORT, (np.array([1, 2], np.int32), np.array([1, 2], np.int32)))
    tree.insert(LONG, (np.arange(1, 6, dtype=np.int32), np.arange(1, 6, dtype=np.int32)))
    return tree


def test_a_window_page_has_a_cell_and_every_boundary_a_mark() -> None:
    tree = with_windows()
    assert [title for title, _ in cells(tree)] == [
        *["window 1-2, evicted next"] * 2,
        *["window 3-5, unlocked"] * 3,
    ]
    assert marks(tree) == [2, 4, 6, 8, 10]
    assert {"w 1", "w 5"} <= {text.text for text in ET.fromstring(tree_map(tree).source).iter(f"{SVG}text")}


def test_a_tombstone_is_dashed_and_nothing_stops_before_the_window_is_whole_again() -> None:
    tree = with_windows()
    tree.evict(1, component=1)  # the upper node's
    assert next(title for title, _ in cells(tree)) == "window none"
    dashed = [rect for rect in ET.fromstring(tree_map(tree).source).iter(f"{SVG}rect") if rect.get("stroke-dasharray")]
    assert len(dashed) == 2  # in the legend, and in the tree
    assert marks(tree) == [8, 10]  # 8 tokens: the last 4 are those behind the hole


def test_marks_are_where_a_match_stops() -> None:
    tree = with_windows()
    tree.evict(1, component=1)
    stops = {tree.match(LONG[:length]).length for length in range(11)} - {0}
    assert stops == {stop for look in looks(tree).values() for stop in look.stops} == set(marks(tree))


def test_what_a_lock_covers_is_amber_component_by_component() -> None:
    tree = with_windows()
    held = tree.lock(tree.match(LONG))
    assert [colour == LOCKED for _, colour in cells(tree)] == [False] * 2 + [True] * 3
    assert all(look.is_locked for look in looks(tree).values())
    tree.unlock(held)
    assert LOCKED not in [colour for _, colour in cells(tree)]


def test_a_state_stands_at_the_end_of_its_node() -> None:
    tree = RadixTree(PAGE, (FULL, STATE))
    tree.insert(SHORT, (np.array([1, 2], np.int32), np.array([7], np.int32)))
    tree.insert(LONG, (np.arange(1, 6, dtype=np.int32), np.array([9], np.int32)))
    assert [title for title, _ in cells(tree)] == ["state 7, evicted next", "state 9, unlocked"]
    assert marks(tree) == [4, 10]
    drawn = ET.fromstring(tree_map(tree).source)
    states = [rect for rect in drawn.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None and len(rect)]
    ends = [float(rect.get("x", "nan")) + float(rect.get("width", "nan")) for rect in states]
    assert ends == pytest.approx([12 + 4 / 10 * 896, 12 + 896], abs=3)
    tree.evict(1, component=1)
    assert [title for title, _ in cells(tree)] == ["state none", "state 9, evicted next"]
    assert marks(tree) == [10]


def test_a_tree_of_one_component_has_no_rows() -> None:
    tree = RadixTree(PAGE)
    tree.insert(SHORT, (np.array([1, 2], np.int32),))
    assert cells(tree) == [] and marks(tree) == []
    assert [look.stops for look in looks(tree).values()] == [()]


@pytest.mark.parametrize("leaves", [60, 300])
def test_a_wide_tree_leaves_the_rows_out(leaves: int) -> None:
    tree = RadixTree(1, (FULL, WINDOW))
    for i in range(leaves):
        tree.insert(RadixKey([i, 7]), (np.array([i, i], np.int32), np.array([1, 1], np.int32)))
    drawn = ET.fromstring(tree_map(tree).source)
    assert float(drawn.get("height", "inf")) < 2000
    assert len(list(drawn.iter(f"{SVG}g"))) == leaves and cells(tree) == []
