"""A tree that is saved and restored again and again in the middle of random lives, beside its oracle."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from jaxcache.errors import LockedError, SnapshotError
from jaxcache.index.component import FULL
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.saved import restore_tree, saved_tree
from jaxcache.index.tree import RadixTree
from jaxcache.state_dict import Columns, StateDict
from tests.index.life import same
from tests.model.tree_driver import SHAPES, TreeDriver


class SavedLives(TreeDriver):
    """A driver that every now and then goes on with another tree, restored from what the last one saved."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.saved = 0
        self.choices[self.choices.index(self.explain)] = self.save  # it knows nothing of what went before
        self.weights[self.choices.index(self.save)] = 4

    def save(self) -> None:
        life = self.life
        while life.locked:
            life.unlock(0)
        life.found.clear()  # of the old tree
        old, books = life.tree, saved_tree(life.tree)
        life.tree, spare = self.restored(books), self.restored(books)
        self.saved += len(old) > 0
        order = [self.rng.randrange(len(old.components)) for _ in range(60)]
        same(drained(spare, order), drained(old, order), "let go in this order")

    def restored(self, books: StateDict) -> RadixTree:
        shape = self.shape
        element_bytes = self.life.key_class.element_bytes
        tree = RadixTree(shape.page_size, shape.components, shape.policy, shape.with_hashes, element_bytes)
        restore_tree(tree, Columns({name: array.copy() for name, array in books.items()}))
        same(plain(saved_tree(tree)), plain(books), "books")
        return tree


def plain(books: StateDict) -> dict[str, list]:
    return {name: array.tolist() for name, array in books.items()}


def drained(tree: RadixTree, order: list[int]) -> list[list[list[int]]]:
    """What goes, if one value of these components after the other must."""
    return [[values.tolist() for values in tree.evict(1, component).values] for component in [*order, *[0] * 60]]


def run(seeds: range, ops: int) -> int:
    """Lives; returns how often a tree with something in it was restored."""
    saved = 0
    for seed in seeds:
        driver = SavedLives(seed)
        try:
            driver.run(ops)
        except Exception as error:
            error.add_note(f"seed {seed}, in a life of {driver.shape}: {', '.join(driver.log)}")
            raise
        saved += driver.saved
    return saved


@pytest.mark.parametrize("policy", Policy)
def test_a_restored_tree_does_what_the_oracle_does(policy):
    seeds = [seed for seed in range(len(SHAPES)) if SHAPES[seed].policy is policy][:15]
    assert sum(run(range(seed, seed + 1), 250) for seed in seeds) > 50


@pytest.mark.parametrize("policy", Policy)
def test_a_restored_tree_remembers_what_was_let_go(policy):
    """What a policy learned from nodes that are gone decides what goes next."""
    dice = random.Random(3)
    tree, ids = RadixTree(1, (FULL,), policy), itertools.count(1)

    def live(trees: list[RadixTree], inserts: int) -> list[list[list[int]]]:
        gone: list[list[list[int]]] = [[] for _ in trees]
        for _ in range(inserts):
            first = min(int(dice.expovariate(0.1)), 60)
            key = RadixKey([first, *range(dice.randint(0, 4))])
            pages = np.array([next(ids) for _ in range(key.length)])
            for twin, out in zip(trees, gone, strict=True):
                twin.match(key)
                twin.insert(key, (pages,))
                out.append(twin.evict(max(0, len(twin) - 40)).values[0].tolist())
        return gone

    live([tree], 600)
    again = RadixTree(1, (FULL,), policy)
    restore_tree(again, Columns(saved_tree(tree)))
    assert plain(saved_tree(again)) == plain(saved_tree(tree))
    mine, theirs = live([tree, again], 600)
    assert mine == theirs and sum(map(len, mine)) > 500


def test_what_is_locked_is_not_saved_and_a_huge_priority_neither():
    tree = RadixTree(1)
    inserted = tree.insert(RadixKey([1, 2]), (np.array([1, 2]),), priority=2**70)
    receipt = tree.lock(inserted)
    with pytest.raises(LockedError, match="locks cover 2 of its pages"):
        saved_tree(tree)
    tree.unlock(receipt)
    with pytest.raises(SnapshotError, match="does not fit 64 bits"):
        saved_tree(tree)


def test_deep_and_wide_trees_come_back():
    tree, again = RadixTree(1, (FULL,), Policy.ADAPTIVE), RadixTree(1, (FULL,), Policy.ADAPTIVE)
    for i in range(3000):
        tree.insert(RadixKey(list(range(i + 1))), (np.arange(i + 1) + 1,))
    for i in range(3000):
        tree.insert(RadixKey([7_000_000 + i]), (np.array([5000 + i]),))
    restore_tree(again, Columns(saved_tree(tree)))
    assert len(again) == len(tree) == 6000
    order = [t.evict(6000).values[0].tolist() for t in (tree, again)]
    assert order[0] == order[1]


def test_trees_of_other_components_are_told_apart():
    tree = RadixTree(4)
    tree.insert(RadixKey(list(range(8))), (np.array([1, 2]),))
    with pytest.raises(SnapshotError, match="tokens"):
        restore_tree(RadixTree(16), Columns(saved_tree(tree)))
    with pytest.raises(SnapshotError, match="clock is missing"):
        restore_tree(RadixTree(4, policy=Policy.LFU), Columns(saved_tree(tree)))
