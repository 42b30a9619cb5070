"""Requests run, share, are chunked, retracted and finished in random order; what they and the tree see is read back.

`python -m tests.caches.test_content --lives 1000 --seed 0` runs more lives than the suite does.
"""

from __future__ import annotations

import argparse
import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxcache.index.policies.registry import Policy
from tests.caches.content import ContentLife, Shape

OPS = 150
WEIGHTS = dict(admit=14, compute=34, share=4, finish=10, match=8, unlock=6, insert=6, evict=12, resume=3, drop=1)


def windows_around(page_size: int) -> list[float | None]:
    """Windows smaller than a page, equal to one, multiples and none of it, larger than any prefix, and no window."""
    return [None, 1, max(page_size - 1, 1), page_size, page_size + 1, 2 * page_size, 5 * page_size - 1, 100, math.inf]


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


@pytest.mark.parametrize("seed", range(60))
def test_random_lives(seed):
    RandomLife(seed).run(OPS)


def test_lives_find_something():
    """The lives are not about nothing: prefixes are found, and holes are made and filled."""
    life = RandomLife(5)
    life.run(400)
    assert life.life.hit_tokens > 0


keys = st.binary(min_size=1, max_size=24).map(lambda raw: bytes(byte % 2 for byte in raw))
spaces = st.sampled_from([b"", b"a"])
index = st.integers(0, 5)


class Lives(RuleBasedStateMachine):
    """The same operations, with Hypothesis choosing: what fails is shrunk to a short story."""

    life: ContentLife | None = None

    @initialize(page_size=st.sampled_from([1, 4, 16]), data=st.data())
    def construct(self, page_size, data):
        self.life = ContentLife(
            Shape(
                page_size=page_size,
                window=data.draw(st.sampled_from(windows_around(page_size))),
                has_states=data.draw(st.booleans()),
                is_eagle=data.draw(st.sampled_from([False, False, True])),
                num_pages=data.draw(st.integers(6, 24)),
                num_windows=data.draw(st.integers(6, 24)),
                num_states=data.draw(st.integers(2, 8)),
                num_rows=data.draw(st.integers(1, 3)),
                policy=data.draw(st.sampled_from(Policy)),
            )
        )

    @rule(tokens=keys, space=spaces)
    def admit(self, tokens, space):
        self.life.admit(tokens, space)

    @rule(pick=index)
    def resume(self, pick):
        self.life.resume(pick)

    @rule(pick=index, count=st.integers(1, 20), token=st.integers(0, 1), flags=st.tuples(*[st.booleans()] * 3))
    def compute(self, pick, count, token, flags):
        self.life.compute(pick, count, token, *flags)

    @rule(pick=index)
    def share(self, pick):
        self.life.share(pick)

    @rule(pick=index, retract=st.booleans())
    def finish(self, pick, retract):
        self.life.finish(pick, retract)

    @rule(tokens=keys, space=spaces, keep=st.booleans())
    def match(self, tokens, space, keep):
        self.life.match(tokens, space, keep)

    @rule(pick=index)
    def unlock(self, pick):
        self.life.unlock(pick)

    @rule(tokens=keys, space=spaces, without_window=st.integers(0, 4))
    def insert(self, tokens, space, without_window):
        self.life.insert(tokens, space, without_window)

    @rule(pages=st.integers(0, 2), windows=st.integers(0, 2), states=st.integers(0, 1))
    def evict(self, pages, windows, states):
        self.life.evict(pages, windows, states)

    @rule(space=spaces)
    def drop(self, space):
        self.life.drop(space)

    @invariant()
    def everything_is_what_it_should_be(self):
        if self.life is not None:
            self.life.check()

    def teardown(self):
        if self.life is not None:
            self.life.wind_down()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.lives):
        try:
            RandomLife(seed).run(OPS)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    print(f"{options.lives} lives of {OPS} operations, nothing wrong")


if __name__ == "__main__":
    main()
