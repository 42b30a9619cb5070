"""Pictures as SVG: nothing to install, and they show wherever a notebook is shown. Here is what they are drawn with."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDTH, MARGIN, HEADING, CHARACTER = 920, 12, 24, 6.6
"""Of a picture, around it, of a line of words above a part of it, and of one character; in pixels."""
INK, PENCIL = "#0f172a", "#475569"
_FONT = "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace"


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


def words_at(x: float, y: float, words: str, colour: str = INK, *, size: int = 11, turned: int = 0) -> str:
    """Words from `x` on, standing on `y`; `turned` by so many degrees around their beginning."""
    more = f' font-size="{size}"' if size != 11 else ""
    more += f' transform="rotate({turned} {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{escape(words)}</text>'


def box_at(x: float, y: float, width: float, height: float, look: str, title: str = "") -> str:
    """A box; `look` is its further attributes, and `title` what hovering over it shows."""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}"'
    return f"<rect {size} {look}>{f'<title>{escape(title)}</title>' if title else ''}</rect>"


def legend(entries: Iterable[tuple[str, str]], top: float = MARGIN) -> str:
    """A line of small boxes with a word beside each.

    Args:
      entries: The look of a box, as for `box_at`, and its words.
      top: Where the line begins.
    """
    parts: list[str] = []
    x = float(MARGIN)
    for look, words in entries:
        parts += [box_at(x, top + 3, 10, 10, look), words_at(x + 15, top + 12, words, PENCIL)]
        x += 15 + (len(words) + 3) * CHARACTER
    return "".join(parts)


def document(parts: Iterable[str], height: float) -> str:
    """A page of its own white, so that it reads the same on a dark screen."""
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    style = f'font-family="{_FONT}" font-size="11"'
    paper = f'<rect width="{WIDTH}" height="{height:.0f}" rx="6" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{paper}{"".join(parts)}</svg>'
