"""What resume points do not need of windows and states is evicted first, as long as lookups end at such points."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.index.check import check
from jaxcache.index.component import FULL, Component
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.queues import SLRU
from jaxcache.index.policies.ranked import Recorded
from jaxcache.index.policies.registry import Policy
from jaxcache.index.saved import restore_tree, saved_tree
from jaxcache.index.tree import RadixTree
from jaxcache.state_dict import Columns

WINDOW, STATE = Component("window", 4), Component("state", 1, spans=False)


class Tree(RadixTree):
    """A tree of one token a page that numbers its values itself."""

    def __init__(self, *further, policy=Policy.LRU):
        super().__init__(1, [FULL, *further], policy)
        self.given = 0

    def put(self, tokens):
        """A request computes tokens, and ends."""
        values = []
        for component in self.components:
            count = len(tokens) if component.spans else 1
            values.append(np.arange(self.given + 1, self.given + 1 + count, dtype=np.int32))
            self.given += count
        receipt = self.lock(self.match(RadixKey(tokens[:-1])))
        done = self.insert(RadixKey(tokens), values, receipt)
        self.unlock(receipt)
        return done

    def resumed(self, tokens):
        """A request goes on, and is given up."""
        self.unlock(self.lock(self.match(RadixKey(tokens))))

    def found(self, tokens):
        return self.match(RadixKey(tokens)).length


def chat(number, turns, tokens=10):
    return [100 * number + turn for turn in range(tokens * turns)]


@pytest.mark.parametrize("policy", Policy)
def test_the_surplus_of_all_goes_before_the_tail_of_any(policy):
    tree = Tree(WINDOW, policy=policy)
    for number in range(5):
        tree.put(chat(number, 1))
    evicted = tree.evict(5 * 6, 1)
    assert (len(evicted.values[0]), len(evicted.values[1]), evicted.nodes) == (0, 30, [])
    check(tree)
    assert [tree.found(chat(number, 1)) for number in range(5)] == [10] * 5
    evicted = tree.evict(1, 1)  # now a tail, and its chat with it
    assert (len(evicted.values[0]), len(evicted.values[1])) == (10, 4)
    check(tree)


@pytest.mark.parametrize("policy", Policy)
def test_the_tail_of_an_earlier_turn_is_surplus(policy):
    tree = Tree(WINDOW, policy=policy)
    tree.put(chat(1, 1))
    tree.evict(6, 1)
    tree.put(chat(1, 2))
    assert tree.evictable == [20, 14]
    evicted = tree.evict(10, 1)  # the tail of the old turn, and the front of the new one
    assert (len(evicted.values[0]), len(evicted.values[1])) == (0, 10)
    assert (tree.found(chat(1, 2)), tree.found(chat(1, 1))) == (20, 0)
    check(tree)


@pytest.mark.parametrize("policy", Policy)
def test_states_of_earlier_turns_go_first(policy):
    tree = Tree(STATE, policy=policy)
    for turns in (1, 2, 3):
        for number in range(4):
            tree.put(chat(number, turns))
    evicted = tree.evict(8, 1)
    assert (len(evicted.values[0]), len(evicted.values[1])) == (0, 8)
    assert [tree.found(chat(number, 3)) for number in range(4)] == [30] * 4
    check(tree)


@pytest.mark.parametrize("part", [WINDOW, STATE])
def test_where_chats_branch_off_is_a_resume_point(part):
    tree = Tree(part)
    system = list(range(1000, 1010))
    tree.put(system)
    for number in range(3):
        tree.put(system + chat(number, 1))
    tree.evict(1 if part is STATE else 4 * 6, 1)
    assert tree.found([*system, 7]) == 10
    check(tree)


def test_a_branch_that_loses_its_branches_is_none_any_more():
    tree = Tree(WINDOW)
    system = list(range(1000, 1010))
    tree.put(system)
    tree.put(system + chat(1, 1))
    tree.put(system + chat(2, 1))
    tree.resumed(system + chat(1, 1))
    tree.resumed(system + chat(2, 1))
    tree.evict(18, 1)
    assert tree.evictable[1] == 12  # three tails
    while tree.resume.next_candidate(1) is not None:  # all are needed
        pass
    check(tree)
    tree.found(system + chat(2, 1))
    tree.evict(1)
    assert tree.evictable == [20, 8]
    check(tree)
    assert len(tree.evict(1, 1).values[0]) == 0  # the tail of the system prompt
    assert tree.found(system + chat(2, 1)) == 20
    check(tree)


def test_what_is_locked_is_no_surplus_until_it_is_unlocked():
    tree = Tree(WINDOW)
    receipt = tree.lock(tree.put(chat(1, 1)))
    assert len(tree.evict(1, 1).values[1]) == 0
    tree.unlock(receipt)
    check(tree)
    evicted = tree.evict(1, 1)
    assert (len(evicted.values[0]), len(evicted.values[1])) == (0, 6)


def test_where_lookups_end_elsewhere_the_policy_decides():
    """Prompts that go on from the middle of others: what lies before the end of a leaf is what they need."""
    tree = Tree(WINDOW)
    for number in range(4):
        tree.put(chat(number, 2))
    for number in range(4):
        tree.resumed([*chat(number, 1), 7])
    assert not tree.resume.are_used()
    evicted = tree.evict(1, 1)
    assert (len(evicted.values[0]), len(evicted.values[1])) == (10, 10)  # what was used longest ago, as it is
    for _ in range(3):
        for number in range(1, 4):
            tree.resumed(chat(number, 2))
    assert tree.resume.are_used()
    assert len(tree.evict(1, 1).values[0]) == 0
    check(tree)


def test_lookups_of_long_ago_count_less():
    tree = Tree(WINDOW)
    tree.resume.elsewhere = 1 << 20
    tree.put(chat(1, 1))
    for _ in range(300_000):
        tree.resume.went_on(next(tree.nodes()), 10, 10)
    assert tree.resume.are_used()
    assert tree.resume.ends + tree.resume.elsewhere <= 1 << 20


@pytest.mark.parametrize("policy", Policy)
def test_a_cut_is_no_use(policy):
    """Hits, and what SLRU protects, are those of the whole; leaves stay in their order."""
    tree = Tree(WINDOW, policy=policy)
    for number in range(3):
        tree.put(chat(number, 1))
        tree.match(RadixKey(chat(number, 1)))
    order = tree.policies[0]
    leaves = [node for node in order if not node.children]
    tree.evict(18, 1)
    assert [node for node in order if not node.children] == leaves
    for leaf in leaves:
        assert (leaf.start, leaf.parent.start, leaf.parent.end) == (6, 0, 6)
        if isinstance(order, Recorded):
            assert order.hits(leaf) == order.hits(leaf.parent) == 1
        if isinstance(order, SLRU):
            assert (leaf in order._protected) is (leaf.parent in order._protected)
    check(tree)
    assert [len(tree.evict(1).values[0]) for _ in range(3)] == [10, 10, 10]  # both halves go together


def test_what_no_request_has_used_goes_in_the_order_of_the_policy():
    """A tree filled without requests does not tell where requests resume."""
    tree = Tree(WINDOW)
    for number in range(3):
        values = [np.arange(1, 11, dtype=np.int32)] * 2
        tree.insert(RadixKey(chat(number, 1)), values)
    assert not tree.resume.are_used()
    evicted = tree.evict(1, 1)
    assert (len(evicted.values[0]), len(evicted.values[1])) == (10, 10)
    tree.resumed([7])
    assert tree.resume.are_used()
    assert len(tree.evict(1, 1).values[0]) == 0
    check(tree)


def test_a_lookup_that_is_not_locked_is_no_request():
    tree = Tree(WINDOW)
    tree.put(chat(1, 2))
    for _ in range(5):
        tree.match(RadixKey(chat(1, 1)))
    assert (tree.resume.ends, tree.resume.elsewhere) == (0, 0)
    tree.resumed(chat(1, 1))
    assert (tree.resume.ends, tree.resume.elsewhere) == (0, 10)
    tree.resumed(chat(1, 1))  # the lock has split the node: now it is the end of a branch
    assert (tree.resume.ends, tree.resume.elsewhere) == (0, 20)
    tree.resumed(chat(1, 2))
    assert (tree.resume.ends, tree.resume.elsewhere) == (20, 20)


def test_infinite_windows_have_no_surplus():
    tree = Tree(Component("window", np.inf))
    tree.put(chat(1, 1))
    assert len(tree.evict(1, 1).values[0]) == 10
    check(tree)


@pytest.mark.parametrize("policy", Policy)
def test_a_restored_tree_evicts_the_same(policy):
    tree = Tree(WINDOW, STATE, policy=policy)
    for turns in (1, 2):
        for number in range(4):
            tree.put(chat(number, turns))
            tree.match(RadixKey(chat(number, turns)))
    tree.evict(3, 1)
    twin = RadixTree(1, tree.components, policy)
    restore_tree(twin, Columns(saved_tree(tree)))
    check(twin)
    for component, amount in ((1, 5), (2, 2), (1, 40), (2, 3)):
        mine, theirs = (one.evict(amount, component).values for one in (tree, twin))
        assert [ids.tolist() for ids in mine] == [ids.tolist() for ids in theirs]
