"""The measured tables of docs/benchmarks.md and, in five rows, of the README, from benchmarks/results.

    python -m benchmarks.readme_table            # rewrites both tables
    python -m benchmarks.readme_table --check    # exit code 1 if they are not what the results say

Ten kinds of files are understood: a replay (`jaxcache replay --json`), the index (`benchmarks.index --json`), eviction
policies (`benchmarks.policies --json`), components of the tree (`benchmarks.components --json`), events
(`benchmarks.events --json`), the host's part of a step (`benchmarks.host_step --json`), snapshots and released memory
(`benchmarks.snapshot --json`), kernels (`benchmarks.device` and `benchmarks.sharded`, JSONL) and attention
(`benchmarks.attention`, JSONL). Another kind is an error: no result should go unseen by accident.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- measured: begin. Written by `python -m benchmarks.readme_table`; edit nothing in here -->"
END = "<!-- measured: end -->"
NOTHING = "Nothing has been measured yet.\n"
# The README's rows: the file, and how `what` and `case` begin.
HIGHLIGHTS = (
    ("h200/replay_mha.json", "trace replayed", ""),
    ("cpu/index.json", "match + insert + evict of a request", "conversation_trace, 2,000 requests, page 16"),
    (
        "cpu/policies.json",
        "hit rate by eviction policy",
        "conversation_trace, 12,031 requests, one at a time, room for 3",
    ),
    ("h200/device.jsonl", "`write_kv`", ""),
    ("cpu/host_step.json", "decode step on the host", ""),
)


@dataclass(frozen=True)
class Row:
    """One line of the table, in Markdown."""

    order: int
    what: str
    case: str
    measured: str
    beside: str
    device: str
    source: Path


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON or JSONL file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else [json.loads(text)]


def rows_of(path: Path) -> Iterator[Row]:
    """What one file adds to the table."""
    records = read(path)
    if "plan_us" in records[0]:
        yield host_row(records[0], path)
    elif any("of_limit" in record for record in records):
        yield from attention_rows(records, path)
    elif all("bench" in record for record in records):
        yield from kernel_rows(records, path)
    elif "verified_slots" in records[0]:
        yield replay_row(records[0], path)
    elif "page_sizes" in records[0]:
        yield from index_rows(records[0], path)
    elif "optimum" in records[0]:
        yield from policy_rows(records[0], path)
    elif "flavours" in records[0]:
        yield from component_rows(records[0], path)
    elif "event_cost" in records[0]:
        yield from event_rows(records[0], path)
    elif "of_plain" in records[0]:
        yield from snapshot_rows(records[0], path)
    elif "released_bytes" in records[0]:
        yield release_row(records[0], path)
    else:
        raise SystemExit(
            f"{path}: neither a replay nor a benchmark of the index, policies, components, events, steps, snapshots or "
            "kernels"
        )


def replay_row(figures: dict[str, Any], path: Path) -> Row:
    """A replay: its proof first."""
    cache = figures.get("cache") or "radix"
    case = (
        f"{Path(figures.get('trace') or path.stem).stem}, {figures['requests']:,} requests, "
        f"{'' if cache == 'radix' else cache + ' cache, '}{figures['pool']} "
        f"{figures.get('dtype', '')}, {figures.get('layers', '?')} layers, page {figures['page_size']}, "
        f"room for {figures['device_tokens']:,} tokens"
    )
    bad = [
        f"{figures[name]:,} {words}"
        for name, words in (
            ("mismatched_slots", "wrong"),
            ("leaked_slots", "leaked"),
            ("recompiles_after_warmup", "late compilations"),
        )
    ]
    states = f" and {figures['verified_states']:,} states" if figures.get("verified_states") else ""
    measured = (
        f"{figures['verified_slots']:,} slots{states} verified: {', '.join(bad)}; hit rate {figures['hit_rate']:.2%}"
    )
    beside = f"{figures['retractions']:,} retractions, {figures['wall_s']:,.0f} s"
    return Row(0, "trace replayed, every hit read back", case, measured, beside, figures["device"], path)


def index_rows(figures: dict[str, Any], path: Path) -> Iterator[Row]:
    """The index beside its peer, keys packed once a request."""
    for page_size, cases in figures["page_sizes"].items():
        ours, theirs = cases["packed keys"], cases.get("SGLang")
        case = f"{Path(figures['trace']).stem}, {figures['requests']:,} requests, page {page_size}"
        for what, name in (("match + insert + evict of a request", "in_all"), ("match, median", "match_p50")):
            beside = "-"
            if theirs is not None:
                times = theirs[f"{name}_us"] / ours[f"{name}_us"]
                beside = f"{figures['peer']}, Python: {theirs[f'{name}_us']:,.1f} µs (**{times:.1f}x**)"
            yield Row(1, what, case, f"{ours[f'{name}_us']:,.1f} µs", beside, figures["cpu"], path)


def policy_rows(figures: dict[str, Any], path: Path) -> Iterator[Row]:
    """Hit rates of the policies on the first trace, one line a pool size: lru beside the best and the optimum."""
    name, trace = next(iter(figures["traces"].items()))
    for i, room in enumerate(figures["device_tokens"]):
        rates = {policy: rate[i] for policy, rate in trace["hit_rates"].items() if policy != "optimum"}
        best = max(rates, key=lambda policy: rates[policy])
        case = f"{Path(name).stem}, {trace['requests']:,} requests, one at a time, room for {room:,} tokens"
        yield Row(
            1,
            "hit rate by eviction policy",
            case,
            f"{best} {rates[best]:.1%}",
            f"lru {rates['lru']:.1%}",
            figures["cpu"],
            path,
        )


def component_rows(figures: dict[str, Any], path: Path) -> Iterator[Row]:
    """What a request costs each kind of tree beside the full tree, and the eviction that grows most with the tree."""
    rows = figures["flavours"]
    for name, row in rows.items():
        if row["beside"] != name:
            case = f"{Path(figures['trace']).stem}, {figures['requests']:,} requests, page {figures['page_size']}"
            beside = (
                f"{row['beside']}: {rows[row['beside']]['in_all_us']:,.1f} µs (**{row['in_all_ratio']:.2f}x** of it)"
            )
            what = f"match + lock + evict + insert, {name}"
            yield Row(1, what, case, f"{row['in_all_us']:,.1f} µs", beside, figures["cpu"], path)
    most = max(figures["growth"], key=lambda row: row["evict_us"][-1] / row["evict_us"][0])
    small, large = (f"{micros:,.0f} µs" for micros in (most["evict_us"][0], most["evict_us"][-1]))
    case = (
        f"1,000 values of the {most['component']}, {most['tree']} tree, which grows most; {most['nodes'][-1]:,} nodes"
    )
    beside = f"{most['nodes'][0]:,} nodes: {small}"
    yield Row(1, "eviction in a large tree", case, large, beside, figures["cpu"], path)


def event_rows(figures: dict[str, Any], path: Path) -> Iterator[Row]:
    """What events cost the index, what an update of the metrics takes, and the proof that a consumer knows the tree."""
    for page_size, cases in figures["event_cost"].items():
        case = f"{Path(figures['trace']).stem}, {figures['requests']:,} requests, page {page_size}"
        measured = f"{cases['recorded']['percent']:+.1f}% of match + insert + evict"
        published = figures["event_cost_beside_steps"][page_size]["published"]["percent"]
        beside = f"published between steps of {figures['step_ms']:g} ms: {published:+.1f}%; "
        beside += f"{figures['thread'][page_size]['ns_a_block']:,.0f} ns a block on the publisher's thread"
        yield Row(1, "events, recorded and taken", case, measured, beside, figures["cpu"], path)
    updates = {name.removesuffix("_ns"): ns for name, ns in figures["metrics"].items()}
    slowest = max(updates, key=lambda name: updates[name])
    beside = ", ".join(f"{name} {ns:,.0f} ns" for name, ns in updates.items() if name != slowest)
    yield Row(1, "metrics", "an update", f"{slowest} {updates[slowest]:,.0f} ns", beside, figures["cpu"], path)
    proof = figures["proof"]
    case = (
        f"{proof['operations']:,} operations on trees of {', '.join(proof['mixes'])}; batches dropped, repeated, late"
    )
    measured = f"{proof['checked']:,} times the same blocks, {proof['differences']} differences"
    beside = f"{proof['gaps']:,} gaps, {proof['restarts']:,} restarts, {proof['losses']:,} losses, all noticed"
    yield Row(1, "tree rebuilt from its events", case, measured, beside, figures["cpu"], path)


def host_row(figures: dict[str, Any], path: Path) -> Row:
    """What a decode step costs the host."""
    upload = f"one upload of {figures['upload_bytes']:,} bytes"
    case = f"{figures['requests']} requests of {figures['context']:,} tokens, {upload}"
    measured = f"{figures['plan_upload_dispatch_us']:,.0f} µs, of it {figures['plan_us']:,.0f} µs to plan"
    late = f"{figures['recompiles']} compilations in {figures['random_steps']:,} steps of random size"
    beside = f"`jax.jit` alone, in the same run: {figures['bare_call_us']:,.0f} µs; {late}"
    return Row(3, "decode step on the host: plan, upload, dispatch", case, measured, beside, figures["device"], path)


def snapshot_rows(figures: dict[str, Any], path: Path) -> Iterator[Row]:
    """Saving and loading a whole cache beside plain file I/O of the same bytes in the same run."""
    rates = {name: rate["median"] for name, rate in figures["gb_per_s"].items()}
    case = f"{figures['file_bytes'] / 1e9:.1f} GB in {figures['files']} files, {figures['threads']} threads"
    for what, name, plain in (
        ("whole cache saved, each file synced", "save", "plain write"),
        ("whole cache loaded, files not in memory", "load cold", "plain read cold"),
        ("whole cache loaded, files in memory", "load warm", "plain read warm"),
    ):
        best = max(rate for other, rate in rates.items() if other.startswith(plain))
        beside = f"plain file I/O: {best:.2f} GB/s (**{figures['of_plain'][name]:.0%}** of it)"
        yield Row(3, what, case, f"{rates[name]:.2f} GB/s", beside, figures["device"], path)


def release_row(figures: dict[str, Any], path: Path) -> Row:
    """Device memory released and resumed, what was in it kept on the host."""
    rates = {name: rate["median"] for name, rate in figures["gb_per_s"].items()}
    case = f"{figures['pool_bytes'] / 1e9:.1f} GB, all in use and kept"
    measured = f"{rates['release, kept, later']:.1f} GB/s out, {rates['resume, later']:.1f} GB/s back"
    beside = f"the first time, which pins host memory: {rates['release, kept, first']:.1f} GB/s out; "
    beside += f"{figures['released_bytes']:,} bytes stay on the device"
    return Row(3, "device memory released and resumed", case, measured, beside, figures["device"], path)


def kernel_rows(records: list[dict[str, Any]], path: Path) -> Iterator[Row]:
    """The largest case of each kernel, if possible one with peers: our fastest implementation beside each of them."""
    for bench, group in itertools.groupby(sorted(records, key=lambda r: r["bench"]), key=lambda r: r["bench"]):
        rows = list(group)
        mine = [row for row in rows if row["implementation"].startswith("jaxcache")]
        if not mine:
            continue
        compared = {row["case"] for row in rows if row["is_peer"] and "copy" not in row["implementation"]}
        case = max(mine, key=lambda row: (row["case"] in compared, row["median_us"]))["case"]
        best = min((row for row in mine if row["case"] == case), key=lambda row: row["median_us"])
        how = best["implementation"].removeprefix("jaxcache-").replace("triton-torch", "triton, the kernel alone")
        measured = f"{best['median_us']:,.1f} µs ({how})"
        if best["gb_per_s"]:
            measured += f", {best['gb_per_s']:,.0f} GB/s"
        if best["ratio_to_copy"]:
            measured += f" ({best['ratio_to_copy']:.0%} of a device copy)"
        peers = [row for row in rows if row["is_peer"] and row["case"] == case and "copy" not in row["implementation"]]
        beside = ", ".join(f"{row['implementation']} {row['median_us']:,.1f} µs" for row in peers) or "-"
        yield Row(2, f"`{bench}`", case, measured, beside, best["device"].replace("-", " "), path)


def attention_rows(records: list[dict[str, Any]], path: Path) -> Iterator[Row]:
    """The checks against float64; then the largest case of each group, if possible one with peers."""
    checks = [record for record in records if record["bench"] == "check"]
    if checks:
        wrong = sum("failed" in check for check in checks)
        what, case = "attention against float64", "random ragged batches; slots without an owner are NaN"
        yield Row(2, what, case, f"{len(checks)} cases, {wrong} wrong", "-", checks[0]["device"], path)
    timed = [record for record in records if record.get("us")]
    for bench, group in itertools.groupby(timed, key=lambda record: record["bench"]):
        rows = list(group)
        compared = {row["case"] for row in rows if row.get("is_peer")}
        case = max(rows, key=lambda row: (row["case"] in compared, row["us"]))["case"]
        rows = sorted((row for row in rows if row["case"] == case), key=lambda row: row["us"])
        best = next(row for row in rows if not row.get("is_peer"))
        measured = f"{best['us']:,.1f} µs a layer ({best['implementation'].removeprefix('jaxcache-')})"
        if 0.5 < best["of_limit"] <= 1:
            measured += f", {best['gb_per_s']:,.0f} GB/s ({best['of_limit']:.0%} of a plain read)"
        else:
            measured += f", {best['tflops']:,.0f} TFLOP/s"
        others = (
            f"{row['implementation'].removeprefix('jaxcache-')} {row['us']:,.1f} µs (**{row['us'] / best['us']:.2f}x**)"
            for row in rows
            if row is not best
        )
        yield Row(2, f"attention, {bench}", case, measured, ", ".join(others) or "-", best["device"], path)


def all_rows(folder: Path = RESULTS) -> list[Row]:
    """A row for every result, in the order of the table."""
    files = sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")])
    return sorted((row for path in files for row in rows_of(path)), key=lambda row: row.order)


def highlights(rows: list[Row], folder: Path = RESULTS) -> list[Row]:
    """The README's rows; one that no result gives any more is an error."""
    found = []
    for name, what, case in HIGHLIGHTS:
        fitting = [r for r in rows if r.source == folder / name and r.what.startswith(what) and r.case.startswith(case)]
        if len(fitting) != 1:
            raise SystemExit(f"README.md: {len(fitting)} rows of {name} begin with {what!r} and {case!r}, not one")
        found += fitting
    return found


def table(rows: list[Row], beside: Path = README) -> str:
    """Rows as Markdown for the file `beside`, with links to their sources; a sentence if there are none."""
    if not rows:
        return NOTHING
    lines = ["| what | case | measured | beside it | on |", "|---|---|---|---|---|"]
    for row in rows:
        source = os.path.relpath(row.source, beside.parent)
        lines.append(f"| {row.what} | {row.case} | {row.measured} | {row.beside} | [{row.device}]({source}) |")
    return "\n".join(lines) + "\n"


def with_table(text: str, new: str) -> str:
    """A page's text with another table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the markers of the measured table are missing: {BEGIN} ... {END}")
    return f"{before}{begin}\n\n{new}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Both pages as they should be."""
    rows = all_rows()
    chosen = {README: highlights(rows), PAGE: rows}
    return {page: with_table(page.read_text(encoding="utf-8"), table(part, page)) for page, part in chosen.items()}


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    outdated = {page: new for page, new in pages().items() if page.read_text(encoding="utf-8") != new}
    for page, new in outdated.items():
        if check:
            print(f"{page.name}: its table is not what benchmarks/results says: python -m benchmarks.readme_table")
        else:
            page.write_text(new, encoding="utf-8")
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
