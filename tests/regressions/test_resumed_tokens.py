"""What comes back after a retraction is no hit: each token of a request is asked for once.

A lone request of 60 tokens that was retracted five times reported 300 hits of 365 tokens, what a host copy gave back
was counted nowhere, and `cached_tokens` became the length that was resumed.
"""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from jaxcache.observe.metrics import CacheMetrics
from jaxcache.request import Request
from tests.model.manager_driver import small_manager, write_step

TOKENS, PAGE = 60, 4


def counts(registry):
    """Tokens by the names of their counters, with their source."""
    return {
        (sample.name.removeprefix("jaxcache:").removesuffix("_tokens_total"), *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }


@pytest.fixture
def watched():
    manager = small_manager(page_size=PAGE, num_pages=40, max_context_len=128, chunk=64)
    registry = CollectorRegistry()
    manager.cache.observer = CacheMetrics(registry)
    return manager, registry


def compute(manager, request):
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))


def test_five_resumptions_from_the_cache_are_no_hits(watched):
    manager, registry = watched
    request = Request("r", list(range(TOKENS)))
    manager.admit(request)
    compute(manager, request)
    for token in range(5):
        request.output_ids.append(token)
        manager.retract(request)
        assert manager.admit(request) == (TOKENS + token) // PAGE * PAGE
        compute(manager, request)
        assert request.cached_tokens == 0
    assert (request.resumed_tokens, request.loaded_tokens) == (4 * TOKENS + 64, 0)
    seen = counts(registry)
    del seen["inserted",]
    assert seen == {("prefix_cache_queries_total",): TOKENS, ("resumed", "device"): 4 * TOKENS + 64}


def test_what_a_host_copy_gives_back_has_a_source_of_its_own(watched):
    manager, registry = watched
    request = Request("r", list(range(TOKENS)))
    manager.admit(request)
    compute(manager, request)
    for kept in (0, 20):
        request.output_ids.append(7)
        manager.retract(request, offload=True)
        manager.cache.evict(1000)
        if kept:  # another request has computed the start of it meanwhile
            other = Request("other", list(range(kept + 1)))
            manager.admit(other)
            compute(manager, other)
            manager.finish(other)
        assert manager.admit(request) == request.num_tokens - 1
        compute(manager, request)
    assert (request.cached_tokens, request.resumed_tokens, request.loaded_tokens) == (0, 20, TOKENS + TOKENS + 1 - 20)
    seen = counts(registry)
    assert (seen["resumed", "device"], seen["resumed", "host"]) == (request.resumed_tokens, request.loaded_tokens)
    assert seen["prefix_cache_queries_total",] == TOKENS + 21
    assert ("cached", "host") not in seen


def test_what_was_found_first_is_billed_for_good(watched):
    manager, registry = watched
    first = Request("first", list(range(41)))
    manager.admit(first)
    compute(manager, first)
    manager.finish(first)
    request = Request("r", list(range(TOKENS)))
    assert manager.admit(request) == 40
    for offload in (False, True):
        compute(manager, request)
        request.output_ids.append(7)
        manager.retract(request, offload=offload)
        manager.cache.evict(1000)
        manager.admit(request)
        assert request.cached_tokens == 40
    assert counts(registry)["cached", "device"] == counts(registry)["prefix_cache_hits_total",] == 40


def test_a_copy_that_a_new_request_is_given_is_no_hit(watched):
    """Such as one that another engine has computed: nothing of it was found here."""
    manager, registry = watched
    request = Request("r", list(range(TOKENS)))
    manager.admit(request)
    compute(manager, request)
    manager.retract(request, offload=True)
    manager.cache.evict(1000)
    new = Request("new", [*range(TOKENS), 5])
    new.cpu_copy = request.cpu_copy
    assert manager.admit(new) == TOKENS
    assert (new.cached_tokens, new.resumed_tokens, new.loaded_tokens) == (0, 0, TOKENS)
    assert counts(registry)["resumed", "host"] == TOKENS
    assert ("prefix_cache_hits_total",) not in counts(registry)


def test_an_admission_that_finds_no_room_is_none(watched):
    manager, registry = watched
    request = Request("r", list(range(TOKENS)))
    rows = manager.req_to_token_pool.alloc(manager.req_to_token_pool.available_size())
    assert manager.admit(request) is None
    assert not counts(registry)
    for row in rows:
        manager.req_to_token_pool.free(row)
    manager.admit(request)
    assert counts(registry) == {("prefix_cache_queries_total",): TOKENS}
