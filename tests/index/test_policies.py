"""What each policy is for, on the traffic it is for; the order of victims is checked by `tests.model`."""

import random

import numpy as np
import pytest

from jaxcache.index.check import check
from jaxcache.index.key import RadixKey
from jaxcache.index.node import Node
from jaxcache.index.policies.ghosts import Ghosts
from jaxcache.index.policies.registry import Policy
from jaxcache.index.policies.reuse import ReuseModel, ShadowLRU
from jaxcache.index.tree import RadixTree

LENGTH = 8


def serve(tree, document, room):
    """One request for a document of LENGTH tokens, in a cache with room for `room` documents; whether it was there."""
    key = RadixKey([document * LENGTH + i for i in range(LENGTH)])
    found = tree.match(key)
    lock = tree.lock(found)
    short = len(tree) + LENGTH - found.length - room * LENGTH
    if short > 0:
        tree.evict(short)
    tree.insert(key, (np.arange(LENGTH, dtype=np.int32),), lock)
    tree.unlock(lock)
    return found.length == LENGTH


def hits(policy, documents, room):
    tree = RadixTree(1, policy=policy)
    count = sum([serve(tree, document, room) for document in documents])
    check(tree)
    return count


def loop(documents, rounds):
    return list(range(documents)) * rounds


def with_a_scan():
    """Ten documents used all the time, and after each use one that is used once."""
    rng = random.Random(0)
    return [x for i in range(1500) for x in (rng.randrange(10), 1000 + 2 * i, 1001 + 2 * i)]


def skewed(seed=0):
    rng = random.Random(seed)
    return [int(300 * rng.random() ** 3) for _ in range(4000)]


