"""Hashes against the golden vectors of the originals, and runs of page hashes against hashing page by page."""

import hashlib
import random
import threading

import ml_dtypes
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.index.check import check
from jaxcache.index.hashing import compute_node_hash, content_digest, hash_bytes, hash_to_int64, hash_token_ids
from jaxcache.index.key import RadixKey
from jaxcache.index.page_hashes import PageHashes, namespace_seed, page_hashes
from jaxcache.index.tree import RadixTree

H1 = "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72"
H2 = "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6"


def packed(tokens):
    return np.array(tokens, "<i4").tobytes()


def test_golden_vectors():
    assert hash_token_ids([1, 2, 3, 4]) == H1
    assert hash_token_ids([5, 6, 7, 8], H1) == H2
    assert hash_token_ids([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hash_to_int64(H1) == -3488128144981237669
    assert hash_bytes(b"abc") == 13436514500253700074


def test_any_form_of_the_same_tokens_has_the_same_hash():
    for tokens in ((1, 2, 3, 4), np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4], np.uint32), [(1, 2), (3, 4)]):
        assert hash_token_ids(tokens) == H1
    assert hash_token_ids([1, 2, 3, 4], "") == H1


def test_tokens_are_unsigned_and_32_bits_wide():
    assert hash_token_ids([2**32 - 1]) == hashlib.sha256(b"\xff" * 4).hexdigest()
    for tokens in ([-1], [2**32], [1.5], ["1"], [2**70], [(1, 2), 3], None):
        with pytest.raises(ArgumentError, match="token_ids"):
            hash_token_ids(tokens)


def test_a_prior_hash_must_be_a_digest():
    for prior in ("abc", H1[:-2], H1 + "00", "z" * 64, " ".join(H1), 7):
        with pytest.raises(ArgumentError, match="prior_hash"):
            hash_token_ids([1], prior)
    for digits in ("", "12", "z" * 16, 7, None, b"ab" * 8):
        with pytest.raises(ArgumentError, match="hex_str"):
            hash_to_int64(digits)


def test_only_bytes_are_hashed_as_bytes():
    assert hash_bytes(bytearray(b"abc")) == hash_bytes(memoryview(b"abc")) == hash_bytes(b"abc")
    for data in ("abc", None, 3, [1, 2]):
        with pytest.raises(ArgumentError, match="data must be bytes"):
            hash_bytes(data)


def test_contents_never_run_together():
    pixels = np.arange(6, dtype=np.uint8)
    contents = [
        (b"ab", b"c"),
        (b"a", b"bc"),
        (b"abc",),
        (b"abc", b""),
        ("abc",),
        (pixels,),
        (pixels.reshape(2, 3),),
        (pixels.reshape(3, 2),),
        (pixels.view(np.int8),),
        (pixels.tobytes(),),
        (pixels[:3], pixels[3:]),
        (pixels.astype(ml_dtypes.bfloat16),),
        (pixels.astype(np.float16),),
        (np.zeros(()),),
        (np.zeros(1),),
    ]
    digests = [content_digest(*parts) for parts in contents]
    assert len(set(digests)) == len(contents)
    assert all(len(digest) == 32 for digest in digests)


def test_contents_are_equal_whatever_their_layout_in_memory():
    pixels = np.arange(6, dtype=">i4").reshape(2, 3)
    assert content_digest(pixels) == content_digest(pixels.astype("<i4")) == content_digest(np.asfortranarray(pixels))
    assert content_digest(pixels) == content_digest(np.repeat(pixels, 2, axis=1)[:, ::2])


@pytest.mark.parametrize("part", [None, 3, [1, 2], np.array([None])])
def test_contents_that_are_none(part):
    with pytest.raises(ArgumentError, match="parts"):
        content_digest(part)
    with pytest.raises(ArgumentError, match="nothing to hash"):
        content_digest()


def cut(packed_tokens, page_bytes, rng):
    """The tokens in runs of whole pages, as they would be inserted one below the other."""
    pages = len(packed_tokens) // page_bytes
    ends = sorted({pages, *(rng.randint(1, pages) for _ in range(rng.randint(0, 3)))})
    return [packed_tokens[a * page_bytes : b * page_bytes] for a, b in zip([0, *ends], ends, strict=False)]


