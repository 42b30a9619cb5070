"""The same lives, with Hypothesis choosing: fewer of them, but what fails is shrunk to a short story."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxcache.index.policies.registry import Policy
from tests.model.life import Life, Shape

keys = st.binary(min_size=1, max_size=24).map(lambda raw: bytes(byte % 2 for byte in raw))
spaces = st.sampled_from([b"", b"a"])
picks = st.lists(st.integers(0, 5), min_size=1, max_size=3)
counts = st.lists(st.integers(0, 30), min_size=3, max_size=3)
index = st.integers(0, 7)


class MemoryLife(RuleBasedStateMachine):
    """Requests, locks and direct inserts in one small memory."""

    life: Life | None = None

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        num_pages=st.integers(1, 16),
        num_rows=st.integers(1, 3),
        policy=st.sampled_from(Policy),
        events=st.booleans(),
        disable=st.sampled_from([False] * 7 + [True]),
    )
    def construct(self, **shape):
        self.life = Life(Shape(**shape))

    @rule(tokens=keys, space=spaces, priority=st.integers(0, 3), cap=st.integers(0, 24))
    def admit(self, tokens, space, priority, cap):
        self.life.admit(tokens, space, priority, cap)

    @rule(index=index, cap=st.integers(0, 24))
    def resume(self, index, cap):
        self.life.resume(index, cap)

    @rule(picks=picks, counts=counts, how=st.integers(0, 2), share=st.booleans(), compute=st.booleans())
    def extend(self, picks, counts, how, share, compute):
        self.life.extend(picks, counts, how, share, compute)

    @rule(picks=picks, token=st.integers(0, 1), share=st.booleans())
    def decode(self, picks, token, share):
        self.life.decode(picks, token, share)

    @rule(index=index)
    def share(self, index):
        self.life.share(index)

    @rule(index=index, retract=st.booleans())
    def finish(self, index, retract):
        self.life.finish(index, retract)

    @rule(tokens=keys, space=spaces, keep=st.booleans())
    def match(self, tokens, space, keep):
        self.life.match(tokens, space, keep)

    @rule(index=index)
    def lock(self, index):
        self.life.lock(index)

    @rule(index=index)
    def unlock(self, index):
        self.life.unlock(index)

    @rule(tokens=keys, space=spaces)
    def insert(self, tokens, space):
        self.life.insert(tokens, space)

    @rule(tokens=st.integers(0, 40))
    def evict(self, tokens):
        self.life.evict(tokens)

    @rule()
    def group(self):
        self.life.group()

    @rule(n=st.integers(0, 4), free_one=st.booleans())
    def speculate(self, n, free_one):
        self.life.speculate(n, free_one)

    @rule(kind=st.integers(0, 4), index=st.integers(0, 40))
    def misuse(self, kind, index):
        self.life.misuse(kind, index)

    @rule()
    def reset(self):
        self.life.reset()

    @invariant()
    def everything_agrees(self):
        if self.life is not None:
            self.life.check_all()

    def teardown(self):
        if self.life is not None:
            self.life.wind_down()


TestMemoryLife = MemoryLife.TestCase
TestMemoryLife.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
