"""The prefix index beside SGLang 0.5.2's Python RadixCache, on a request trace, one request at a time, on one core.

    python -m benchmarks.index TRACE --sglang DIR --json OUT.json

Both run in this process, on the same requests, and take turns. Of each step of each request the fastest of several
passes counts, so that what other processes do to the machine is hardly measured. `in all` is match + evict + insert.
SGLang is given what it takes natively: lists, and int64 slots in a tensor.

Each cache has its own allocator: ours checks and changes the owner of every page inserted or evicted, SGLang's gathers
the pages of every slot evicted. `tree alone` is each cache without: evicting and inserting then keep no books of pages.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import as_command, measured_on, requests_of, write_figures
from benchmarks.index_drivers import (
    Driver,
    ListKeys,
    NumPyKeys,
    Packed,
    SGLang,
    SGLangTreeAlone,
    Slots,
    TreeAlone,
)
from benchmarks.index_scale import measure_scale
from benchmarks.sglang_tree import HOW_TO_GET_IT, SGLangClasses, find_sglang, load_sglang
from jaxcache.errors import CacheError
from jaxcache.replay.trace import TraceRequest, output_tokens, prompt_tokens

PEER, PEER_ALONE = "SGLang", "SGLang, tree alone"
CASES: dict[str, type[Packed]] = {
    "packed keys": Packed,
    "NumPy keys": NumPyKeys,
    "slots expanded": Slots,
    "Python lists": ListKeys,
    "packed keys, tree alone": TreeAlone,
}
STEP_COLUMNS = ("match", "evict", "insert", "allocator")
STEPS = ("match", "evict", "allocate", "insert", "free")


class Run:
    """One pass of a cache through all requests.

    Attributes:
      nanoseconds: int64 (requests, steps).
      hits: int64 (requests,), tokens matched.
      first_eviction: The first request that had to evict; the number of requests if none had.
    """

    def __init__(self, driver: Driver, requests: Sequence[TraceRequest]):
        self.nanoseconds = np.zeros((len(requests), len(STEPS)), np.int64)
        self.hits = np.zeros(len(requests), np.int64)
        self.first_eviction = len(requests)
        clock = time.perf_counter_ns
        for i, request in enumerate(requests):
            prompt = prompt_tokens(request)
            driver.prepare(prompt, np.concatenate([prompt, output_tokens(i, request.output_length)]))
            begun = clock()
            hit = driver.match()
            matched = clock()
            evicted = driver.make_room()
            roomy = clock()
            driver.allocate()
            allocated = clock()
            driver.insert()
            inserted = clock()
            driver.free_duplicates()
            freed = clock()
            self.nanoseconds[i] = np.diff([begun, matched, roomy, allocated, inserted, freed])
            self.hits[i] = hit
            if evicted:
                self.first_eviction = min(self.first_eviction, i)


def summarise(runs: Sequence[Run], tokens: int) -> dict[str, float]:
    """The figures of one case; times in microseconds a request."""
    micros = np.min([run.nanoseconds for run in runs], axis=0) / 1e3
    mean = dict(zip(STEPS, micros.mean(axis=0).tolist(), strict=True))
    match, insert = micros[:, STEPS.index("match")], micros[:, STEPS.index("insert")]
    return {
        "in_all_us": mean["match"] + mean["evict"] + mean["insert"],
        "match_us": mean["match"],
        "evict_us": mean["evict"],
        "insert_us": mean["insert"],
        "match_p50_us": float(np.percentile(match, 50)),
        "match_p99_us": float(np.percentile(match, 99)),
        "insert_p50_us": float(np.percentile(insert, 50)),
        "insert_p99_us": float(np.percentile(insert, 99)),
        "allocator_us": mean["allocate"] + mean["free"],
        "hit_rate": float(runs[0].hits.sum() / tokens),
    }


def check_hits(ours: Run, theirs: Run) -> None:
    """Both must find the same until something is evicted; only the order of eviction may differ.

    SGLang's match splits the node it ends in and makes both halves young; ours changes nothing and leaves the part that
    was not matched as old as it is. So after the first eviction ours keeps what is shared a little better.
    """
    end = min(ours.first_eviction, theirs.first_eviction) + 1
    differs = ours.hits[:end] != theirs.hits[:end]
    if differs.any():
        i = int(differs.argmax())
        raise CacheError(
            f"request {i}: matched {ours.hits[i]} tokens, {PEER} matched {theirs.hits[i]}, nothing evicted"
        )


def measure(
    requests: Sequence[TraceRequest], page_size: int, device_tokens: int, repeat: int, sglang: SGLangClasses | None
) -> dict[str, dict[str, float]]:
    """Every case at one page size, the peer's included; a ratio is how many times slower the peer is."""
    makers: dict[str, Callable[[], Driver]] = {
        name: functools.partial(case, device_tokens, page_size) for name, case in CASES.items()
    }
    if sglang is not None:
        makers[PEER] = functools.partial(SGLang, sglang, device_tokens, page_size)
        makers[PEER_ALONE] = functools.partial(SGLangTreeAlone, sglang, device_tokens, page_size)
    runs: dict[str, list[Run]] = {name: [] for name in makers}
    for _ in range(repeat):
        for name, make in makers.items():
            gc.collect()
            runs[name].append(Run(make(), requests))
    tokens = sum(request.input_length for request in requests)
    rows = {name: summarise(of_case, tokens) for name, of_case in runs.items()}
    if sglang is not None:
        for name in CASES:
            check_hits(runs[name][0], runs[PEER][0])
            peer = PEER_ALONE if CASES[name] is TreeAlone else PEER
            for figure in ("in_all", "match_p50", "match_p99"):
                rows[name][f"{figure}_ratio"] = rows[peer][f"{figure}_us"] / rows[name][f"{figure}_us"]
            rows[name]["in_all_ratio_to_tree_alone"] = rows[PEER_ALONE]["in_all_us"] / rows[name]["in_all_us"]
    return rows


