"""`generate()` with a JaxPagedCache gives the tokens of a DynamicCache, computes less, and leaks nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import socket
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers
from transformers import DynamicCache

from jaxcache import (
    ArgumentError,
    Layout,
    Request,
    RequestStateError,
    SWAKVPool,
    UnsupportedError,
    init_memory_pool_and_cache,
)
from jaxcache.pages.allocator import PageState
from tests.torch_bridge.hf_models import MODELS, SIZES, VOCABULARY, make
from tests.torch_bridge.tensors import DEVICE
from torch_bridge.transformers import JaxPagedCache, ShortageError

PAGE = 4
NEW = 6
model_named = functools.cache(make)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models as small as these only lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def cache_for(name: str = "llama", tokens: int = 256, **sizes) -> JaxPagedCache:
    return JaxPagedCache.for_model(model_named(name), tokens, page_size=PAGE, **sizes)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        1, VOCABULARY, (1, length), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    ).to(DEVICE)


def padded(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts in one batch, padded on the left, and the mask."""
    width = max(each.shape[1] for each in prompts)
    rows = [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in prompts]
    return torch.cat(rows), (torch.cat(rows) != 0).long()


def expected(name: str, input_ids: torch.Tensor, mask: torch.Tensor | None = None, **options) -> torch.Tensor:
    model = model_named(name)
    past = DynamicCache(config=model.config)
    mask = torch.ones_like(input_ids) if mask is None else mask
    options = dict(do_sample=False, max_new_tokens=NEW) | options
    return model.generate(input_ids, attention_mask=mask, past_key_values=past, **options)


def generated(cache: JaxPagedCache, name: str, input_ids: torch.Tensor, mask=None, **options) -> torch.Tensor:
    options = dict(do_sample=False, max_new_tokens=NEW) | options
    output = cache.generate(model_named(name), input_ids, attention_mask=mask, **options)
    require_nothing_held(cache)
    return output


def reused(cache: JaxPagedCache, input_ids: torch.Tensor, mask=None, **options) -> int:
    with cache.session(input_ids, mask, **options) as past:
        length = past.get_seq_length()
    require_nothing_held(cache)
    return length


def require_nothing_held(cache: JaxPagedCache) -> None:
    """Books balance; every page is the tree's or free, nothing is locked, nobody runs."""
    memory = cache.memory
    memory.check_memory(read_device=True)
    assert not memory.running
    assert memory.cache.protected_size() == memory.cache.swa_protected_size() == 0
    assert memory.allocator.full_available_size() + memory.cache.evictable_size() == memory.config.max_context_len
    if isinstance(memory.pool, SWAKVPool):
        assert not (memory.allocator.window.states == PageState.PRIVATE).any()
        assert memory.allocator.swa_available_size() + memory.cache.swa_evictable_size() == memory.allocator.size_swa


@pytest.mark.parametrize("name", MODELS)
def test_repeated_calls_give_the_tokens_of_a_dynamic_cache(name):
    cache, ids = cache_for(name), prompt(21)
    first = generated(cache, name, ids)
    assert torch.equal(first, expected(name, ids))
    assert reused(cache, ids) == 20  # a hit leaves one token to compute
    assert torch.equal(generated(cache, name, ids), first)
    longer = torch.cat([first, prompt(5, seed=1)], dim=1)
    assert reused(cache, longer) == 24  # 21 + 6 tokens, the last one not computed: 26, in whole pages
    assert torch.equal(generated(cache, name, longer), expected(name, longer))
    other = torch.cat([ids[:, :10], prompt(9, seed=2)], dim=1)
    assert reused(cache, other) in ((8,) if cache.memory.config.sliding_window_size is None else (0, 8))
    assert torch.equal(generated(cache, name, other), expected(name, other))


@pytest.mark.parametrize("name", MODELS)
def test_batches_give_the_tokens_of_a_dynamic_cache(name):
    cache, (a, b, c) = cache_for(name), (prompt(length, seed) for seed, length in enumerate((21, 13, 6)))
    ids, mask = padded(a, b, c)
    assert torch.equal(generated(cache, name, ids, mask), expected(name, ids, mask))
    assert [reused(cache, each) for each in (a, b, c)] == [20, 12, 4]
    assert reused(cache, ids, mask) == 19  # columns: 0 + 20, 8 + 12, 15 + 4
    assert torch.equal(generated(cache, name, ids, mask), expected(name, ids, mask))
    ids, mask = padded(a, b, prompt(9, seed=3))
    assert reused(cache, ids, mask) == 12  # of the last one nothing is cached, so only its padding is saved
    assert torch.equal(generated(cache, name, ids, mask), expected(name, ids, mask))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_right_across_eviction(name):
    cache = cache_for(name, tokens=64)
    for seed in (0, 1, 2, 0, 1, 1):
        ids = prompt(30, seed)
        assert torch.equal(generated(cache, name, ids), expected(name, ids))
    assert cache.memory.cache.evictable_size() <= 64
    assert reused(cache, prompt(30, 1)) == 28
    assert reused(cache, prompt(30, 2)) < 28  # this one had to go


