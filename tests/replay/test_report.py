"""The report and the terminal say what happened: verdict first, every figure, and foreign text as text."""

import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from jaxcache.errors import TraceError
from jaxcache.replay.chart import Line, Series, chart, compact, nice_step
from jaxcache.replay.config import ReplayConfig
from jaxcache.replay.report import render, write_report
from jaxcache.replay.result import ReplayResult, Sample
from jaxcache.replay.run import run_replay
from jaxcache.replay.summary import Mood, duration, figures, size, verdict
from jaxcache.replay.terminal import ReplayProgress, render_table

VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its place; collects what there is to read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Balanced:
    """Parses a whole page."""
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def result_of(**changes: object) -> ReplayResult:
    """A finished replay of nine requests."""
    samples = [Sample(i, 100 * i, 30 * i, min(i, 4), 10 * i, 20 * i, 15 * i, i / 10) for i in range(10)]
    result = ReplayResult(requests=9, verified_slots=12_345, device_tokens=1000, max_running=4, samples=samples)
    result.prompt_tokens, result.hit_tokens, result.hit_rate, result.wall_s = 900, 270, 0.3, 1.5
    result.host_us = {"match": {"p50": 1.5, "p99": 2000.4, "total_s": 0.25, "calls": 9}}
    result.trace = "folder/chats.jsonl"
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def terminal(result: ReplayResult) -> str:
    """What a terminal shows in the end."""
    out = io.StringIO()
    Console(file=out, width=120).print(render_table(result))
    return out.getvalue()


