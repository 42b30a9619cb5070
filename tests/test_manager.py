"""MemoryManager: the life of a request, all-or-nothing acquisition, plans and their buckets, the table, the checks."""

from __future__ import annotations

import dataclasses

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.caches.chunk import ChunkCache, SWAChunkCache
from jaxcache.caches.lora_radix import LoRARadixCache
from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import ArgumentError, BrokenInvariantError, RequestStateError
from jaxcache.index.policies.registry import Policy
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.pools.config import KVCacheConfig
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool
from jaxcache.pools.swa import SWAConfig, SWAKVPool
from jaxcache.request import Request, RequestState
from jaxcache.steps.batch import unpack
from jaxcache.steps.buckets import Bucket, StepKind
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.plan import StepPlan
from tests.model.manager_driver import assert_contents, drive, small_manager, write_step


def prefilled(manager, tokens, **options):
    """A running request with its whole prompt computed."""
    request = Request(options.pop("rid", "r"), tokens, **options)
    assert manager.admit(request) is not None
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    return request


def books(manager):
    """Everything that an operation which fails must leave as it was."""
    return (
        manager.allocator.states.tolist(),
        manager.allocator.free_pages.tolist(),
        manager.req_to_token_pool.free_rows,
        manager.cache.evictable_size(),
        manager.cache.protected_size(),
        dict(manager.running),
    )


def state(request):
    return request.state, request.req_pool_idx, request.kv_len, request.num_pages, request.lock


class OtherConfig(KVCacheConfig):
    row_shapes = ()


# ---- construction ------------------------------------------------------------------------------------------------


def test_the_factory_chooses_from_the_config():
    sizes = {"size": 32, "dtype": jnp.float32, "layer_num": 1}
    mha = MHAConfig(page_size=4, head_num=1, head_dim=2, **sizes)
    mla = MLAConfig(page_size=1, kv_lora_rank=4, qk_rope_head_dim=2, **sizes)
    manager = init_memory_pool_and_cache(MemoryConfig(mha, 2, 16, policy=Policy.PRIORITY))
    assert isinstance(manager.pool, MHATokenToKVPool)
    assert isinstance(manager.allocator, PagedTokenToKVPoolAllocator)
    assert type(manager.cache) is RadixCache
    assert manager.cache.tree.policy is Policy.PRIORITY
    manager = init_memory_pool_and_cache(MemoryConfig(mha, 2, 16, disable_radix_cache=True))
    assert type(manager.cache) is ChunkCache
    manager = init_memory_pool_and_cache(MemoryConfig(mha, 2, 16, enable_lora=True))
    assert type(manager.cache) is LoRARadixCache
    manager = init_memory_pool_and_cache(MemoryConfig(mla, 2, 16, need_sort=True, enable_kv_cache_events=True))
    assert isinstance(manager.pool, MLATokenToKVPool)
    assert isinstance(manager.allocator, TokenToKVPoolAllocator)
    assert manager.allocator.need_sort
    assert manager.cache.enable_kv_cache_events
    with pytest.raises(ArgumentError, match="a kind that there is a pool for, got OtherConfig"):
        init_memory_pool_and_cache(MemoryConfig(OtherConfig(page_size=1, **sizes), 2, 16))


