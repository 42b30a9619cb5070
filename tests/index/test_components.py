"""What windows and states ask of the tree, on examples a page long; `test_tree_model` has all the rest."""

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, LockedError, ReceiptError
from jaxcache.index.check import check, draw
from jaxcache.index.component import FULL, Component
from jaxcache.index.explain import Reason, explain
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from tests.support.counting import count_calls

WINDOW, STATE = Component("window", 4), Component("state", 1, spans=False)


def insert(tree, tokens, *values, space=None, held=None):
    done = tree.insert(RadixKey(tokens, space), [np.array(ids, np.int32) for ids in values], held)
    check(tree)
    return done


def window_tree(*offers):
    tree = RadixTree(1, (FULL, WINDOW))
    for number, ids in enumerate(offers):
        insert(tree, range(len(ids)), range(100 * number + 1, 100 * number + len(ids) + 1), ids)
    return tree


def nodes(tree):
    """(start, end, window) of each node; 0 for a hole."""
    windows = {node: node.slot(1).value for node in tree.nodes()}
    return sorted((node.start, node.end, 0 if ids is None else ids.tolist()) for node, ids in windows.items())


def found(tree, length):
    match = tree.match(RadixKey(range(length)))
    return match.length, match.structural_length


def test_a_leaf_is_cut_where_its_window_begins():
    tree = RadixTree(1, (FULL, WINDOW))
    done = insert(tree, range(8), range(1, 9), [0, 0, 0, 4, 5, 6, 7, 8])
    assert nodes(tree) == [(0, 3, 0), (3, 8, [4, 5, 6, 7, 8])]
    assert [(node.start, node.end) for node in done.added] == [(0, 3), (3, 8)]
    assert done.leaf is done.added[-1] is done.node
    assert [ids.tolist() for ids in done.spare] == [[], []]
    assert (tree.evictable, found(tree, 8), found(tree, 7), found(tree, 6)) == ([8, 5], (8, 8), (7, 7), (0, 6))


def test_what_comes_before_the_last_zero_is_not_offered_and_spare():
    tree = RadixTree(1, (FULL, WINDOW))
    done = insert(tree, range(6), range(1, 7), [1, 0, 3, 0, 5, 6])
    assert nodes(tree) == [(0, 4, 0), (4, 6, [5, 6])]
    assert done.spare[1].tolist() == [1, 3]


def test_a_hole_is_filled_from_where_the_offer_begins():
    tree = window_tree([0, 0, 0, 0, 0, 6])
    done = insert(tree, range(6), range(101, 107), [0, 0, 0, 14, 15, 16])
    assert nodes(tree) == [(0, 3, 0), (3, 5, [14, 15]), (5, 6, [6])]
    assert [(node.start, node.end) for node in done.healed] == [(3, 5)]
    assert ([ids.tolist() for ids in done.spare], done.added) == ([[101, 102, 103, 104, 105, 106], [16]], [])
    assert done.kept.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("window", "state"), [([1, 2, 0], [9]), ([1, 2, 3], [0]), ([1, 2, 3], [])])
def test_nothing_at_the_end_is_refused_and_changes_nothing(window, state):
    tree = RadixTree(1, (FULL, WINDOW, STATE))
    insert(tree, [0, 1], [7, 8], [7, 8], [7])
    lock = tree.lock(tree.match(RadixKey([0, 1])))
    before, changes = draw(tree), tree.changes
    for held in (None, lock):
        with pytest.raises(ArgumentError, match="nothing is offered at the end"):
            insert(tree, [0, 1, 2], [1, 2, 3], window, state, held=held)
    assert (draw(tree), tree.changes) == (before, changes)
    insert(tree, [0, 1], [1, 2], [0, 0], [], held=lock)  # nothing is asked for beyond the lock


def test_a_state_says_which_it_is_and_where_pages_go_on():
    tree = RadixTree(2, (FULL, STATE))
    insert(tree, range(4), [1, 2], [11])
    insert(tree, range(8), [0, 0, 3, 4], [12])
    for length, expected in ((7, (4, 6, 11)), (5, (4, 4, 11)), (3, (0, 2, 0)), (9, (8, 8, 12))):
        match = tree.match(RadixKey(range(length)))
        assert (match.length, match.structural_length, match.state) == expected
    assert tree.evict(1, 1).values[1].tolist() == [11]  # what is furthest from the end goes first
    assert tree.match(RadixKey(range(7))).length == 0
    done = insert(tree, range(4), [5, 6], [13])
    assert ([ids.tolist() for ids in done.spare], tree.match(RadixKey(range(4))).state) == ([[5, 6], []], 13)
    assert insert(tree, range(4), [5, 6], [14]).spare[1].tolist() == [14]


