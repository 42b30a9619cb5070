"""Drawings show every node once, in its place, and change nothing."""

import importlib.util
import io
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console

from jaxcache import FULL, Component, Namespace, PagedTokenToKVPoolAllocator, Policy, RadixCache, RadixKey, RadixTree
from jaxcache.errors import UnsupportedError
from jaxcache.index.check import draw as internals
from jaxcache.observe.draw import icicle, page_map, rich_tree, tree_map, view
from jaxcache.observe.look import LOCKED, namespace_name, runs
from tests.support.drawings import SVG

PAGE = 2


def grown(policy: Policy = Policy.LRU) -> RadixTree:
    """Two branches, one of them in two leaves, and another namespace; inserted oldest first.

    1 2 3 4 --- 5 6
          `---- 7 8 9 9          tenant: 1 2
    """
    tree = RadixTree(PAGE, policy=policy)
    page = 0
    for tokens, space in (([1, 2, 3, 4, 5, 6], None), ([1, 2, 3, 4, 7, 8, 9, 9], None), ([1, 2], "tenant")):
        pages = np.arange(page + 1, page + 1 + len(tokens) // PAGE, dtype=np.int32)
        page += len(pages)
        tree.insert(RadixKey(tokens, space), (pages,))
    return tree


def printed(tree: RadixTree, **options: object) -> str:
    """What a terminal of plenty of columns shows."""
    out = io.StringIO()
    Console(file=out, width=200).print(rich_tree(tree, **options))
    return out.getvalue()


def boxes(source: str) -> list[dict[str, float | str]]:
    """The boxes of a tree map: corners, colour and what hovering shows."""
    found = []
    for group in ET.fromstring(source).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None and rect is not None
        sizes = {name: float(rect.get(name, "nan")) for name in ("x", "y", "width", "height")}
        found.append({**sizes, "fill": rect.get("fill", ""), "title": title.text or ""})
    return found


def test_terminal_shows_every_node_with_pages_and_locks() -> None:
    tree = grown()
    held = tree.lock(tree.match(RadixKey([1, 2, 3, 4, 5, 6])))
    lines = printed(tree).splitlines()
    assert lines[0] == "4 nodes, 12 tokens in pages of 2"
    assert any("0-4  1 2 3 4  pages 1-2  locked by 1" in line for line in lines)
    assert any("4-6  5 6  pages 3  locked by 1" in line for line in lines)
    assert any("4-8  7 8 9 9  pages 6-7  evicted next" in line for line in lines)
    assert any("namespace extra_key=tenant" in line for line in lines)
    tree.unlock(held)
    assert "locked" not in printed(tree)


def test_terminal_stops_at_max_nodes() -> None:
    assert "... 2 more nodes" in printed(grown(), max_nodes=2)


def test_markup_in_tokens_is_text() -> None:
    tree = grown()
    marked = "[red]<b>&"
    assert "[red]<b>&" in printed(tree, text=lambda tokens: marked)
    assert all(marked in str(box["title"]) for box in boxes(tree_map(tree, lambda tokens: marked).source))
    assert "<b>&" not in "".join(map(str, icicle(tree, lambda tokens: marked).data[0].labels))


def test_icicle_is_as_wide_as_the_tokens() -> None:
    tree = grown()
    held = tree.lock(tree.match(RadixKey([1, 2])))  # splits the first node, and locks its upper half
    (trace,) = icicle(tree).data
    assert isinstance(trace, go.Icicle) and trace.branchvalues == "remainder"
    assert len(set(trace.ids)) == len(trace.ids)
    assert set(trace.parents) <= {*trace.ids, ""}
    nodes = [i for i, name in enumerate(trace.ids) if name.startswith("node")]
    assert len(nodes) == 5
    assert sum(trace.values) == sum(trace.values[i] for i in nodes) == 12
    locked = [trace.labels[i] for i in nodes if trace.marker.colors[i] == LOCKED]
    assert locked == ["1 2"]
    hover = "".join(trace.customdata)
    assert "pages 6-7" in hover and "locked by 1" in hover and hover.count("evicted next") == 1
    tree.unlock(held)
    assert LOCKED not in icicle(tree).data[0].marker.colors


def test_tree_map_boxes_stand_where_their_tokens_are() -> None:
    found = boxes(tree_map(grown()).source)
    assert len(found) == 4
    places = {}
    for box in found:
        start, stop = map(int, re.match(r"tokens (\d+)-(\d+)", str(box["title"])).groups())  # type: ignore[union-attr]
        places[str(box["title"]).splitlines()[-1]] = box
        scale = (float(box["width"]) + 2) / (stop - start)
        assert scale == pytest.approx((920 - 24) / 8, abs=0.1)
        assert float(box["x"]) == pytest.approx(12 + start * scale + 1, abs=0.5)
    above, left, right = places["1 2 3 4"], places["5 6"], places["7 8 9 9"]
    assert above["height"] == pytest.approx(float(left["height"]) + float(right["height"]) + 2)
    assert abs(float(left["y"]) - float(right["y"])) >= float(left["height"])


def test_age_fades_a_node_and_use_refreshes_it() -> None:
    def colour(tree: RadixTree, tokens: str) -> str:
        return next(str(box["fill"]) for box in boxes(tree_map(tree).source) if str(box["title"]).endswith(tokens))

    tree = grown()
    old, young = colour(tree, "\n5 6"), colour(tree, "\n7 8 9 9")
    tree.match(RadixKey([1, 2, 3, 4, 5, 6]))
    assert old == colour(tree, "\n7 8 9 9") == "#e8ecf1" and colour(tree, "\n5 6") != old != young


def test_a_policy_without_recency_has_one_colour() -> None:
    assert len({box["fill"] for box in boxes(tree_map(grown(Policy.PRIORITY)).source)}) == 1


def test_an_empty_tree() -> None:
    empty = RadixTree(PAGE)
    assert "nothing is cached" in tree_map(empty).source
    assert sum(icicle(empty).data[0].values) == 0
    assert "0 nodes" in printed(empty)
    assert repr(view(empty)) == "nothing is cached"


def test_a_deep_tree_needs_no_recursion() -> None:
    tree = RadixTree(1)
    deep = sys.getrecursionlimit() + 200
    for i in range(1, deep):
        tree.insert(RadixKey(np.arange(i, dtype=np.int32)), (np.arange(i, dtype=np.int32),))
    assert len(boxes(tree_map(tree).source)) == deep - 1
    assert len(icicle(tree).data[0].ids) == deep + 1
    assert f"{deep - 1} nodes" in printed(tree, max_nodes=3)


def test_a_wide_tree_stays_on_a_screen_or_two() -> None:
    tree = RadixTree(1)
    for i in range(300):
        tree.insert(RadixKey([i, 7]), (np.array([i, i], np.int32),))
    drawn = ET.fromstring(tree_map(tree).source)
    assert float(drawn.get("height", "inf")) < 2000
    assert len(boxes(tree_map(tree).source)) == 300


def test_several_components_are_shown_by_name() -> None:
    tree = RadixTree(1, (FULL, Component("state", 1, spans=False)))
    key = RadixKey([1, 2])
    tree.insert(key, (np.array([4, 5], np.int32), np.array([9], np.int32)))
    assert "pages full 4-5, state 9" in printed(tree)
    tree.evict(1, component=1)
    assert printed(tree).splitlines()[0].startswith("0 nodes")  # a leaf that nothing can stop at goes


def test_drawing_changes_nothing() -> None:
    tree = grown()
    before, order = internals(tree), list(tree.policies[0])
    rich_tree(tree), icicle(tree), tree_map(tree), view(tree)
    assert internals(tree) == before and list(tree.policies[0]) == order


def test_a_notebook_gets_what_it_can_show() -> None:
    bundle = view(grown())._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/svg+xml", "application/vnd.plotly.v1+json"}
    assert bundle["application/vnd.plotly.v1+json"]["data"][0]["type"] == "icicle"
    assert "4-8  7 8 9 9  pages 6-7" in bundle["text/plain"]


@pytest.mark.parametrize(("package", "draw"), [("rich.tree", rich_tree), ("plotly.graph_objects", icicle)])
def test_a_missing_extra_is_named(package: str, draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedError, match=rf"needs {package.split('.')[0]}: pip install 'jaxcache\["):
        draw(grown())


def test_a_view_without_plotly_is_still_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(view(grown())._repr_mimebundle_()) == {"text/plain", "image/svg+xml"}


def test_page_map_counts_what_the_allocator_owns() -> None:
    allocator = PagedTokenToKVPoolAllocator(20 * 4, 4)
    cache = RadixCache(None, allocator, 4)
    slots = allocator.alloc(24)
    assert slots is not None
    cache.insert(np.arange(12), slots[:12])
    drawn = page_map(allocator)
    assert repr(drawn) == "pages: 14 free, 3 private, 3 tree, 1 sink"
    titles = [title.text for title in ET.fromstring(drawn.source).iter(f"{SVG}title")]
    states = ["sink", *["tree"] * 3, *["private"] * 3, "free"]
    assert titles[:8] == [f"page {i}: {state}" for i, state in enumerate(states)]
    assert len(titles) == 21


def test_page_map_of_a_large_pool_stays_small() -> None:
    allocator = PagedTokenToKVPoolAllocator(100_000, 4)
    drawn = page_map(allocator)
    assert len(list(ET.fromstring(drawn.source).iter(f"{SVG}title"))) <= 2048
    assert "25000 free" in repr(drawn)


@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        (Namespace(), "default namespace"),
        (Namespace(extra_key="a", lora_id="b"), "namespace extra_key=a, lora_id=b"),
        (Namespace(media=(b"\x01\xff",)), "namespace media=01ff"),
        (Namespace(cache_salt="secret"), "namespace cache_salt=..."),
    ],
)
def test_namespaces_are_readable_and_salts_stay_secret(namespace: Namespace, name: str) -> None:
    assert namespace_name(namespace.encode()) == name


def test_runs_of_pages() -> None:
    assert runs(np.array([3, 4, 5, 9, 8, 7, 1])) == "3-5 9 8 7 1"
