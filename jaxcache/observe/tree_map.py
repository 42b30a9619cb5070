"""A tree from left to right.

+-- tokens 0-8 ------------+-- 8-12 -----+     a box is a node, its width its tokens
| p 1-2                    | p 3         |
+--------------------------+-------------+
 [ - ][ - ]                 [ 4 ]              further components: a value a page, or one at the end of a node;
                        s2            s3       dashed where there is none (a tombstone)
                         ^             ^       where a lookup may stop
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jaxcache.index.node import Node
from jaxcache.index.tree import RadixTree
from jaxcache.observe.look import LOCKED, UNRANKED, Look, Part, TokenText, looks, namespace_name, shortened
from jaxcache.observe.svg import CHARACTER, HEADING, INK, MARGIN, PENCIL, WIDTH, Svg, box_at, document, legend, words_at

_LANE, _THINNEST_LANE, _USUAL_HEIGHT = 46, 5, 900
_ROW, _MARKS, _NARROWEST_PAGE = 17, 9, 4
_HOLE = 'rx="2" fill="#ffffff" stroke="#94a3b8" stroke-dasharray="3 2"'


def tree_map(tree: RadixTree, text: TokenText | None = None) -> Svg:
    """The tree from left to right: a box is a node, its width its tokens, and what it shares it spans.

    Amber is locked; unlocked nodes fade with age, and the palest is evicted next (`Policy.LRU`). Hovering over a box
    shows all of it. Further components have a row each below a node, in colours of their own: window pages, dashed
    where they were evicted, and the state saved at its end. A triangle is where a lookup may stop.

    Args:
      tree: Is only looked at.
      text: Makes tokens readable; numbers by default.
    """
    seen = looks(tree, text)
    lanes = _Lanes(tree, seen)
    parts: list[str] = []
    top = MARGIN
    if lanes.rows:
        parts.append(_legend(tree))
        top += HEADING
    for namespace, root in sorted(tree.roots.items()):
        parts.append(words_at(MARGIN, top + 13, namespace_name(namespace), PENCIL))
        top += HEADING
        top += lanes.draw(root.children.values(), top, parts) + MARGIN // 2
    if not seen:
        parts.append(words_at(MARGIN, top + 13, "nothing is cached", PENCIL))
        top += HEADING
    return Svg(document(parts, top + MARGIN), f"{len(seen)} nodes, {len(tree) * tree.page_size} tokens")


def _legend(tree: RadixTree) -> str:
    names = " and ".join(component.name for component in tree.components[1:])
    entries = [
        (f'rx="2" fill="{LOCKED}"', "locked"),
        (f'rx="2" fill="{UNRANKED}"', "unlocked"),
        (_HOLE, f"no {names.replace(' and ', ' or ')}"),
        ('fill="none"', "\u25b2 a lookup may stop here"),
    ]
    return legend(entries)


class _Lanes:
    """Where each box goes: subtrees below each other, a lane a leaf.

    Attributes:
      rows: Pixels below a box for what further components keep.
    """

    def __init__(self, tree: RadixTree, seen: dict[Node, Look]):
        leaves = sum(not node.children for node in seen)
        self._seen = seen
        self._page_size = tree.page_size
        self._scale = (WIDTH - 2 * MARGIN) / max((node.end for node in seen), default=1)
        self.rows = _ROW * (len(tree.components) - 1) + (_MARKS if len(tree.components) > 1 else 0)
        self._lane = min(_LANE, max(_THINNEST_LANE, _USUAL_HEIGHT // max(leaves, 1)))
        if self._lane < _LANE:
            self.rows = 0  # no room: what is there shows when hovering
        self._lane += self.rows

    def draw(self, nodes: Iterable[Node], top: int, parts: list[str]) -> int:
        """Draws these subtrees from `top` on; returns the height they take. No recursion: depth is no limit."""
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
            y, height = top + lane_of[node] * self._lane, lanes[node] * self._lane
            parts.append(self._node(self._seen[node], y, height))
        return end * self._lane

    def _node(self, look: Look, top: float, height: float) -> str:
        x, width = MARGIN + look.node.start * self._scale, look.node.tokens * self._scale
        parts = [_box(look, x, top, width, height - self.rows)]
        if self.rows:
            y = top + height - self.rows
            for part in look.parts[1:]:
                parts.append(self._pages(part, x, y, width) if part.component.spans else _state(part, x + width, y))
                y += _ROW
            if self._scale * self._page_size >= _NARROWEST_PAGE:
                parts += [_mark(MARGIN + stop * self._scale, y) for stop in look.stops]
        return "".join(parts)

    def _pages(self, part: Part, x: float, y: float, width: float) -> str:
        """A cell a page, with its id where there is room; one for all of them where they are too narrow."""
        value = part.value
        if value is None:
            return box_at(x + 2, y + 1, width - 4, _ROW - 4, _HOLE, part.words)
        cell = self._scale * self._page_size
        if cell < _NARROWEST_PAGE:
            return box_at(x + 2, y + 1, width - 4, _ROW - 4, f'rx="2" fill="{part.colour}"', part.words)
        cells = []
        for i, page in enumerate(value.tolist()):
            left = x + i * cell
            cells.append(box_at(left + 2, y + 1, cell - 4, _ROW - 4, f'rx="2" fill="{part.colour}"', part.words))
            words = f"{part.component.name[0]} {page}"
            if cell >= 8 + CHARACTER * len(words):
                cells.append(words_at(left + 6, y + 11, words, PENCIL, size=10))
        return "".join(cells)


def _place(nodes: Iterable[Node], lanes: dict[Node, int], lane_of: dict[Node, int], lane: int) -> int:
    """Puts nodes below each other from `lane` on; returns the lane after them."""
    for node in nodes:
        lane_of[node] = lane
        lane += lanes[node]
    return lane


def _box(look: Look, x: float, top: float, width: float, height: float) -> str:
    node = look.node
    gap = 2 if height > 10 else 1
    title = f"tokens {node.start}-{node.end}\npages {look.pages}\n{look.state}\n{shortened(look.tokens, 400)}"
    rect = f'x="{x + 1:.1f}" y="{top + 1:.1f}" width="{max(width - 2, 1):.1f}" height="{height - gap:.1f}"'
    parts = [f'<g><title>{escape(title)}</title><rect {rect} rx="{min(4, height / 4):g}" fill="{look.colour}"/>']
    room = int((width - 12) / CHARACTER)
    caption = f"p {look.parts[0].ids}" + (f"  ·  {look.state}" if look.state != "unlocked" else "")
    middle = top + height / 2
    if height >= 34:
        parts.append(words_at(x + 7, middle - 4, shortened(look.tokens, room)))
        parts.append(words_at(x + 7, middle + 12, shortened(caption, room), PENCIL))
    elif height >= 13:
        parts.append(words_at(x + 7, middle + 4, shortened(look.tokens, room)))
    return "".join(parts) + "</g>"


def _state(part: Part, right: float, y: float) -> str:
    """One value at the end of a node."""
    words = "-" if part.value is None else f"{part.component.name[0]} {part.ids}"
    width = 8 + CHARACTER * len(words)
    look = _HOLE if part.value is None else f'rx="6" fill="{part.colour}"'
    cell = box_at(right - width - 2, y + 1, width, _ROW - 4, look, part.words)
    return cell + words_at(right - width + 2, y + 11, words, PENCIL, size=10)


def _mark(x: float, y: float) -> str:
    return f'<path d="M{x - 5:.1f} {y + 6:.1f}l4 -6l4 6z" fill="{INK}"><title>a lookup may stop here</title></path>'
