"""Every reason for which a lookup can stop, on trees made for it; and that asking costs the tree nothing."""

import random

import pytest

from jaxcache.caches.radix import RadixCache
from jaxcache.index.component import FULL, Component
from jaxcache.index.explain import Reason, explain
from jaxcache.index.graves import Graves
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.tree import RadixTree
from tests.support.trees import put

STATE = Component("state", 1, spans=False)
WINDOW = Component("window", 4)


def test_all_of_it_is_found():
    tree = RadixTree(2)
    put(tree, [1, 2, 3, 4])
    why = explain(tree, RadixKey([1, 2, 3, 4]))
    assert (why.reason, why.length, why.asked, why.known) == (Reason.FOUND, 4, 4, 4)
    assert str(why) == "4 of 4 tokens: all of it was found"


def test_the_tail_is_shorter_than_a_page():
    tree = RadixTree(4)
    put(tree, [1, 2, 3, 4])
    why = explain(tree, RadixKey([1, 2, 3, 4, 5, 6]))
    assert (why.reason, why.length, why.known) == (Reason.TAIL, 4, 4)
    assert str(why) == "4 of 6 tokens: the rest is shorter than a page"


@pytest.mark.parametrize("policy", Policy)
def test_evicted_by_whom_and_how_long_ago(policy):
    tree = RadixTree(1, policy=policy)
    put(tree, [1, 2, 3, 4])
    tree.evict(4)
    for token in range(10, 13):
        put(tree, [token])
    why = explain(tree, RadixKey([1, 2, 3, 9]))
    assert (why.reason, why.length, why.known) == (Reason.EVICTED, 0, 3)
    assert (why.policy, why.changes_ago) == (policy.value, 4)  # this one, and three leaves since
    assert str(why) == f"0 of 4 tokens: the rest was evicted, up to token 3, by {policy.value}, 4 changes ago"


def test_evicted_where_only_the_end_is_gone_and_its_parents_were_cut_and_cached_anew():
    tree = RadixTree(1)
    put(tree, [1, 2, 3, 4])
    put(tree, [1, 2, 5])
    put(tree, [1, 2, 3, 4, 6, 7])
    tree.evict(1)  # 5
    lock = tree.lock(tree.match(RadixKey([1, 2, 3])))
    tree.evict(3)  # 4 6 7
    assert explain(tree, RadixKey([1, 2, 3, 4, 6, 7])).known == 6
    tree.unlock(lock)
    tree.evict(3)
    assert tree.roots == {}
    put(tree, [1, 2])
    why = explain(tree, RadixKey([1, 2, 3, 4, 6, 8]))
    assert (why.reason, why.length, why.known) == (Reason.EVICTED, 2, 5)
    assert explain(tree, RadixKey([1, 2, 5])).known == 3
    assert explain(tree, RadixKey([1, 9, 3, 4, 6])).reason is Reason.NEVER_SEEN


def test_the_same_tokens_after_another_prefix_or_in_another_namespace_are_not_those_evicted():
    tree = RadixTree(1)
    put(tree, [1, 2, 3], "a")
    tree.evict(3)
    assert explain(tree, RadixKey([7, 2, 3], "a")).reason is Reason.NEVER_SEEN
    assert explain(tree, RadixKey([1, 2, 3], "b")).reason is Reason.NEVER_SEEN
    assert explain(tree, RadixKey([1, 2, 3], "a")).reason is Reason.EVICTED


def test_another_namespace_has_it_and_its_name_is_not_in_the_line():
    tree = RadixTree(2)
    put(tree, [1, 2, 3, 4, 5, 6], "secret")
    put(tree, [1, 2, 3, 4], "other")
    put(tree, [1, 2])
    why = explain(tree, RadixKey([1, 2, 3, 4, 5, 6, 7]))
    assert (why.reason, why.length, why.known) == (Reason.OTHER_NAMESPACE, 2, 6)
    assert why.namespace == RadixKey([], "secret").namespace
    assert str(why) == "2 of 7 tokens: the rest is cached in another namespace, up to token 6"


