"""Sharp edges of recurrent states elsewhere, and that they are gone: the pool, its allocator, the request rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.pages.states import StateAllocator
from jaxcache.tables.hybrid_table import HybridReqToTokenPool
from tests.pools.numpy_states import filled_states, mamba_config, random_parts


def test_s51_row_0_of_the_requests_is_not_the_state_of_padding():
    """pymllm used the request's row as its state: padding, which writes to 0, overwrote the first request's state."""
    table, states = HybridReqToTokenPool(2, 16), StateAllocator(9)
    (row,) = table.alloc(1)
    assert row == 0
    table.set_state(row, states.alloc_track_slot(), 0)
    pool, oracle = filled_states(mamba_config())
    batch = jnp.array([table.state[row], 0, 0], jnp.int32)
    parts = random_parts(np.random.default_rng(0), pool.config, 3)
    oracle.write([1], 2, [part[:1] for part in parts])
    oracle.expect(pool.write(batch, 2, *parts))


def test_a_state_that_was_freed_full_is_empty_for_the_next_request():
    """SGLang empties a state when it is freed; here whoever takes it does, in the step that first uses it."""
    table, states = HybridReqToTokenPool(1, 16), StateAllocator(1)
    pool, oracle = filled_states(mamba_config())
    (row,) = table.alloc(1)
    table.set_state(row, states.alloc_track_slot(), 0)
    pool = pool.copy_states(*table.state_copies([row]))
    oracle.copy([0], [1])
    oracle.expect(pool)


def test_1b_12_a_snapshot_says_how_many_tokens_it_stands_for_and_that_is_a_page_boundary():
    """A state taken after 161,152 tokens hung on a node of 160,768: the tokens in between were applied twice."""
    table = HybridReqToTokenPool(1, 256, page_size=16)
    (row,) = table.alloc(1)
    table.set_state(row, 1, 0)
    table.copied([row])
    with pytest.raises(ArgumentError, match="length must be a multiple of page_size = 16"):
        table.set_saved(row, 2, 100)
    table.set_saved(row, 2, 96)
    assert table.take_saved(row) == (2, 96)


def test_1b_14_a_state_that_no_step_has_filled_cannot_be_saved():
    """A state's hash was published when its step was planned; the step was aborted, and a stranger's state served."""
    table = HybridReqToTokenPool(1, 256)
    (row,) = table.alloc(1)
    table.set_state(row, 1, 0)
    with pytest.raises(RequestStateError, match="no working state that a step has filled"):
        table.set_saved(row, 2, 16)
    with pytest.raises(RequestStateError, match="no working state that a step has filled"):
        table.save_working(row, 16)


def test_1a_17_a_row_cannot_be_given_back_with_its_state():
    """A state was taken, scheduling failed, and the row went back without it: the state was lost."""
    table, states = HybridReqToTokenPool(1, 16), StateAllocator(1)
    (row,) = table.alloc(1)
    table.set_state(row, states.alloc_track_slot(), 0)
    with pytest.raises(RequestStateError, match="take_states, and free them"):
        table.free(row)
    for state in table.take_states(row).tolist():
        states.free_track_slot(state)
    table.free(row)
    assert states.available_size() == 1