def test_the_factory_chooses_for_windows_and_states():
    sizes = {"size": 32, "page_size": 4, "dtype": jnp.float32, "layer_num": 1, "head_num": 1, "head_dim": 2}
    swa = SWAConfig(full=MHAConfig(**sizes), window=MHAConfig(**sizes), full_layers=(0,), window_layers=(1,))
    float32 = jnp.float32
    states = MambaConfig(
        num_states=6,
        layer_num=1,
        conv_shape=(2, 3),
        temporal_shape=(1, 2, 2),
        conv_dtype=float32,
        temporal_dtype=float32,
    )
    made = {
        (window, state, disable): init_memory_pool_and_cache(
            MemoryConfig(
                swa if window else swa.full,
                2,
                16,
                sliding_window_size=window,
                states=states if state else None,
                disable_radix_cache=disable,
            )
        )
        for window in (None, 6)
        for state in (False, True)
        for disable in (False, True)
    }
    kinds = {
        (None, False): RadixCache,
        (6, False): SWARadixCache,
        (None, True): MambaRadixCache,
        (6, True): MambaRadixCache,
    }
    chunks = {(None, False): ChunkCache, (6, False): SWAChunkCache}
    for (window, state, disable), manager in made.items():
        kind = kinds[window, state]
        assert type(manager.cache) is (chunks.get((window, state), kind) if disable else kind)
        assert manager.cache.disable is disable
        assert isinstance(manager.allocator, SWATokenToKVPoolAllocator) == (window is not None)
        assert isinstance(manager.pool, HybridKVPool) == state
        assert isinstance(manager.pool.kv if state else manager.pool, SWAKVPool if window else MHATokenToKVPool)
    for kv, window in ((swa, None), (swa.full, 6)):
        with pytest.raises(ArgumentError, match="sliding_window_size"):
            MemoryConfig(kv, 2, 16, sliding_window_size=window)


# ---- the life of a request ---------------------------------------------------------------------------------------


def test_a_life_from_admission_to_the_next_request_that_profits():
    manager = small_manager()
    request = Request("a", list(range(10)), tag=3)
    assert manager.admit(request) == 0
    assert request.state is RequestState.RUNNING
    manager.run(write_step, manager.extend([(request, 7)]))
    manager.run(write_step, manager.extend([(request, 3)]))
    assert request.kv_len == 10
    for token in (50, 51, 52):
        request.output_ids.append(token)
        manager.run(write_step, manager.decode([request]))
    assert_contents(manager, [request])
    withheld = 160 - 64
    assert manager.get_token_info() == (withheld + 16, (withheld + 16) / 160, 48, 0)
    manager.finish(request)
    assert state(request) == (RequestState.DONE, None, 0, 0, None)
    assert manager.get_token_info() == (withheld, withheld / 160, 52, 12)
    follower = Request("b", [*range(10), 50, 51, 60], tag=3)
    assert manager.admit(follower) == 12
    assert follower.cached_tokens == 12
    manager.run(write_step, manager.extend([(follower, 1)]))
    assert_contents(manager, [follower])
    manager.finish(follower)
    manager.check_memory(read_device=True)


def test_running_is_having_a_row_and_the_pool_has_one_owner():
    manager = small_manager()
    request = prefilled(manager, list(range(10)))
    assert manager.allocator.get_kvcache() is manager.pool  # of after the step
    with pytest.raises(RequestStateError, match="cannot be done: it has row 0"):
        request.state = RequestState.DONE
    manager.retract(request)
    with pytest.raises(RequestStateError, match="cannot be running: it has no row"):
        request.state = RequestState.RUNNING
    assert request.state is RequestState.RETRACTED
    manager.allocator.load_cpu_copy(manager.allocator.get_cpu_copy([4, 5]), [6, 7])
    manager.admit(request)  # with the pool that the allocator's copy has made
    manager.run(write_step, manager.extend([(request, 10 - request.kv_len)]))


def test_one_token_is_always_left_to_compute():
    manager = small_manager()
    manager.finish(prefilled(manager, list(range(8))))
    request = Request("again", list(range(8)))
    assert manager.admit(request) == 4


@pytest.mark.parametrize(("start", "found"), [(None, 12), (12, 12), (11, 8), (5, 4), (3, 0), (0, 0), (100, 12)])
def test_the_match_respects_logprob_start_len(start, found):
    manager = small_manager()
    manager.finish(prefilled(manager, list(range(12))))
    assert manager.admit(Request("again", list(range(15)), logprob_start_len=start)) == found


def test_a_negative_logprob_start_len_is_refused():
    with pytest.raises(ArgumentError, match="must not be negative, got -1"):
        Request("r", [1, 2], logprob_start_len=-1)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("is_evicted", [False, True])