def test_never_seen():
    tree = RadixTree(1)
    assert explain(tree, RadixKey([1])).reason is Reason.NEVER_SEEN
    put(tree, [1, 2])
    why = explain(tree, RadixKey([1, 3]))
    assert (why.reason, why.length, why.known) == (Reason.NEVER_SEEN, 1, 1)


def test_a_window_that_is_gone():
    tree = RadixTree(1, (FULL, WINDOW))
    put(tree, list(range(8)))
    put(tree, list(range(12)))
    lock = tree.lock(tree.match(RadixKey(list(range(12)))))
    tree.evict(1, 1)  # a lock holds the last 4 tokens of the window: what is above them goes
    tree.unlock(lock)
    why = explain(tree, RadixKey(list(range(8))))
    assert (why.reason, why.length, why.known, why.component) == (Reason.WINDOW_GONE, 0, 8, "window")
    assert str(why) == "0 of 8 tokens: what a window needs was evicted (window; 8 tokens are cached)"
    assert explain(tree, RadixKey(list(range(12)))).reason is Reason.FOUND


def test_no_state_at_this_point():
    tree = RadixTree(1, (FULL, STATE))
    put(tree, [1, 2, 3, 4])
    why = explain(tree, RadixKey([1, 2]))
    assert (why.reason, why.length, why.known, why.component) == (Reason.NO_STATE, 0, 2, "state")


def test_asking_changes_nothing():
    cache = RadixCache(None, None, 1)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        cache.insert(tokens)
    before = list(cache.tree.policies[0])
    assert cache.explain([1, 2, 9]).length == 2
    assert list(cache.tree.policies[0]) == before


def test_the_memory_is_bounded_and_the_oldest_is_forgotten_first():
    tree = RadixTree(1)
    tree.graves.__init__(4, most_bytes=4 * 264)  # a node of 2 tokens takes 8 bytes and 256
    for token in range(5):
        put(tree, [token, 0])
        tree.evict(2)
    reasons = [explain(tree, RadixKey([token, 0])).reason for token in range(5)]
    assert reasons == [Reason.NEVER_SEEN] * 2 + [Reason.EVICTED] * 3  # room for 4, and an eighth of it was made free
    put(tree, list(range(10, 10 + 150)))
    tree.evict(150)
    assert len(tree.graves) == 1
    put(tree, list(range(1000)))
    tree.evict(1000)
    assert len(tree.graves) == 0  # larger than all the room
    tree.reset()
    assert len(tree.graves) == 0


@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_as_the_history_of_all_prefixes_says(page_size):
    """A model that forgets nothing: every whole-page prefix ever cached, and those cached now."""
    for seed in range(15):
        rng = random.Random(seed)
        tree = RadixTree(page_size, policy=rng.choice(list(Policy)))
        ever = {"": set(), "x": set()}
        for _ in range(80):
            space = rng.choice(["", "x"])
            tokens = [rng.randrange(2) for _ in range(rng.randrange(6 * page_size))]
            if rng.random() < 0.5:
                put(tree, tokens, space or None)
                ever[space] |= {tuple(tokens[: (i + 1) * page_size]) for i in range(len(tokens) // page_size)}
            elif rng.random() < 0.5:
                tree.evict(rng.randrange(1, 4))
            key = RadixKey(tokens, space or None)
            why = explain(tree, key)
            longest = {
                s: max((i for i in range(len(tokens) + 1) if tuple(tokens[:i]) in seen), default=0)
                for s, seen in ever.items()
            }
            other = "x" if space == "" else ""
            elsewhere = tree.find(RadixKey(tokens, other or None))[1]
            assert why.length == tree.match(key).length
            if why.length == len(tokens):
                assert why.reason is Reason.FOUND
            elif len(tokens) - why.length < page_size:
                assert why.reason is Reason.TAIL
            elif longest[space] > why.length:
                assert (why.reason, why.known) == (Reason.EVICTED, longest[space])
            elif elsewhere > why.length:
                assert (why.reason, why.known) == (Reason.OTHER_NAMESPACE, elsewhere)
            else:
                assert why.reason is Reason.NEVER_SEEN


def test_graves_alone():
    assert len(Graves(4)) == 0
    assert Graves(4).search(RadixKey([1]), 0) is None