@pytest.mark.parametrize("name", ["gemma3", "mimo"])
def test_few_window_pages_suffice_if_prompts_come_in_chunks(name):
    cache = cache_for(name, tokens=256, window_tokens=60)
    for length in (70, 100):
        ids = prompt(length, seed=length)
        with pytest.raises(ShortageError, match="prefill_chunk_size"):
            generated(cache, name, ids)
        require_nothing_held(cache)
        output = generated(cache, name, ids, prefill_chunk_size=10)
        assert torch.equal(output, expected(name, ids))
        assert reused(cache, output) == (length + NEW - 1) // PAGE * PAGE
        assert torch.equal(generated(cache, name, output), expected(name, output))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_kv_is_in_the_pool(name):
    model, cache, ids = model_named(name), cache_for(name), prompt(8)
    seen = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=seen, use_cache=True)
    generated(cache, name, ids)
    slots = cache.memory.cache.match_prefix(ids[0].cpu().numpy()).device_indices
    assert len(slots) == 8
    for layer, other in enumerate(seen.layers):
        for mine, theirs in zip(cache.memory.pool.gather(slots, layer), (other.keys, other.values), strict=True):
            theirs = theirs[0].transpose(0, 1).cpu().numpy()
            np.testing.assert_allclose(np.asarray(mine)[-len(theirs) :], theirs, rtol=1e-5, atol=1e-6)


def test_what_is_cached_is_not_written_though_others_of_the_batch_lack_it():
    cache, (a, b) = cache_for(), (prompt(13), prompt(13, seed=1))
    generated(cache, "llama", a)
    slots = cache.memory.cache.match_prefix(a[0].cpu().numpy()).device_indices
    before = [np.asarray(rows) for layer in range(2) for rows in cache.memory.pool.gather(slots, layer)]
    with cache.session(torch.cat([a, b])) as past:
        assert past.get_seq_length() == 0
        for layer in range(2):
            rows = torch.full((2, 2, 13, 8), 7.0)
            past.update(rows, rows, layer)
    after = [np.asarray(rows) for layer in range(2) for rows in cache.memory.pool.gather(slots, layer)]
    np.testing.assert_array_equal(after, before)


def test_the_pool_has_the_dtype_of_the_model():
    model = make("llama").bfloat16()
    cache, ids = JaxPagedCache.for_model(model, 64, page_size=PAGE), prompt(13)
    assert cache.memory.config.kv.dtype == jnp.bfloat16
    outputs = [
        model.generate(ids, past_key_values=DynamicCache(config=model.config), do_sample=False, max_new_tokens=NEW),
        cache.generate(model, ids, do_sample=False, max_new_tokens=NEW),
    ]
    assert torch.equal(*outputs)
    require_nothing_held(cache)


def test_requests_of_the_same_memory_find_what_was_generated():
    cache, ids = cache_for(), prompt(12)
    output = generated(cache, "llama", ids)
    request = Request("jax", output[0].tolist())
    assert cache.memory.admit(request) == 16
    assert reused_beside(cache, ids) == 11 // PAGE * PAGE
    cache.memory.abort(request)
    require_nothing_held(cache)


def reused_beside(cache: JaxPagedCache, ids: torch.Tensor) -> int:
    with cache.session(ids) as past:
        cache.memory.check_memory()
        return past.get_seq_length()


def test_a_loop_of_ones_own():
    model, cache, ids = model_named("llama"), cache_for(), prompt(10)
    for cached in (0, 8):
        with cache.session(ids) as past, torch.no_grad():
            assert past.get_seq_length() == cached
            tokens, fed = ids, cached
            for _ in range(NEW):
                logits = model(tokens[:, fed:], past_key_values=past, use_cache=True).logits
                fed = tokens.shape[1]
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
                cache.memory.check_memory()
            past.keep(tokens)
        require_nothing_held(cache)
        assert torch.equal(tokens, expected("llama", ids))
    assert reused(cache, torch.cat([tokens, ids], dim=1)) == 12  # of 16 tokens the last one is not computed


