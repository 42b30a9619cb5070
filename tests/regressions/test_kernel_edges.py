"""Sharp edges of the original kernels that ours must not have. Each test carries its number in the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.copy_kv import move_rows
from jaxcache.kernels.write_kv import write_mla_kv


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("num_tokens", [4, 30])
def test_s06_a_wrong_token_count_gives_no_garbage(num_tokens):
    """Too few places cut the batch short; too many are sink slots, not uninitialised memory."""
    slots = alloc_extend(i32([0]), i32([10]), i32([-1]), i32([3, 7, 2]), page_size=4, num_tokens=num_tokens)
    right = [12, 13, 14, 15, 28, 29, 30, 31, 8, 9]
    assert slots.tolist() == (right + [0] * 20)[:num_tokens]


def test_s06_pages_past_the_end_are_not_read():
    """The free list is all that may be handed out, whatever lies behind it in memory."""
    backing = jnp.arange(1, 9, dtype=jnp.int32)
    slots = jax.jit(lambda pages: alloc_extend(i32([0]), i32([12]), i32([-1]), pages[:2], page_size=4, num_tokens=12))(
        backing
    )
    assert slots.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 0, 0, 0, 0]


def test_s08_decode_with_the_last_page_taken_by_an_earlier_row():
    slots = alloc_decode(i32([5, 6, 7]), i32([3, 12, 22]), i32([9]), page_size=4)
    assert slots.tolist() == [36, 13, 23]
    nobody_needs_one = alloc_decode(i32([6, 7]), i32([12, 22]), i32([]), page_size=4)
    assert nobody_needs_one.tolist() == [13, 23]


@pytest.mark.parametrize(("rank", "rope"), [(96, 32), (100, 28), (1, 200), (512, 64)])
def test_s26_latent_width_need_not_be_a_multiple_of_128(rank, rope):
    row = np.arange(rank + rope, dtype=np.float32) + 1
    pool = write_mla_kv(jnp.zeros((1, 4, rank + rope)), 0, i32([2]), row[None, :rank], row[None, rank:])
    np.testing.assert_array_equal(pool[0, 2], row)
    assert not pool[0, jnp.array([0, 1, 3])].any()


def test_s30_a_long_move_list_costs_its_length():
    """Ten thousand rows shift by one slot, every source also a target, without a program that holds them all."""
    count = 10_000
    pool = jnp.arange(2 * (count + 2) * 3, dtype=jnp.float32).reshape(2, count + 2, 3)
    want = np.asarray(pool).copy()
    want[:, 2:] = want[:, 1:-1]
    src = np.arange(1, count + 1, dtype=np.int32)
    np.testing.assert_array_equal(jax.jit(move_rows)(pool, src + 1, src), want)
