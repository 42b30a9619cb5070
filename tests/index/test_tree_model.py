"""The tree against the prefix oracle, by seeded random operations, for every mix of components."""

import random

import numpy as np
import pytest

from jaxcache.index.check import check
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import RadixKey
from jaxcache.index.recency import Policy
from jaxcache.index.tree import RadixTree
from tests.index.model import PrefixModel

STATE = Component("state", 1, spans=False)
MIXES = {
    "full": (FULL,),
    "window3": (FULL, Component("window", 3)),
    "window6": (FULL, Component("window", 6)),
    "window64": (FULL, Component("window", 64)),
    "state": (FULL, STATE),
    "window4+state": (FULL, Component("window", 4), STATE),
}


class Driver:
    """One random life of a tree beside its oracle."""

    def __init__(self, seed, components, page_size, policy):
        self.rng = random.Random(seed)
        self.tree = RadixTree(page_size, components, policy, with_hashes=seed % 2 == 0)
        self.model = PrefixModel(page_size, components)
        self.next_value = 1
        self.recent = [((), b"")]
        self.locks = []

    def fresh(self, count):
        values = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        return values

    def some_key(self):
        tokens, space = self.rng.choice(self.recent)
        tail = self.rng.randint(0, 2 * self.tree.page_size + 2)
        tokens = tokens[: self.rng.randint(0, len(tokens))] + tuple(self.rng.randint(0, 1) for _ in range(tail))
        return tokens, self.rng.choice([space, space, b"", b"other"])

    def lock(self):
        tokens, space = self.some_key()
        key = RadixKey(np.array(tokens, np.int32), space or None)
        match = self.tree.match(key)
        name = key.namespace
        assert match.length == self.model.match(name, tokens)
        assert match.pages.tolist() == self.model.pages(name, tokens, match.length)
        if self.rng.random() < 0.8:
            keep = self.model.protected_by(name, tokens, match.length)
            self.locks.append((tokens, space, key, self.tree.lock(match), keep))

    def insert(self, release):
        if not self.locks:
            return
        tokens, space, key, receipt, _ = self.locks.pop(self.rng.randrange(len(self.locks)))
        length = len(tokens) // self.tree.page_size * self.tree.page_size
        values = []
        for component in self.tree.components:
            count = length // self.tree.page_size if component.spans else min(length, 1)
            values.append(self.fresh(count))
        offered = [np.array(part, np.int32) for part in values]
        present = self.model_present(key.namespace, tokens, length)
        done = self.tree.insert(key, offered, held=receipt)
        spare = self.model.insert(key.namespace, tokens, values, receipt.length)
        assert [sorted(part.tolist()) for part in done.spare] == [sorted(part) for part in spare]
        assert (done.length, done.present) == (length, present)
        assert (
            done.kept.tolist()
            == self.model.pages(key.namespace, tokens, present)[receipt.length // self.tree.page_size :]
        )
        self.recent = [*self.recent[-9:], (tokens, space)]
        if release:
            self.tree.unlock(receipt)
        elif self.tree.match(key).length == length:
            keep = self.model.protected_by(key.namespace, tokens, length)
            self.locks.append((tokens, space, key, self.tree.lock(done), keep))
            self.tree.unlock(receipt)
        else:
            self.tree.unlock(receipt)

    def model_present(self, name, tokens, length):
        end = 0
        while end < length and (name, tokens[: end + self.tree.page_size]) in self.model.live[0]:
            end += self.tree.page_size
        return end

    def evict(self):
        i = self.rng.randrange(len(self.tree.components))
        amount = self.rng.randint(1, 2) if self.rng.random() < 0.7 else self.rng.randint(1, 12)
        held = [set() for _ in self.tree.components]
        for *_, keep in self.locks:
            for mine, more in zip(held, keep, strict=True):
                mine |= more
        room = self.tree.evictable[i]
        gone = self.tree.evict(amount, i)
        assert len(gone.values[i]) >= min(amount, room)
        self.model.forget([part.tolist() for part in gone.values], held)

    def run(self, steps):
        for _ in range(steps):
            choice = self.rng.random()
            if choice < 0.45:
                self.lock()
            elif choice < 0.8:
                self.insert(release=self.rng.random() < 0.7)
            else:
                self.evict()
            check(self.tree)
        for *_, receipt, _ in self.locks:
            self.tree.unlock(receipt)
        assert not any(self.tree.protected)
        gone = self.tree.evict(10**9)
        self.model.forget([part.tolist() for part in gone.values], [set() for _ in self.tree.components])
        assert not list(self.tree.nodes()) and not self.tree.roots and not any(self.model.live)


@pytest.mark.parametrize("policy", list(Policy), ids=lambda policy: policy.value)
@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("mix", list(MIXES))
def test_tree_equals_the_prefix_oracle(mix, page_size, policy):
    for seed in range(12):
        Driver(seed, MIXES[mix], page_size, policy).run(120)
