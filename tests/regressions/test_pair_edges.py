"""Sharp edges of keys of pairs (EAGLE)."""

import numpy as np
import pytest

from jaxcache.index.key import BigramKey
from jaxcache.index.tree import RadixTree


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("pages", [1, 2])
def test_1b_09_a_sequence_that_fills_its_pages_has_one_page_of_pairs_less(page_size, pages):
    """n tokens are n - 1 pairs: what was inserted is what is found, and what is not whole is nobody's."""
    tree = RadixTree(page_size, element_bytes=BigramKey.element_bytes)
    whole = BigramKey(range(pages * page_size))
    done = tree.insert(whole, [np.arange(1, pages + 1, dtype=np.int32)])
    expected = (pages * page_size - 1) // page_size * page_size
    assert done.length == tree.match(whole).length == len(tree) * page_size == expected
    longer = BigramKey(range(pages * page_size + 1))
    done = tree.insert(longer, [np.arange(1, pages + 1, dtype=np.int32)])
    assert (done.present, done.length) == (expected, pages * page_size)
    assert tree.match(longer).length == pages * page_size
    assert tree.match(whole).length == expected
