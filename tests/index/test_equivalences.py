"""Trees that have to behave alike, played the same random stories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcache.errors import LockedError
from jaxcache.index.check import check
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import BigramKey, RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree

STATE = Component("state", 1, spans=False)
SIMPLE = [Policy.LRU, Policy.LFU, Policy.FIFO, Policy.FILO, Policy.MRU, Policy.PRIORITY]
IDS_OF_A_PLAYER = 10_000
NO_LOCK = 99

few = settings(max_examples=60)
sequences = st.lists(st.integers(0, 2), max_size=8).map(tuple)
index = st.integers(0, 9)
steps = st.one_of(
    st.tuples(st.just("match"), sequences, st.booleans()),
    st.tuples(st.just("unlock"), index),
    st.tuples(st.just("insert"), sequences, index, st.integers(0, 2)),
    st.tuples(st.just("evict"), st.integers(1, 4)),
    st.tuples(st.just("drop")),
)
stories = st.lists(steps, max_size=40)

Symbols = tuple[int, ...]


def plain(symbols: Symbols) -> RadixKey:
    return RadixKey(symbols)


class Player:
    """Plays a story to a tree and writes down what comes back, of the first component.

    Args:
      tree: Empty; it may have several players, each in a namespace.
      to_key: What a sequence of symbols is for this tree.
      unit: Pages a symbol; what is written down is divided by it.
      number: Tells the page ids of players apart.
    """

    def __init__(self, tree: RadixTree, to_key: Callable[[Symbols], RadixKey] = plain, unit: int = 1, number: int = 0):
        self.tree, self.to_key, self.unit = tree, to_key, unit
        self.first_id = self.next_id = 1 + number * IDS_OF_A_PLAYER
        self.held: list = []
        self.heard: list[object] = []

    def play(self, story: list[tuple]) -> list[object]:
        for name, *arguments in story:
            getattr(self, name)(*arguments)
            check(self.tree)
        return self.heard

    def match(self, symbols: Symbols, keep: bool) -> None:
        match = self.tree.match(self.to_key(symbols))
        self.hear(match.length // self.tree.page_size, match.pages)
        if keep:
            self.held.append((symbols, self.tree.lock(match)))

    def unlock(self, index: int) -> None:
        if self.held:
            _, receipt = self.held.pop(index % len(self.held))
            self.heard.append(self.tree.unlock(receipt) // self.unit)

    def insert(self, symbols: Symbols, index: int, priority: int) -> None:
        """With a lock, if there are more than `index`: then its sequence goes on with `symbols`."""
        receipt = None
        if index < len(self.held):
            before, receipt = self.held[index]
            symbols = before[: receipt.length // self.tree.page_size // self.unit] + symbols
        key = self.to_key(symbols)
        pages = key.length // self.tree.page_size
        ids = np.arange(self.next_id, self.next_id + pages, dtype=np.int32)
        self.next_id += pages
        done = self.tree.insert(key, [ids if c.spans else ids[-1:] for c in self.tree.components], receipt, priority)
        self.hear(done.present // self.tree.page_size, done.kept, done.spare[0])

    def evict(self, count: int) -> None:
        self.hear(0, self.tree.evict(count * self.unit).values[0])

    def drop(self) -> None:
        try:
            gone = self.tree.drop(self.to_key(()).namespace).values[0]
        except LockedError:
            self.heard.append("locked")
        else:
            self.hear(len(gone), np.sort(gone))

    def hear(self, pages: int, *ids: np.ndarray) -> None:
        """Ids as if the player were alone, and a symbol a page."""
        numbers = [((part[:: self.unit] - self.first_id) // self.unit).tolist() for part in ids]
        self.heard.append((pages / self.unit, *numbers))


@pytest.mark.parametrize("policy", Policy)
@few
@given(stories)
def test_a_window_without_end_is_full(policy, story):
    window = RadixTree(1, (FULL, Component("window", math.inf)), policy)
    assert Player(window).play(story) == Player(RadixTree(1, policy=policy)).play(story)
    assert window.evictable[0] == window.evictable[1] and window.protected[0] == window.protected[1]


@pytest.mark.parametrize("page_size", [2, 16])
@pytest.mark.parametrize("policy", SIMPLE)
@few
@given(stories)
def test_pages_of_aligned_input_are_single_tokens(policy, page_size, story):
    """Each symbol is a page of its own tokens: what is cut is cut at pages."""

    def aligned(symbols: Symbols) -> RadixKey:
        return RadixKey([page_size * symbol + i for symbol in symbols for i in range(page_size)])

    heard = Player(RadixTree(page_size, policy=policy), aligned).play(story)
    assert Player(RadixTree(1, policy=policy), aligned, unit=page_size).play(story) == heard
    assert Player(RadixTree(1, policy=policy)).play(story) == heard


@pytest.mark.parametrize("page_size", [1, 3])
@pytest.mark.parametrize("policy", Policy)
@few
@given(stories)
def test_a_tree_of_pairs_is_one_in_which_every_pair_has_a_number(policy, page_size, story):
    def tokens(symbols: Symbols) -> list[int]:
        return [token for symbol in symbols for token in range(symbol, symbol + page_size)] + [0] * bool(symbols)

    def pairs(symbols: Symbols) -> RadixKey:
        return BigramKey(tokens(symbols))

    def numbers(symbols: Symbols) -> RadixKey:
        of = tokens(symbols)
        return RadixKey([1000 * a + b for a, b in itertools.pairwise(of)])

    # No sequence goes on behind a lock: the last pair that is locked knows another token after it.
    story = [(*step[:2], NO_LOCK, step[3]) if step[0] == "insert" else step for step in story]
    of_pairs = RadixTree(page_size, policy=policy, element_bytes=BigramKey.element_bytes)
    of_numbers = RadixTree(page_size, policy=policy)
    assert Player(of_pairs, pairs).play(story) == Player(of_numbers, numbers).play(story)


@given(st.lists(sequences, max_size=8), st.lists(sequences, max_size=8))
def test_a_state_everywhere_is_full(inserted, asked):
    """A state was saved after every token: then a lookup stops where the pages end."""
    full, states = RadixTree(1), RadixTree(1, (FULL, STATE))
    for symbols in inserted:
        ids = np.arange(1, len(symbols) + 1, dtype=np.int32)
        for end in range(1, len(symbols) + 1):
            full.insert(plain(symbols[:end]), [ids])
            states.insert(plain(symbols[:end]), [ids, ids[end - 1 :]])
    for symbols in [*asked, *inserted]:
        match = states.match(plain(symbols))
        assert match.length == match.structural_length == match.state == full.match(plain(symbols)).length
    check(states)


@pytest.mark.parametrize("policy", SIMPLE)
@few
@given(st.lists(st.tuples(st.integers(0, 2), steps), max_size=40))
def test_one_namespace_of_many_is_a_tree_of_its_own(policy, story):
    """Whatever happens in others; of each goes what its own tree would let go."""
    shared = RadixTree(1, policy=policy)
    spaces = [b"", RadixKey([], "a").namespace, RadixKey([], "b").namespace]
    together = [Player(shared, lambda symbols, s=s: plain(symbols).within(s), 1, i) for i, s in enumerate(spaces)]
    alone = [Player(RadixTree(1, policy=policy), number=i) for i in range(len(spaces))]
    for number, step in story:
        if step[0] == "evict":
            gone = shared.evict(step[1]).values[0]
            for i, player in enumerate(alone):
                mine = gone[(gone - 1) // IDS_OF_A_PLAYER == i]
                assert player.tree.evict(len(mine)).values[0].tolist() == mine.tolist()
        else:
            assert together[number].play([step]) == alone[number].play([step])