def test_retract_and_resume(offload, is_evicted):
    manager = small_manager()
    request = prefilled(manager, list(range(10)), tag=2)
    request.output_ids.append(77)
    manager.run(write_step, manager.decode([request]))
    request.output_ids.append(78)
    manager.retract(request, offload=offload)
    assert state(request) == (RequestState.RETRACTED, None, 0, 0, None)
    assert manager.allocator.count(PageState.PRIVATE) == 0
    if is_evicted:
        manager.cache.evict(64)
        other = prefilled(manager, [9] * 20, rid="other")  # overwrites what was there
        manager.finish(other)
    expected = 11 if offload else (0 if is_evicted else 8)
    assert manager.admit(request) == request.kv_len == expected
    found = 0 if is_evicted else 8
    assert (request.cached_tokens, request.resumed_tokens, request.loaded_tokens) == (0, found, expected - found)
    assert request.cpu_copy is None
    assert_contents(manager, [request])
    if expected < 11:
        manager.run(write_step, manager.extend([(request, 11 - expected)]))
    manager.run(write_step, manager.decode([request]))
    assert_contents(manager, [request])
    manager.finish(request)
    manager.check_memory(read_device=True)


def test_a_resumed_request_has_one_token_to_compute_even_if_all_were_copied():
    manager = small_manager()
    request = prefilled(manager, list(range(10)))
    manager.retract(request, offload=True)
    manager.cache.evict(64)
    assert manager.admit(request) == 9
    manager.run(write_step, manager.extend([(request, 1)]))
    assert_contents(manager, [request])


def test_resuming_waits_for_memory_to_load_back_into():
    manager = small_manager(num_pages=4)
    request = prefilled(manager, list(range(14)))
    manager.retract(request, offload=True)
    other = prefilled(manager, [7] * 9, rid="other")
    before = books(manager)
    assert manager.admit(request) is None
    assert request.cpu_copy is not None
    assert state(request) == (RequestState.RETRACTED, None, 0, 0, None)
    assert books(manager)[0].count(PageState.PRIVATE) == before[0].count(PageState.PRIVATE)
    manager.check_memory()
    manager.finish(other)
    assert manager.admit(request) == 13
    assert_contents(manager, [request])


def test_abort_in_every_state():
    manager = small_manager()
    waiting, done = Request("waiting", [1]), prefilled(manager, [1, 2, 3])
    running = prefilled(manager, list(range(10)))
    planned = Request("planned", [5] * 9)
    manager.admit(planned)
    manager.extend([(planned, 9)])
    retracted = prefilled(manager, [3] * 9)
    manager.retract(retracted, offload=True)
    manager.finish(done)
    for request in (waiting, done, running, planned, retracted):
        manager.abort(request)
        assert request.state is RequestState.DONE
        assert request.cpu_copy is None
        manager.check_memory()
    assert manager.allocator.count(PageState.PRIVATE) == 0
    assert manager.cache.match_prefix(list(range(10))).prefix_len == 8  # what was computed is good
    assert manager.cache.match_prefix([5] * 9).prefix_len == 0  # what was only planned is not


def test_admission_waits_for_a_row():
    manager = small_manager(max_running=1)
    first, second = Request("1", [1]), Request("2", [2])
    assert manager.admit(first) == 0
    before = books(manager)
    assert manager.admit(second) is None
    assert books(manager) == before
    manager.abort(first)
    assert manager.admit(second) == 0


@pytest.mark.parametrize("tag_name", ["x", "y"])
def test_requests_of_two_namespaces_never_meet(tag_name):
    manager = small_manager()
    manager.finish(prefilled(manager, list(range(8)), extra_key="x", tag=1))
    found = manager.admit(Request("r", list(range(8)), extra_key=tag_name))
    assert found == (4 if tag_name == "x" else 0)


# ---- wrong use ---------------------------------------------------------------------------------------------------


