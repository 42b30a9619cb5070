"""Pictures as SVG: nothing to install, and they show wherever a notebook is shown."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from jaxcache.index.node import Node
from jaxcache.index.tree import RadixTree
from jaxcache.observe.look import LOCKED, Look, TokenText, looks, namespace_name, shortened
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState

_WIDTH, _MARGIN, _HEADING, _CHAR = 920, 12, 24, 6.6
_LANE, _THINNEST_LANE, _USUAL_HEIGHT = 46, 5, 900
_FONT = "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace"
_PAGE_COLOURS = {
    PageState.FREE: "#e8ecf1",
    PageState.PRIVATE: LOCKED,
    PageState.TREE: "#5ecdbe",
    PageState.IN_FLIGHT: "#6ea8fe",
    PageState.QUARANTINED: "#ef6f6c",
    PageState.PENDING: "#c4b5fd",
    PageState.SINK: "#475569",
}
_MAX_CELLS, _CELL = 2048, 14


class Svg:
    """A picture: shown as such by a notebook, as its description elsewhere.

    Attributes:
      source: The SVG document.
      text: What it shows, in words.
    """

    def __init__(self, source: str, text: str):
        self.source = source
        self.text = text

    def _repr_svg_(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return self.text


def tree_map(tree: RadixTree, text: TokenText | None = None) -> Svg:
    """The tree from left to right: a box is a node, its width its tokens, and what it shares it spans.

    Amber is locked; unlocked nodes fade with age, and the palest is evicted next (`Policy.LRU`). Hovering over a box
    shows all of it.

    Args:
      tree: Is only looked at.
      text: Makes tokens readable; numbers by default.
    """
    seen = looks(tree, text)
    scale = (_WIDTH - 2 * _MARGIN) / max((node.end for node in seen), default=1)
    leaves = sum(not node.children for node in seen)
    lane = min(_LANE, max(_THINNEST_LANE, _USUAL_HEIGHT // max(leaves, 1)))
    parts: list[str] = []
    top = _MARGIN
    for namespace, root in sorted(tree.roots.items()):
        parts.append(_text(_MARGIN, top + 13, namespace_name(namespace), "#475569"))
        top += _HEADING
        top += _boxes(root.children.values(), seen, top, lane, scale, parts) + _MARGIN // 2
    if not seen:
        parts.append(_text(_MARGIN, top + 13, "nothing is cached", "#475569"))
        top += _HEADING
    return Svg(_document(parts, top + _MARGIN), f"{len(seen)} nodes, {len(tree) * tree.page_size} tokens")


def _boxes(nodes: Iterable[Node], seen: dict[Node, Look], top: int, lane: int, scale: float, parts: list[str]) -> int:
    """Draws subtrees below each other, a lane a leaf; returns the height they take. No recursion: depth is no limit."""
    order: list[Node] = []
    todo = list(nodes)
    first = todo[:]
    while todo:
        node = todo.pop()
        order.append(node)
        todo.extend(node.children.values())
    lanes: dict[Node, int] = {}
    for node in reversed(order):
        lanes[node] = sum(lanes[child] for child in node.children.values()) or 1
    lane_of: dict[Node, int] = {}
    end = _place(first, lanes, lane_of, 0)
    for node in order:
        _place(node.children.values(), lanes, lane_of, lane_of[node])
        parts.append(_box(seen[node], top + lane_of[node] * lane, lanes[node] * lane, scale))
    return end * lane


def _place(nodes: Iterable[Node], lanes: dict[Node, int], lane_of: dict[Node, int], lane: int) -> int:
    """Puts nodes below each other from `lane` on; returns the lane after them."""
    for node in nodes:
        lane_of[node] = lane
        lane += lanes[node]
    return lane


def _box(look: Look, top: float, height: float, scale: float) -> str:
    node = look.node
    x, width = _MARGIN + node.start * scale, (node.end - node.start) * scale
    gap = 2 if height > 10 else 1
    title = f"tokens {node.start}-{node.end}\npages {look.pages}\n{look.state}\n{shortened(look.tokens, 400)}"
    rect = f'x="{x + 1:.1f}" y="{top + 1:.1f}" width="{max(width - 2, 1):.1f}" height="{height - gap:.1f}"'
    parts = [f'<g><title>{escape(title)}</title><rect {rect} rx="{min(4, height / 4):g}" fill="{look.colour}"/>']
    room = int((width - 12) / _CHAR)
    caption = f"p {look.pages}" + (f"  ·  {look.state}" if look.state != "unlocked" else "")
    middle = top + height / 2
    if height >= 34:
        parts.append(_text(x + 7, middle - 4, shortened(look.tokens, room), "#0f172a"))
        parts.append(_text(x + 7, middle + 12, shortened(caption, room), "#475569"))
    elif height >= 13:
        parts.append(_text(x + 7, middle + 4, shortened(look.tokens, room), "#0f172a"))
    return "".join(parts) + "</g>"


def page_map(allocator: BaseTokenToKVPoolAllocator) -> Svg:
    """Every page as a square in the colour of its state, page 0 first, with a count of each state.

    Of more than 2,048 pages, a square stands for several and has the colour of most of them. O(pages).
    """
    states = np.asarray(allocator.states)
    per_cell = -(-len(states) // _MAX_CELLS)
    padded = np.pad(states, (0, -len(states) % per_cell), mode="edge").reshape(-1, per_cell)
    votes = np.stack([(padded == state).sum(axis=1) for state in PageState])
    cells = votes.argmax(axis=0)
    columns = (_WIDTH - 2 * _MARGIN) // _CELL
    counts = {state: int((states == state).sum()) for state in PageState}
    parts = _legend(counts)
    top = _MARGIN + _HEADING
    for i, state in enumerate(cells.tolist()):
        x, y = _MARGIN + i % columns * _CELL, top + i // columns * _CELL
        name = f"page {i}" if per_cell == 1 else f"pages {i * per_cell}-{min((i + 1) * per_cell, len(states)) - 1}"
        title = f"<title>{name}: {PageState(state).name.lower()}</title>"
        box = f'x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="2"'
        parts.append(f'<rect {box} fill="{_PAGE_COLOURS[PageState(state)]}">{title}</rect>')
    words = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    return Svg(_document(parts, top + -(-len(cells) // columns) * _CELL + _MARGIN), f"pages: {words}")


def _legend(counts: dict[PageState, int]) -> list[str]:
    parts: list[str] = []
    x = float(_MARGIN)
    for state, count in counts.items():
        if count:
            words = f"{state.name.lower()} {count:,}"
            parts.append(f'<rect x="{x:.1f}" y="{_MARGIN + 3}" width="10" height="10" fill="{_PAGE_COLOURS[state]}"/>')
            parts.append(_text(x + 15, _MARGIN + 12, words, "#475569"))
            x += 15 + (len(words) + 3) * _CHAR
    return parts


def _text(x: float, y: float, words: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(words)}</text>'


def _document(parts: list[str], height: float) -> str:
    """A page of its own white, so that it reads the same on a dark screen."""
    size = f'viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}"'
    style = f'font-family="{_FONT}" font-size="11"'
    paper = f'<rect width="{_WIDTH}" height="{height:.0f}" rx="6" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{paper}{"".join(parts)}</svg>'
