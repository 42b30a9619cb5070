"""Keys put into a bare tree."""

import numpy as np

from jaxcache.index.key import RadixKey


def put(tree, tokens, space=None):
    key = RadixKey(tokens, space)
    pages = np.arange(1, len(tokens) // tree.page_size + 1, dtype=np.int32)
    return tree.insert(key, [pages if component.spans else pages[:1] for component in tree.components])
