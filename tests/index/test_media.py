"""Media by position: a prefix is shared up to the page in which another image starts, and no further."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.index.check import check
from jaxcache.index.component import FULL, Component
from jaxcache.index.explain import Reason, explain
from jaxcache.index.hashing import compute_node_hash, content_digest, hashes_of
from jaxcache.index.key import BigramKey, Namespace, RadixKey
from jaxcache.index.media import MediaRange, digests_of, marks_of
from jaxcache.index.saved import restore_tree, saved_tree
from jaxcache.index.tree import RadixTree
from jaxcache.state_dict import Columns
from tests.index.media_model import PrefixDictionary

CAT, DOG = content_digest("cat"), content_digest("dog")


def tree_of(page_size=2, components=(FULL,), **options):
    return RadixTree(page_size, components, **options)


def put(tree, key, first=1):
    pages = key.length // tree.page_size
    values = [np.arange(first, first + (pages if part.spans else 1), dtype=np.int32) for part in tree.components]
    return tree.insert(key, values)


def random_sequence(rng, page_size):
    """Tokens of two symbols, and ranges over some of them: starts and stops anywhere, from two digests."""
    tokens = [rng.choice([0, 0, 0, 1]) for _ in range(rng.randrange(1, 6 * page_size + 2))]
    media, at = [], 0
    while at < len(tokens):
        start = at + rng.randrange(0, 2 * page_size + 1)
        stop = start + rng.randrange(1, 2 * page_size + 2)
        if stop > len(tokens) or rng.random() < 0.3:
            break
        media.append(MediaRange(start, stop, rng.choice([CAT, DOG])))
        at = stop
    return tokens, media


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_tree_equals_a_dictionary_of_prefixes(page_size, seed):
    rng = random.Random(seed)
    tree, oracle = tree_of(page_size, with_hashes=True), PrefixDictionary(page_size)
    known, next_id = [], 1
    for _ in range(400):
        if known and rng.random() < 0.5:  # goes on with what is known, or differs from it in its media only
            tokens, media = rng.choice(known)
            more, others = random_sequence(rng, page_size)
            media = [*media, *[each.later(len(tokens)) for each in others]]
            if rng.random() < 0.3:
                media = [MediaRange(each.start, each.stop, rng.choice([CAT, DOG])) for each in media]
            tokens = [*tokens, *more]
        else:
            tokens, media = random_sequence(rng, page_size)
        space = rng.choice([None, None, "a"])
        key = RadixKey(tokens, space, rng.sample(media, len(media)))
        found = tree.match(key)
        assert found.pages.tolist() == oracle.match(space, tokens, media)
        if rng.random() < 0.2:
            tree.unlock(tree.lock(found))  # splits
        if rng.random() < 0.6:
            ids = list(range(next_id, next_id + len(tokens) // page_size))
            next_id += len(ids)
            present = tree.insert(key, [np.array(ids, np.int32)]).present // page_size
            assert present == len(oracle.match(space, tokens, media))
            oracle.insert(space, tokens, media, ids)
            known = [*known[-20:], (tokens, media)]
        if rng.random() < 0.15:
            oracle.remove(tree.evict(rng.randrange(1, 30)).values[0].tolist())
        check(tree)
    assert len(tree) == len(oracle.pages)


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_text_before_an_image_is_shared_with_text(page_size):
    tree = tree_of(page_size)
    text = RadixKey([5] * 8 + [0] * 8)
    put(tree, text)
    image = RadixKey([5] * 8 + [0] * 8, media=[MediaRange(9, 13, CAT)])
    assert tree.match(image).length == 9 // page_size * page_size
    put(tree, image, 100)
    assert tree.match(text).pages.tolist()[0] == tree.match(image).pages.tolist()[0] == 1
    assert tree.match(image).length == tree.match(text).length == 16
    assert tree.match(image).pages.tolist() != tree.match(text).pages.tolist()
    check(tree)


def test_another_image_is_no_hit_from_the_page_it_starts_in():
    tree = tree_of(4)
    put(tree, RadixKey([1] * 4 + [0] * 12, media=[MediaRange(6, 10, CAT)]))
    for media, found in {
        (MediaRange(6, 10, CAT),): 16,
        (MediaRange(6, 10, DOG),): 4,
        (MediaRange(6, 11, CAT),): 4,  # of another length
        (MediaRange(7, 11, CAT),): 4,  # at another place
        (MediaRange(6, 10, CAT), MediaRange(12, 13, DOG)): 12,
        (MediaRange(6, 10, CAT), MediaRange(10, 11, CAT)): 8,
        (): 4,
    }.items():
        assert tree.match(RadixKey([1] * 4 + [0] * 12, media=media)).length == found


def test_a_page_boundary_within_an_image_is_a_place_to_stop():
    tree = tree_of(4)
    media = [MediaRange(2, 11, CAT)]
    put(tree, RadixKey([0] * 16, media=media))
    short = RadixKey([0] * 16, media=media)[:9]
    assert tree.match(short).length == 8
    receipt = tree.lock(tree.match(short))
    check(tree)
    node = receipt.node
    assert (node.start, node.end, digests_of(node.media)) == (0, 8, [CAT])
    (lower,) = node.children.values()
    assert (lower.start, lower.media) == (8, b"")
    put(tree, RadixKey([0] * 8 + [1] * 8, media=media), 50)
    assert tree.match(RadixKey([0] * 8 + [1] * 8, media=media)).length == 16
    tree.unlock(receipt)
    check(tree)


def test_a_lock_on_other_media_is_refused():
    tree = tree_of(2)
    key = RadixKey([0] * 8, media=[MediaRange(2, 4, CAT)])
    receipt = tree.lock(put(tree, key))
    for media in ([], [MediaRange(2, 4, DOG)], [MediaRange(2, 4, CAT), MediaRange(5, 6, DOG)]):
        other = RadixKey([0] * 10, media=media)
        with pytest.raises(ArgumentError, match="other media"):
            tree.insert(other, [np.arange(1, 6, dtype=np.int32)], receipt)
    more = RadixKey([0] * 12, media=[MediaRange(2, 4, CAT), MediaRange(9, 11, DOG)])
    assert tree.insert(more, [np.arange(1, 7, dtype=np.int32)], receipt).present == 8
    tree.unlock(receipt)
    check(tree)


@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_pairs_depend_on_the_image_that_the_second_token_begins(page_size):
    tree = tree_of(page_size, element_bytes=BigramKey.element_bytes)
    tokens = [7, 7, 7, 0, 0, 7, 7, 7, 7, 7]
    cat = BigramKey(tokens, media=[MediaRange(3, 5, CAT)])
    put(tree, cat)
    assert tree.match(cat).length == len(cat) // page_size * page_size
    for other in (BigramKey(tokens), RadixKey(tokens, media=[MediaRange(3, 5, DOG)]).bigrams()):
        assert tree.match(other).length == 2 // page_size * page_size  # the pairs of the first three tokens
    assert RadixKey(tokens, media=[MediaRange(3, 5, CAT)]).bigrams() == cat
    first = [BigramKey([0] * 6, media=[MediaRange(start, start + 3, CAT)]) for start in (0, 1)]
    assert marks_of(first[0].media, page_size) != marks_of(first[1].media, page_size)


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_hashes_depend_on_media_and_on_no_node(page_size):
    tokens = [3] * 6 + [0] * 8 + [4] * 6
    keys = [RadixKey(tokens, media=media) for media in ([], [MediaRange(7, 12, CAT)], [MediaRange(7, 12, DOG)])]
    names = [[digest for run in hashes_of(key, page_size) for digest in run] for key in keys]
    same = 7 // page_size
    for other in names[1:]:
        assert other[:same] == names[0][:same]
        assert not set(other[same:]) & set(names[0])
    assert not set(names[1][same:]) & set(names[2])
    tree = tree_of(page_size, with_hashes=True)
    for at in (4, 8, 13, 20):
        put(tree, keys[1][:at], 1)
        tree.unlock(tree.lock(tree.match(keys[1][: at - 1])))
    path, _, _ = tree.find(keys[1])
    assert [digest for node in path for digest in node.hashes] == names[1]
    lazy = tree_of(page_size)
    end = put(lazy, keys[1]).node
    assert list(compute_node_hash(end, 4 * page_size)) == names[1][end.start // page_size :]


def test_a_restored_tree_finds_the_same():
    tree = tree_of(2, with_hashes=True)
    keys = [RadixKey([0] * 10, media=media) for media in ([], [MediaRange(3, 6, CAT)], [MediaRange(3, 6, DOG)])]
    for i, key in enumerate(keys):
        put(tree, key, 1 + 10 * i)
    twin = tree_of(2, with_hashes=True)
    restore_tree(twin, Columns(saved_tree(tree)))
    check(twin)
    for key in keys:
        assert twin.match(key).pages.tolist() == tree.match(key).pages.tolist()
        assert twin.match(key).length == 10


def test_what_was_evicted_is_told_of_the_same_media_only():
    tree = tree_of(2)
    keys = [RadixKey([0] * 10, media=media) for media in ([MediaRange(3, 6, CAT)], [MediaRange(3, 6, DOG)], [])]
    put(tree, keys[0])
    tree.evict(100)
    assert explain(tree, keys[0]).reason is Reason.EVICTED
    assert explain(tree, keys[0]).known == 10
    assert [explain(tree, key).known for key in keys[1:]] == [2, 2]


@pytest.mark.parametrize("components", [(FULL, Component("window", 3)), (FULL, Component("state", 1, spans=False))])
def test_further_components_go_with_media(components):
    tree = tree_of(2, components)
    key = RadixKey([0] * 12, media=[MediaRange(5, 7, CAT)])
    put(tree, key)
    assert tree.match(key).length == 12
    assert tree.match(RadixKey([0] * 12)).length == (0 if components[1].name == "state" else 4)
    check(tree)
    tree.evict(100)
    assert not tree.roots


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_parts_of_keys_keep_their_media():
    key = RadixKey(range(10), "a", [MediaRange(6, 8, DOG), MediaRange(1, 4, CAT)])
    assert [each.start for each in key.media] == [1, 6]
    assert key[:5] == RadixKey(range(10), "a", [MediaRange(1, 4, CAT)])[:5]
    assert key[:5].extended([9] * 5) != key
    assert key[:5].extended(range(5, 10)).media == (MediaRange(1, 4, CAT),)
    assert key[5:].media == (MediaRange(1, 3, DOG),)
    assert key[2:].media[0] == MediaRange(0, 2, key[2:].media[0].digest)
    assert key[2:].media[0].digest not in (CAT, key[3:].media[0].digest)
    assert key.within(Namespace(extra_key="b").encode()).media == key.media
    assert key != RadixKey(range(10), "a")
    assert "media=[MediaRange(start=1" in repr(key)


@pytest.mark.parametrize("digest", [b"", b"x", "text", 7, None, bytearray(32)])
def test_what_is_no_digest_is_refused(digest):
    with pytest.raises(ArgumentError, match="must be at least 2 bytes"):
        MediaRange(0, 1, digest)
    if isinstance(digest, bytes):
        with pytest.raises(ArgumentError, match="must be at least 2 bytes"):
            RadixKey([1], Namespace(media=(digest,)))


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 2), (0.5, 2), ("a", 2), (True, 2), (0, None)])
def test_what_is_no_range_is_refused(start, stop):
    with pytest.raises(ArgumentError, match="media"):
        MediaRange(start, stop, CAT)


def test_ranges_that_overlap_or_lie_outside_are_refused():
    with pytest.raises(ArgumentError, match=r"\[1, 4\) and \[3, 5\) overlap"):
        RadixKey(range(10), media=[MediaRange(3, 5, CAT), MediaRange(1, 4, DOG)])
    with pytest.raises(ArgumentError, match=r"\[8, 11\) ends after the 10 tokens"):
        BigramKey(range(10), media=[MediaRange(8, 11, CAT)])
    for wrong in (CAT, 7, [(0, 1, CAT)], [None], {"a": 1}):
        with pytest.raises(ArgumentError, match="media must be a sequence of MediaRange"):
            RadixKey(range(10), media=wrong)
    assert RadixKey(range(10), media=[MediaRange(3, 5, CAT), MediaRange(5, 10, CAT)]).length == 10