def test_without_keep_the_prompt_stays():
    cache, ids = cache_for(), prompt(10)
    with cache.session(ids) as past:
        output = model_named("llama").generate(ids, past_key_values=past, do_sample=False, max_new_tokens=NEW)
    require_nothing_held(cache)
    assert reused(cache, output) == 8


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prompt_lookup_takes_back_what_it_guessed_wrong(name):
    cache, options = cache_for(name), dict(prompt_lookup_num_tokens=3, max_new_tokens=12)
    for seed in (0, 0, 4, 4, 5, 5):
        ids = prompt(8, seed).repeat(1, 3)
        output = generated(cache, name, ids, **options)
        assert torch.equal(output, expected(name, ids, max_new_tokens=12))


def test_a_whole_prompt_is_refused_where_columns_are_reused():
    """As `generate` gives it where it guesses: the columns would be taken for those behind the reused ones."""
    cache, ids = cache_for(), prompt(8).repeat(1, 3)
    generated(cache, "llama", ids)
    options = dict(prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)
    with (
        pytest.raises(UnsupportedError, match="the whole prompt, though 20 of them are there"),
        cache.session(ids) as past,
    ):
        model_named("llama").generate(ids, past_key_values=past, **options)
    require_nothing_held(cache)
    with cache.session(ids, reuse=False) as past:
        output = model_named("llama").generate(ids, past_key_values=past, **options)
    assert torch.equal(output, expected("llama", ids, max_new_tokens=12))


def test_sequences_that_end_early_keep_only_what_was_computed():
    cache, (a, b) = cache_for(), (prompt(9), prompt(9, seed=1))
    ids, mask = padded(a, b)
    end = int(expected("llama", a)[0, 10])
    options = dict(eos_token_id=end, pad_token_id=0)
    output = generated(cache, "llama", ids, mask, **options)
    assert (output[0] == 0).any()
    assert torch.equal(output, expected("llama", ids, mask, **options))
    assert torch.equal(generated(cache, "llama", ids, mask, **options), output)


def test_namespaces_are_apart():
    cache, ids = cache_for(), prompt(12)
    cache.generate(model_named("llama"), ids, extra_key="adapter", max_new_tokens=2)
    assert reused(cache, ids) == 0
    assert reused(cache, ids, extra_key="adapter") == 8


def test_an_error_inside_gives_everything_back():
    cache, ids = cache_for(), prompt(10)

    def fail(*_):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        cache.generate(model_named("llama"), ids, prefix_allowed_tokens_fn=fail, max_new_tokens=2)
    require_nothing_held(cache)
    layer = model_named("llama").model.layers[1]
    handle = layer.register_forward_pre_hook(fail)  # the first layer has its KV by then, the second has not
    with pytest.raises(FloatingPointError):
        cache.generate(model_named("llama"), prompt(10, seed=1), max_new_tokens=2)
    handle.remove()
    require_nothing_held(cache)
    assert reused(cache, prompt(10, seed=1)) == 0
    assert torch.equal(generated(cache, "llama", ids), expected("llama", ids))


def test_a_shortage_and_what_is_too_long_are_typed():
    cache = cache_for(tokens=32)
    with pytest.raises(ArgumentError, match=r"35 tokens.* 32"):
        generated(cache, "llama", prompt(35))
    require_nothing_held(cache)
    with pytest.raises(ArgumentError, match=r"33 tokens.* 32: generate fewer"):
        generated(cache, "llama", prompt(30), max_new_tokens=8)
    require_nothing_held(cache)
    ids, mask = padded(prompt(20, seed=1), prompt(20, seed=2))
    with pytest.raises(ShortageError, match="10 pages of 4 tokens"):
        generated(cache, "llama", ids, mask)
    require_nothing_held(cache)
    holder = Request("holder", list(range(1, 21)))
    cache.memory.admit(holder)
    cache.memory.extend([(holder, 20)])
    with pytest.raises(ShortageError):
        cache.generate(model_named("llama"), prompt(20), max_new_tokens=2)
    cache.memory.abort(holder)
    assert torch.equal(generated(cache, "llama", prompt(20)), expected("llama", prompt(20)))


def test_rows_may_run_short_too():
    cache = cache_for(max_batch=2)
    with pytest.raises(ArgumentError, match="batch of 3, max_running is 2"):
        cache.generate(model_named("llama"), prompt(5).repeat(3, 1), max_new_tokens=2)
    holder = Request("holder", [1])
    cache.memory.admit(holder)
    with pytest.raises(ShortageError, match="row"):
        cache.generate(model_named("llama"), prompt(5).repeat(2, 1), max_new_tokens=2)
    cache.memory.abort(holder)
    require_nothing_held(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "neither beams nor num_return_sequences"),
        (dict(num_return_sequences=2, do_sample=True), "neither beams nor num_return_sequences"),
    ],
)
def test_what_multiplies_the_batch_is_refused(options, message):
    cache = cache_for()
    with pytest.raises(ArgumentError, match=message):
        cache.generate(model_named("llama"), prompt(5), max_new_tokens=2, **options)
    require_nothing_held(cache)


