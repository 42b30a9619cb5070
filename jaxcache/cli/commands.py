"""The commands of `jaxcache`, on top of everything. Needs the extra `cli`; nothing imports this but `cli.py`."""

# No `from __future__ import annotations` here: typer reads the annotations as objects.
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jaxcache.cli.options import takes
from jaxcache.errors import SnapshotError
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.config import Fault, ReplayConfig
from jaxcache.replay.files import require_writable
from jaxcache.replay.report import write_report
from jaxcache.replay.terminal import ReplayProgress, render_table
from jaxcache.replay.trace import write_trace

FOUND_WRONG = 1
_AUTO = "auto"
_FAULTS = ", ".join(fault.value for fault in Fault)
_LOAD, _MEMORY, _PROOF, _OUTPUT = "Load", "Memory", "Proof", "Output"  # panels of the help


def _option(panel: str, words: str, **more: Any) -> Any:
    """An option with its place in the help."""
    return typer.Option(help=words, rich_help_panel=panel, **more)


def _layers(text: str) -> int | None:
    """Number of layers; None for `auto`."""
    if text == _AUTO:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise typer.BadParameter(f"--layers must be a positive number or {_AUTO}, got {text!r}")
    return int(text)


app = typer.Typer(
    help="A paged KV cache with prefix sharing for JAX: replay traces through it, look at saved caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_REPLAY = {
    "trace": typer.Argument(help="Trace in Mooncake's format (JSONL); without it, chats are generated."),
    "requests": _option(_LOAD, "Only the first so many requests."),
    "concurrency": _option(_LOAD, "Most requests that run at once."),
    "chunk": _option(_LOAD, "Most prompt tokens of one step."),
    "seed": _option(_LOAD, "Of generated chats and of output tokens."),
    "page_size": _option(_MEMORY, "Tokens in a page."),
    "device_tokens": _option(_MEMORY, "Room of the pool, in tokens."),
    "policy": _option(_MEMORY, "Order of eviction."),
    "cache": _option(_MEMORY, "Kind of prefix cache."),
    "window": _option(_MEMORY, "Tokens that window layers attend to (swa)."),
    "window_tokens": _option(_MEMORY, "Room of the window layers' pool. (a quarter of --device-tokens)"),
    "states": _option(_MEMORY, "Recurrent states there is room for (mamba). (4 x --concurrency)"),
    "adapters": _option(_LOAD, "Adapters requests are spread over (lora)."),
    "pool": _option(_MEMORY, "Kind of device pool."),
    "layout": _option(_MEMORY, "Order of the rows in it."),
    "layers": _option(
        _MEMORY,
        "Layers of KV; auto: what the device has room for, two on a CPU.",
        metavar=f"L|{_AUTO}",
        parser=_layers,
        show_default=_AUTO,
    ),
    "heads": _option(_MEMORY, "KV heads of an mha pool. (CPU: 1, GPU: 8)"),
    "head_dim": _option(_MEMORY, "Width of a head. (CPU: 8, GPU: 128)"),
    "rank": _option(_MEMORY, "Latent width of an mla pool. (CPU: 12, GPU: 512)"),
    "rope_dim": _option(_MEMORY, "Rotary width of an mla pool. (CPU: 4, GPU: 64)"),
    "dtype": _option(_MEMORY, "Of the pool. (CPU: float32, GPU: bfloat16)", metavar="DTYPE"),
    "verify": typer.Option(" /--no-verify", help="Read nothing back.", rich_help_panel=_PROOF, show_default=False),
    "attend": typer.Option(
        "--attend",
        help="Attend in every decode step, and compare with float32 over the request's own tokens.",
        rich_help_panel=_PROOF,
        show_default=False,
    ),
    "plant": _option(_PROOF, f"Break the stack on purpose: {_FAULTS}.", metavar="FAULT"),
}


@app.command()
@takes(ReplayConfig, _REPLAY)
def replay(
    config: ReplayConfig,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the figures here.", rich_help_panel=_OUTPUT)
    ] = None,
    report: Annotated[Path | None, _option(_OUTPUT, "Write an HTML report here.", metavar="PATH.html")] = None,
) -> None:
    """Drive every request of a trace through the real stack and prove the content of every hit.

    Exit code 0: every slot held what it should and no page was lost. 1: something was wrong. 2: wrong option or trace.
    """
    for path in (json_path, report):
        if path is not None:
            require_writable(path)  # now, as a replay can take long
    requests = config.load_requests()  # before JAX starts, so that a bad file is reported at once

    from jaxcache.replay.run import run_replay

    with ReplayProgress(len(requests)) as progress:
        result = run_replay(config, progress=progress, requests=requests)
    Console().print(render_table(result))
    if json_path is not None:
        result.write_json(json_path)
    if report is not None:
        write_report(result, report)
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


@app.command()
def snapshot(path: Annotated[Path, typer.Argument(help="Folder that `save_snapshot` wrote to.")]) -> None:
    """Show what a saved cache is of, and compare every file with its checksum.

    Exit code 0: it is whole. 1: there is none, or it is damaged.
    """
    from jaxcache.snapshot.load import verify_snapshot

    try:
        manifest = verify_snapshot(path)
    except SnapshotError as error:
        print(f"jaxcache: {error}", file=sys.stderr)
        raise typer.Exit(FOUND_WRONG) from error
    for name, value in manifest.fingerprint.items():
        print(f"{name:36} {value}")
    files = sum(map(len, manifest.parts.values()))
    print(f"{path}: {files} files, {manifest.num_bytes} bytes, all as they were written")
