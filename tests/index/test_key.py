"""Keys of tokens and of pairs of tokens, against lists."""

import hashlib
import struct
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxcache.errors import ArgumentError
from jaxcache.index.check import draw
from jaxcache.index.key import BigramKey, Namespace, RadixKey
from jaxcache.index.page_hashes import page_hashes
from jaxcache.index.tree import RadixTree
from tests.support.trees import put

tokens = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12)
TOKENS = [5, 6, 7, 5, 6]


@given(tokens)
def test_elements_are_neighbours(ids):
    key = BigramKey(ids, "tenant")
    assert list(key) == list(pairwise(ids))
    assert len(key) == max(len(ids) - 1, 0)
    assert key.pairs.tolist() == [list(pair) for pair in pairwise(ids)]
    assert key.token_ids.tolist() == ids[:-1]
    assert key.namespace == RadixKey([], "tenant").namespace
    assert RadixKey(ids, "tenant").bigrams() == key == key.bigrams()


@given(tokens, st.integers(0, 12), st.integers(0, 12))
def test_a_cut_key_has_those_elements_and_goes_on_like_the_whole(ids, start, stop):
    key, elements = BigramKey(ids), list(pairwise(ids))
    assert list(key[start:stop]) == elements[start:stop]
    assert RadixKey(ids)[start:stop].bigrams() == BigramKey(ids[start:stop])
    head = key[: max(stop, 1)]
    if len(head):
        assert head.extended(ids[len(head) + 1 :]) == key
        assert list(head.extended([])) == elements[: len(head)]


@pytest.mark.parametrize("key", [BigramKey([]), BigramKey([5]), BigramKey(TOKENS)[:0]])
def test_an_empty_key_of_pairs_does_not_know_what_comes_before(key):
    assert len(key) == 0 and list(key) == []
    with pytest.raises(ArgumentError, match="make one of all the tokens"):
        key.extended([6, 7])


@pytest.mark.parametrize(
    "form", [TOKENS, tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, np.uint16), np.array(TOKENS, "<i4").tobytes()]
)
def test_any_form_of_tokens(form):
    assert BigramKey(form) == RadixKey(form).bigrams()
    assert list(BigramKey(form)) == [(5, 6), (6, 7), (7, 5), (5, 6)]


def test_pairs_are_never_equal_to_the_tokens_they_are_packed_like():
    pairs, same_bytes = BigramKey([1, 2, 3]), RadixKey([1, 2, 2, 3])
    assert pairs.packed == same_bytes.packed
    assert pairs != same_bytes and pairs != same_bytes[:2]
    assert pairs == BigramKey([1, 2, 3, 4])[:2] and hash(pairs) == hash(BigramKey([1, 2, 3, 4])[:2])
    assert pairs != BigramKey([1, 2, 3], Namespace(lora_id="x"))


@pytest.mark.parametrize("extra_key", [None, "a", b"a", "", Namespace(lora_id="a"), Namespace("a", cache_salt="b")])
def test_a_key_says_what_separates_it_as_it_was_told(extra_key):
    for kind in (RadixKey, BigramKey):
        key = kind([1, 2, 3], extra_key)
        assert key.extra_key == extra_key == key[1:].extra_key
        assert kind([1, 2, 3], key.extra_key) == key
    assert RadixKey([1], Namespace("a")).extra_key == "a"
    assert RadixKey([1], Namespace()).extra_key is None


def test_repr_says_what_it_is():
    assert repr(BigramKey([1, 2, 3])) == "BigramKey([(1, 2), (2, 3)], length=2)"
    assert repr(RadixKey([1, 2, 3])[1:]) == "RadixKey([2, 3], length=2)"


@pytest.mark.parametrize("wrong", [["a"], [2**31], np.zeros((2, 2), np.int32), b"123", RadixKey([1, 2])])
def test_what_is_no_tokens_is_refused(wrong):
    with pytest.raises(ArgumentError, match="token_ids"):
        BigramKey(wrong)


def test_a_hash_takes_each_integer_of_a_pair_in_order():
    """As a tuple is hashed elsewhere: every element, 4 little-endian bytes."""
    key, page_size = BigramKey([1, 2, 3, 4, 5]), 2
    prior, expected = b"", []
    for page in ([(1, 2), (2, 3)], [(3, 4), (4, 5)]):
        digest = hashlib.sha256(prior)
        for pair in page:
            for token in pair:
                digest.update(struct.pack("<I", token))
        prior = digest.digest()
        expected.append(prior)
    assert page_hashes(key.packed, key.element_bytes * page_size) == expected


def test_a_tree_of_pairs_hashes_and_draws_pairs():
    tree = RadixTree(2, with_hashes=True, element_bytes=BigramKey.element_bytes)
    key = BigramKey([1, 2, 3, 4, 5, 6])
    node = tree.insert(key, [np.array([7, 8], np.int32)]).leaf
    assert list(node.hashes) == page_hashes(key.packed, 16)
    assert (node.start, node.end, node.tokens, node.token_ids.tolist()) == (0, 4, 4, [1, 2, 3, 4])
    assert "[0:4] 1 2 3 4  full=7 8" in draw(tree)


@pytest.mark.parametrize(("mine", "other"), [(RadixKey, BigramKey), (BigramKey, RadixKey)])
def test_a_tree_takes_keys_of_one_class(mine, other):
    """Also where the bytes would fit: (1, 2) (2, 3) is packed like 1 2 2 3."""
    tree = RadixTree(1, element_bytes=mine.element_bytes)
    if mine is RadixKey:
        put(tree, [1, 2, 2, 3])
    before, key = draw(tree), other([1, 2, 3])
    for use in (tree.match, tree.find, lambda key: tree.insert(key, [np.arange(1, 9, dtype=np.int32)])):
        with pytest.raises(ArgumentError, match="keys of one class"):
            use(key)
    theirs = RadixTree(1, element_bytes=other.element_bytes)
    theirs.insert(key, [np.array([2, 3, 4], np.int32)])
    with pytest.raises(ArgumentError, match="keys of one class"):
        tree.lock(theirs.match(key))
    assert draw(tree) == before


def test_there_is_no_third_size_of_elements():
    with pytest.raises(ArgumentError, match="element_bytes"):
        RadixTree(1, element_bytes=6)