def test_what_a_state_does_not_allow_is_refused_and_changes_nothing():
    manager = small_manager()
    running, waiting = prefilled(manager, list(range(6))), Request("w", [1, 2])
    done = prefilled(manager, [8] * 5)
    manager.finish(done)
    foreign = prefilled(small_manager(), [1] * 5)
    before, ours = books(manager), state(running)
    for call in (
        lambda: manager.admit(running),
        lambda: manager.admit(done),
        lambda: manager.finish(waiting),
        lambda: manager.finish(done),
        lambda: manager.finish(foreign),
        lambda: manager.retract(waiting),
        lambda: manager.retract(foreign, offload=True),
        lambda: manager.abort(foreign),
        lambda: manager.extend([(waiting, 1)]),
        lambda: manager.decode([Request("one", [1])]),
    ):
        with pytest.raises(RequestStateError):
            call()
        assert books(manager) == before
        assert state(running) == ours
    for call, rule in (
        (lambda: manager.admit(Request("long", [1] * 65)), "max_context_len is 64"),
        (lambda: manager.extend([(running, 1)]), "has 0 tokens, not 1"),
        (lambda: manager.extend([(running, 0)]), "has 0 tokens, not 0"),
        (lambda: manager.extend([]), "at least one"),
        (lambda: manager.decode([]), "at least one"),
        (lambda: manager.decode([running]), "has 0 tokens to compute"),
    ):
        with pytest.raises(ArgumentError, match=rule):
            call()
        assert books(manager) == before
    running.output_ids.append(1)
    with pytest.raises(ArgumentError, match="name each request once"):
        manager.decode([running, running])
    assert books(manager) == before


def test_a_request_that_outgrows_the_context_is_refused_before_a_page_is_taken():
    manager = small_manager(num_pages=20)
    short, full = prefilled(manager, [1, 2, 3], rid="short"), Request("full", [4] * 64)
    manager.admit(full)
    for _ in range(2):
        manager.run(write_step, manager.extend([(full, 32)]))
    short.output_ids.append(1)
    full.output_ids.append(1)
    before = books(manager)
    with pytest.raises(ArgumentError, match="request full would have 65 tokens, max_context_len is 64"):
        manager.decode([short, full])
    assert books(manager) == before
    manager.check_memory()
    manager.run(write_step, manager.decode([short]))


def test_a_batch_beyond_every_bucket_is_refused_before_a_page_is_taken():
    manager = small_manager(num_pages=32)
    request = Request("r", [1] * 60)
    manager.admit(request)
    before = books(manager)
    with pytest.raises(
        ArgumentError,
        match="60 tokens, but a step computes at most 32, the config's chunk: split prompts with next_chunk",
    ):
        manager.extend([(request, 60)])
    assert books(manager) == before


# ---- all or nothing ----------------------------------------------------------------------------------------------


class Fault(Exception):
    """Not one of ours: what a full disk, an interrupt or a bug would raise."""


@pytest.mark.parametrize(
    ("part", "method", "nth"),
    [
        ("cache", "match_prefix", 1),
        ("cache", "inc_lock_ref", 1),
        ("cache", "evict_values", 1),
        ("allocator", "alloc_pages", 1),
        ("req_to_token_pool", "alloc", 1),
        ("req_to_token_pool", "write_pages", 1),
        ("req_to_token_pool", "write_pages", 2),
        ("pool", "load_cpu_copy", 1),
    ],
)
def test_a_fault_between_two_steps_of_an_admission_loses_nothing(monkeypatch, part, method, nth):
    manager = small_manager(num_pages=8)
    manager.finish(prefilled(manager, list(range(4)), rid="prefix"))
    request = prefilled(manager, list(range(18)), rid="r")
    manager.retract(request, offload=True)
    manager.cache.evict(manager.cache.evictable_size() - 4)  # keep one page of it cached
    manager.finish(prefilled(manager, [5] * 20, rid="filler"))  # and make the rest of the memory need eviction
    before, own = books(manager), state(request)
    locked = manager.cache.protected_size()
    owner = getattr(manager, part)
    honest = getattr(type(owner), method)
    calls = 0

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Fault(method)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(type(owner), method, failing)
    with pytest.raises(Fault):
        manager.admit(request)
    monkeypatch.undo()
    manager.check_memory(read_device=True)
    assert state(request) == own
    assert request.cpu_copy is not None
    assert manager.cache.protected_size() == locked
    after = books(manager)
    assert after[5] == before[5]
    assert sorted(after[2]) == sorted(before[2])
    assert after[0].count(PageState.PRIVATE) == before[0].count(PageState.PRIVATE)
    assert manager.admit(request) == 17
    assert_contents(manager, [request])


