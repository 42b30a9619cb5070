"""Random lives of trees: `python -m tests.model.tree_driver --seeds 0:1000 --out FILE`.

A seed decides everything: components, page size, window, policy and kind of keys (`SHAPES`, in turn), then each
operation. A life is some hundred operations on a small tree, biased to where bugs live: few different pages, sequences
that share prefixes of all lengths, one component evicted in bites of one or two, short prefixes touched again, locks
held across splits, old matches and inserts locked late, offers with zeros. All is compared after every operation.

`--out` appends one line of JSON a run that found nothing, so that runs add up; `--sum FILE` does it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import machine
from jaxcache.index.component import FULL, Component
from jaxcache.index.policies.registry import Policy
from tests.index.life import SYMBOLS, Shape, TreeLife

OPS_PER_LIFE = 400
STATE = Component("state", 1, spans=False)


def components_of(page_size: int) -> Iterator[tuple[Component, ...]]:
    """Full, window, state, and both; windows shorter than a page, of one, of several, of no whole number of pages."""
    yield (FULL,)
    yield FULL, STATE
    for reach in sorted({2, 4, page_size, 64, 3 * page_size // 2 + 1, 3 * page_size}):
        window = Component("window", reach)
        yield FULL, window
        yield FULL, window, STATE


SHAPES = [
    Shape(page_size, components, policy, is_bigram)
    for page_size in (1, 4, 16, 64)
    for components in components_of(page_size)
    for policy in Policy
    for is_bigram in (False, True)
]
random.Random(0).shuffle(SHAPES)  # so that any few seeds in a row are different


class TreeDriver:
    """Chooses what happens next in one life."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.shape = replace(SHAPES[seed % len(SHAPES)], with_hashes=rng.random() < 0.1)
        self.life = TreeLife(self.shape)
        self.symbols = rng.randint(1, SYMBOLS)
        self.spaces = [b""] if rng.random() < 0.4 else [b"", b"a"]
        self.longest = rng.choice([3, 6, 10])
        self.room = rng.choice([8, 16, 30])
        self.recent: deque[tuple[tuple[int, ...], int]] = deque([((), 0)], maxlen=rng.choice([2, 6]))
        self.one_component = rng.randrange(-1, len(self.shape.components))
        self.zeros = rng.choice([0.0, 0.3, 0.7])
        weights = {
            self.match: 22,
            self.lock: 14,
            self.unlock: 12,
            self.narrow: 4,
            self.insert: 16,
            self.extend: 14,
            self.evict: rng.choice([4, 10, 20]),
            self.drop: rng.choice([0, 0.5, 2]),
            self.explain: 1,
            self.misuse: 1,
            self.reset: 0.1,
        }
        self.choices, self.weights = list(weights), list(weights.values())
        self.log: deque[str] = deque(maxlen=12)

    def run(self, ops: int) -> None:
        for i in range(ops):
            (operation,) = self.rng.choices(self.choices, self.weights)
            self.log.append(f"{i}: {operation.__name__}")
            operation()
            self.life.check()
        self.life.wind_down()

    # What is chosen.

    def some(self) -> bytes:
        """A prefix of something recent and a new end, both of any length."""
        rng = self.rng
        symbols, tail = rng.choice(self.recent)
        if rng.random() < 0.7:
            symbols, tail = symbols[: rng.randint(0, len(symbols))], 0
        new = tuple(rng.randrange(self.symbols) for _ in range(rng.choice([0, 1, 1, 2, 4])))
        symbols = (symbols + new)[: self.longest]
        if rng.random() < 0.4:
            tail = rng.randrange(self.shape.page_size)
        self.recent.append((symbols, tail))
        return self.life.tokens(symbols, tail + self.shape.is_bigram * (rng.random() < 0.8))

    def space(self) -> bytes:
        return self.rng.choice(self.spaces)

    def pick(self) -> int:
        return self.rng.randrange(64)

    def match(self) -> None:
        tokens = self.some()
        if self.rng.random() < 0.3:
            tokens = tokens[: self.rng.choice([1, 1, 2]) * self.shape.page_size + self.shape.is_bigram]
        self.life.match(tokens, self.space(), keep=self.rng.random() < 0.7)

    def lock(self) -> None:
        self.life.lock(self.pick())

    def unlock(self) -> None:
        if len(self.life.locked) > self.rng.randrange(6):
            self.life.unlock(self.pick())

    def narrow(self) -> None:
        further = self.rng.choice([0, 0, 1, self.rng.randrange(3 * self.shape.page_size)])
        self.life.narrow(self.pick(), further)

    def insert(self) -> None:
        self.make_room()
        self.life.insert(self.some(), self.space(), None, self.masks(), self.priority(), self.rng.random() < 0.3)

    def extend(self) -> None:
        """Inserts what comes after a lock."""
        self.make_room()
        tokens = self.some()[: 4 * self.shape.page_size]
        self.life.insert(tokens, b"", self.pick(), self.masks(), self.priority(), self.rng.random() < 0.3)

    def make_room(self) -> None:
        if len(self.life.model.cached) > self.room:
            self.life.evict(0, 2)

    def masks(self) -> list[int]:
        """What is not offered: nothing, a prefix, or any pages; now and then the end too, which is refused."""
        masks = []
        for component in self.shape.components[1:]:
            mask = 0
            if component.spans and self.rng.random() < self.zeros:
                mask = (1 << self.rng.randint(0, 8)) - 1 if self.rng.random() < 0.7 else self.rng.getrandbits(8)
            elif not component.spans:
                mask = int(self.rng.random() < 0.03)
            masks.append(mask)
        return masks

    def priority(self) -> int:
        return self.rng.choice([0, 0, 0, 1, 5, -1])

    def evict(self) -> None:
        component = self.one_component if self.one_component >= 0 else self.pick()
        amount = self.rng.randint(1, 2) if self.rng.random() < 0.85 else self.rng.randint(-1, 12)
        self.life.evict(component, amount)

    def drop(self) -> None:
        self.life.drop(self.space())

    def explain(self) -> None:
        self.life.explain(self.some(), self.space())

    def misuse(self) -> None:
        self.life.misuse(self.rng.randrange(4), self.some(), self.space())

    def reset(self) -> None:
        self.life.reset()


