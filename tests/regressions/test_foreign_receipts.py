"""A lock on other tokens is no lock on a prefix of the key."""

import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.index.key import RadixKey
from jaxcache.index.tree import RadixTree


def pages(*ids):
    return (np.array(ids, np.int32),)


def locked_tree():
    tree = RadixTree(page_size=1)
    tree.insert(RadixKey([1, 2, 3], "x"), pages(7, 8, 9))
    return tree, tree.lock(tree.match(RadixKey([1, 2], "x")))


@pytest.mark.parametrize(
    "key", [RadixKey([1, 5, 3], "x"), RadixKey([5, 2, 3], "x"), RadixKey([1, 2, 3]), RadixKey([1, 2, 3], "y")]
)
def test_an_insert_under_another_prefix_or_namespace_is_refused_and_changes_nothing(key):
    tree, receipt = locked_tree()
    before = [(node.key, node.value.tolist(), node.locks) for node in tree.nodes()]
    with pytest.raises(ArgumentError, match="held: the lock is"):
        tree.insert(key, pages(4, 5, 6), held=receipt)
    assert [(node.key, node.value.tolist(), node.locks) for node in tree.nodes()] == before
    assert tree.insert(RadixKey([1, 2, 4], "x"), pages(4, 5, 6), held=receipt).present == 2
