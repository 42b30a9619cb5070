"""A replay in a terminal: a bar while it runs, a table when it has ended. Needs the extra `cli` (rich)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxcache.replay.result import ReplayResult, Sample
from jaxcache.replay.summary import Mood, figures, host_rows, verdict

_STYLES = {Mood.CLEAN: "bold green", Mood.UNPROVEN: "bold yellow", Mood.WRONG: "bold red"}
_MARKS = {Mood.CLEAN: "✓", Mood.UNPROVEN: "?", Mood.WRONG: "✗"}
_LINES = 10  # how often a log, where no bar can be drawn, hears of a replay


class ReplayProgress:
    """Shows how far a replay is: a bar in a terminal, now and then a line in a log.

    A context manager; call it with each sample.

    Args:
      total: Requests of the trace.
      console: Where to show it; stderr by default, so that stdout is the result's alone.
    """

    def __init__(self, total: int, console: Console | None = None):
        self.total = total
        self.console = console or Console(stderr=True)
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self._task = self._bar.add_task("compiling", total=total, figures="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop() if self.console.is_terminal else None

    def __call__(self, sample: Sample, total: int | None = None) -> None:
        """Shows a sample; `total` is accepted as `run_replay` passes it."""
        done = sample.done_requests
        hit_rate = sample.hit_tokens / max(sample.prompt_tokens, 1)
        rate = done / sample.wall_s if sample.wall_s > 0 else 0.0
        words = f"{rate:,.1f} requests/s  hit rate {hit_rate:.1%}"
        if self.console.is_terminal:
            self._bar.update(self._task, description="replay", completed=done, figures=words)
        elif done >= self._next_line or done == self.total:
            self._next_line = done + self.total / _LINES
            line = f"replay {done:,}/{self.total:,}  {words}  {sample.running} running  {sample.wall_s:,.0f} s"
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def render_table(result: ReplayResult) -> Group:
    """The whole result for `Console.print`: figures, host times, and the verdict last, where the eye is."""
    sections = figures(result)
    pairs = Table.grid(padding=(0, 3))
    pairs.add_row(_column(sections["Proof"], "Proof"), _column(sections["Prefix cache"], "Prefix cache"))
    pairs.add_row("", "")
    pairs.add_row(_column(sections["Load"], "Load"), _column(sections["Time"], "Time"))
    host = Table.grid(padding=(0, 3))
    host.add_row(
        Text("Host time", style="bold"), *(Text(name, style="dim") for name in ("calls", "p50", "p99", "total"))
    )
    for column in host.columns[1:]:
        column.justify = "right"
    for row in host_rows(result):
        host.add_row(*row)
    said = verdict(result)
    line = Text.assemble((f"{_MARKS[said.mood]} {said.headline}", _STYLES[said.mood]), f"  {said.detail}")
    setup = _column(sections["Setup"], "Setup", justify="left")
    return Group(*(Padding(part, (1, 0, 0, 1)) for part in (setup, pairs, host, line)))


def _column(rows: dict[str, str], title: str, justify: str = "right") -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=17)
    table.add_column(justify=justify, min_width=14)  # type: ignore[arg-type]
    table.add_row(Text(title, style="bold not dim"), "")
    for name, value in rows.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table