CASES = {
    "clean": ({}, Mood.CLEAN, "All 12,345 slots proven"),
    "mismatch": ({"mismatched_slots": 7}, Mood.WRONG, "7 of 12,345 slots held the wrong KV"),
    "leak": ({"leaked_slots": 16}, Mood.WRONG, "16 slots leaked"),
    "error": ({"error": "OwnershipError: <script>[red]"}, Mood.WRONG, "Stopped by an error"),
    "unverified": ({"verified_slots": 0}, Mood.UNPROVEN, "Not proven: nothing was read back"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_comes_first_in_the_report_and_last_in_the_terminal(case: str) -> None:
    changes, mood, headline = CASES[case]
    result = result_of(**changes)
    assert verdict(result).mood is mood
    assert (mood is Mood.WRONG) == (not result.is_clean)
    page = render(result)
    assert f'<section class="verdict {mood.value}"><h1>{headline}</h1>' in page
    assert page.index(headline, page.index("<main>")) < page.index('class="tiles"')
    assert headline in "".join(terminal(result).strip().splitlines()[-3:])


def test_foreign_text_stays_text() -> None:
    result = result_of(error="OwnershipError: <script>[red]", trace="<b>.jsonl", plant="leak")
    page = render(result)
    assert "<script" not in page and "<b>.jsonl" not in page
    parsed = read(page)
    assert "OwnershipError: <script>[red]" in parsed.text and "<b>.jsonl" in parsed.text
    assert "OwnershipError: <script>[red]" in terminal(result)
    assert "leak was planted on purpose" in parsed.text


def test_the_report_is_whole_in_itself() -> None:
    parsed = read(render(result_of()))
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert parsed.links == [] and not re.findall(r"https?://|@import|url\(", render(result_of()))
    assert "default-src 'none'" in render(result_of())


def test_every_figure_is_shown_in_both() -> None:
    values = {name: 1_000_003 + 1009 * i for i, name in enumerate(ReplayResult().as_json()) if name != "samples"}
    numbers = {name for name, value in ReplayResult().as_json().items() if type(value) is int}
    result = result_of(**{name: values[name] for name in numbers})
    shown, printed = read(render(result)).text, terminal(result)
    for name in numbers - {"pool_bytes", "layers", "concurrency", "page_size", "seed"}:
        assert f"{values[name]:,}" in shown, name
        assert f"{values[name]:,}" in printed, name
    for section in figures(result).values():
        for name, value in section.items():
            assert name in shown and name in printed
            assert value in shown and value in printed


def test_host_times_have_their_share_of_the_replay() -> None:
    parsed = read(render(result_of()))
    assert "match91.5 µs2,000 µs250.0 ms16.7%" in parsed.text
    assert re.search(r"match +9 +1\.5 µs +2,000 µs +250\.0 ms", terminal(result_of()))


def test_charts_hold_every_sample_inside_their_frame() -> None:
    page = render(result_of())
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(charts) == 4
    for drawn in charts:
        curves = [*drawn.iter("polyline"), *drawn.iter("polygon")]
        assert curves
        for curve in curves:
            points = [tuple(map(float, pair.split(","))) for pair in curve.get("points", "").split()]
            assert len(points) == (10 if curve.tag == "polyline" else 20)
            assert all(46 <= x <= 552 and 8 <= y <= 216 for x, y in points)
        tips = [text.text or "" for text in drawn.iter("text")]
        assert "0.9 s" in tips


def test_stacked_areas_rest_on_each_other() -> None:
    lines = [Line("a", Series.FIRST, [1, 2]), Line("b", Series.SECOND, [3, 0])]
    drawn = ET.fromstring(re.findall(r"<svg.*?</svg>", chart("t", [0, 1], lines, top=4, stacked=True))[0])
    lower, upper = (
        [float(p.split(",")[1]) for p in curve.get("points", "").split()] for curve in drawn.iter("polygon")
    )
    assert upper[2:] == lower[:2][::-1] and lower[2:] == [216, 216]
    assert upper[0] == 8


@pytest.mark.parametrize("samples", [[], [Sample(0, 0, 0, 0, 0, 0, 0, 0.0)]])
def test_a_replay_without_a_course_has_no_charts(samples: list[Sample]) -> None:
    assert "svg" not in read(render(ReplayResult(samples=samples))).tags
    assert terminal(ReplayResult(samples=samples))


def test_samples_of_one_instant_are_no_problem() -> None:
    samples = [Sample(0, 0, 0, 0, 0, 0, 0, 0.0)] * 3
    assert "nan" not in render(ReplayResult(samples=samples)).replace("provenance", "")


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        write_report(result_of(), tmp_path)


def test_progress_in_a_log_is_a_few_lines() -> None:
    out = io.StringIO()
    with ReplayProgress(100, Console(file=out, width=40)) as progress:
        for done in range(101):
            progress(Sample(done, 10 * done, 4 * done, 7, 0, 0, 0, done / 50))
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1] == "replay 100/100  50.0 requests/s  hit rate 40.0%  7 running  2 s"


def test_a_replay_is_sampled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxcache.replay.run.SAMPLES", 3)
    config = ReplayConfig(requests=11, device_tokens=60_000, layers=1, concurrency=3, chunk=2048)
    result = run_replay(config)
    last = result.samples[-1]
    assert (last.done_requests, last.running, last.prompt_tokens) == (11, 0, result.prompt_tokens)
    assert len({sample.done_requests for sample in result.samples}) == len(result.samples)
    assert all(
        sample.used_tokens + sample.evictable_tokens <= result.device_tokens
        and sample.evictable_tokens <= sample.cached_tokens
        for sample in result.samples
    )


def test_progress_in_a_terminal_is_a_bar() -> None:
    out = io.StringIO()
    with ReplayProgress(10, Console(file=out, width=120, force_terminal=True)) as progress:
        progress(Sample(10, 100, 25, 7, 0, 0, 0, 2.0))
    last = out.getvalue()
    assert "10/10" in last and "5.0 requests/s" in last and "hit rate 25.0%" in last


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (9_999, "9,999"), (12_345, "12.3 k"), (4_560_000, "4.56 M"), (2e9, "2 G")]
)
def test_compact_numbers(value: float, words: str) -> None:
    assert compact(value) == words


@pytest.mark.parametrize(("span", "step"), [(4, 1), (4.1, 2), (0.1, 0.025), (970, 250), (1, 0.25), (0, 1)])
def test_axes_have_round_steps(span: float, step: float) -> None:
    assert nice_step(span, 4) == pytest.approx(step)


def test_units() -> None:
    assert (size(999), size(25_602_048), size(3 << 30)) == ("999 B", "24.4 MiB", "3.0 GiB")
    assert (duration(0.0125), duration(75)) == ("12.5 ms", "75.0 s")