def trace_table(page_size: int, rows: dict[str, dict[str, float]]) -> Table:
    """The cases of one page size, each with its ratio to the peer in brackets."""
    table = Table(title=f"page size {page_size}: microseconds a request (times faster than {PEER})")
    table.add_column("")
    for column in ("in all", "to its tree alone", "match p50", "match p99", *STEP_COLUMNS, "hit rate"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        strictly = row.get("in_all_ratio_to_tree_alone")
        cells = [_with_ratio(row, "in_all"), "" if strictly is None else f"{strictly:.1f}x"]
        cells += [_with_ratio(row, figure) for figure in ("match_p50", "match_p99")]
        cells += [f"{row[f'{figure}_us']:.1f}" for figure in STEP_COLUMNS]
        table.add_row(name, *cells, f"{row['hit_rate']:.4f}")
    return table


def _with_ratio(row: dict[str, float], figure: str) -> str:
    ratio = row.get(f"{figure}_ratio")
    return f"{row[f'{figure}_us']:.1f}" + ("" if ratio is None else f" ({ratio:.1f}x)")


def scale_table(rows: list[dict[str, float]]) -> Table:
    """One column a tree size."""
    table = Table(title="one tree, small and large: microseconds")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['nodes']:,} nodes", justify="right")
    for figure in rows[0]:
        if figure != "nodes":
            table.add_row(figure.removesuffix("_us").replace("_", " "), *(f"{row[figure]:.1f}" for row in rows))
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="Mooncake's format; without it a chat trace is generated")
    parser.add_argument("--requests", type=int, default=2_000, help="only the first so many")
    parser.add_argument("--device-tokens", type=int, default=3_000_000, help="room of the cache")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeat", type=int, default=5, help="passes of each case")
    parser.add_argument("--sglang", type=Path, help="folder that holds SGLang's package; default: an installed one")
    parser.add_argument(
        "--nodes", type=int, nargs="*", default=[10_000, 1_000_000], help="trees to measure growth with"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what was written."""
    options = parse(arguments)
    console = Console()
    folder = find_sglang(options.sglang)
    sglang = load_sglang(folder) if folder else None
    if folder is None:
        console.print(f"{PEER} is not installed, so there is nothing to compare with: {HOW_TO_GET_IT}")
    requests = requests_of(options)
    result: dict[str, Any] = measured_on(options, requests) | {
        "peer": f"{PEER} {sglang.version}" if sglang else None,
        "page_sizes": {},
    }
    for page_size in options.page_sizes:
        rows = measure(requests, page_size, options.device_tokens, options.repeat, sglang)
        result["page_sizes"][str(page_size)] = rows
        console.print(trace_table(page_size, rows))
    if options.nodes:
        result["scale"] = measure_scale(tuple(options.nodes), operations=20_000, evictions=20)
        console.print(scale_table(result["scale"]))
    write_figures(options.json, result)
    return result


if __name__ == "__main__":
    as_command("index", main)
