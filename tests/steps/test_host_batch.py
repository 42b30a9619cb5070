"""A plan as arrays says what the jitted step is told, and what the request table says, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.request import Request
from jaxcache.steps.buckets import StepKind
from tests.model.manager_driver import sampling_step, small_manager, write_step

PER_TOKEN = "tokens", "positions", "slots", "request"
PER_REQUEST = "row", "prefix_len", "seq_len", "tag", "last"


def told_step(pool, batch):
    """`write_step`, which also returns what it was told."""
    pool, _ = write_step(pool, batch)
    names = (*PER_TOKEN, *PER_REQUEST, "cu_q", "block_table")
    return pool, {name: getattr(batch, name) for name in names}


def plans(page_size):
    """A manager, and plans over it one after the other: chunks, twins, decode steps, both mixed, a pending token."""
    manager = small_manager(page_size, {1: 64, 4: 40, 16: 12}[page_size], max_context_len=48)
    for row in range(4):  # each row has had a longer request, whose pages are still written there
        before = Request("before", [row + 70] * 30)
        manager.admit(before)
        manager.run(write_step, manager.extend([(before, 30)]))
        manager.finish(before)
    requests = [Request(str(i), tokens, tag=i) for i, tokens in enumerate(([*range(19)], [*range(17), 50], [1, 2, 3]))]
    for request in requests:
        manager.admit(request)
    long, twin, short = requests
    yield manager, manager.extend([(long, 5), (short, 2)])
    yield manager, manager.extend([(long, 14), (twin, 18)])
    yield manager, manager.extend([(short, 1)])
    for request in requests:
        request.output_ids.append(40 + request.tag)
    yield manager, manager.decode([twin, long])
    twin.output_ids.append(60)
    yield manager, manager.extend([(short, 1), (twin, 1)])
    twin.output_ids.append(61)
    manager.run(sampling_step, manager.decode([twin]))
    yield manager, manager.decode([twin])


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_it_is_what_the_table_says(page_size):
    """Oracle: request by request, token by token, in Python."""
    for manager, plan in plans(page_size):
        batch, at = manager.host_batch(plan), 0
        table = manager.req_to_token_pool.pages
        ends = [0]
        for i, (request, start, stop) in enumerate(
            zip(plan.requests, plan.prefix_len.tolist(), plan.seq_len.tolist(), strict=True)
        ):
            known = [*request.origin_input_ids, *request.output_ids]
            pages = table[request.req_pool_idx]
            assert batch.row[i] == request.req_pool_idx
            assert (batch.tag[i], batch.prefix_len[i], batch.seq_len[i]) == (request.tag, start, stop)
            for position in range(start, stop):
                if position < len(known):
                    assert batch.tokens[at] == known[position]
                assert batch.positions[at] == position
                assert batch.request[at] == i
                assert batch.slots[at] == pages[position // page_size] * page_size + position % page_size
                at += 1
            ends.append(at)
            held = -(-stop // page_size)
            assert batch.block_table[i].tolist() == [
                *pages[:held].tolist(),
                *[0] * (batch.block_table.shape[1] - held),
            ]
            first, last = batch.pages.indptr[i : i + 2]
            assert batch.pages.indices[first:last].tolist() == pages[:held].tolist()
            assert batch.pages.last_page_len[i] == (stop - 1) % page_size + 1
        assert batch.cu_q.tolist() == ends
        assert batch.last.tolist() == [end - 1 for end in ends[1:]]
        assert len(batch.tokens) == at
        manager.run(write_step, plan)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_it_is_what_a_jitted_step_is_told(page_size):
    for manager, plan in plans(page_size):
        batch = manager.host_batch(plan)
        told = {name: np.asarray(value) for name, value in manager.run(told_step, plan).items()}
        num_tokens, num_requests = len(batch.tokens), len(batch.row)
        assert batch.kind is plan.bucket.kind
        for name in PER_TOKEN:
            if name == "tokens" and batch.kind is StepKind.DECODE and batch.tokens.min() < 0:
                continue  # which token is pending only the device knows
            np.testing.assert_array_equal(getattr(batch, name), told[name][:num_tokens], err_msg=name)
        for name in PER_REQUEST:
            np.testing.assert_array_equal(getattr(batch, name), told[name][:num_requests], err_msg=name)
        np.testing.assert_array_equal(batch.cu_q, told["cu_q"][: num_requests + 1])
        width = batch.block_table.shape[1]
        np.testing.assert_array_equal(batch.block_table, told["block_table"][:num_requests, :width])
        assert not told["block_table"][:num_requests, width:].any()


def test_its_arrays_are_the_callers_own():
    for manager, plan in plans(4):
        before = plan.tokens.copy(), plan.seq_len.copy()
        batch = manager.host_batch(plan)
        for array in (batch.tokens, batch.seq_len, batch.prefix_len, batch.tag, batch.block_table):
            array[:] = 7
        np.testing.assert_array_equal(plan.tokens, before[0])
        np.testing.assert_array_equal(plan.seq_len, before[1])
        manager.run(write_step, plan)
        manager.check_memory(read_device=True)