def drive(seeds: range, ops_per_life: int = OPS_PER_LIFE) -> int:
    """A life a seed; returns the operations. The first failure says how to repeat it."""
    for seed in seeds:
        driver = TreeDriver(seed)
        try:
            driver.run(ops_per_life)
        except Exception as error:
            error.add_note(f"in a life of {driver.shape}: {', '.join(driver.log)}")
            error.add_note(f"repeat with: python -m tests.model.tree_driver --seeds {seed}:{seed + 1}")
            raise
    return len(seeds) * ops_per_life


def add_up(path: Path) -> tuple[int, int]:
    """Operations and violations of all runs in a file, a seed counted once."""
    seeds: set[int] = set()
    operations = violations = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        mine = range(*run["seeds"])
        operations += run["ops_per_life"] * len(set(mine) - seeds)
        violations += run["violations"]
        seeds |= set(mine)
    return operations, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:250", help=f"A:B, a life of {OPS_PER_LIFE} operations each")
    parser.add_argument("--out", type=Path, help="append the outcome here, as a line of JSON")
    parser.add_argument("--sum", type=Path, help="add up such a file instead")
    arguments = parser.parse_args()
    if arguments.sum:
        operations, violations = add_up(arguments.sum)
        print(f"{operations:,} operations, {violations} violations")
        return
    first, stop = map(int, arguments.seeds.split(":"))
    started = time.process_time()
    operations = drive(range(first, stop))
    seconds = time.process_time() - started
    print(f"{operations:,} operations, 0 violations, {operations / seconds:,.0f} operations/s of one core")
    if arguments.out:
        run = machine() | {
            "seeds": [first, stop],
            "ops_per_life": OPS_PER_LIFE,
            "violations": 0,
            "cpu_seconds": round(seconds),
        }
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
