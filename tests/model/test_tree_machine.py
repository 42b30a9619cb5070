"""The lives of `tree_driver`, with Hypothesis choosing: fewer of them, but what fails is shrunk to a short story."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.index.life import SYMBOLS, TreeLife
from tests.model.tree_driver import SHAPES

symbols = st.lists(st.integers(0, SYMBOLS - 1), max_size=8)
tails = st.integers(0, 3)
spaces = st.sampled_from([b"", b"a"])
index = st.integers(0, 5)
masks = st.lists(st.integers(0, 255), min_size=2, max_size=2)


class TreeMachine(RuleBasedStateMachine):
    """A small tree of any shape."""

    life: TreeLife | None = None

    @initialize(shape=st.sampled_from(SHAPES))
    def construct(self, shape):
        self.life = TreeLife(shape)

    @rule(symbols=symbols, tail=tails, space=spaces, keep=st.booleans())
    def match(self, symbols, tail, space, keep):
        self.life.match(self.life.tokens(symbols, tail), space, keep)

    @rule(index=index)
    def lock(self, index):
        self.life.lock(index)

    @rule(index=index)
    def unlock(self, index):
        self.life.unlock(index)

    @rule(index=index, further=st.integers(0, 100))
    def narrow(self, index, further):
        self.life.narrow(index, further)

    @rule(
        symbols=symbols,
        tail=tails,
        space=spaces,
        held=st.none() | index,
        zeros=masks,
        priority=st.integers(-1, 2),
        keep=st.booleans(),
    )
    def insert(self, symbols, tail, space, held, zeros, priority, keep):
        self.life.insert(self.life.tokens(symbols, tail), space, held, zeros, priority, keep)

    @rule(component=st.integers(0, 2), amount=st.integers(-1, 4))
    def evict(self, component, amount):
        self.life.evict(component, amount)

    @rule(space=spaces)
    def drop(self, space):
        self.life.drop(space)

    @rule(symbols=symbols, tail=tails, space=spaces)
    def explain(self, symbols, tail, space):
        self.life.explain(self.life.tokens(symbols, tail), space)

    @rule(kind=st.integers(0, 3), symbols=symbols, space=spaces)
    def misuse(self, kind, symbols, space):
        self.life.misuse(kind, self.life.tokens(symbols, 0), space)

    @invariant()
    def everything_agrees(self):
        if self.life is not None:
            self.life.check()

    def teardown(self):
        if self.life is not None:
            self.life.wind_down()


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
