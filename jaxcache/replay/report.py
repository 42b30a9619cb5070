"""A replay as one HTML page: the verdict, what changed over time, and the figures. No script, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from jaxcache.errors import TraceError
from jaxcache.replay.result import ReplayResult, Sample

_WIDTH, _HEIGHT, _MARGIN = 640, 150, 4
_COLOURS = ("#2563eb", "#ea580c")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem }
.clean { color: #15803d } .wrong { color: #b91c1c }
svg { width: 100%; background: #f3f4f6; border-radius: 4px } polyline { fill: none; stroke-width: 2 }
table { border-collapse: collapse } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
td + td { text-align: right; font-variant-numeric: tabular-nums } small { color: #6b7280 }
"""


def write_html(result: ReplayResult, path: str | Path) -> None:
    """Writes the page.

    Raises:
      TraceError: if the file cannot be written.
    """
    try:
        Path(path).write_text(render(result), encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from error


def render(result: ReplayResult) -> str:
    """The page as text."""
    charts = [
        _chart("Hit rate so far", result.samples, {"hit rate": _hit_rate}, top=1.0),
        _chart(
            "Tokens of the pool",
            result.samples,
            {"in use": lambda sample: sample.used_tokens, "in the prefix cache": lambda sample: sample.cached_tokens},
            top=float(result.device_tokens),
        ),
        _chart("Requests running", result.samples, {"running": lambda sample: sample.running}, top=result.max_running),
    ]
    body = [f"<h1>{_verdict(result)}</h1>", *charts, "<h2>Figures</h2>", _table(result)]
    head = f'<meta charset="utf-8"><title>jaxcache replay</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _verdict(result: ReplayResult) -> str:
    if result.error is not None:
        return f'<span class="wrong">Ended by an error</span>: {escape(result.error)}'
    wrong = f"{result.mismatched_slots:,} wrong, {result.leaked_slots:,} leaked"
    style = "clean" if result.is_clean else "wrong"
    return (
        f'{result.requests:,} requests, {result.verified_slots:,} slots read back: <span class="{style}">{wrong}</span>'
    )


def _hit_rate(sample: Sample) -> float:
    return sample.hit_tokens / max(sample.prompt_tokens, 1)


def _chart(title: str, samples: Sequence[Sample], lines: dict[str, Callable[[Sample], float]], top: float) -> str:
    """Lines over the number of requests done; `top` is the upper edge."""
    last = max((sample.done_requests for sample in samples), default=0)
    drawn, legend = [], []
    for colour, (name, value_of) in zip(_COLOURS, lines.items(), strict=False):
        points = " ".join(
            f"{_scaled(sample.done_requests, last, _WIDTH):.1f},{_HEIGHT - _scaled(value_of(sample), top, _HEIGHT):.1f}"
            for sample in samples
        )
        drawn.append(f'<polyline points="{points}" stroke="{colour}"/>')
        legend.append(f'<span style="color:{colour}">{escape(name)}</span>')
    return (
        f"<h2>{escape(title)} <small>{' · '.join(legend)}; up to {top:,.4g}, over {last:,} requests</small></h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">{"".join(drawn)}</svg>'
    )


def _scaled(value: float, top: float, length: int) -> float:
    """`value` of [0, top] as a distance inside the margins of `length`."""
    return _MARGIN + (length - 2 * _MARGIN) * (value / top if top else 0.0)


def _table(result: ReplayResult) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in figure_rows(result))
    return f"<table>{rows}</table>"


def figure_rows(result: ReplayResult) -> list[tuple[str, str]]:
    """Name and value of every figure as a reader sees them; a nested one (host_us) has a row for each operation."""
    rows = []
    for name, value in result.as_json().items():
        if isinstance(value, dict):
            rows += [(f"{name} {part}", _shown(timing)) for part, timing in value.items()]
        else:
            rows.append((name, _shown(value)))
    return rows


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "  ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