@pytest.mark.parametrize(("part", "method"), [("allocator", "alloc_pages"), ("cache", "evict_values")])
def test_a_fault_in_planning_loses_nothing(monkeypatch, part, method):
    manager = small_manager(num_pages=8)
    manager.finish(prefilled(manager, [1] * 24, rid="filler"))
    request = Request("r", [2] * 20)
    manager.admit(request)
    before, own = books(manager), state(request)

    def failing(self, *args):
        raise Fault(method)

    monkeypatch.setattr(type(getattr(manager, part)), method, failing)
    with pytest.raises(Fault):
        manager.extend([(request, 20)])
    monkeypatch.undo()
    after = books(manager)
    assert (after[2:3], after[4:], state(request)) == (before[2:3], before[4:], own)  # only an eviction may have been
    assert after[0].count(PageState.PRIVATE) == before[0].count(PageState.PRIVATE)
    manager.run(write_step, manager.extend([(request, 20)]))
    assert_contents(manager, [request])


def test_a_step_that_fails_can_be_run_again():
    manager = small_manager()
    request = Request("r", list(range(9)))
    manager.admit(request)
    plan = manager.extend([(request, 9)])
    changed = manager.req_to_token_pool.num_changed()

    def failing_step(pool, batch):
        raise Fault("while tracing")

    with pytest.raises(Fault):
        manager.run(failing_step, plan)
    assert manager.req_to_token_pool.num_changed() == changed > 0
    assert request.kv_len == 0
    manager.run(write_step, plan)
    assert_contents(manager, [request])


def test_shortage_is_an_answer_and_takes_no_page():
    manager = small_manager(num_pages=4)
    first, second = prefilled(manager, [1] * 8), Request("2", [2] * 12)
    manager.admit(second)
    private = manager.allocator.count(PageState.PRIVATE)
    own = state(second)
    assert manager.extend([(second, 12)]) is None
    assert state(second) == own
    assert manager.allocator.count(PageState.PRIVATE) == private
    manager.check_memory()
    manager.finish(first)
    assert manager.extend([(second, 12)]) is not None


# ---- plans -------------------------------------------------------------------------------------------------------


def test_cancel_gives_the_pages_of_a_plan_back():
    manager = small_manager()
    request = prefilled(manager, list(range(6)))
    request.output_ids += [1]
    manager.run(write_step, manager.decode([request]))
    request.output_ids += [2] * 6
    before = books(manager)
    plan = manager.extend([(request, 6)])
    assert len(plan.new_pages) == 2
    manager.check_memory()
    manager.cancel(plan)
    assert books(manager)[0] == before[0]
    assert books(manager)[2:] == before[2:]
    manager.check_memory()
    manager.run(write_step, manager.extend([(request, 6)]))
    assert_contents(manager, [request])


