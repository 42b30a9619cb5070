"""What said one thing and did another, or refused what it could have done."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.hashing import content_digest
from jaxcache.replay.content import write_step
from jaxcache.request import Request
from tests.support.loop_managers import make_manager


def test_an_extend_beyond_chunk_says_how_many_tokens_a_step_takes():
    """It listed every bucket there is."""
    memory = make_manager(4, False, False)
    request = Request("r", list(range(60)))
    memory.admit(request)
    with pytest.raises(ArgumentError, match="60 tokens, but a step computes at most 32, the config's chunk") as error:
        memory.extend([(request, 60)])
    assert len(str(error.value)) < 300
    assert memory.extend([(request, 32)]) is not None


def test_abort_says_that_it_leaves_a_decode_loop_alone():
    memory = make_manager(4, False, False)
    request = Request("r", list(range(10)))
    memory.admit(request)
    memory.run(write_step, memory.extend([(request, 10)]))
    request.output_ids.append(1)
    plan = memory.decode_loop([request], 2)
    with pytest.raises(RequestStateError, match="absorb or cancel"):
        memory.abort(request)
    memory.cancel_loop(plan)
    memory.abort(request)
    assert not memory.running


def test_states_are_counted_in_states():
    memory = make_manager(4, False, True)
    assert memory.get_state_info() == (0, 0.0, 12, 0)
    request = Request("r", list(range(20)))
    memory.admit(request)
    memory.run(write_step, memory.extend([(request, 20)]))
    used, usage, available, evictable = memory.get_state_info()
    assert used + available + evictable == 12 and usage == used / 12 > 0
    with pytest.raises(ArgumentError, match="get_token_info"):
        make_manager(4, False, False).get_state_info()


def test_a_digest_is_of_the_numbers_whatever_holds_them():
    pixels = np.arange(12, dtype=np.int32).reshape(3, 4)
    digest = content_digest(pixels)
    assert content_digest(jnp.asarray(pixels)) == digest
    assert content_digest(b"abc") == content_digest(bytearray(b"abc")) == content_digest(memoryview(b"abc"))
    half = jnp.asarray(pixels, jnp.bfloat16)
    assert content_digest(half) == content_digest(np.asarray(half)) != digest


def test_a_digest_of_tensors():
    torch = pytest.importorskip("torch")
    pixels = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert content_digest(torch.from_numpy(pixels)) == content_digest(pixels)
    for tensor in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, requires_grad=True)):
        with pytest.raises(ArgumentError, match="detach"):
            content_digest(tensor)


@pytest.mark.parametrize("part", [[1, 2], None, 3, {}, object(), np.array([object()])])
def test_a_digest_of_something_else_is_refused(part):
    with pytest.raises(ArgumentError, match="parts"):
        content_digest(part)
