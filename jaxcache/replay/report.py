"""A replay as one HTML page: the verdict, what changed over time, host times, set-up.

It is whole in itself: no script, nothing loaded, and a policy in its head that forbids both.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from jaxcache.replay.chart import Line, Series, chart, compact
from jaxcache.replay.files import write_text
from jaxcache.replay.result import ReplayResult, Sample
from jaxcache.replay.summary import figures, host_rows, verdict

_RECENT = 12
"""Samples behind one point of the recent hit rate."""


def write_report(result: ReplayResult, path: str | Path) -> None:
    """Writes the page.

    Raises:
      TraceError: The file cannot be written.
    """
    write_text(path, render(result))


def render(result: ReplayResult) -> str:
    """The page as text."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>jaxcache replay: {escape(verdict(result).headline)}</title><style>{_STYLE}</style>"
    )
    body = "".join((_banner(result), _tiles(result), _charts(result), _host_time(result), _tables(result), _method()))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _banner(result: ReplayResult) -> str:
    said = verdict(result)
    where = f"{Path(result.trace).name or 'replay'} · {result.device} · jax {result.jax_version}"
    return (
        f"<header><b>jaxcache replay</b><span>{escape(where)}</span></header>"
        f'<section class="verdict {said.mood.value}">'
        f"<h1>{escape(said.headline)}</h1><p>{escape(said.detail)}</p></section>"
    )


def _tiles(result: ReplayResult) -> str:
    shown = figures(result)
    tiles = [
        (
            "hit rate",
            f"{result.hit_rate:.1%}",
            f"{compact(result.hit_tokens)} of {compact(result.prompt_tokens)} tokens",
        ),
        ("requests", f"{result.requests:,}", f"{result.max_running:,} running at most"),
        ("replay", shown["Time"]["replay"], f"{shown['Time']['requests a second']} requests a second"),
        ("evicted", compact(result.evicted_tokens), f"tokens, from room for {compact(result.device_tokens)}"),
        ("retractions", f"{result.retractions:,}", "requests that had to make room"),
        ("late compilations", f"{result.recompiles_after_warmup:,}", f"after {shown['Time']['warm-up']} of warm-up"),
    ]
    cells = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<section class="tiles">{cells}</section>'


def _charts(result: ReplayResult) -> str:
    samples = result.samples
    if len(samples) < 2:
        return ""
    at = [sample.wall_s for sample in samples]
    total = [_share(sample.hit_tokens, sample.prompt_tokens) for sample in samples]
    recent = _recent(samples)
    hits = chart(
        "Hit rate",
        at,
        [
            Line("last requests", Series.PALE, recent),
            Line("since the start", Series.FIRST, total),
        ],
        top=1.0 if max(recent + total) > 0.5 else max([*recent, *total, 0.01]),
        unit="%",
    )
    memory = chart(
        "Pool, in tokens",
        at,
        [
            Line("running requests", Series.SECOND, [float(sample.used_tokens) for sample in samples]),
            Line("cached, evictable", Series.FIRST, [float(sample.evictable_tokens) for sample in samples]),
        ],
        top=float(result.device_tokens),
        stacked=True,
    )
    load = chart(
        "Requests running",
        at,
        [Line("running", Series.SECOND, [float(sample.running) for sample in samples])],
        top=float(max(result.max_running, 1)),
        stacked=True,
    )
    prompts = chart(
        "Prompt tokens so far",
        at,
        [
            Line("from the cache", Series.FIRST, [float(sample.hit_tokens) for sample in samples]),
            Line("computed", Series.SECOND, [float(sample.prompt_tokens - sample.hit_tokens) for sample in samples]),
        ],
        top=float(max(result.prompt_tokens, 1)),
        stacked=True,
    )
    return f'<section class="charts">{hits}{memory}{prompts}{load}</section>'


def _recent(samples: list[Sample]) -> list[float]:
    """Hit rate of what was admitted within the samples before; the last one known where that was nothing."""
    rates = []
    for i, now in enumerate(samples):
        before = samples[max(i - _RECENT, 0)]
        prompt = now.prompt_tokens - before.prompt_tokens
        known = rates[-1] if rates else _share(now.hit_tokens, now.prompt_tokens)
        rates.append((now.hit_tokens - before.hit_tokens) / prompt if prompt else known)
    return rates


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _host_time(result: ReplayResult) -> str:
    rows = host_rows(result)
    if not rows:
        return ""
    cells = []
    for (name, *values), timing in zip(rows, result.host_us.values(), strict=True):
        share = _share(timing["total_s"], result.wall_s)
        bar = f'<i style="width:{min(100 * share, 100):.1f}%"></i>'
        numbers = "".join(f"<td>{escape(value)}</td>" for value in values)
        cells.append(
            f'<tr><th>{escape(name)}</th>{numbers}<td>{share:.1%}</td><td class="bar"><div>{bar}</div></td></tr>'
        )
    heads = "".join(f"<th>{name}</th>" for name in ("", "calls", "p50", "p99", "total", "of the replay", ""))
    note = (
        "Time that the scheduler's thread spends in the cache. Admitting contains matching; planning contains evicting."
    )
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(cells)}</tbody>"
    return (
        f'<section class="card"><h2>Host time</h2><p>{note}</p><div class="wide"><table>{body}</table></div></section>'
    )