def test_a_match_is_not_locked_once_another_state_was_saved_there():
    tree = RadixTree(1, (FULL, STATE))
    insert(tree, [1, 2], [1, 2], [11])
    match = tree.match(RadixKey([1, 2]))
    insert(tree, [1, 2, 3], [0, 0, 3], [12])
    assert tree.evict(1, 1).values[1].tolist() == [11]
    insert(tree, [1, 2], [8, 9], [13])
    with pytest.raises(ReceiptError, match="match again"):
        tree.lock(match)


def test_an_insert_is_not_locked_once_its_window_was_let_go():
    tree = RadixTree(1, (FULL, WINDOW))
    done = insert(tree, range(4), range(1, 5), range(1, 5))
    insert(tree, range(6), range(1, 7), range(1, 7))
    tree.evict(4, 1)
    with pytest.raises(ReceiptError, match="insert again"):
        tree.lock(done)


@pytest.mark.parametrize("policy", Policy)
def test_dropping_a_namespace_lets_go_of_all_of_it_and_of_nothing_else(policy):
    tree = RadixTree(1, (FULL, WINDOW, STATE), policy)
    for space in (None, "a"):
        for tokens in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 9]):
            first = 100 * (space == "a") + 10 * len(tokens)
            ids = range(first, first + len(tokens))
            insert(tree, tokens, ids, ids, [first], space=space)
    others = [node for node in tree.nodes() if node.value[0] < 100]
    lock = tree.lock(tree.match(RadixKey([1, 9], "a")))
    name = Namespace(extra_key="a").encode()
    before, changes = draw(tree), tree.changes
    with pytest.raises(LockedError, match="end what uses it"):
        tree.drop(name)
    assert (draw(tree), tree.changes) == (before, changes)
    tree.unlock(lock)
    gone = tree.drop(name)
    check(tree)
    assert sorted(gone.values[0].tolist()) == [121, 130, 131, 132, 153, 154]
    assert sorted(gone.values[1].tolist()) == sorted(gone.values[0].tolist())
    assert sorted(gone.values[2].tolist()) == [120, 130, 150]
    assert len(gone.nodes) == 4 and all(node.parent is None for node in gone.nodes)
    assert set(tree.nodes()) == set(others)
    assert tree.match(RadixKey([1, 2, 3], "a")).length == 0
    assert [len(ids) for ids in tree.drop(name).values] == [0, 0, 0]
    assert len(tree) == tree.evictable[0] == len(tree.drop(b"").values[0]) and not tree.roots


def test_a_drop_costs_what_it_drops():
    def cost(others):
        tree = RadixTree(1)
        for space, count in ((None, others), ("a", 20)):
            for token in range(count):
                insert_alone(tree, [token], space)
        name = Namespace(extra_key="a").encode()
        return count_calls(lambda: tree.drop(name))

    def insert_alone(tree, tokens, space):
        tree.insert(RadixKey(tokens, space), [np.array([1], np.int32)])

    assert cost(5000) <= 1.05 * cost(50)


@pytest.mark.parametrize("namespace", ["a", None, Namespace(extra_key="a")])
def test_a_namespace_to_drop_is_an_encoding(namespace):
    with pytest.raises(ArgumentError, match="encode"):
        RadixTree(1).drop(namespace)


def test_a_lookup_in_a_dropped_namespace_says_so():
    tree = RadixTree(1)
    for space in (None, "a"):
        insert(tree, [1, 2, 3], [1, 2, 3], space=space)
    tree.drop(Namespace(extra_key="a").encode())
    insert(tree, [7], [4])
    why = explain(tree, RadixKey([1, 2, 9], "a"))
    assert (why.reason, why.known, why.policy, why.changes_ago) == (Reason.DROPPED, 2, None, 2)
    assert str(why) == "0 of 3 tokens: the rest was dropped with its namespace, up to token 2, 2 changes ago"


@pytest.mark.parametrize("wrong", [dict(reach=0), dict(reach=-1), dict(reach=float("nan")), dict(reach=2, spans=False)])
def test_a_component_reaches_at_least_a_token(wrong):
    with pytest.raises(ArgumentError, match="reach"):
        Component("x", **wrong)


@pytest.mark.parametrize("components", [(), (WINDOW,), (STATE, FULL), (FULL, STATE, STATE)])
def test_components_that_do_not_go_together(components):
    with pytest.raises(ArgumentError, match="components"):
        RadixTree(1, components)


@pytest.mark.parametrize("component", [0, 1, 2])
@pytest.mark.parametrize("policy", Policy)
def test_eviction_of_any_component_costs_what_it_evicts_however_large_the_tree(policy, component):
    def cost(siblings):
        tree = RadixTree(1, (FULL, WINDOW, STATE), policy)
        one = np.array([1], np.int32)
        two = np.array([1, 2], np.int32)
        for token in range(1, siblings):
            tree.insert(RadixKey([0, token]), [two, two, one])
        tree.evict(100, component)  # first ones, so that outdated entries of a heap are paid for
        return count_calls(lambda: tree.evict(50, component))

    assert cost(4000) <= 1.05 * cost(400)
