"""Requests run, share, are chunked, retracted and finished in random order; what they and the tree see is read back.

`python -m tests.caches.test_content --lives 1000 --seed 0` runs more lives than the suite does.
"""

from __future__ import annotations

import argparse

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxcache.index.policies.registry import Policy
from tests.caches.content import ContentLife, Shape
from tests.support.random_lives import RandomLife, windows_around

OPS = 150


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
