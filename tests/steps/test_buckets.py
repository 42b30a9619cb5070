"""Buckets: sizes that lie close together, prompts that are cut to fit them, and what is refused."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxcache.errors import ArgumentError
from jaxcache.manager.config import MemoryConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.request import Request
from jaxcache.steps.buckets import MAX_EXECUTABLES, Buckets, StepKind, smallest
from tests.model.manager_driver import assert_contents, small_manager, write_step

SIZES = [
    (1, 1, 1),
    (2, 512, 16),
    (64, 8192, 64),
    (256, 8192, 1),
    (256, 8192, 16),
    (1024, 16_384, 1),
    (4096, 32_768, 16),
]


@pytest.mark.parametrize(("max_running", "chunk", "page_size"), SIZES)
def test_default_sizes_are_close_together_and_few(max_running, chunk, page_size):
    sizes = Buckets.default(max_running, chunk, page_size)
    shapes = sizes.shapes(page_size)
    assert len(set(shapes)) == len(shapes) <= MAX_EXECUTABLES
    assert sizes.decode_sizes[-1] == sizes.extend_requests[-1] == max_running
    assert sizes.extend_tokens[-1] == chunk and sizes.extend_tokens[0] <= page_size
    assert all(b <= 2 * a for a, b in zip(sizes.extend_tokens, sizes.extend_tokens[1:], strict=False))
    assert all(b <= 2 * a for a, b in zip(sizes.decode_sizes, sizes.decode_sizes[1:], strict=False))
    if max_running <= 512:
        pairs = [(a, b) for a, b in zip(sizes.decode_sizes, sizes.decode_sizes[1:], strict=False) if a >= 16]
        assert all(b <= 1.25 * a for a, b in pairs)


@given(st.integers(1, 2000), st.integers(1, 20_000), st.sampled_from([1, 4, 16, 64]), st.booleans())
def test_default_sizes_hold_whatever_can_run(max_running, chunk, page_size, has_contexts):
    contexts = (512, 4096) if has_contexts else ()
    shapes = Buckets.default(max_running, chunk, page_size, contexts=contexts).shapes(page_size)
    assert len(shapes) <= MAX_EXECUTABLES
    most = min(max_running, chunk)
    pages = min(chunk, -(-(chunk - most) // page_size) + most)  # each request begins a page, one fills whole ones
    for longest in contexts or (1 << 30,):
        assert smallest(shapes, StepKind.DECODE, max_running, max_running, max_running, longest).tokens >= max_running
        assert smallest(shapes, StepKind.EXTEND, most, chunk, pages, longest).tokens == chunk


@given(st.data())
def test_the_smallest_bucket_that_holds_the_batch(data):
    shapes = Buckets((1, 3, 8), (4, 16, 64), (1, 8), contexts=(32, 256)).shapes(4)
    kind = data.draw(st.sampled_from(StepKind))
    requests, longest = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 256))
    tokens = requests if kind is StepKind.DECODE else data.draw(st.integers(requests, 64))
    pages = data.draw(st.integers(0, min(tokens, -(-tokens // 4) + requests)))
    found = smallest(shapes, kind, requests, tokens, pages, longest)

    def holds(b):
        return b.kind is kind and b.requests >= requests and b.tokens >= tokens and b.context >= longest

    assert holds(found) and found.pages >= pages
    assert found.tokens == min(b.tokens for b in shapes if holds(b))
    assert found.context == (32 if longest <= 32 else 256)


def test_what_no_bucket_holds_is_refused_with_those_there_are():
    shapes = Buckets((4,), (16,), (4,), contexts=(64,)).shapes(4)
    for kind, size, says in (
        (StepKind.EXTEND, (1, 17, 1, 1), "17 tokens, but a step computes at most 16"),
        (StepKind.DECODE, (5, 5, 0, 1), "no decode bucket holds .*configure larger buckets"),
        (StepKind.DECODE, (1, 1, 0, 65), "no decode bucket holds .*configure larger buckets"),
    ):
        with pytest.raises(ArgumentError, match=says):
            smallest(shapes, kind, *size)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"decode_sizes": ()}, "decode_sizes"),
        ({"decode_sizes": (4, 2)}, "decode_sizes"),
        ({"extend_tokens": (0, 4)}, "extend_tokens"),
        ({"extend_tokens": [4, 8]}, "extend_tokens"),
        ({"extend_requests": (1, 1)}, "extend_requests"),
        ({"contexts": (True,)}, "contexts"),
        ({"step_cost": -1}, "step_cost"),
        ({"changes": 1.5}, "changes"),
    ],
)
def test_sizes_that_are_none_are_refused(change, name):
    with pytest.raises(ArgumentError, match=f"{name} must be"):
        Buckets(**{"decode_sizes": (1,), "extend_tokens": (8,), "extend_requests": (1,)} | change)


def test_contexts_must_reach_as_far_as_requests_may():
    kv = MHAConfig(size=64, page_size=4, dtype=np.float32, layer_num=1, head_num=1, head_dim=1)
    sizes = Buckets((1,), (8,), (1,), contexts=(8, 31))
    with pytest.raises(ArgumentError, match="at least max_context_len = 32"):
        MemoryConfig(kv, 1, 32, buckets=sizes)
    MemoryConfig(kv, 1, 31, buckets=sizes)


# ---- chunks ------------------------------------------------------------------------------------------------------


def cheapest(sizes, total):
    """Oracle: the least cost of any sequence of steps that computes `total` tokens, step by step."""

    @functools.cache
    def cost(left):
        if not left:
            return 0
        firsts = range(1, min(left, sizes.extend_tokens[-1]) + 1)
        return min(min(s for s in sizes.extend_tokens if s >= n) + sizes.step_cost + cost(left - n) for n in firsts)

    return cost(total)


def steps_of(sizes, total):
    """The chunks of a prompt, and what they are padded to."""
    chunks = []
    while total:
        chunks.append(sizes.chunk(total))
        assert 1 <= chunks[-1] <= total
        total -= chunks[-1]
    return chunks, [min(s for s in sizes.extend_tokens if s >= n) for n in chunks]


@given(st.sets(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 12), st.integers(1, 70))
def test_a_chunk_is_split_where_that_is_cheapest(tokens, step_cost, total):
    doubling = {1 << i for i in range(6)} if len(tokens) == 1 else tokens
    sizes = Buckets((1,), tuple(sorted(doubling)), (1,), step_cost=step_cost)
    chunks, padded = steps_of(sizes, total)
    whole = -(-total // sizes.extend_tokens[-1]) * (sizes.extend_tokens[-1] + step_cost)
    assert sum(padded) + step_cost * len(chunks) <= whole
    if doubling is not tokens:  # of powers of two, the largest that fits is where to begin
        assert sum(padded) + step_cost * len(chunks) == cheapest(sizes, total)


@given(st.integers(0, 100), st.integers(1, 200))
def test_a_chunk_fits_beside_what_others_compute(beside, tokens):
    sizes = Buckets((1,), (8, 16, 32, 64), (4,), step_cost=4)
    count = sizes.chunk(tokens, beside)
    assert 0 <= count <= tokens
    assert count == 0 if beside >= 64 else 1 <= count <= 64 - beside


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("longest", [128, 512, 4096, 20_000])
def test_padding_of_random_suffixes_is_at_most_a_quarter(page_size, longest):
    sizes = Buckets.default(64, 8192, page_size)
    suffixes = np.random.default_rng(0).integers(1, longest + 1, 2000)
    padded = sum(sum(steps_of(sizes, int(n))[1]) for n in suffixes)
    assert padded <= 1.25 * suffixes.sum()


def test_the_manager_plans_chunks_by_bucket():
    manager = small_manager(page_size=1, num_pages=64, buckets=Buckets((4,), (4, 8, 32), (4,), step_cost=2))
    request, other = Request("a", list(range(21))), Request("b", list(range(50, 90)))
    for each in (request, other):
        manager.admit(each)
    assert manager.next_chunk(request, 32) == 8  # 21 in one step is 32 + 2; 8, 8 and 5 in 8 are 24 + 6
    assert manager.next_chunk(request, 3) == 3
    assert manager.next_chunk(other, 64, beside=30) == 2
    assert manager.next_chunk(other, 64, beside=32) == 0
    padded = 0
    while left := request.num_tokens - request.kv_len:
        plan = manager.extend([(request, manager.next_chunk(request, left))])
        padded += plan.bucket.tokens
        manager.run(write_step, plan)
    assert padded == 24
    assert_contents(manager, [request])
    with pytest.raises(ArgumentError, match="beside must not be negative"):
        manager.next_chunk(other, 4, beside=-1)
