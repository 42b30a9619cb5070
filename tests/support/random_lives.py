"""Random lives of a cache with content, so that a wrong page shows."""

from __future__ import annotations

import math
import random

from jaxcache.index.policies.registry import Policy
from tests.caches.content import ContentLife, Shape

WEIGHTS = dict(admit=14, compute=34, share=4, finish=10, match=8, unlock=6, insert=6, evict=12, resume=3, drop=1)


class RandomLife:
    """One life in which a seed decides everything: keys that share prefixes of all lengths, eviction in small bites."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        page = rng.choice([1, 1, 2, 4, 4, 16])
        self.shape = Shape(
            page_size=page,
            window=rng.choice(windows_around(page)),
            has_states=rng.random() < 0.5,
            is_eagle=rng.random() < 0.25,
            num_pages=rng.choice([12, 16, 24, 40]),
            num_windows=rng.choice([6, 8, 12, 24, 40]),
            num_states=rng.randint(3, 10),
            num_rows=rng.randint(1, 3),
            policy=rng.choice([Policy.LRU, *Policy]),
            disable=rng.random() < 0.03,
        )
        self.life = ContentLife(self.shape)
        self.alphabet = rng.choice([1, 2, 2, 3])
        self.spaces = rng.choice([[b""], [b"", b"a"]])
        self.recent = [b""]

    def key(self) -> bytes:
        rng, page = self.rng, self.shape.page_size
        old = rng.choice(self.recent)
        old = old[: rng.randint(0, len(old))] if rng.random() < 0.7 else old
        if rng.random() < 0.3:
            old = old[: len(old) // page * page]
        new = bytes(rng.randrange(self.alphabet) for _ in range(rng.randint(0, 3 * page + 1)))
        key = (old + new)[: 8 * page] or b"\0"
        self.recent = [*self.recent[-7:], key]
        return key

    def act(self, operation: str) -> None:
        rng, life, page = self.rng, self.life, self.shape.page_size
        pick, space = rng.randrange(12), rng.choice(self.spaces)
        if operation == "admit":
            life.admit(self.key(), space)
        elif operation == "resume":
            life.resume(pick)
        elif operation == "compute":
            count = rng.choice([1, 1, 2, page, page, 3 * page, 5 * page - 1])
            save, share, drop = rng.random() < 0.6, rng.random() < 0.4, rng.random() < 0.6
            life.compute(pick, count, rng.randrange(self.alphabet), save, share, drop)
        elif operation == "share":
            life.share(pick)
        elif operation == "finish":
            life.finish(pick, rng.random() < 0.3)
        elif operation == "match":
            life.match(self.key(), space, rng.random() < 0.5)
        elif operation == "unlock":
            life.unlock(pick)
        elif operation == "insert":
            life.insert(self.key(), space, rng.choice([0, 0, 1, 2]))
        elif operation == "evict":
            life.evict(rng.choice([0, 0, 1, 2]), rng.choice([0, 1, 2]), rng.choice([0, 0, 1]))
        else:
            life.drop(space)

    def run(self, ops: int) -> None:
        log: list[str] = []
        try:
            for operation in self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=ops):
                log.append(operation)
                self.act(operation)
                self.life.check()
            self.life.wind_down()
        except Exception as error:
            error.add_note(f"after {len(log)} operations, at last {log[-8:]}, of a life of {self.shape}")
            raise


def windows_around(page_size: int) -> list[float | None]:
    """Windows smaller than a page, equal to one, multiples and none of it, larger than any prefix, and no window."""
    return [None, 1, max(page_size - 1, 1), page_size, page_size + 1, 2 * page_size, 5 * page_size - 1, 100, math.inf]
