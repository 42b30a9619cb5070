"""The commands of `jaxcache`, on top of everything. Needs the extra `cli`; nothing imports this but `cli.py`."""

# No `from __future__ import annotations` here: typer reads the annotations as objects.
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxcache.errors import ArgumentError
from jaxcache.index.recency import Policy
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.config import DType, Fault, PoolKind, ReplayConfig
from jaxcache.replay.report import figure_rows, write_html
from jaxcache.replay.result import ReplayResult, Sample
from jaxcache.replay.trace import write_trace

FOUND_WRONG = 1
_AUTO = "auto"

app = typer.Typer(
    help="A paged KV cache with prefix sharing for JAX: replay traces through it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def replay(
    trace: Annotated[
        Path | None, typer.Argument(help="Trace in Mooncake's format (JSONL); without it a chat trace is generated.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    concurrency: Annotated[int, typer.Option(help="Most requests that run at once.")] = ReplayConfig.concurrency,
    chunk: Annotated[int, typer.Option(help="Most prompt tokens of one step.")] = ReplayConfig.chunk,
    page_size: Annotated[int, typer.Option(help="Slots in a page.")] = ReplayConfig.page_size,
    device_tokens: Annotated[int, typer.Option(help="Room of the pool, in tokens.")] = ReplayConfig.device_tokens,
    pool: Annotated[PoolKind, typer.Option(help="Kind of device pool.")] = ReplayConfig.pool,
    layers: Annotated[
        str, typer.Option(metavar="L|auto", help="Layers of KV; auto: what the device has room for.")
    ] = _AUTO,
    heads: Annotated[int | None, typer.Option(help="KV heads, for mha.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head, for mha.")] = None,
    rank: Annotated[int | None, typer.Option(help="Width of the compressed part, for mla.")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Width of the positional part, for mla.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    policy: Annotated[Policy, typer.Option(help="Order of eviction.")] = ReplayConfig.policy,
    seed: Annotated[int, typer.Option(help="Of output tokens and generated traces.")] = ReplayConfig.seed,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read back what was written.")] = False,
    plant: Annotated[Fault | None, typer.Option(help="Break the stack on purpose; the replay must notice.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="PATH.html", help="Write an HTML report here.")] = None,
) -> None:
    """Drive every request of a trace through the real stack and prove the content of every hit."""
    config = ReplayConfig(
        trace=trace, requests=requests, concurrency=concurrency, chunk=chunk, page_size=page_size,
        device_tokens=device_tokens, pool=pool, layers=_layers(layers), heads=heads, head_dim=head_dim, rank=rank,
        rope_dim=rope_dim, dtype=dtype, policy=policy, seed=seed, verify=not no_verify, plant=plant,
    )  # fmt: skip
    for path in (json_path, report):
        _check_writable(path)
    requests_to_replay = config.load_requests()  # before JAX starts, so that a bad file is reported at once

    from jaxcache.replay.run import run_replay

    with _progress() as bar:
        task = bar.add_task("replay", total=len(requests_to_replay), hit_rate=0.0, rate=0.0)

        def advance(sample: Sample, _total: int) -> None:
            hit_rate = sample.hit_tokens / max(sample.prompt_tokens, 1)
            rate = sample.done_requests / max(sample.wall_s, 1e-9)
            bar.update(task, completed=sample.done_requests, hit_rate=hit_rate, rate=rate)

        result = run_replay(config, progress=advance, requests=requests_to_replay)
        bar.update(task, completed=result.requests, hit_rate=result.hit_rate)
    Console().print(_table(result))
    if json_path is not None:
        result.write_json(json_path)
    if report is not None:
        write_html(result, report)
    if result.error is not None:
        print(f"jaxcache: {result.error}", file=sys.stderr)
    if not result.is_clean:
        raise typer.Exit(FOUND_WRONG)


@app.command()
def trace(
    requests: Annotated[int, typer.Option(help="How many requests, that is turns of chats.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    seed: Annotated[int, typer.Option(help="Another seed gives another trace.")] = 0,
) -> None:
    """Generate a trace of multi-turn chats with shared system prompts."""
    generated = generate_chat(requests, seed)
    write_trace(out, generated)
    prompt_tokens = sum(request.input_length for request in generated)
    print(f"{out}: {len(generated)} requests, {prompt_tokens} prompt tokens")


def _layers(text: str) -> int | None:
    """Number of layers; None for `auto`."""
    if text == _AUTO:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise ArgumentError(f"--layers must be a positive number or {_AUTO}, got {text!r}")
    return int(text)


def _check_writable(path: Path | None) -> None:
    """A replay can take long: a result that cannot be written is better known before."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ArgumentError(f"{path}: cannot be written: it must be a file in a folder that exists")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} requests/s"),
        TextColumn("hit rate {task.fields[hit_rate]:.1%}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _table(result: ReplayResult) -> Table:
    table = Table(title="replay", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in figure_rows(result):
        table.add_row(name, value)
    return table