def _tables(result: ReplayResult) -> str:
    cards = []
    for title, rows in figures(result).items():
        body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
        wide = " full" if title == "Setup" else ""
        cards.append(f'<div class="card{wide}"><h2>{escape(title)}</h2><dl>{body}</dl></div>')
    return f'<section class="cards">{"".join(cards)}</section>'


def _method() -> str:
    return (
        '<section class="method"><h2>What was proven</h2><p>The KV written for a token is a fixed function of its '
        "namespace, token id, position, layer, head and element, computed inside the jitted step. On every cache hit "
        "the matched slots, and at its end every request's whole row, were read back from the pool and compared bit "
        "for bit with that function of the request's own tokens, never with what pool or tree returned. At the end "
        "every page must have exactly one owner.</p></section>"
    )


_STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#111827;--soft:#5b6472;--line:#e3e7ed;--first:#0f9d8a;--second:#e08a00;
--pale:#9bd8cf;--clean:#0b7a53;--clean-bg:#e5f6ee;--wrong:#b3261e;--wrong-bg:#fdecea;--unproven:#8a6100;
--unproven-bg:#fff4d6}
@media(prefers-color-scheme:dark){:root{--bg:#0e1217;--card:#161c24;--ink:#e6e9ee;--soft:#98a2b1;--line:#28313d;
--first:#34c4af;--second:#f0a93a;--pale:#1f5f57;--clean:#5fd6a4;--clean-bg:#10291f;--wrong:#ff8a80;--wrong-bg:#331513;
--unproven:#ffd166;--unproven-bg:#2e2508}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 48px;display:grid;grid-template-columns:minmax(0,1fr);gap:18px}
header{display:flex;justify-content:space-between;gap:12px;flex-wrap:wrap;color:var(--soft);font-size:14px}
header b{color:var(--ink)}h1,h2,p,dl{margin:0}h2{font-size:14px;font-weight:600}
.verdict{border-radius:10px;padding:22px 26px;border-left:6px solid}
.verdict h1{font-size:30px;line-height:1.2;letter-spacing:-.01em;overflow-wrap:anywhere}
.verdict p{margin-top:6px;font-size:16px;overflow-wrap:anywhere;white-space:pre-wrap}
.clean{background:var(--clean-bg);color:var(--clean)}.wrong{background:var(--wrong-bg);color:var(--wrong)}
.unproven{background:var(--unproven-bg);color:var(--unproven)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(155px,1fr));gap:12px}
.tiles div,.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tiles span,.tiles small{display:block;color:var(--soft);font-size:12.5px}
.tiles b{display:block;font-size:25px;line-height:1.35;font-weight:600;letter-spacing:-.01em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:12px}
figure{margin:0}figcaption{display:flex;justify-content:space-between;flex-wrap:wrap;gap:4px 14px;margin-bottom:6px}
figcaption b{font-size:14px;font-weight:600}figcaption span{font-size:12.5px;color:var(--soft)}
figcaption i{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 12px}
svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}
.grid{stroke:var(--line)}.first{stroke:var(--first);fill:var(--first)}.second{stroke:var(--second);fill:var(--second)}
.pale{stroke:var(--pale);fill:var(--pale)}i.first{background:var(--first)}i.second{background:var(--second)}
i.pale{background:var(--pale)}.line{fill:none;stroke-width:2;stroke-linejoin:round}.area{stroke:none;fill-opacity:.75}
.hit{fill:transparent}.tip{visibility:hidden}.at:hover .tip{visibility:visible}.tip line{stroke:var(--soft)}
.tip rect{fill:var(--card);stroke:var(--line)}.tip text{fill:var(--ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:12px}.full{grid-column:1/-1}
dl{display:grid;grid-template-columns:auto 1fr;gap:3px 14px;margin-top:8px;font-size:14px}dt{color:var(--soft)}
dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.full dd{text-align:left}
.card p,.method p{color:var(--soft);font-size:13.5px;margin-top:2px}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin-top:8px;font-size:14px;font-variant-numeric:tabular-nums}
td,th{text-align:right;padding:5px 12px;border-top:1px solid var(--line);font-weight:400;white-space:nowrap}
thead th{border:0;color:var(--soft);font-size:12.5px}tr th:first-child{text-align:left;padding-left:0}
.bar{width:30%;min-width:90px;padding-right:0}.bar div{background:var(--line);border-radius:3px}
.bar i{display:block;height:8px;border-radius:3px;background:var(--first);min-width:2px}
.method{padding:4px 2px}.method p{max-width:80ch}
"""