def test_what_a_pool_cannot_do_is_refused():
    cache, ids = cache_for(), prompt(6)
    for refused in (
        cache.reset,
        cache.early_initialization,
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: cache.offload(0),
        lambda: cache.prefetch(0),
        lambda: copy.deepcopy(cache),
        cache.layers[0].reset,
        cache.layers[0].offload,
        cache.layers[0].prefetch,
        lambda: cache.layers[0].reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(UnsupportedError, match="does not support"):
            refused()
    with pytest.raises(UnsupportedError, match="no_grad"), cache.session(ids) as past:
        model_named("llama")(ids, past_key_values=past, use_cache=True)
    require_nothing_held(cache)


def test_sessions_are_checked():
    cache, ids, model = cache_for(), prompt(6), model_named("llama")
    with pytest.raises(RequestStateError, match="no session"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with cache.session(ids), pytest.raises(RequestStateError, match="is open"), cache.session(ids):
        pass
    with pytest.raises(ArgumentError, match="begin with the 1 prompts"), cache.session(ids) as past:
        model.generate(ids, past_key_values=past, max_new_tokens=2)
        past.keep(ids + 1)
    require_nothing_held(cache)
    for bad_ids, mask, message in (
        (ids[0], None, "batch, columns"),
        (ids.float(), None, "batch, columns"),
        (ids, torch.ones(1, 5), "shape of input_ids"),
        (ids, torch.tensor([[1, 1, 1, 1, 1, 0]]), "on the left"),
        (ids, torch.tensor([[0, 1, 0, 1, 1, 1]]), "on the left"),
        (ids, torch.zeros(1, 6), "on the left"),
    ):
        with pytest.raises(ArgumentError, match=message), cache.session(bad_ids, mask):
            pass
        require_nothing_held(cache)


def test_only_what_was_generated_can_be_taken_back():
    cache, ids, model = cache_for(), prompt(6), model_named("llama")
    with cache.session(ids) as past, torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
        model(ids[:, :3], past_key_values=past, use_cache=True)
        with pytest.raises(ArgumentError, match="negative"):
            past.crop(1)
        with pytest.raises(ArgumentError, match="3 were generated"):
            past.crop(-4)
        past.crop(-2)
        assert past.get_seq_length() == 7
    require_nothing_held(cache)


def test_a_layer_must_not_be_left_out():
    cache, ids = cache_for(), prompt(6)
    rows = torch.zeros(1, 2, 6, 8)
    with pytest.raises(UnsupportedError, match="every layer must be updated"), cache.session(ids) as past:
        past.update(rows, rows, 0)
        past.update(rows[:, :, :1], rows[:, :, :1], 0)
        past.update(rows[:, :, :1], rows[:, :, :1], 1)
    require_nothing_held(cache)


def test_models_that_keep_something_else_are_refused():
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        JaxPagedCache.for_model(transformers.T5ForConditionalGeneration(t5), 64)
    kinds = dict(num_hidden_layers=2, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    recurrent = transformers.Lfm2Config(**SIZES, **kinds)
    with pytest.raises(UnsupportedError, match="layer 0 keeps a LinearAttentionLayer"):
        JaxPagedCache.for_model(transformers.Lfm2ForCausalLM(recurrent), 64)
    cache = cache_for()
    kv = dataclasses.replace(cache.memory.config.kv, layout=Layout.PAGE_MAJOR)
    by_page = init_memory_pool_and_cache(dataclasses.replace(cache.memory.config, kv=kv))
    with pytest.raises(UnsupportedError, match=r"memory: need Layout\.LAYER_MAJOR"):
        JaxPagedCache(by_page, [None, None])
    with pytest.raises(ArgumentError, match="each of the 2 layers, got 3"):
        JaxPagedCache(cache.memory, [None] * 3)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for loaded in ("transformers.cache_utils", "torch_bridge.transformers"):
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ModuleNotFoundError, match=r"jaxcache\[transformers\]"):
        importlib.import_module("torch_bridge.transformers")


def test_an_old_release_is_refused(monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = "5.16.3"
    old.cache_utils = types.ModuleType("transformers.cache_utils")
    old.cache_utils.Cache = old.cache_utils.CacheLayerMixin = object
    monkeypatch.setitem(sys.modules, "transformers", old)
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", old.cache_utils)
    monkeypatch.delitem(sys.modules, "torch_bridge.transformers")
    with pytest.raises(ImportError, match=r"5\.17 or newer, .*, got 5\.16\.3"):
        importlib.import_module("torch_bridge.transformers")
