"""What a window or a state costs the tree: each operation of each cache flavour beside the full tree.

    python -m benchmarks.components TRACE --json OUT.json

All flavours run in this process, on the same requests, and take turns. Of each step of each request the fastest of
several passes counts, so that what other processes do to the machine is hardly measured. No allocator, no cache class:
only the tree. Room is short for the first component alone, so that all evict the same.

A request is looked up and locked, room is made, what it computed is inserted, and its lock is given back. Where it is
inserted in two parts, prompt and answer, there are twice as many nodes, which cost more whatever is in them: such a
tree is compared with a full tree of the same nodes.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import as_command, measured_on, requests_of, write_figures
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import RadixKey
from jaxcache.index.tree import RadixTree
from jaxcache.replay.trace import TraceRequest, output_tokens, prompt_tokens

STEPS = ("match", "lock", "evict", "insert", "unlock")
OPERATIONS = {"match": ("match",), "lock": ("lock", "unlock"), "evict": ("evict",), "insert": ("insert",)}
EVICTED = 1_000
_OWN_PAGES = 3
_CHATS_A_PROMPT = 50
_PASSES = 15


@dataclass(frozen=True)
class Flavour:
    """A tree, and how requests fill it.

    Attributes:
      components: Of the tree.
      is_in_parts: A prompt is inserted before its answer, not with it.
      beside: Name of the case that it is compared with.
    """

    components: tuple[Component, ...]
    is_in_parts: bool = False
    beside: str = "full"

    def values(self, pages: int, numbers: np.ndarray) -> list[np.ndarray]:
        """What is offered for that many pages."""
        return [numbers[: pages if component.spans else 1].copy() for component in self.components]


def flavours(window: int) -> dict[str, Flavour]:
    """The cases."""
    swa, state = Component("window", window), Component("state", 1, spans=False)
    return {
        "full": Flavour((FULL,)),
        "window": Flavour((FULL, swa)),
        "state": Flavour((FULL, state)),
        "window and state": Flavour((FULL, swa, state)),
        "full, in two parts": Flavour((FULL,), True, "full, in two parts"),
        "window, in two parts": Flavour((FULL, swa), True, "full, in two parts"),
    }


Keys = Sequence[tuple[RadixKey, RadixKey]]


def keys_of(requests: Sequence[TraceRequest]) -> Keys:
    """Prompt and sequence (prompt and answer) of each request, packed."""
    keys = []
    for i, request in enumerate(requests):
        prompt = prompt_tokens(request)
        answer = output_tokens(i, request.output_length)
        keys.append((RadixKey(prompt), RadixKey(np.concatenate([prompt, answer]))))
    return keys


def run(flavour: Flavour, keys: Keys, page_size: int, room: int) -> tuple[np.ndarray, RadixTree]:
    """One pass through all requests: int64 nanoseconds (requests, steps), and the tree that is left."""
    tree = RadixTree(page_size, flavour.components)
    nanoseconds = np.zeros((len(keys), len(STEPS)), np.int64)
    numbers = np.arange(1, max(len(sequence) for _, sequence in keys) // page_size + 1, dtype=np.int32)
    clock = time.perf_counter_ns
    for i, (prompt, sequence) in enumerate(keys):
        pages = sequence.length // page_size
        values = flavour.values(pages, numbers)
        begun = clock()
        match = tree.match(prompt)
        matched = clock()
        receipt = tree.lock(match)
        locked = clock()
        short = len(tree) + pages - match.length // page_size - room
        if short > 0:
            tree.evict(short)
        roomy = clock()
        if flavour.is_in_parts:
            tree.insert(prompt, values, receipt)
        tree.insert(sequence, values, receipt)
        inserted = clock()
        tree.unlock(receipt)
        unlocked = clock()
        nanoseconds[i] = np.diff([begun, matched, locked, roomy, inserted, unlocked])
    return nanoseconds, tree


def measure(cases: dict[str, Flavour], keys: Keys, page_size: int, room: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Microseconds a request for each operation of each flavour, and the ratio to what it is compared with."""
    best: dict[str, np.ndarray] = {}
    nodes: dict[str, int] = {}
    for turn in range(repeat):
        for name in list(cases) if turn % 2 else reversed(cases):
            gc.collect()
            nanoseconds, tree = run(cases[name], keys, page_size, room)
            best[name] = np.minimum(best.get(name, nanoseconds), nanoseconds)
            nodes[name] = sum(1 for _ in tree.nodes())
    rows: dict[str, dict[str, Any]] = {}
    for name in cases:
        mean = dict(zip(STEPS, (best[name].mean(axis=0) / 1e3).tolist(), strict=True))
        rows[name] = {f"{figure}_us": sum(mean[step] for step in steps) for figure, steps in OPERATIONS.items()}
        rows[name]["in_all_us"] = sum(mean.values())
    figures = [f"{figure}_us" for figure in (*OPERATIONS, "in_all")]
    for name, row in rows.items():
        base = rows[cases[name].beside]
        row |= {figure.replace("_us", "_ratio"): row[figure] / base[figure] for figure in figures}
        row |= {"beside": cases[name].beside, "nodes": nodes[name]}
    return rows


