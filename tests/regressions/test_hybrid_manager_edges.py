"""Sharp edges of the manager over windows and recurrent states, and that they are gone."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.replay.content import write_step
from jaxcache.replay.proof import Proof
from jaxcache.request import Request
from jaxcache.steps.compiled import CompiledSteps

PAGE, WINDOW = 4, 6

_compiled = functools.cache(lambda page_size: CompiledSteps())
"""What is compiled for pages of a size, by any test; JAX tells the pools apart."""


def make_manager(num_window_tokens=None, num_states=None, page_size=PAGE, **options):
    side = {"page_size": page_size, "dtype": jnp.float32, "layer_num": 1, "head_num": 1, "head_dim": 4}
    kv = MHAConfig(size=64, **side)
    if num_window_tokens is not None:
        window = MHAConfig(size=num_window_tokens, **side)
        kv = SWAConfig(full=kv, window=window, full_layers=(0,), window_layers=(1,))
        options["sliding_window_size"] = WINDOW
    if num_states is not None:
        shapes = {"conv_shape": (3, 2), "temporal_shape": (2, 4)}
        dtypes = {"conv_dtype": jnp.float32, "temporal_dtype": jnp.float32}
        options["states"] = MambaConfig(num_states=num_states, layer_num=1, **shapes, **dtypes)
    manager = init_memory_pool_and_cache(MemoryConfig(kv, max_running=4, max_context_len=64, chunk=16, **options))
    manager.runner.compiled = _compiled(page_size)
    return manager


def prefilled(manager, rid, tokens):
    """A request whose prompt is computed, in chunks of two pages."""
    request = Request(rid, list(tokens))
    assert manager.admit(request) is not None
    while request.kv_len < request.num_tokens:
        manager.run(write_step, manager.extend([(request, manager.next_chunk(request, 2 * PAGE))]))
    return request


def sample(request):
    request.output_ids.append(request.num_tokens % 7)


def decode(manager, request):
    manager.run(write_step, manager.decode([request]))


def require_right(manager, request):
    proof = Proof(manager)
    proof.verify(request, request.kv_len)
    proof.verify_state(request)
    assert proof.mismatched == 0
    manager.check_memory(read_device=True)


def test_warming_up_again_leaves_the_states_of_running_and_cached_prefixes_alone():
    """To compile the copies of states, the first ones were emptied, whoever had them: an engine that warmed a second
    step up between requests served empty states."""
    manager = make_manager(num_states=12)
    manager.finish(prefilled(manager, "cached", range(9)))
    running = prefilled(manager, "running", range(50, 59))
    manager.warm_up(write_step)
    require_right(manager, running)
    again = prefilled(manager, "again", range(9))
    assert again.cached_tokens == 8
    require_right(manager, again)


def test_coming_back_asks_for_no_window_pages_that_the_copy_does_not_need():
    """Nothing was evicted, as that could not have sufficed for a window page with each page: `admit` said None for
    ever, in an engine that was idle."""
    manager = make_manager(num_window_tokens=24)
    request = prefilled(manager, "long", range(12))
    for _ in range(24):
        sample(request)
        decode(manager, request)
    manager.retract(request, offload=True)
    for first in (100, 200):  # the tree holds every window page
        manager.finish(prefilled(manager, "other", range(first, first + 20)))
    sample(request)
    assert manager.admit(request) == 36
    decode(manager, request)
    require_right(manager, request)


def test_one_state_and_a_cache_do_not_go_together():
    """A request locked the one cached state, and so could have none to copy it to: `admit` said None for ever."""
    with pytest.raises(ArgumentError, match="num_states must be at least 2"):
        make_manager(num_states=1)
    manager = make_manager(num_states=1, disable_radix_cache=True)
    for _ in range(2):
        request = prefilled(manager, "alone", range(8))
        require_right(manager, request)
        manager.finish(request)


def test_where_nothing_is_cached_no_snapshot_is_taken():
    """Each chunk that ended with a page was cut there, and its state copied to a second one, for nobody."""
    manager = make_manager(num_states=2, disable_radix_cache=True)
    request = Request("r", list(range(15)))
    manager.admit(request)
    assert manager.next_chunk(request, 8) == 8
    manager.run(write_step, manager.extend([(request, 8)]))
    assert manager.next_chunk(request, 16) == 7
    manager.run(write_step, manager.extend([(request, 7)]))
    sample(request)
    decode(manager, request)
    assert manager.cache.usage("state")[1] == 1
    require_right(manager, request)


def test_a_copy_in_pages_of_another_size_is_refused():
    """Another manager loaded it into the slots that its pages would have had in the first one: wrong KV, unnoticed."""
    first, second = make_manager(), make_manager(page_size=1)
    request = prefilled(first, "moved", range(9))
    sample(request)
    first.retract(request, offload=True)
    with pytest.raises(ArgumentError, match="pages of 4, here they have 1"):
        second.admit(request)
    second.check_memory()
    request.cpu_copy = None
    assert second.admit(request) == 0


def test_a_lock_keeps_no_more_of_a_chunk_than_its_window():
    """It kept the window pages of all of the chunk, up to its own: with room for that chunk alone, no token could be
    computed after it, and `retract` was of no use."""
    manager = make_manager(num_window_tokens=16)
    request = Request("alone", list(range(16)))
    manager.admit(request)
    manager.run(write_step, manager.extend([(request, 16)]))
    sample(request)
    decode(manager, request)
    require_right(manager, request)


def test_a_long_prompt_needs_window_pages_for_a_chunk_and_a_window():
    """It needed them for two chunks."""
    manager = make_manager(num_window_tokens=16 + 6 + 2)
    request = Request("long", list(range(60)))
    manager.admit(request)
    for first in range(0, 60, 16):
        manager.run(write_step, manager.extend([(request, min(16, 60 - first))]))
    require_right(manager, request)


def test_who_has_gone_on_keeps_no_windows_where_its_prompt_ends():
    """Each request kept a window there, and another where it was."""
    manager = make_manager(num_window_tokens=2 * (6 + 2 + 2 * PAGE))
    requests = [prefilled(manager, str(first), range(first, first + 12)) for first in (0, 100)]
    for _ in range(18):
        for request in requests:
            sample(request)
        manager.run(write_step, manager.decode(requests))
    for request in requests:
        require_right(manager, request)


def test_a_snapshot_that_waits_does_not_end_its_request():
    """It kept every window page since the window before it: at some length `decode` said None for ever. The snapshot is
    given up, and what it stands for is not found again."""
    manager = make_manager(num_window_tokens=20, num_states=4, state_interval=24)
    request = prefilled(manager, "alone", range(9))
    saved = {}
    for _ in range(40):
        sample(request)
        decode(manager, request)
        saved[request.kv_len] = int(manager.req_to_token_pool.saved_len[0])
    assert [at for at in range(10, 50) if saved[at] != saved.get(at - 1, 0)] == [24, 33, 48]  # 33 needs a sixth page
    assert (saved[24], saved[33], saved[48]) == (24, 0, 48)
    require_right(manager, request)
    manager.finish(request)
    manager.check_memory()


def test_a_snapshot_is_kept_where_it_is_not_windows_that_are_short():
    """Another request can take no pages, whatever windows it gives up."""
    manager = make_manager(num_window_tokens=60, num_states=4, state_interval=24)
    request = prefilled(manager, "long", range(9))
    for _ in range(43):
        sample(request)
        decode(manager, request)
    other = Request("other", list(range(100, 116)))
    assert manager.admit(other) == 0
    assert manager.extend([(other, 16)]) is None
    assert manager.req_to_token_pool.saved_len[request.req_pool_idx] == 48
    require_right(manager, request)
