"""Random lives: `python -m tests.model.driver --ops 100000 --seed 0`.

A seed decides everything: the shape of the memory, the kind of the keys, each operation. A life is a few thousand
operations in small memory, biased to where bugs live: few different tokens, keys that share prefixes of all lengths,
eviction in bites of a page or two, short prefixes touched again, locks held across splits. The books are compared after
every operation; the whole tree after every operation of small lives and every 16th of the others.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque

from jaxcache.index.policies.registry import Policy
from tests.model.life import Life, Shape

OPS_PER_LIFE = 1000
CHECK_ALL_EVERY = 16
SMALL_POOL = 24


class Driver:
    """Chooses what happens next in one life."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        num_pages = rng.choice([16, 16, 20, 24, 32, 32, 48, 64, 128, 256])
        self.shape = Shape(
            page_size=rng.choice([1, 1, 2, 4, 4, 16]),
            num_pages=num_pages,
            num_rows=rng.randint(1, 6),
            policy=rng.choice([Policy.LRU, *Policy]),
            events=rng.random() < 0.2,
            disable=rng.random() < 0.05,
            max_pages=max(8, num_pages // 2),
        )
        self.life = Life(self.shape)
        self.alphabet = rng.randint(1, 3)
        self.spaces = [b""] if rng.random() < 0.5 else [b"", b"a", b"b"]
        self.longest = rng.choice([2, 4, 8, num_pages // 3]) * self.shape.page_size
        self.recent: deque[bytes] = deque([b""], maxlen=rng.choice([2, 6, 16]))
        self.evict_bites = rng.random() < 0.8
        share = rng.choice([0.3, 0.8, 1.0])
        self.share = lambda: rng.random() < share
        weights = {
            self.admit: 14,
            self.extend: 26,
            self.decode: 12,
            self.finish: 9,
            self.match: 12,
            self.lock: 6,
            self.unlock: 6,
            self.insert: 6,
            self.evict: rng.choice([2, 8, 16]),
            self.resume: 4,
            self.group: rng.choice([0, 0, 2]),
            self.speculate: 2,
            self.misuse: 4,
            self.cancel: 2,
            self.reshare: 2,
        }
        self.choices, self.weights = list(weights), list(weights.values())
        self.log: deque[str] = deque(maxlen=12)

    def run(self, ops: int) -> None:
        every = 1 if self.shape.num_pages <= SMALL_POOL and self.shape.num_rows <= 3 else CHECK_ALL_EVERY
        for i in range(ops):
            (operation,) = self.rng.choices(self.choices, self.weights)
            if self.rng.random() < 0.0003:
                operation = self.reset
            self.log.append(f"{i}: {operation.__name__}")
            operation()
            if i % every:
                self.life.check()
            else:
                self.life.check_all()
        self.life.wind_down()

    # What is chosen.

    def key(self) -> bytes:
        """A prefix of something recent and a new end, both of any length."""
        rng = self.rng
        old = rng.choice(self.recent)
        old = old[: rng.randint(0, len(old))] if rng.random() < 0.7 else old
        if rng.random() < 0.3:
            old = old[: len(old) // self.shape.page_size * self.shape.page_size]
        new = bytes(rng.randrange(self.alphabet) for _ in range(rng.randint(0, 2 * self.shape.page_size + 1)))
        key = (old + new)[: self.longest] or bytes([rng.randrange(self.alphabet)])
        self.recent.append(key)
        return key

    def space(self) -> bytes:
        return self.rng.choice(self.spaces)

    def pick(self) -> int:
        return self.rng.randrange(64)

    def picks(self) -> list[int]:
        return [self.pick() for _ in range(self.rng.choice([1, 1, 2, 4]))]

    def admit(self) -> None:
        key = self.key()
        cap = self.rng.randint(0, len(key)) if self.rng.random() < 0.1 else len(key)
        self.life.admit(key, self.space(), self.rng.choice([0, 0, 1, 5]), cap)

    def resume(self) -> None:
        self.life.resume(self.pick(), 1 << 20)

    def extend(self) -> None:
        counts = [self.rng.choice([0, self.pick(), 1 << 20, (1 << 20) - 1]) for _ in range(4)]
        self.life.extend(self.picks(), counts, self.rng.randrange(3), self.share())

    def cancel(self) -> None:
        self.life.extend(self.picks(), [self.pick() for _ in range(4)], self.rng.randrange(3), False, compute=False)

    def decode(self) -> None:
        self.life.decode(self.picks(), self.rng.randrange(self.alphabet), self.share() and self.rng.random() < 0.2)

    def reshare(self) -> None:
        self.life.share(self.pick())

    def finish(self) -> None:
        self.life.finish(self.pick(), retract=self.rng.random() < 0.3)

    def match(self) -> None:
        key = self.key()
        if self.rng.random() < 0.4:
            key = key[: self.shape.page_size]
        self.life.match(key, self.space(), keep=self.rng.random() < 0.6)

    def lock(self) -> None:
        self.life.lock(self.pick())

    def unlock(self) -> None:
        self.life.unlock(self.pick())

    def insert(self) -> None:
        self.life.insert(self.key(), self.space())

    def evict(self) -> None:
        pages = self.rng.randint(1, 2) if self.evict_bites else self.rng.randint(0, self.shape.num_pages)
        self.life.evict(max(pages * self.shape.page_size - self.rng.randrange(self.shape.page_size), 0))

    def group(self) -> None:
        self.life.group()

    def speculate(self) -> None:
        self.life.speculate(self.rng.randint(0, 5), self.rng.random() < 0.3)

    def misuse(self) -> None:
        self.life.misuse(self.rng.randrange(5), self.pick())

    def reset(self) -> None:
        self.life.reset()


def drive(seed: int, ops: int, ops_per_life: int = OPS_PER_LIFE) -> None:
    """`ops` operations, life after life; the first failure says how to repeat it."""
    done = 0
    while done < ops:
        count = min(ops_per_life, ops - done)
        driver = Driver(seed)
        try:
            driver.run(count)
        except Exception as error:
            error.add_note(f"in a life of {driver.shape}: {', '.join(driver.log)}")
            error.add_note(f"repeat with: python -m tests.model.driver --seed {seed} --ops {count}")
            raise
        done += count
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    drive(arguments.seed, arguments.ops)
    elapsed = time.perf_counter() - started
    print(f"{arguments.ops} operations, 0 violations, {arguments.ops / elapsed:,.0f} operations/s")


if __name__ == "__main__":
    main()
