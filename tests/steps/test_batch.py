"""What a batch says of a step, padding included: an oracle token by token, in Python."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcache.device.packing import NOWHERE
from jaxcache.request import Request
from jaxcache.steps.batch import unpack
from jaxcache.steps.buckets import Bucket, Buckets, StepKind
from jaxcache.tables.device_table import RequestTable
from tests.model.manager_driver import small_manager, write_step

ROWS, MAX_PAGES = 5, 6
PER_TOKEN = "tokens", "positions", "slots", "request", "valid", "token_row"
PER_REQUEST = "row", "prefix_len", "seq_len", "tag", "last"


@st.composite
def batches(draw):
    """A packed plan made by hand: bucket, page size, and for each request its row, lengths and pages."""
    kind, page_size = draw(st.sampled_from(StepKind)), draw(st.sampled_from([1, 2, 4]))
    most = MAX_PAGES * page_size
    rows = draw(st.permutations(range(ROWS)))[: draw(st.integers(0, 4))]
    work = []
    for row in rows:
        prefix = draw(st.integers(0, most - 1))
        new = 1 if kind is StepKind.DECODE else draw(st.integers(1, most - prefix))
        pages = draw(st.lists(st.integers(1, 90), min_size=MAX_PAGES, max_size=MAX_PAGES))
        work.append((row, prefix, prefix + new, pages))
    tokens = sum(seq - prefix for _, prefix, seq, _ in work)
    padding, spare = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    requests = max(len(work) + padding, 1)
    room = requests if kind is StepKind.DECODE else max(tokens + spare, 1)
    context = draw(st.sampled_from([None, most, max((seq for _, _, seq, _ in work), default=1)]))
    return Bucket(kind, requests, room, 30, 4, context=context), page_size, work


def batch_of(bucket, page_size, work):
    """The batch as the step sees it. The table has the pages of the prefix; fresh ones are changes of it."""
    table = np.full((ROWS, MAX_PAGES), 77, np.int32)  # what nobody may read
    parts = {name: [] for name in ("row", "prefix_len", "seq_len", "last_loc", "tag", "tokens", "new_pages")}
    for i, (row, prefix, seq, pages) in enumerate(work):
        table[row, : -(-seq // page_size)] = pages[: -(-seq // page_size)]
        last = pages[(prefix - 1) // page_size] * page_size + (prefix - 1) % page_size if prefix else -1
        fresh = pages[-(-prefix // page_size) : -(-seq // page_size)]
        numbers = {"row": row, "prefix_len": prefix, "seq_len": seq, "last_loc": last, "tag": 40 + i}
        for name, value in numbers.items():
            parts[name].append(value)
        parts["tokens"] += [1000 * (i + 1) + position for position in range(prefix, seq)]
        parts["new_pages"] += fresh
    packed = bucket.packing.pack({k: np.array(v, np.int32) for k, v in parts.items()} | {"index": [], "page": []})
    return jax.jit(unpack, static_argnums=(1, 3))(packed, bucket, RequestTable(jnp.array(table)), page_size)


def expected(bucket, page_size, work):
    """Oracle: a list a field, from the contract in `Batch`."""
    fields = {name: [] for name in (*PER_TOKEN, *PER_REQUEST)} | {"cu_q": [0], "block_table": []}
    width = MAX_PAGES if bucket.context is None else min(MAX_PAGES, -(-bucket.context // page_size))
    for i, (row, prefix, seq, pages) in enumerate(work):
        for position in range(prefix, seq):
            slot = pages[position // page_size] * page_size + position % page_size
            token = 1000 * (i + 1) + position
            for name, value in zip(PER_TOKEN, (token, position, slot, i, True, row), strict=True):
                fields[name].append(value)
        last = len(fields["tokens"]) - 1
        for name, value in zip(PER_REQUEST, (row, prefix, seq, 40 + i, last), strict=True):
            fields[name].append(value)
        fields["cu_q"].append(len(fields["tokens"]))
        held = -(-seq // page_size)
        fields["block_table"].append((pages[:held] + [0] * MAX_PAGES)[:width])
    for _ in range(bucket.tokens - len(fields["tokens"])):
        for name, value in zip(PER_TOKEN, (0, 0, 0, bucket.requests, False, ROWS), strict=True):
            fields[name].append(value)
    for _ in range(bucket.requests - len(work)):
        for name, value in zip(PER_REQUEST, (ROWS, 0, 0, 0, bucket.tokens), strict=True):
            fields[name].append(value)
        fields["cu_q"].append(fields["cu_q"][-1])
        fields["block_table"].append([0] * width)
    return fields | {"num_tokens": fields["cu_q"][-1], "num_requests": len(work)}


@settings(max_examples=60)
@given(batches())
def test_a_batch_says_where_every_token_is(case):
    bucket, page_size, _ = case
    batch = batch_of(*case)
    assert batch.kind is bucket.kind and batch.page_size == page_size
    for name, value in expected(*case).items():
        assert np.asarray(getattr(batch, name)).tolist() == value, name


@settings(max_examples=30)
@given(batches())
def test_what_is_scattered_by_row_reaches_real_rows_alone(case):
    """With registers of one entry a row, padding overwrote that of row 0."""
    bucket, _, work = case
    batch = batch_of(*case)
    registers = jnp.full(ROWS, -1)
    real = {row for row, *_ in work}
    by_row = registers.at[batch.row].set(5)
    by_token = registers.at[batch.token_row].set(5)
    counted = jnp.zeros(bucket.requests, jnp.int32).at[batch.request].add(1)
    for found in (by_row, by_token):
        assert found.tolist() == [5 if row in real else -1 for row in range(ROWS)]
    assert counted.tolist()[: len(work)] == [seq - prefix for _, prefix, seq, _ in work]
    assert not counted[len(work) :].any()
    marked = jnp.zeros(bucket.tokens, bool).at[batch.last].set(True)
    assert int(marked.sum()) == len(work)
    assert np.asarray(batch.tokens[batch.last])[: len(work)].tolist() == [
        1000 * (i + 1) + seq - 1 for i, (_, _, seq, _) in enumerate(work)
    ]


def test_padding_is_in_no_index_that_a_scatter_takes():
    bucket = Bucket(StepKind.DECODE, 4, 4, 4, 4)
    packed = bucket.packing.pack({field.name: np.empty(0, np.int32) for field in bucket.packing.fields})
    batch = unpack(jnp.asarray(packed), bucket, RequestTable(jnp.zeros((3, 2), jnp.int32)), 4)
    assert batch.row.tolist() == [3] * 4 and int(batch.row[0]) * 2 < NOWHERE  # an index made of it stays past the end
    assert not batch.slots.any()


def test_a_step_knows_its_kind_where_the_shapes_of_both_kinds_agree():
    manager = small_manager(page_size=4, max_running=4, buckets=Buckets((4,), (4,), (4,)))
    seen = []

    def step(pool, batch):
        seen.append((batch.kind, batch.tokens.shape, batch.row.shape))
        return write_step(pool, batch)

    request = Request("r", [1, 2, 3])
    manager.admit(request)
    manager.run(step, manager.extend([(request, 3)]))
    request.output_ids.append(4)
    manager.run(step, manager.decode([request]))
    assert seen == [(StepKind.EXTEND, (4,), (4,)), (StepKind.DECODE, (4,), (4,))]


@pytest.mark.parametrize("context", [8, 64])
def test_a_step_that_gathers_sees_the_shortest_context_that_holds_its_longest_request(context):
    manager = small_manager(page_size=4, buckets=Buckets((4,), (8, 32), (4,), contexts=(8, 64)))
    request = Request("r", list(range(8 if context == 8 else 9)))
    manager.admit(request)
    plan = manager.extend([(request, request.num_tokens)])
    width = manager.run(lambda pool, batch: (pool, batch.block_table), plan).shape[1]
    assert (plan.bucket.context, width) == (context, context // 4)