def drifting(seed=0):
    rng = random.Random(seed)
    return [i // 4 + int(rng.expovariate(1 / 10)) for i in range(4000)]


@pytest.mark.parametrize("policy", [Policy.LFU, Policy.SLRU, Policy.S3FIFO, Policy.ADAPTIVE])
def test_a_scan_does_not_flush_what_is_in_use(policy):
    best = 1500 - 10
    assert hits(Policy.LRU, with_a_scan(), 12) < best / 2
    assert hits(policy, with_a_scan(), 12) > 0.85 * best


def test_a_loop_that_does_not_fit_is_kept_in_part():
    assert hits(Policy.LRU, loop(60, 40), 40) == 0
    assert hits(Policy.MRU, loop(60, 40), 40) > 1200
    assert hits(Policy.ADAPTIVE, loop(60, 40), 40) > 1200  # of 1600 that are possible


def test_adaptive_is_ahead_where_some_are_asked_for_more():
    assert hits(Policy.ADAPTIVE, skewed(), 30) > 1.15 * hits(Policy.LRU, skewed(), 30)


@pytest.mark.parametrize("make", [drifting, skewed, with_a_scan, lambda: loop(60, 40)])
@pytest.mark.parametrize("room", [12, 40, 120])
def test_adaptive_never_loses_much_to_lru(make, room):
    documents = make()
    assert hits(Policy.ADAPTIVE, documents, room) > hits(Policy.LRU, documents, room) - 0.015 * len(documents)


def test_adaptive_is_lru_while_nothing_was_used_again():
    evicted = {}
    for policy in (Policy.LRU, Policy.ADAPTIVE):
        tree = RadixTree(1, policy=policy)
        order = []
        for document in range(200):
            tree.insert(RadixKey([7, document, 1, 2]), (np.arange(4, dtype=np.int32),))
            if len(tree) > 60:
                order += [node.key for node in tree.evict(3).nodes]
        evicted[policy] = order
    assert evicted[Policy.ADAPTIVE] == evicted[Policy.LRU]


def test_slru_bounds_what_it_protects():
    tree = RadixTree(1, policy=Policy.SLRU)
    for document in range(10):
        serve(tree, document, 10)
    for document in range(10):  # all were found: 8 fit the protected segment, so 0 and 1 are on probation again
        serve(tree, document, 10)
    serve(tree, 99, 10)
    assert not tree.match(RadixKey([0])).length
    assert tree.match(RadixKey([2 * LENGTH])).length


def test_s3fifo_knows_again_what_it_let_go_too_early():
    tree = RadixTree(1, policy=Policy.S3FIFO)
    for document in range(11):
        serve(tree, document, 10)
    assert not serve(tree, 0, 10)  # let go, and back: in the main queue
    for document in range(20, 40):
        serve(tree, document, 10)
    assert serve(tree, 0, 10)


def test_a_hit_under_a_lock_and_the_halves_of_a_split():
    tree = RadixTree(1, policy=Policy.LFU)
    tree.insert(RadixKey([1, 2, 3, 4]), (np.arange(4, dtype=np.int32),))
    lock = tree.lock(tree.match(RadixKey([1, 2, 3, 4])))
    tree.unlock(tree.lock(tree.match(RadixKey([1, 2]))))
    tree.unlock(lock)
    upper, lower = sorted(tree.nodes(), key=lambda node: node.end)
    assert (tree.policies[0].hits(upper), tree.policies[0].hits(lower)) == (2, 1)


@pytest.mark.parametrize("policy", Policy)
def test_what_a_policy_remembers_of_itself_is_checked(policy):
    tree = RadixTree(1, policy=policy)
    for document in range(4):
        serve(tree, document, 9)
    assert not list(tree.policies[0].problems(set(tree.nodes())))
    if policy is not Policy.LRU:
        assert list(tree.policies[0].problems(set()))  # what is no longer cached must not be known


def node(start, tokens):
    parent = Node(b"", 0, start, None, ())
    return Node(np.array(tokens, "<i4").tobytes(), start, start + len(tokens), parent, ())


def test_ghosts_are_found_by_place_and_first_tokens_and_the_oldest_expire():
    ghosts = Ghosts()
    ghosts.put(node(4, [1, 2, 3]), 3, "a")
    ghosts.put(node(4, [9]), 1, "b")
    assert (len(ghosts), ghosts.tokens) == (2, 4)
    assert ghosts.take(node(5, [1, 2, 3])) is None
    assert ghosts.expire(4) is None
    assert ghosts.expire(3) == (3, "a")
    assert ghosts.take(node(4, [9])) == (1, "b")
    assert (len(ghosts), ghosts.tokens) == (0, 0)


def test_a_ghost_put_again_counts_once():
    ghosts = Ghosts()
    for note in "ab":
        ghosts.put(node(0, [1, 2]), 2, note)
    assert ghosts.tokens == 2
    assert ghosts.take(node(0, [1, 2])) == (2, "b")


def test_the_index_is_higher_for_what_is_found_sooner_and_more_surely():
    model = ReuseModel()
    for _ in range(100):
        model.found(0, 1000, 64)
        model.lost(0, 100_000, 64)
        model.found(1, 1000, 64)
        model.found(2, 30_000, 64)
        model.lost(3, 100_000, 64)
    levels = model.levels(0.25)
    young = [row[0] for row in levels]
    assert young[1] > young[0] > young[2] > young[3]
    assert levels[0][12] < young[0]  # after the time in which it would have been found
    assert levels[1][4] >= young[1]  # nearer to the time in which it is found
    assert young[5] == pytest.approx(young[4])  # nothing is known of either: as the class below


def test_an_infinite_margin_makes_all_equal():
    model = ReuseModel()
    model.found(0, 1000, 64)
    model.lost(3, 5000, 64)
    assert len({level for row in model.levels(np.inf) for level in row}) == 1


@pytest.mark.parametrize("make", [drifting, skewed, with_a_scan])
def test_the_shadow_counts_what_lru_finds(make):
    """Of an LRU cache it watches, the shadow says nearly what that cache finds."""
    shadow, seen, stack = ShadowLRU(), {}, []
    shadow.capacity = 40
    real = 0
    for document in make():
        is_there = document in stack[-40:]
        real += is_there
        if document in seen:
            shadow.use(seen[document], 1, is_there)
        else:
            shadow.now += 1
        seen[document] = shadow.now
        if document in stack:
            stack.remove(document)
        stack.append(document)
    assert shadow._its == pytest.approx(real, rel=0.05)
    assert shadow._ours == real
