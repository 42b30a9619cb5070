"""Drawings of a tree and of the pages, for the place where you look at them.

    terminal                 rich_tree(tree)     rich, extra `cli`
    any notebook, GitHub     tree_map(tree)      SVG, nothing to install
    live notebook            icicle(tree)        plotly, extra `viz`; `view(tree)` also shows where plotly does not run
    who owns which page      page_map(allocator) SVG; moment after moment: PageTimeline(allocator)

A drawing shows the moment it was made. It changes nothing, not even recency. All are O(nodes and their values).
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from jaxcache.errors import UnsupportedError
from jaxcache.index.node import Node
from jaxcache.index.tree import RadixTree
from jaxcache.observe.look import Look, TokenText, looks, namespace_name, outline, shortened
from jaxcache.observe.page_map import PageTimeline, page_map
from jaxcache.observe.svg import Svg
from jaxcache.observe.tree_map import tree_map

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.text import Text
    from rich.tree import Tree

__all__ = ["PageTimeline", "Svg", "TreeView", "icicle", "page_map", "rich_tree", "tree_map", "view"]

_LABEL_CHARACTERS = 60


def rich_tree(tree: RadixTree, text: TokenText | None = None, max_nodes: int = 500) -> Tree:
    """The tree for a terminal: `rich.print(rich_tree(tree))`.

    Yellow is locked, red is evicted next.

    Args:
      tree: Is only looked at.
      text: Makes tokens readable; numbers by default.
      max_nodes: Where to stop.

    Raises:
      UnsupportedError: rich is not installed.
    """
    try:
        from rich.tree import Tree
    except ImportError as error:
        raise UnsupportedError("rich_tree needs rich: pip install 'jaxcache[cli]'") from error
    seen = looks(tree, text)
    top = Tree(f"{len(seen)} nodes, {len(tree) * tree.page_size} tokens in pages of {tree.page_size}")
    left = max_nodes
    for namespace, root in sorted(tree.roots.items()):
        todo = [(child, top.add(namespace_name(namespace))) for child in reversed(root.children.values())]
        while todo and left:
            node, above = todo.pop()
            branch = above.add(_line(seen[node]))
            todo += [(child, branch) for child in reversed(node.children.values())]
            left -= 1
    if len(seen) > max_nodes:
        top.add(f"... {len(seen) - max_nodes} more nodes")
    return top


def _line(look: Look) -> Text:
    from rich.text import Text

    style = "yellow" if look.is_locked else "red" if look.age == 1 else "green"
    return Text.assemble(
        (f"{look.node.start}-{look.node.end}  ", "dim"),
        (shortened(look.tokens, _LABEL_CHARACTERS), style),
        (f"  pages {look.pages}", "dim"),
        ("" if look.state == "unlocked" else f"  {look.state}", style),
    )


def icicle(tree: RadixTree, text: TokenText | None = None) -> go.Figure:
    """The tree as an interactive plotly figure: a click on a node zooms in.

    The width of a node is its tokens and those of what is below it. Amber is locked; unlocked nodes fade with age, and
    the palest is evicted next (`Policy.LRU`). Hovering shows tokens, page ids and locks.

    Args:
      tree: Is only looked at.
      text: Makes tokens readable; numbers by default.

    Raises:
      UnsupportedError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise UnsupportedError("icicle needs plotly: pip install 'jaxcache[viz]'") from error
    boxes = _boxes(tree, text)
    figure = go.Figure(
        go.Icicle(
            ids=[box["id"] for box in boxes],
            parents=[box["parent"] for box in boxes],
            labels=[box["label"] for box in boxes],
            values=[box["tokens"] for box in boxes],
            customdata=[box["hover"] for box in boxes],
            marker={"colors": [box["colour"] for box in boxes], "line": {"color": "white", "width": 1}},
            branchvalues="remainder",
            tiling={"orientation": "v"},
            textfont={"color": "#0f172a", "family": "monospace"},
            hovertemplate="%{customdata}<extra></extra>",
            leaf={"opacity": 1},
            root={"color": "#cbd5e1"},
        )
    )
    return figure.update_layout(margin={"t": 28, "l": 4, "r": 4, "b": 4}, height=420, template="plotly_white")


def _boxes(tree: RadixTree, text: TokenText | None) -> list[dict[str, Any]]:
    """What plotly wants to know of each box: the whole cache, its namespaces, its nodes."""
    whole = f"{len(tree) * tree.page_size} tokens"
    boxes = [{"id": "cache", "parent": "", "label": "cache", "tokens": 0, "hover": whole, "colour": "#cbd5e1"}]
    ids: dict[Node, str] = {}
    for i, (namespace, root) in enumerate(sorted(tree.roots.items())):
        ids[root] = f"namespace {i}"
        name = _plain(namespace_name(namespace))
        boxes.append({**boxes[0], "id": ids[root], "parent": "cache", "label": name, "hover": name})
    for i, (node, look) in enumerate(looks(tree, text).items()):
        ids[node] = f"node {i}"
        boxes.append(
            {
                "id": ids[node],
                "parent": ids[node.parent],  # type: ignore[index]
                "label": _plain(shortened(look.tokens, _LABEL_CHARACTERS)),
                "tokens": node.end - node.start,
                "hover": _hover(look),
                "colour": look.colour,
            }
        )
    return boxes


def _hover(look: Look) -> str:
    node = look.node
    lines = [
        f"<b>tokens {node.start}-{node.end}</b>",
        _plain(shortened(look.tokens, 200)),
        f"pages {shortened(look.pages, 200)}",
        look.state,
    ]
    return "<br>".join(lines)


def _plain(words: str) -> str:
    """Words in which plotly sees no markup."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def view(tree: RadixTree, text: TokenText | None = None) -> TreeView:
    """The tree in a notebook: the icicle where plotly runs, else the SVG (as on GitHub), else text."""
    return TreeView(tree, text)


class TreeView:
    """A tree as everything a notebook may be able to show. Made by `view`."""

    def __init__(self, tree: RadixTree, text: TokenText | None):
        self._bundle: dict[str, Any] = {"text/plain": outline(tree, text), "image/svg+xml": tree_map(tree, text).source}
        if importlib.util.find_spec("plotly") is not None:
            self._bundle["application/vnd.plotly.v1+json"] = json.loads(icicle(tree, text).to_json() or "{}")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return self._bundle

    def __repr__(self) -> str:
        return self._bundle["text/plain"]
