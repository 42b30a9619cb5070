"""Line and area charts over time as inline SVG: axes, a legend, and figures under the pointer, without a script."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_TIPS = 60
"""Places of a chart that answer to the pointer."""


class Series(enum.Enum):
    """Colour of a line: the name of a class of the page's style."""

    FIRST = "first"
    SECOND = "second"
    PALE = "pale"


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its colour, a value for each time."""

    name: str
    colour: Series
    values: Sequence[float]


def chart(
    title: str, at: Sequence[float], lines: Sequence[Line], top: float, unit: str = "", stacked: bool = False
) -> str:
    """A `<figure>`.

    Args:
      title: Heading.
      at: Seconds, ascending, at least two.
      lines: What to draw.
      top: Largest value that must fit; the axis ends at a round number.
      unit: "%" shows fractions as percent.
      stacked: Areas on top of each other instead of lines.
    """
    step = nice_step(top, 4)
    frame = _Frame(at[0], max(at[-1], at[0] + 1e-9), step * max(math.ceil(top / step - 1e-9), 1))
    parts = _axes(frame, step, unit)
    below = [0.0] * len(at)
    for line in lines:
        if stacked:
            above = [low + value for low, value in zip(below, line.values, strict=True)]
            outline = _points(frame, at, above) + " " + _points(frame, at[::-1], below[::-1])
            parts.append(f'<polygon class="area {line.colour.value}" points="{outline}"/>')
            below = above
        else:
            parts.append(f'<polyline class="line {line.colour.value}" points="{_points(frame, at, line.values)}"/>')
    parts += _tips(frame, at, lines, unit)
    legend = "".join(f'<span><i class="{line.colour.value}"></i>{escape(line.name)}</span>' for line in lines)
    return (
        f"<figure><figcaption><b>{escape(title)}</b><div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True)
class _Frame:
    """From seconds and values to places in the picture."""

    start: float
    end: float
    top: float

    def x(self, at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (at - self.start) / (self.end - self.start)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.top


def _points(frame: _Frame, at: Sequence[float], values: Sequence[float]) -> str:
    return " ".join(f"{frame.x(t):.1f},{frame.y(value):.1f}" for t, value in zip(at, values, strict=True))


def _axes(frame: _Frame, step: float, unit: str) -> list[str]:
    parts = []
    for i in range(round(frame.top / step) + 1):
        y = frame.y(i * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(i * step, unit)}</text>')
    step = nice_step(frame.end - frame.start, 5)
    for i in range(math.floor((frame.end - frame.start) / step + 1e-9) + 1):
        x = frame.x(frame.start + i * step)
        anchor = "middle" if x < _WIDTH - 30 else "end"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{i * step:,.6g} s</text>')
    return parts


def _tips(frame: _Frame, at: Sequence[float], lines: Sequence[Line], unit: str) -> list[str]:
    """Invisible columns, each with a ruler and a box of figures that appear under the pointer."""
    count = min(_TIPS, len(at))
    chosen = sorted({round(i * (len(at) - 1) / max(count - 1, 1)) for i in range(count)})
    parts = []
    for place, i in enumerate(chosen):
        x = frame.x(at[i])
        left = (frame.x(at[chosen[place - 1]]) + x) / 2 if place else _LEFT
        right = (frame.x(at[chosen[place + 1]]) + x) / 2 if place + 1 < len(chosen) else _WIDTH - _RIGHT
        words = [f"{at[i]:,.4g} s", *(f"{line.name}: {shown(line.values[i], unit)}" for line in lines)]
        width, height = 7 * max(map(len, words)) + 14, 16 * len(words) + 10
        box_x = x + 8 if x + 8 + width < _WIDTH else x - 8 - width
        text = "".join(
            f'<text x="{box_x + 8:.1f}" y="{_TOP + 18 + 16 * row}">{escape(word)}</text>'
            for row, word in enumerate(words)
        )
        ruler = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        box = f'<rect x="{box_x:.1f}" y="{_TOP + 2}" width="{width}" height="{height}" rx="4"/>'
        column = f'x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" height="{_HEIGHT}"'
        parts.append(f'<g class="at"><rect class="hit" {column}/><g class="tip">{ruler}{box}{text}</g></g>')
    return parts


def nice_step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that divides `span` into `at_most` steps or fewer."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / at_most))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power * at_most >= span * (1 - 1e-9))


def shown(value: float, unit: str = "") -> str:
    """A figure of an axis or a tip."""
    return f"{100 * value:.3g} %" if unit == "%" else compact(value)


def compact(value: float) -> str:
    """At most four digits: 950, 12.3 k, 4.56 M, 2 G."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * (10 if letter == "k" else 1):
            return f"{value / power:.3g} {letter}"
    return f"{value:,.4g}"
