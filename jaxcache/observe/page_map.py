"""Pages in the colour of their owners: at this moment, or moment after moment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxcache.errors import ArgumentError
from jaxcache.observe.look import LOCKED
from jaxcache.observe.svg import CHARACTER, HEADING, INK, MARGIN, PENCIL, WIDTH, Svg, box_at, document, legend, words_at
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState

if TYPE_CHECKING:
    from jaxtyping import Int

_COLOURS = {
    PageState.FREE: "#e8ecf1",
    PageState.PRIVATE: LOCKED,
    PageState.TREE: "#5ecdbe",
    PageState.IN_FLIGHT: "#6ea8fe",
    PageState.QUARANTINED: "#ef6f6c",
    PageState.PENDING: "#c4b5fd",
    PageState.SINK: "#475569",
    PageState.PLANNED: "#f9a8d4",
}
_MAX_CELLS, _CELL = 2048, 14
_READ = "#2a9d8f"
_REQUESTS = ("#f6c453", "#8ab4f8", "#f4978e", "#b79ced", "#a5c96a", "#e6a5d0", "#d3a273", "#7fb2b8")
_GUTTER, _TALLEST_ROW, _USUAL_HEIGHT, _TURN = 34, 14, 460, 28
_SHARED, _FIRST_REQUEST = len(PageState), len(PageState) + 1


def page_map(allocator: BaseTokenToKVPoolAllocator) -> Svg:
    """Every page as a square in the colour of its state, page 0 first, with a count of each state.

    Of more than 2,048 pages, a square stands for several and has the colour of most of them. O(pages).
    """
    states = np.asarray(allocator.states)
    per_cell = -(-len(states) // _MAX_CELLS)
    padded = np.pad(states, (0, -len(states) % per_cell), mode="edge").reshape(-1, per_cell)
    votes = np.stack([(padded == state).sum(axis=1) for state in PageState])
    cells = votes.argmax(axis=0)
    columns = (WIDTH - 2 * MARGIN) // _CELL
    counts = {state: count for state in PageState if (count := int((states == state).sum()))}
    look = {state: f'fill="{_COLOURS[state]}"' for state in PageState}
    parts = [legend((look[state], f"{state.name.lower()} {count:,}") for state, count in counts.items())]
    top = MARGIN + HEADING
    for i, cell in enumerate(cells.tolist()):
        state = PageState(cell)
        name = f"page {i}" if per_cell == 1 else f"pages {i * per_cell}-{min((i + 1) * per_cell, len(states)) - 1}"
        x, y = MARGIN + i % columns * _CELL, top + i // columns * _CELL
        parts.append(box_at(x, y, _CELL - 2, _CELL - 2, f'rx="2" {look[state]}', f"{name}: {state.name.lower()}"))
    words = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items())
    return Svg(document(parts, top + -(-len(cells) // columns) * _CELL + MARGIN), f"pages: {words}")


class PageTimeline:
    """Who had which page, moment after moment: a row a page, a column a moment.

        timeline = PageTimeline(allocator)
        timeline.mark("a comes", {"a": pages_of_a})      # as often as there is something new
        timeline                                          # a notebook draws it

    A request's own pages have its colour; those of the tree are green, darker while they are locked.

    Args:
      allocator: Whose pages; is only looked at.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator):
        self._allocator = allocator
        self._names: list[str] = []
        self._captions: list[str] = []
        self._moments: list[Int[np.ndarray, " pages"]] = []

    def mark(self, caption: str = "", readers: Mapping[str, ArrayLike] | None = None) -> None:
        """Remembers who has which page now. O(pages).

        Args:
          caption: What happened; may be empty.
          readers: The pages that each running request reads: its own, and those of the tree. Without them a request's
            own pages are "private".

        Raises:
          ArgumentError: A reader names no page of the allocator.
        """
        codes = self._allocator.states.astype(np.int32)
        codes[0] = PageState.FREE
        own, cached = codes == PageState.PRIVATE, codes == PageState.TREE
        for name, named in (readers or {}).items():
            pages = np.asarray(named, np.int32)
            if len(pages) and not 0 <= pages.min() <= pages.max() < len(codes):
                raise ArgumentError(f"readers: {name} has pages outside [0, {len(codes) - 1}], got {pages}")
            if name not in self._names:
                self._names.append(name)
            codes[pages[own[pages]]] = _FIRST_REQUEST + self._names.index(name)
            codes[pages[cached[pages]]] = _SHARED
        self._captions.append(caption)
        self._moments.append(codes[1:])

    def draw(self) -> Svg:
        """What was marked so far. O(pages times moments)."""
        table = np.array(self._moments, np.int32).reshape(-1, self._allocator.num_pages).T
        row = min(_TALLEST_ROW, max(2, _USUAL_HEIGHT // len(table)))
        column = (WIDTH - 2 * MARGIN - _GUTTER) / max(len(self._moments), 1)
        top = MARGIN + HEADING + self._caption_height()
        seen = [code for code in np.unique(table).tolist() if code != PageState.FREE]
        entries = [(self._look(code), self._name(code)) for code in seen]
        if len(self._names) > len(_REQUESTS):
            entries[sum(code < _FIRST_REQUEST for code in seen) :] = [
                (self._look(_FIRST_REQUEST), "requests, colours repeat")
            ]
        parts = [legend(entries)]
        for i, caption in enumerate(self._captions):
            x = MARGIN + _GUTTER + i * column
            if caption:
                parts.append(words_at(x + min(column / 2, 8), top - 5, caption, PENCIL, size=10, turned=-_TURN))
        every = 1 if row >= 11 else 8
        for i, codes in enumerate(table):
            y = top + i * row
            if (i + 1) % every == 0:
                parts.append(words_at(MARGIN, y + row - 2 if every == 1 else y + row / 2 + 4, f"p {i + 1}", PENCIL))
            parts.append(box_at(MARGIN + _GUTTER, y, column * len(codes), row - 1, 'fill="#f3f5f8"'))
            parts += self._bars(i, codes, table[i - 1] if i else None, y, row, column)
        words = f"{len(table)} pages, {len(self._moments)} moments"
        return Svg(document(parts, top + len(table) * row + MARGIN), words)

    def _bars(
        self, i: int, codes: np.ndarray, above: np.ndarray | None, y: float, row: int, column: float
    ) -> list[str]:
        """The owners of page `i + 1`, a bar for as long as each had it; named where the page above was not theirs."""
        parts: list[str] = []
        edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
        for start, stop in itertools.pairwise(edges):
            code = int(codes[start]) if stop > start else PageState.FREE
            if code == PageState.FREE:
                continue
            x, width, name = MARGIN + _GUTTER + start * column, (stop - start) * column, self._name(code)
            title = f"page {i + 1}, moments {start + 1}-{stop}: {name}"
            gap = 1 if column >= 6 else 0
            parts.append(box_at(x, y, width - gap, row - 1, f'rx="{2 * gap}" {self._look(code)}', title))
            is_new = above is None or above[start] != code
            if is_new and code >= _FIRST_REQUEST and row >= 11 and width >= CHARACTER * len(name) + 8:
                parts.append(words_at(x + 4, y + row - 4, name, INK, size=10))
        return parts

    def _caption_height(self) -> int:
        longest = max(map(len, self._captions), default=0)
        return round(longest * CHARACTER * np.sin(np.deg2rad(_TURN))) + 6 if longest else 0

    def _name(self, code: int) -> str:
        if code >= _FIRST_REQUEST:
            return self._names[code - _FIRST_REQUEST]
        return {_SHARED: "tree, being read", PageState.TREE: "tree"}.get(code) or PageState(code).name.lower()

    def _look(self, code: int) -> str:
        if code >= _FIRST_REQUEST:
            return f'fill="{_REQUESTS[(code - _FIRST_REQUEST) % len(_REQUESTS)]}"'
        return f'fill="{_READ if code == _SHARED else _COLOURS[PageState(code)]}"'

    def _repr_svg_(self) -> str:
        return self.draw().source

    def __repr__(self) -> str:
        return self.draw().text