def test_an_outdated_plan_is_refused_before_it_writes():
    manager = small_manager()
    request, other = prefilled(manager, list(range(5))), prefilled(manager, [7] * 9, rid="other")
    request.output_ids += [1, 2, 3]
    plan, twin = manager.extend([(request, 1)]), manager.extend([(request, 2)])  # allowed: neither takes a page
    manager.run(write_step, plan)
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, twin)
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, plan)  # ran already
    cancelled = manager.extend([(request, 2)])
    manager.cancel(cancelled)
    other.output_ids.append(1)
    decode = manager.decode([other])
    manager.retract(other)
    with pytest.raises(RequestStateError):
        manager.run(write_step, decode)
    assert manager.admit(other) == 8
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, decode)
    assert_contents(manager, [request, other])


def test_a_cancelled_plan_is_refused():
    manager = small_manager()
    request = prefilled(manager, list(range(8)))
    request.output_ids.append(1)
    plan = manager.decode([request])
    manager.cancel(plan)
    manager.cancel(plan)  # nothing is left to give back
    with pytest.raises(RequestStateError, match="plan again"):
        manager.run(write_step, plan)
    manager.check_memory()


def test_a_second_plan_waits_for_the_first():
    manager = small_manager()
    request = prefilled(manager, list(range(8)))
    request.output_ids.append(1)
    plan = manager.decode([request])
    before = books(manager)
    with pytest.raises(RequestStateError, match="run or cancel it first"):
        manager.decode([request])
    assert books(manager) == before
    manager.run(write_step, plan)


def test_cancel_of_a_plan_passes_over_the_requests_that_ended():
    manager = small_manager()
    first, second = prefilled(manager, [1] * 8, rid="1"), prefilled(manager, [2] * 8, rid="2")
    for request in (first, second):
        request.output_ids.append(1)
    plan = manager.decode([first, second])
    manager.finish(second)
    manager.cancel(plan)
    assert first.num_pages == 2
    manager.check_memory()
    manager.finish(first)
    before = books(manager)
    with pytest.raises(RequestStateError):
        manager.cancel(plan)
    assert books(manager) == before


