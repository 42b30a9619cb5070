"""alloc_extend and alloc_decode: golden vectors, random batches against the three-part rule, and what they refuse."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.kernels import alloc_pages
from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels import oracles

PAGE_SIZES = (1, 3, 4, 16, 64)


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


def test_golden_extend(run):
    first = run.alloc_extend(
        i32([0, 0, 0]), i32([5, 3, 8]), i32([-1] * 3), i32(range(1, 10)), page_size=4, num_tokens=16
    )
    assert first.tolist() == [4, 5, 6, 7, 8, 12, 13, 14, *range(16, 24)]
    again = run.alloc_extend(
        i32([5, 3, 8]), i32([14, 4, 8]), i32([8, 14, 23]), i32([6, 7, 8, 9]), page_size=4, num_tokens=10
    )
    assert again.tolist() == [9, 10, 11, 24, 25, 26, 27, 28, 29, 15]


def test_golden_decode(run):
    assert run.alloc_decode(i32([15, 5, 9]), i32([29, 15, 23]), i32([8, 9]), page_size=4).tolist() == [30, 32, 36]
    assert run.alloc_decode(i32([5, 6, 9]), i32([403, 504, 607]), i32([1, 2, 3]), page_size=4).tolist() == [4, 505, 8]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("bs", [1, 2, 7, 33])
def test_extend_is_the_three_part_rule(run, bs, page_size):
    rng = np.random.default_rng(bs * 100 + page_size)
    prefix, seq, last, pages = oracles.random_batch(rng, bs, page_size, max_len=40)
    num_tokens = int((seq - prefix).sum()) + int(rng.integers(0, 70))
    got = run.alloc_extend(
        prefix, seq, last, np.append(pages, i32([10**6])), page_size=page_size, num_tokens=num_tokens
    )
    np.testing.assert_array_equal(got, oracles.extend(prefix, seq, last, pages, page_size, num_tokens))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("bs", [1, 2, 7, 33])
def test_decode_is_the_rule(run, bs, page_size):
    rng = np.random.default_rng(bs * 100 + page_size)
    _, seq, last, pages = oracles.random_batch(rng, bs, page_size, max_len=40, decode=True)
    padded = np.where(rng.random(bs) < 0.3, 0, seq).astype(np.int32)
    got = run.alloc_decode(padded, last, np.append(pages, i32([10**6])), page_size=page_size)
    np.testing.assert_array_equal(got, oracles.decode(padded, last, np.append(pages, i32([10**6])), page_size))


def test_more_requests_than_tokens_in_a_program(run):
    """Most rows end before the program's first token, or begin after its last, and some have no token at all."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, 50, 300).astype(np.int32)
    seq = prefix + rng.integers(0, 3, 300).astype(np.int32)
    last, pages = prefix + 15, i32(rng.permutation(400) + 1)  # page 1 onwards, so that slots fit their positions
    num_tokens = int((seq - prefix).sum())
    got = run.alloc_extend(prefix, seq, last, pages, page_size=16, num_tokens=num_tokens)
    np.testing.assert_array_equal(got, oracles.extend(prefix, seq, last, pages, 16, num_tokens))


def test_a_batch_too_large_for_one_program_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(alloc_pages, "MAX_SUMMED", 2)
    batch = i32([0] * 3), i32([1] * 3), i32([-1] * 3), i32([4, 5, 6])
    assert alloc_extend(*batch, page_size=4, num_tokens=3).tolist() == [16, 20, 24]
    with pytest.raises(UnsupportedError, match="at most 2 requests, got 3"):
        alloc_extend(*batch, page_size=4, num_tokens=3, implementation=Implementation.TRITON)


def test_too_few_pages_go_to_the_sink(run):
    """A batch that the caller gave too few pages loses tokens to slot 0; it never lands on somebody's page."""
    rng = np.random.default_rng(5)
    prefix, seq, last, pages = oracles.random_batch(rng, 9, 4, max_len=30)
    short, num_tokens = pages[: len(pages) // 2], int((seq - prefix).sum())
    got = run.alloc_extend(prefix, seq, last, short, page_size=4, num_tokens=num_tokens)
    np.testing.assert_array_equal(got, oracles.extend(prefix, seq, last, short, 4, num_tokens))
    assert (got == 0).any()
    assert run.alloc_decode(i32([5, 1, 9]), i32([7, -1, 11]), i32([3]), page_size=4).tolist() == [12, 0, 0]


def test_rows_of_padding_anywhere(run):
    """Empty rows before, between and after, with nonsense in last_loc."""
    got = run.alloc_extend(
        i32([0, 4, 0, 9, 0]), i32([0, 6, 0, 9, 0]), i32([99, 7, -5, 1, 0]), i32([2]), page_size=4, num_tokens=5
    )
    assert got.tolist() == [8, 9, 0, 0, 0]


@pytest.mark.parametrize("bs", [0, 3])
def test_empty_batches(bs):
    zeros, nothing = np.zeros(bs, np.int32), np.zeros(0, np.int32)
    assert alloc_extend(zeros, zeros, zeros, nothing, page_size=4, num_tokens=0).shape == (0,)
    assert alloc_extend(zeros, zeros, zeros, nothing, page_size=4, num_tokens=6).tolist() == [0] * 6
    assert alloc_decode(zeros, zeros, nothing, page_size=4).tolist() == [0] * bs


def test_one_trace_serves_every_batch_of_a_bucket():
    traces = []

    @jax.jit
    def step(prefix, seq, last, pages):
        traces.append(1)
        return alloc_extend(prefix, seq, last, pages, page_size=4, num_tokens=256)

    for seed in range(3):
        prefix, seq, last, pages = oracles.random_batch(np.random.default_rng(seed), 4, 4, max_len=40)
        pages = np.append(pages, np.zeros(64 - len(pages), np.int32))
        np.testing.assert_array_equal(step(prefix, seq, last, pages), oracles.extend(prefix, seq, last, pages, 4, 256))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prefix_lens": np.zeros(3, np.int64)}, "prefix_lens"),
        ({"seq_lens": np.zeros((3, 1), np.int32)}, "seq_lens"),
        ({"last_loc": np.zeros(4, np.int32)}, "last_loc"),
        ({"new_pages": [1, 2]}, "new_pages"),
        ({"page_size": 0}, "page_size"),
        ({"num_tokens": -1}, "num_tokens"),
    ],
)
def test_extend_refuses(change, named):
    good: dict[str, Any] = dict.fromkeys(("prefix_lens", "seq_lens", "last_loc", "new_pages"), np.zeros(3, np.int32))
    with pytest.raises(ArgumentError, match=named):
        alloc_extend(**{**good, "page_size": 4, "num_tokens": 8, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_lens": np.zeros(2, np.int32)}, "seq_lens"),
        ({"page_size": -4}, "page_size"),
        ({"last_loc": None}, "last_loc"),
    ],
)
def test_decode_refuses(change, named):
    good: dict[str, Any] = dict.fromkeys(("seq_lens", "last_loc", "new_pages"), np.zeros(3, np.int32))
    with pytest.raises(ArgumentError, match=named):
        alloc_decode(**{**good, "page_size": 4, **change})


def test_the_references_promote_no_dtype_silently():
    rows = i32([5, 6, 0]), i32([3, 12, -1]), i32([9])
    with jax.numpy_dtype_promotion("strict"):
        assert alloc_decode(*rows, page_size=4).tolist() == [36, 13, 0]
        slots = alloc_extend(rows[0] - 1, rows[0], rows[1], rows[2], page_size=4, num_tokens=4)
    assert slots.tolist() == [36, 13, 0, 0]
