"""Hit rates of the eviction policies beside the offline optimum, on request traces.

    python -m benchmarks.policies [TRACE ...] [--json OUT.json] [--plot OUT.svg]

Without a trace, chats of several shapes are generated, and what breaks policies: scans, loops, popularity that is
skewed or drifts. Requests come one at a time: look up the prompt, lock what is found, evict what is short, insert
prompt and answer, unlock. A hit is a prompt token found. The tree is the real one, without an allocator.

The optimum is Belady's, on blocks of 512 tokens: the block asked for furthest in the future goes first, one that never
comes again at once, and a block is found if all before it are. It knows the future; no policy that does not comes near.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import as_command, machine, write_figures
from benchmarks.policy_traces import generated_traces
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from jaxcache.observe.svg import Svg
from jaxcache.replay.trace import BLOCK_TOKENS, TraceRequest, output_tokens, prompt_tokens, read_trace

SIZES = (1_000_000, 3_000_000, 10_000_000)
OPTIMUM = "optimum"
MOST_LOST = 0.01


class Run:
    """One policy with room for some tokens, on its way through a trace.

    Attributes:
      hits: Prompt tokens found so far.
    """

    def __init__(self, policy: Policy, device_tokens: int, page_size: int):
        self.hits = 0
        self._tree = RadixTree(page_size, policy=policy)
        self._room = device_tokens // page_size
        self._used = 0

    def serve(self, prompt: RadixKey, sequence: RadixKey, pages: np.ndarray) -> None:
        """One request; `pages` are as many numbers as the sequence has whole pages."""
        tree = self._tree
        match = tree.match(prompt)
        self.hits += match.length
        lock = tree.lock(match)
        short = self._used + len(pages) - match.length // tree.page_size - self._room
        if short > 0:
            gone = len(tree.evict(short).values[0])
            self._used -= gone
            short -= gone
        if short <= 0:
            inserted = tree.insert(sequence, (pages,), lock)
            self._used += (inserted.length - inserted.present) // tree.page_size
        tree.unlock(lock)


def optimum(requests: Sequence[TraceRequest], device_tokens: int, block: int = BLOCK_TOKENS) -> int:
    """Prompt tokens that an eviction which knows the future would find. O(blocks log blocks)."""
    accesses = [(i, block_id) for i, request in enumerate(requests) for block_id in request.hash_ids]
    next_use = np.full(len(accesses), len(requests), np.int64)
    coming: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        i, block_id = accesses[at]
        next_use[at] = coming.get(block_id, len(requests))
        coming[block_id] = i
    room, hits = device_tokens // block, 0
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    at = 0
    for request in requests:
        left = request.input_length
        is_prefix = True
        for block_id in request.hash_ids:
            is_prefix = is_prefix and block_id in kept
            hits += min(block, left) if is_prefix else 0
            left -= block
        for block_id in request.hash_ids:
            kept[block_id] = int(next_use[at])
            heapq.heappush(furthest, (-kept[block_id], block_id))
            at += 1
        while furthest and (len(kept) > room or -furthest[0][0] == len(requests)):
            when, block_id = heapq.heappop(furthest)
            if kept.get(block_id) == -when:
                del kept[block_id]
    return hits


def measure(
    requests: Sequence[TraceRequest], policies: Iterable[Policy], sizes: Sequence[int], page_size: int
) -> dict[str, list[float]]:
    """Hit rate of every policy, and of the optimum, at every size."""
    runs = {policy: [Run(policy, size, page_size) for size in sizes] for policy in policies}
    pages = np.arange(max(r.input_length + r.output_length for r in requests) // page_size + 1, dtype=np.int32)
    for i, request in enumerate(requests):
        prompt = prompt_tokens(request)
        sequence = RadixKey(np.concatenate([prompt, output_tokens(i, request.output_length)]))
        looked_up = sequence[: len(prompt)]
        fresh = pages[: sequence.length // page_size]
        for of_policy in runs.values():
            for run in of_policy:
                run.serve(looked_up, sequence, fresh)
    asked = sum(request.input_length for request in requests)
    rates = {policy.value: [run.hits / asked for run in of_policy] for policy, of_policy in runs.items()}
    return rates | {OPTIMUM: [optimum(requests, size) / asked for size in sizes]}


def lost_to_lru(rates: dict[str, list[float]]) -> dict[str, float]:
    """The most that each policy is behind LRU at any size; negative if it is always ahead."""
    baseline = rates[Policy.LRU.value]
    return {name: max(b - r for b, r in zip(baseline, mine, strict=True)) for name, mine in rates.items()}


def table(name: str, sizes: Sequence[int], rates: dict[str, list[float]]) -> Table:
    """One row a policy."""
    shown = Table(title=f"{name}: prompt tokens found, %")
    shown.add_column("")
    for size in sizes:
        shown.add_column(f"{size / 1e6:g} M tokens", justify="right")
    shown.add_column("at worst behind LRU", justify="right")
    behind = lost_to_lru(rates)
    for policy, row in rates.items():
        style = "red" if behind[policy] > MOST_LOST else ""
        shown.add_row(policy, *(f"{100 * rate:.1f}" for rate in row), f"{100 * behind[policy]:+.1f}", style=style)
    return shown


def plot(name: str, sizes: Sequence[int], rates: dict[str, list[float]]) -> Svg:
    """Hit rate over room, a line a policy, as SVG."""
    width, height, left, top, right, bottom = 760, 420, 60, 40, 130, 50
    across = np.log(np.array(sizes, float))
    x = left + (across - across[0]) / max(np.ptp(across), 1e-9) * (width - left - right)
    most = max(max(row) for row in rates.values()) * 1.05 or 1.0
    y = {policy: top + (1 - np.array(row) / most) * (height - top - bottom) for policy, row in rates.items()}
    parts = [f'<text x="{left}" y="22" font-weight="bold">{name}: prompt tokens found</text>']
    for rate in np.linspace(0, most, 5):
        level = top + (1 - rate / most) * (height - top - bottom)
        parts.append(f'<path d="M{left} {level:.1f}H{width - right}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{left - 8}" y="{level + 4:.1f}" text-anchor="end">{100 * rate:.0f} %</text>')
    for size, place in zip(sizes, x, strict=True):
        parts.append(f'<text x="{place:.1f}" y="{height - 25}" text-anchor="middle">{size / 1e6:g} M tokens</text>')
    ends = sorted(rates, key=lambda policy: y[policy][-1])
    label = -np.inf
    for i, policy in enumerate(ends):
        colour = "#0f172a" if policy == OPTIMUM else f"hsl({i * 360 // len(ends)} 65% 45%)"
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y[policy], strict=True))
        dash = ' stroke-dasharray="6 4"' if policy == OPTIMUM else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        label = max(y[policy][-1] + 4, label + 14)
        parts.append(f'<text x="{x[-1] + 8:.1f}" y="{label:.1f}" fill="{colour}">{policy}</text>')
    source = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
    return Svg(source, f"{name}: hit rates of {', '.join(rates)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("traces", nargs="*", type=Path, help="Mooncake's format; without one, traces are generated")
    parser.add_argument("--generated", action="store_true", help="the generated traces too")
    parser.add_argument("--requests", type=int, help="only the first so many of each")
    parser.add_argument("--policies", nargs="+", type=Policy, default=list(Policy), metavar="POLICY")
    parser.add_argument("--device-tokens", type=int, nargs="+", default=list(SIZES), help="rooms of the cache")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a drawing of the first trace here, as SVG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what was written."""
    options = parse(arguments)
    console = Console()
    sizes = options.device_tokens
    policies = dict.fromkeys([Policy.LRU, *options.policies])
    traces = {path.name: read_trace(path, options.requests) for path in options.traces}
    if options.generated or not traces:
        traces |= generated_traces(options.requests)
    result: dict[str, Any] = machine() | {
        "page_size": options.page_size,
        "device_tokens": sizes,
        "optimum": f"Belady on blocks of {BLOCK_TOKENS} tokens",
        "traces": {},
    }
    for i, (name, requests) in enumerate(traces.items()):
        begun = time.perf_counter()
        rates = measure(requests, policies, sizes, options.page_size)
        result["traces"][name] = {"requests": len(requests), "hit_rates": rates, "behind_lru": lost_to_lru(rates)}
        console.print(table(f"{name} ({len(requests)} requests)", sizes, rates))
        console.print(f"{time.perf_counter() - begun:.0f} s")
        if i == 0 and options.plot:
            options.plot.write_text(plot(name, sizes, rates).source + "\n", encoding="utf-8")
        write_figures(options.json, result)
    return result


if __name__ == "__main__":
    as_command("policies", main)
