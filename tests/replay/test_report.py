"""The HTML report: well formed, says what happened, and shows foreign text as text."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxcache.errors import TraceError
from jaxcache.replay.report import figure_rows, render, write_html
from jaxcache.replay.result import ReplayResult, Sample

VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its place; collects what there is to read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.points: list[tuple[float, float]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for pair in (dict(attrs).get("points") or "").split():
            x, y = pair.split(",")
            self.points.append((float(x), float(y)))

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
    """A finished replay."""
    samples = [Sample(i, 100 * i, 30 * i, min(i, 4), 10 * i, 20 * i, i / 10) for i in range(10)]
    result = ReplayResult(requests=9, verified_slots=12_345, device_tokens=1000, max_running=4, samples=samples)
    result.host_us = {"match": {"p50": 1.5, "p99": 2000.4, "total_s": 0.25}}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def test_a_clean_replay() -> None:
    page = read(render(result_of()))
    assert "9 requests, 12,345 slots read back: 0 wrong, 0 leaked" in page.text
    assert len(page.points) == 40
    assert all(0 <= x <= 640 and 0 <= y <= 150 for x, y in page.points)


@pytest.mark.parametrize("changes", [{"mismatched_slots": 7}, {"leaked_slots": 7}])
def test_a_wrong_replay(changes: dict[str, int]) -> None:
    page = render(result_of(**changes))
    assert 'class="wrong"' in page and "7 " in read(page).text
    assert 'class="wrong"' not in render(result_of())


def test_an_error_is_shown_as_text() -> None:
    page = render(result_of(error="OwnershipError: <script>"))
    assert "<script>" not in page
    assert "Ended by an error: OwnershipError: <script>" in read(page).text


def test_a_replay_without_samples() -> None:
    assert read(render(ReplayResult())).points == []


def test_every_figure_has_a_row() -> None:
    rows = dict(figure_rows(result_of()))
    assert rows["verified_slots"] == "12,345"
    assert rows["host_us match"] == "p50 1.5  p99 2,000  total_s 0.25"
    assert rows["error"] == "-"
    assert set(result_of().as_json()) - {"host_us"} <= set(rows)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        write_html(result_of(), tmp_path)