def test_runs_have_their_page_hashes_however_they_are_cut_split_and_asked():
    rng = random.Random(0)
    for _ in range(300):
        page_bytes = 4 * rng.choice([1, 2, 5])
        tokens = packed([rng.randrange(3) for _ in range(page_bytes // 4 * rng.randint(1, 12))])
        prior = rng.choice([b"", b"space"])
        expected = page_hashes(tokens, page_bytes, namespace_seed(prior))
        runs = []
        for part in cut(tokens, page_bytes, rng):
            prior = PageHashes(part, page_bytes, prior)
            runs.append((part, prior))
        for _ in range(rng.randint(0, 4)):
            i = rng.randrange(len(runs))
            part, run = runs[i]
            if rng.random() < 0.5:
                assert run[-1] in expected
            if len(run) > 1:
                at = page_bytes * rng.randint(1, len(run) - 1)
                halves = run.split(part[:at], part[at:])
                runs[i : i + 1] = [(part[:at], halves[0]), (part[at:], halves[1])]
        found = {i: list(runs[i][1]) for i in rng.sample(range(len(runs)), len(runs))}
        assert [len(run) for _, run in runs] == [len(found[i]) for i in range(len(runs))]
        assert [digest for i in range(len(runs)) for digest in found[i]] == expected
        names = [int.from_bytes(digest[:8], "big", signed=True) for digest in expected]
        assert [name for _, run in runs for name in run.names()] == names
        assert [hash_to_int64(digest.hex()) for digest in expected] == names


def test_a_run_hashes_nothing_until_asked_and_then_lets_its_tokens_go():
    tokens = packed(range(8))
    above = PageHashes(tokens, 16)
    below = PageHashes(tokens, 16, above)
    assert below._packed is tokens
    assert below[-1] == page_hashes(tokens, 16, page_hashes(tokens, 16)[1])[-1]
    assert [(run._packed, run._prior, len(run._done)) for run in (above, below)] == [(b"", b"", 64)] * 2
    assert [half._packed for half in above.split(tokens[:16], tokens[16:])] == [b"", b""]


@pytest.mark.parametrize("pages", [1, 31, 32, 33, 100])
def test_whoever_works_digests_out_pauses_after_a_few(pages):
    tokens = packed(range(4 * pages))
    above = PageHashes(tokens, 16, b"space")
    below = PageHashes(tokens, 16, above)
    pauses = []
    below.work_out(lambda: pauses.append(len(pauses)))
    assert len(pauses) == 2 * -(-pages // 32)
    assert [*above, *below] == page_hashes(tokens + tokens, 16, namespace_seed(b"space"))
    below.work_out(lambda: pauses.append("again"))
    assert "again" not in pauses


def test_a_chain_of_any_depth_needs_no_recursion():
    hashes = PageHashes(packed([0]), 4)
    for token in range(1, 50_000):
        hashes = PageHashes(packed([token]), 4, hashes)
    assert hashes[0] == page_hashes(packed(range(50_000)), 4)[-1]


def test_threads_may_ask_for_the_same_run_at_once():
    tokens = packed(range(20_000))
    expected = page_hashes(tokens, 4)
    for _ in range(3):
        run = PageHashes(tokens[:40_000], 4)
        halves = [run, PageHashes(tokens[40_000:], 4, run)] * 3
        found: list[list[bytes]] = [[] for _ in halves]

        def look(i, halves=halves, found=found):
            found[i] = list(halves[i])

        threads = [threading.Thread(target=look, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected[:10_000], expected[10_000:]] * 3


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_past_the_end_is_refused(index):
    with pytest.raises(IndexError):
        PageHashes(packed(range(4)), 4)[index]


def test_several_digests_are_a_list():
    run = PageHashes(packed(range(6)), 4)
    for where in (slice(1, 4), slice(None, None, -2), slice(4, 2)):
        assert run[where] == page_hashes(packed(range(6)), 4)[where]


def pages(count):
    return (np.arange(count, dtype=np.int32),)


def test_s50_a_node_has_one_hash_whoever_was_asked_first():
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        tree = RadixTree(2)
        key = RadixKey(list(range(12)), "tenant")
        expected = page_hashes(key.packed, 8, namespace_seed(key.namespace))
        for end in (4, 8, 12):
            tree.insert(key[:end], pages(end // 2))
        nodes = sorted(tree.nodes(), key=lambda node: node.end)
        found = {i: list(compute_node_hash(nodes[i], 8)) for i in order}
        assert [found[i] for i in range(3)] == [expected[:2], expected[2:4], expected[4:]]
        tree.unlock(tree.lock(tree.match(key[:10])))  # splits the last node
        assert [list(node.hashes) for node in tree.nodes()] == [
            expected[:2],
            expected[2:4],
            expected[4:5],
            expected[5:],
        ]
        tree.insert(RadixKey([*range(10), 99, 98], "tenant"), pages(6))
        (late,) = (node for node in tree.nodes() if node.hashes is None)
        assert compute_node_hash(late, 8)[0] == page_hashes(late.key, 8, expected[4])[0]
        check(tree)


def test_a_node_that_has_left_its_tree_has_no_hash():
    tree = RadixTree(1)
    node = tree.insert(RadixKey([1, 2]), pages(2)).node
    root = node.parent
    tree.evict(1)
    for gone in (node, root):
        with pytest.raises(ArgumentError, match="match again"):
            compute_node_hash(gone, 4)
    with pytest.raises(ArgumentError, match="must be a node"):
        compute_node_hash(None, 4)
