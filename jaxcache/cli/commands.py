"""The commands of `jaxcache`, on top of everything. Needs the extra `cli`; nothing imports this but `cli.py`."""

# No `from __future__ import annotations` here: typer reads the annotations as objects.
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jaxcache.errors import ArgumentError, SnapshotError
from jaxcache.index.policies.registry import Policy
from jaxcache.pools.layout import Layout
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.config import CacheKind, DType, Fault, PoolKind, ReplayConfig
from jaxcache.replay.report import write_report
from jaxcache.replay.terminal import ReplayProgress, render_table
from jaxcache.replay.trace import write_trace

FOUND_WRONG = 1
_AUTO = "auto"
_FAULTS = ", ".join(fault.value for fault in Fault)
_LOAD, _MEMORY, _PROOF, _OUTPUT = "Load", "Memory", "Proof", "Output"  # panels of the help


def _option(panel: str, words: str, metavar: str | None = None) -> Any:
    """An option with its place in the help."""
    return typer.Option(help=words, rich_help_panel=panel, metavar=metavar)


app = typer.Typer(
    help="A paged KV cache with prefix sharing for JAX: replay traces through it, look at saved caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def replay(
    trace: Annotated[
        Path | None, typer.Argument(help="Trace in Mooncake's format (JSONL); without it, chats are generated.")
    ] = None,
    requests: Annotated[int | None, _option(_LOAD, "Only the first so many requests.")] = None,
    concurrency: Annotated[int, _option(_LOAD, "Most requests that run at once.")] = ReplayConfig.concurrency,
    chunk: Annotated[int, _option(_LOAD, "Most prompt tokens of one step.")] = ReplayConfig.chunk,
    seed: Annotated[int, _option(_LOAD, "Of generated chats and of output tokens.")] = ReplayConfig.seed,
    page_size: Annotated[int, _option(_MEMORY, "Tokens in a page.")] = ReplayConfig.page_size,
    device_tokens: Annotated[int, _option(_MEMORY, "Room of the pool, in tokens.")] = ReplayConfig.device_tokens,
    policy: Annotated[Policy, _option(_MEMORY, "Order of eviction.")] = ReplayConfig.policy,
    cache: Annotated[CacheKind, _option(_MEMORY, "Kind of prefix cache.")] = ReplayConfig.cache,
    window: Annotated[int, _option(_MEMORY, "Tokens that window layers attend to (swa).")] = ReplayConfig.window,
    window_tokens: Annotated[
        int | None, _option(_MEMORY, "Room of the window layers' pool. [a quarter of --device-tokens]")
    ] = None,
    states: Annotated[
        int | None, _option(_MEMORY, "Recurrent states there is room for (mamba). [4 x --concurrency]")
    ] = None,
    adapters: Annotated[int, _option(_LOAD, "Adapters requests are spread over (lora).")] = ReplayConfig.adapters,
    pool: Annotated[PoolKind, _option(_MEMORY, "Kind of device pool.")] = ReplayConfig.pool,
    layout: Annotated[Layout, _option(_MEMORY, "Order of the rows in it.")] = ReplayConfig.layout,
    layers: Annotated[
        str, _option(_MEMORY, "Layers of KV; auto: what the device has room for, two on a CPU.", metavar="L|auto")
    ] = _AUTO,
    heads: Annotated[int | None, _option(_MEMORY, "KV heads of an mha pool. [CPU: 1, GPU: 8]")] = None,
    head_dim: Annotated[int | None, _option(_MEMORY, "Width of a head. [CPU: 8, GPU: 128]")] = None,
    rank: Annotated[int | None, _option(_MEMORY, "Latent width of an mla pool. [CPU: 12, GPU: 512]")] = None,
    rope_dim: Annotated[int | None, _option(_MEMORY, "Rotary width of an mla pool. [CPU: 4, GPU: 64]")] = None,
    dtype: Annotated[
        DType | None, _option(_MEMORY, "Of the pool. [CPU: float32, GPU: bfloat16]", metavar="DTYPE")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Read nothing back.", rich_help_panel=_PROOF)] = False,
    plant: Annotated[Fault | None, _option(_PROOF, f"Break the stack on purpose: {_FAULTS}.", metavar="FAULT")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the figures here.", rich_help_panel=_OUTPUT)
    ] = None,
    report: Annotated[Path | None, _option(_OUTPUT, "Write an HTML report here.", metavar="PATH.html")] = None,
) -> None:
    """Drive every request of a trace through the real stack and prove the content of every hit.

    Exit code 0: every slot held what it should and no page was lost. 1: something was wrong. 2: wrong option or trace.
    """
    config = ReplayConfig(
        trace=trace, requests=requests, concurrency=concurrency, chunk=chunk, page_size=page_size,
        device_tokens=device_tokens, pool=pool, layout=layout, layers=_layers(layers), heads=heads, head_dim=head_dim,
        rank=rank, rope_dim=rope_dim, dtype=dtype, policy=policy, cache=cache, window=window,
        window_tokens=window_tokens, states=states, adapters=adapters, seed=seed, verify=not no_verify, plant=plant,
    )  # fmt: skip
    for path in (json_path, report):
        _check_writable(path)
    requests_to_replay = config.load_requests()  # before JAX starts, so that a bad file is reported at once

    from jaxcache.replay.run import run_replay

    with ReplayProgress(len(requests_to_replay)) as progress:
        result = run_replay(config, progress=progress, requests=requests_to_replay)
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