def expected_batch(work, page_size, rows):
    """Oracle of `unpack`: a list per field, token by token."""
    fields = {name: [] for name in ("tokens", "positions", "slots", "request")}
    for i, (tokens, prefix, seq) in enumerate(work):
        for position in range(prefix, seq):
            page = rows[i][position // page_size]
            fields["tokens"].append(tokens[position])
            fields["positions"].append(position)
            fields["slots"].append(page * page_size + position % page_size)
            fields["request"].append(i)
    return fields


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("sizes", [[n] for n in range(1, 9)] + [[1, 7], [7, 1], [2, 3, 3], [1, 1], [4, 4], [8]])
def test_every_padding_of_an_extend_bucket(page_size, sizes):
    bucket = Bucket(StepKind.EXTEND, requests=4, tokens=8, pages=12, changes=16)
    manager = small_manager(page_size, num_pages=64 // page_size)
    manager.planner.buckets = (bucket,)
    requests = []
    for i, size in enumerate(sizes):
        request = Request(str(i), list(range(100 * i, 100 * i + size + 3)), tag=i + 5)
        manager.admit(request)
        manager.run(write_step, manager.extend([(request, 2)]))
        requests.append(request)
    plan = manager.extend([(request, size) for request, size in zip(requests, sizes, strict=True)])
    manager.runner.send_changes(bucket.changes)
    packed = plan.pack(manager.req_to_token_pool.take_changes(bucket.changes))
    batch = unpack(jnp.asarray(packed), bucket, manager.table, page_size)
    rows = [manager.req_to_token_pool.pages[request.req_pool_idx].tolist() for request in requests]
    work = [(list(request.origin_input_ids), 2, 2 + size) for request, size in zip(requests, sizes, strict=True)]
    total = sum(sizes)
    for name, expected in expected_batch(work, page_size, rows).items():
        assert np.asarray(getattr(batch, name))[:total].tolist() == expected, name
    assert np.asarray(batch.valid).tolist() == [True] * total + [False] * (8 - total)
    assert not np.asarray(batch.slots)[total:].any()
    assert not np.asarray(batch.positions)[total:].any()
    padding = [0] * (4 - len(sizes))
    assert np.asarray(batch.seq_len).tolist() == [2 + size for size in sizes] + padding
    assert np.asarray(batch.tag).tolist() == [request.tag for request in requests] + padding
    table = np.asarray(batch.table.pages)
    for request, row in zip(requests, rows, strict=True):
        assert table[request.req_pool_idx, : request.num_pages].tolist() == row[: request.num_pages]


@pytest.mark.parametrize("count", range(5))
def test_every_padding_of_a_decode_bucket(count):
    manager = small_manager(page_size=4, num_pages=24)
    bucket = Bucket(StepKind.DECODE, 4, 4, 4, 64)
    requests = [prefilled(manager, [i] * (3 + i), rid=str(i), tag=i) for i in range(count)]
    for request in requests:
        request.output_ids.append(40 + request.tag)
    manager.planner.buckets = (bucket,)
    plan = manager.decode(requests) if requests else StepPlan.empty(bucket)
    assert plan.bucket == bucket
    batch = unpack(jnp.asarray(plan.pack(manager.req_to_token_pool.take_changes(64))), bucket, manager.table, 4)
    rows = [manager.req_to_token_pool.pages[request.req_pool_idx].tolist() for request in requests]
    work = [(request.key.token_ids.tolist(), 3 + i, 4 + i) for i, request in enumerate(requests)]
    for name, expected in expected_batch(work, 4, rows).items():
        assert np.asarray(getattr(batch, name))[:count].tolist() == expected, name
    assert np.asarray(batch.valid).tolist() == [True] * count + [False] * (4 - count)
    assert not np.asarray(batch.slots)[count:].any()


def test_a_plan_that_does_not_fit_its_bucket_is_refused():
    manager = small_manager()
    request = Request("r", list(range(9)))
    manager.admit(request)
    plan = manager.extend([(request, 9)])
    changes = manager.req_to_token_pool.take_changes(100)
    for bucket, name in (
        (Bucket(StepKind.EXTEND, 1, 4, 4, 8), "tokens"),
        (Bucket(StepKind.EXTEND, 1, 16, 1, 8), "new_pages"),
        (Bucket(StepKind.EXTEND, 1, 16, 4, 2), "index"),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: .* do not fit the bucket"):
            dataclasses.replace(plan, bucket=bucket).pack(changes)


# ---- the device table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 5])
def test_the_device_table_is_exact_however_few_changes_fit_a_step(room):
    manager = small_manager(page_size=1, num_pages=64)
    manager.planner.buckets = tuple(
        Bucket(bucket.kind, bucket.requests, bucket.tokens, bucket.pages, room) for bucket in manager.buckets
    )
    requests = [prefilled(manager, [i] * 11, rid=str(i)) for i in range(3)]
    for _ in range(3):
        for request in requests:
            request.output_ids.append(1)
        manager.run(write_step, manager.decode(requests))
    assert manager.req_to_token_pool.num_changed() <= max(room, 0)
    assert_contents(manager, requests)
    device, host = np.asarray(manager.table.pages), manager.req_to_token_pool.pages
    np.testing.assert_array_equal(device, host)


def test_changes_beyond_one_patch_are_sent_in_several(monkeypatch):
    monkeypatch.setattr("jaxcache.steps.runner.TABLE_PATCH_ENTRIES", 4)
    manager = small_manager(page_size=1, num_pages=64)
    manager.planner.buckets = tuple(Bucket(b.kind, b.requests, b.tokens, b.pages, 3) for b in manager.buckets)
    requests = [prefilled(manager, [i] * 20, rid=str(i)) for i in range(2)]
    assert_contents(manager, requests)
    np.testing.assert_array_equal(np.asarray(manager.table.pages), manager.req_to_token_pool.pages)


def test_a_change_of_a_change_sends_the_last_value():
    manager = small_manager(page_size=1, num_pages=64)
    (row,) = manager.req_to_token_pool.alloc(1)
    for value in (1, 2, 3):
        manager.req_to_token_pool.write_pages(row, 0, np.array([value, value + 10], np.int32))
    changes = manager.req_to_token_pool.take_changes(3)
    manager.req_to_token_pool.write_pages(row, 1, np.array([20], np.int32))
    manager.req_to_token_pool.give_back(changes)
    manager.runner.send_changes()
    assert np.asarray(manager.table.pages)[row, :2].tolist() == [3, 20]


# ---- check_memory ------------------------------------------------------------------------------------------------


def plant_leak(manager, request):
    manager.allocator.alloc_pages(1)


def plant_early_free(manager, request):
    pages = manager.req_to_token_pool.row_pages(request.req_pool_idx, 2, 3)
    manager.allocator.release(pages.copy(), PageState.PRIVATE)


def plant_tree_page_freed(manager, request):
    pages = manager.req_to_token_pool.row_pages(request.req_pool_idx, 0, 1)
    manager.allocator.release(pages.copy(), PageState.TREE)


def plant_forgotten_page(manager, request):
    request.num_pages -= 1


def plant_other_pages_in_the_shared_part(manager, request):
    manager.req_to_token_pool.write_pages(request.req_pool_idx, 0, np.array([9], np.int32))


def plant_other_tokens(manager, request):
    request._key = Request("x", [99] * 10).key


def plant_lost_row(manager, request):
    manager.req_to_token_pool.alloc(1)


def plant_row_freed(manager, request):
    manager.req_to_token_pool.free(request.req_pool_idx)


def plant_forgotten_request(manager, request):
    del manager.running[request.req_pool_idx]


def plant_lock_released(manager, request):
    node = request.lock.node
    node.locks -= 1


def plant_size_counter(manager, request):
    manager.cache.tree.evictable[0] += 1


def plant_device_entry(manager, request):
    runner = manager.runner
    pages = runner.table.pages.at[request.req_pool_idx, 1].add(1)
    runner.table = dataclasses.replace(runner.table, pages=pages)


PLANTS = [value for name, value in sorted(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.removeprefix("plant_"))
def test_check_memory_finds(plant):
    manager = small_manager()
    request = prefilled(manager, list(range(10)))
    manager.finish(prefilled(manager, [50] * 9, rid="cached"))
    manager.check_memory(read_device=True)
    plant(manager, request)
    with pytest.raises(BrokenInvariantError):
        manager.check_memory(read_device=True)


# ---- recompilation, and random lives -----------------------------------------------------------------------------


def test_nothing_compiles_after_the_warm_up():
    manager = small_manager(page_size=4, num_pages=40, max_running=6, buckets=None)
    manager.runner.compiled = CompiledSteps()  # compiled by nobody else
    manager.warm_up(write_step)
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(0)
    running = []
    try:
        for i in range(150):
            request = Request(str(i), rng.integers(0, 2, rng.integers(1, 30)), str(i % 2), tag=i % 2)
            if manager.admit(request) is not None:
                running.append(request)
            budget = manager.config.chunk
            work = []
            for request in running:
                if n := min(request.num_tokens - request.kv_len, budget):
                    work.append((request, n))
                    budget -= n
            if work and (plan := manager.extend(work)) is not None:
                manager.run(write_step, plan)
            batch = [request for request in running if request.kv_len == request.num_tokens < 60]
            for request in batch:
                request.output_ids.append(int(rng.integers(2)))
            if batch and (plan := manager.decode(batch)) is not None:
                manager.run(write_step, plan)
            if len(running) > 4 or (running and rng.random() < 0.3):
                manager.finish(running.pop(int(rng.integers(len(running)))))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert seen == []
    manager.check_memory()


@pytest.mark.parametrize(("page_size", "policy"), [(1, Policy.LRU), (4, Policy.PRIORITY), (16, Policy.LRU)])
def test_random_lives_with_a_real_step(page_size, policy):
    drive(seed=page_size, ops=1000, page_size=page_size, policy=policy)