class Forest:
    """A tree full of chats: a system prompt of one page, shared by 50 chats, and three pages of each chat's own."""

    def __init__(self, components: tuple[Component, ...], nodes: int, page_size: int):
        self.tree = RadixTree(page_size, components)
        self.page_size = page_size
        self.chats = max(nodes * _CHATS_A_PROMPT // (_CHATS_A_PROMPT + 1), 1)
        self.next_chat = 0
        self.fill()

    def fill(self) -> None:
        """New chats take the place of those that were evicted."""
        pages = self.chats * _OWN_PAGES
        values = [np.arange(1, _OWN_PAGES + 2, dtype=np.int32) for _ in self.tree.components]
        while len(self.tree) < pages:
            self.next_chat += 1
            prompt = self.next_chat % (self.chats // _CHATS_A_PROMPT + 1)
            tokens = np.array([prompt] + [-self.next_chat] * _OWN_PAGES, np.int32).repeat(self.page_size)
            self.tree.insert(RadixKey(tokens), values)

    def evict(self, component: int) -> float:
        """Seconds that evicting 1,000 values of a component took; they are filled again afterwards."""
        start = time.perf_counter()
        self.tree.evict(EVICTED, component)
        seconds = time.perf_counter() - start
        self.fill()
        return seconds


def measure_growth(cases: dict[str, Flavour], sizes: Sequence[int], page_size: int) -> list[dict[str, Any]]:
    """Microseconds to evict 1,000 values of each component, the least of several times, in small and large trees."""
    rows = []
    for name, flavour in cases.items():
        if flavour.is_in_parts:
            continue
        forests = [Forest(flavour.components, nodes, page_size) for nodes in sizes]
        for c, component in enumerate(flavour.components):
            seconds = [[forest.evict(c) for forest in forests] for _ in range(_PASSES)]
            micros = (1e6 * np.min(seconds, axis=0)).tolist()
            rows.append({"tree": name, "component": component.name, "nodes": list(sizes), "evict_us": micros})
    return rows


def cost_table(rows: dict[str, dict[str, Any]], page_size: int) -> Table:
    """One row a flavour, each cell with its ratio to a full tree of the same nodes in brackets."""
    table = Table(title=f"page size {page_size}: microseconds a request (times a full tree of the same nodes)")
    table.add_column("")
    for figure in (*OPERATIONS, "in_all", "nodes"):
        table.add_column(figure.replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = [f"{row[f'{figure}_us']:.2f} ({row[f'{figure}_ratio']:.2f}x)" for figure in (*OPERATIONS, "in_all")]
        table.add_row(name, *cells, f"{row['nodes']:,}")
    return table


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """One row a component of a tree, one column a size of it."""
    table = Table(title=f"evicting {EVICTED:,} values: microseconds")
    for column in ("tree", "component", *(f"{nodes:,} nodes" for nodes in rows[0]["nodes"])):
        table.add_column(column)
    for row in rows:
        table.add_row(row["tree"], row["component"], *(f"{micros:.0f}" for micros in row["evict_us"]))
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.components", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="Mooncake's format; without it a chat trace is generated")
    parser.add_argument("--requests", type=int, default=3_000, help="only the first so many")
    parser.add_argument("--device-tokens", type=int, default=3_000_000, help="room of the tree")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=1_024, help="tokens of the sliding window")
    parser.add_argument("--repeat", type=int, default=6, help="passes of each flavour")
    parser.add_argument("--nodes", type=int, nargs="*", default=[10_000, 100_000], help="trees to measure growth with")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what was written."""
    options = parse(arguments)
    console = Console()
    requests = requests_of(options)
    cases = flavours(options.window)
    room = options.device_tokens // options.page_size
    result: dict[str, Any] = measured_on(options, requests) | {
        "page_size": options.page_size,
        "window": options.window,
    }
    result["flavours"] = measure(cases, keys_of(requests), options.page_size, room, options.repeat)
    console.print(cost_table(result["flavours"], options.page_size))
    if options.nodes:
        result["growth"] = measure_growth(cases, options.nodes, options.page_size)
        console.print(growth_table(result["growth"]))
    write_figures(options.json, result)
    return result


if __name__ == "__main__":
    as_command("components", main)
