"""What a model was given decides what a JaxPagedCache keeps: nothing but tokens, or a refusal, and never wrong KV.

The oracle is the model's own `generate`, of models whose weights are six times as large, so that wrong KV shows.
"""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from jaxcache import ArgumentError, CacheError, RequestStateError, UnsupportedError, init_memory_pool_and_cache
from tests.torch_bridge.hf_models import make_sharp
from tests.torch_bridge.tensors import DEVICE
from torch_bridge.transformers import JaxPagedCache, ShortageError
from torch_bridge.transformers_forward import longest_prefix

PAGE = 4
NEW = 8
model_named = functools.cache(make_sharp)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cache_for(name: str = "llama", tokens: int = 512, **sizes) -> JaxPagedCache:
    return JaxPagedCache.for_model(model_named(name), tokens, page_size=PAGE, **sizes)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(1, 60, (1, length), generator=generator, device="cpu").to(DEVICE)


def own(name: str, ids: torch.Tensor, **options) -> torch.Tensor:
    options = dict(do_sample=False, max_new_tokens=NEW) | options
    return model_named(name).generate(ids, attention_mask=torch.ones_like(ids), **options)


def answer(cache: JaxPagedCache, name: str, ids: torch.Tensor, **options) -> torch.Tensor:
    options = dict(do_sample=False, max_new_tokens=NEW) | options
    return cache.generate(model_named(name), ids, **options)


def reused(cache: JaxPagedCache, ids: torch.Tensor) -> int:
    with cache.session(ids) as past:
        return past.get_seq_length()


def require_right(cache: JaxPagedCache, name: str, ids: torch.Tensor) -> None:
    """Honest calls after whatever was tried: of a prompt, of more than it, and of its answer."""
    for each in (ids, torch.cat([ids, prompt(5, seed=9)], dim=1), own(name, ids)):
        assert torch.equal(answer(cache, name, each), own(name, each))
    cache.memory.check_memory(read_device=True)


def logits(name: str, past, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model_named(name)(ids, past_key_values=past, use_cache=True, **options).logits


class Passes:
    """Counts how often the layers of a model run."""

    def __init__(self, model: torch.nn.Module):
        self.count = 0
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()


IDS = prompt(14)
REFUSED = {
    "use_cache": dict(use_cache=False),
    "position_ids": dict(position_ids=torch.arange(3, 17)[None]),
    "inputs_embeds": dict(inputs_embeds=torch.ones(1, 14, 32)),
    "inputs": dict(inputs=IDS),
    "past_key_values": dict(past_key_values=DynamicCache()),
    "cache_implementation": dict(cache_implementation="static"),
    "paged": dict(cache_implementation="paged"),
    "offloaded": dict(generation_config=GenerationConfig(cache_implementation="offloaded")),
    "pixel_values": dict(pixel_values=torch.ones(1, 3, 4, 4)),
    "token_type_ids": dict(token_type_ids=torch.zeros(1, 14, dtype=torch.long)),
    "num_beams": dict(num_beams=2),
    "num_return_sequences": dict(num_return_sequences=2, do_sample=True),
    "holes": dict(attention_mask=torch.tensor([[1] * 6 + [0] + [1] * 7])),
    "padded on the right": dict(attention_mask=torch.tensor([[1] * 13 + [0]])),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED.keys())
def test_options_that_give_a_model_something_else_are_refused_before_it_runs(options, warm):
    cache = cache_for()
    if warm:
        answer(cache, "llama", IDS)
    with Passes(model_named("llama")) as passes, pytest.raises(CacheError):
        answer(cache, "llama", IDS, **options)
    assert passes.count == 0
    assert reused(cache, IDS) == (12 if warm else 0)
    require_right(cache, "llama", IDS)


@pytest.mark.parametrize("name", ["llama", "mpt"])
@pytest.mark.parametrize("where", ["model", "model.generation_config", "generation_config"])
def test_a_config_that_says_use_cache_false_does_not_spoil_anything(name, where, monkeypatch):
    model, options = model_named(name), {}
    if where == "generation_config":
        options = dict(generation_config=GenerationConfig(use_cache=False, max_new_tokens=NEW))
    else:
        config = model.config if where == "model" else model.generation_config
        monkeypatch.setattr(config, "use_cache", False)
    cache = cache_for(name)
    for cached in (0, 12):
        assert reused(cache, IDS) == cached
        assert torch.equal(answer(cache, name, IDS, **options), own(name, IDS))
    require_right(cache, name, IDS)


def test_generate_in_a_session_refuses_whole_sequences_in_each_pass():
    cache, model = cache_for(), model_named("llama")
    with pytest.raises(UnsupportedError, match="use_cache is False"), cache.session(IDS) as past:
        past.keep(model.generate(IDS, past_key_values=past, max_new_tokens=NEW, use_cache=False))
    require_right(cache, "llama", IDS)


def test_right_positions_may_be_given():
    cache = cache_for()
    for _ in range(2):
        output = answer(cache, "llama", IDS, position_ids=torch.arange(14, device=DEVICE)[None])
        assert torch.equal(output, own("llama", IDS))
    require_right(cache, "llama", IDS)


WRONG_PASSES = {
    "positions": (dict(position_ids=torch.arange(3, 17)[None]), "position_ids must be"),
    "positions of other columns": (dict(position_ids=torch.arange(13)[None]), "position_ids must be"),
    "a hole": (dict(attention_mask=torch.tensor([[1] * 6 + [0] + [1] * 7])), "attention_mask must be"),
    "a mask of four dimensions": (dict(attention_mask=torch.ones(1, 1, 14, 14)), "attention_mask must be"),
    "a short mask": (dict(attention_mask=torch.ones(1, 13)), "attention_mask must be"),
    "unknown": (dict(token_type_ids=torch.zeros(1, 14)), "token_type_ids: KV may depend on it"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_PASSES.values(), ids=WRONG_PASSES.keys())
def test_a_pass_with_something_else_is_refused(options, message):
    cache = cache_for()
    with (
        Passes(model_named("llama")) as passes,
        pytest.raises(UnsupportedError, match=message),
        cache.session(IDS) as past,
    ):
        logits("llama", past, IDS, **options)
    assert passes.count == 0
    require_right(cache, "llama", IDS)


def test_other_tokens_than_the_prompts_are_refused():
    cache = cache_for()
    with pytest.raises(ArgumentError, match="other tokens than the prompts"), cache.session(IDS) as past:
        logits("llama", past, prompt(14, seed=1))
    with pytest.raises(UnsupportedError, match="inputs_embeds"), cache.session(IDS) as past, torch.no_grad():
        model_named("llama")(inputs_embeds=torch.ones(1, 14, 32), past_key_values=past)
    require_right(cache, "llama", IDS)


def test_padding_must_be_told_to_the_model():
    cache, mask = cache_for(), torch.tensor([[0] * 4 + [1] * 10])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for options, message in (
        ({}, "attention_mask must be"),
        (dict(attention_mask=mask), "position_ids must be"),
        (dict(attention_mask=torch.ones_like(mask), position_ids=positions), "attention_mask must be"),
        (dict(attention_mask=mask, position_ids=torch.arange(14)[None]), "position_ids must be"),
    ):
        with pytest.raises(UnsupportedError, match=message), cache.session(IDS, mask, reuse=False) as past:
            logits("llama", past, IDS, **options)
    with cache.session(IDS, mask, reuse=False) as past:
        logits("llama", past, IDS, attention_mask=mask, position_ids=positions)
    assert reused(cache, IDS[:, 4:]) == 8
    require_right(cache, "llama", IDS[:, 4:])


def test_only_what_the_model_was_given_is_kept():
    """`keep` with tokens that the model was not given: of those that it was, only the ones before the first other."""
    cache, ids = cache_for(), prompt(8)
    said = torch.cat([ids, prompt(8, seed=3)], dim=1)
    given = torch.cat([said[:, :12], prompt(4, seed=4)], dim=1)
    with cache.session(ids) as past:
        logits("llama", past, given[:, :8])
        logits("llama", past, given[:, 8:])
        past.keep(said)
    assert reused(cache, torch.cat([said, ids], dim=1)) == 12
    assert reused(cache, torch.cat([given, ids], dim=1)) == 12
    for each in (said, given):
        require_right(cache, "llama", each)


def test_a_pass_of_a_part_of_the_model_leaves_nothing():
    """Nobody sees what the decoder alone is given; and afterwards its columns are not those of a known sequence."""
    cache, model = cache_for(), model_named("llama")
    with cache.session(IDS) as past, torch.no_grad():
        model.model(IDS, position_ids=torch.arange(3, 17)[None], past_key_values=past, use_cache=True)
        past.keep(IDS)
    assert reused(cache, IDS) == 0
    with pytest.raises(RequestStateError, match="leave the session"), cache.session(IDS) as past:
        with torch.no_grad():
            model.model(IDS, past_key_values=past, use_cache=True)
        logits("llama", past, IDS[:, :1])
    require_right(cache, "llama", IDS)


def test_layers_without_kv_are_not_kept():
    """The second layer never ran: its pages hold what was there before."""
    cache, rows = cache_for(), torch.zeros(1, 2, 14, 8)
    with pytest.raises(UnsupportedError, match="every layer must be updated"), cache.session(IDS) as past:
        past.update(rows, rows, 0)
        past.update(rows[:, :, :1], rows[:, :, :1], 0)
        past.update(rows[:, :, :1], rows[:, :, :1], 1)
    assert reused(cache, IDS) == 0


def test_without_a_model_nothing_that_is_computed_stays():
    """Nobody can tell then what a loop gives to which model."""
    known = cache_for()
    memory = init_memory_pool_and_cache(known.memory.config)
    cache = JaxPagedCache(memory, [None, None])
    with cache.session(IDS) as past:
        logits("llama", past, IDS)
        with pytest.raises(RequestStateError, match="model="):
            past.keep(IDS)
    assert reused(cache, IDS) == 0
    with cache.session(IDS, model=model_named("llama")) as past:
        logits("llama", past, IDS)
    assert reused(cache, IDS) == 12
    require_right(cache, "llama", IDS)


@pytest.mark.parametrize(
    "options",
    [dict(assistant_early_exit=1), dict(prompt_lookup_num_tokens=3), dict(guidance_scale=1.5)],
    ids=lambda options: next(iter(options)),
)
def test_passes_beside_the_session_leave_nothing_in_it(options):
    """Of an early exit, which runs fewer layers of the same model; of a guess; of a prompt beside the real one."""
    cache = cache_for()
    for _ in range(2):
        assert torch.equal(answer(cache, "llama", IDS, **options), own("llama", IDS, **options))
    require_right(cache, "llama", IDS)


# KV that depends on more than the tokens before.


@pytest.mark.parametrize(("name", "limit"), [("dynamic", 63), ("longrope", 64), ("phi3", 64), ("yarn", None)])
def test_positions_by_length_never_answer_wrongly(name, limit):
    """Two frequencies for one token: which one depends on how long the sequence became that it was computed in."""
    assert longest_prefix(model_named(name)) == limit
    cache, text, refused = cache_for(name, tokens=1024), prompt(110), set()
    for length in (100, 50, 63, 64, 70, 20, 58, 100, 50):
        ids = text[:, :length]
        right = own(name, ids)  # also leaves the model with the frequencies of a longer sequence
        try:
            assert torch.equal(answer(cache, name, ids), right), length
        except UnsupportedError as error:
            assert "use a DynamicCache" in str(error)
            refused.add(length)
    assert refused <= ({58, 63, 64, 70, 100} if limit else set())
    assert {70, 100} <= refused or limit is None
    assert reused(cache, text[:, :60]) >= 56


@pytest.mark.parametrize("order", [(100, 50), (50, 100), (70, 60, 64, 63), (60, 66, 58)])
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_positions_by_length_in_every_order(name, order):
    cache, text = cache_for(name, tokens=1024), prompt(110, seed=2)
    for length in order:
        own(name, text)
        try:
            output = answer(cache, name, text[:, :length])
        except UnsupportedError:
            continue
        assert torch.equal(output, own(name, text[:, :length]))


def test_the_model_that_lets_go_of_its_cache_says_so():
    """Phi-3 computes a sequence anew, beside its cache, once that is longer than its short frequencies are for."""
    cache = cache_for("phi3", tokens=1024)
    with pytest.raises(UnsupportedError, match="100 tokens, and from 65 on"):
        answer(cache, "phi3", prompt(100))
    with pytest.raises(UnsupportedError, match="and none could be reused"), cache.session(prompt(65)):
        pass
    assert torch.equal(answer(cache, "phi3", prompt(60)), own("phi3", prompt(60)))


# Windows that are gone.


@functools.cache
def long_text() -> tuple[JaxPagedCache, torch.Tensor]:
    """A prompt of 60 tokens in a memory with room for the windows of 48, of which only the last ones stayed."""
    cache, ids = cache_for("gemma3", tokens=512, window_tokens=48), prompt(60)
    answer(cache, "gemma3", ids, prefill_chunk_size=8)
    assert reused(cache, ids) == 56
    return cache, ids


def in_chunks(past, ids: torch.Tensor, **options) -> torch.Tensor:
    """Logits of the columns that are not there yet, eight at a time."""
    first = past.get_seq_length()
    return torch.cat([logits("gemma3", past, ids[:, i : i + 8]) for i in range(first, ids.shape[1], 8)], dim=1)


def test_a_prompt_computed_again_does_not_read_windows_that_are_gone():
    """The windows of its first columns had been evicted; page 0 was read instead, and 47 of 60 columns were wrong."""
    cache, ids = long_text()
    expected = logits("gemma3", DynamicCache(config=model_named("gemma3").config), ids)
    for _ in range(2):
        with cache.session(ids, reuse=False) as past:
            assert past.get_seq_length() == 0
            torch.testing.assert_close(in_chunks(past, ids), expected, rtol=1e-3, atol=1e-3)
    cache.memory.check_memory(read_device=True)


@pytest.mark.parametrize("other", [60, 33])
def test_a_cold_row_does_not_make_the_others_read_windows_that_are_gone(other):
    """All are computed from the first column that one of them lacks: 55 of 60 columns of the cached one were wrong."""
    cache, ids = long_text()
    cold = torch.nn.functional.pad(prompt(other, seed=other), (60 - other, 0))
    both, mask = torch.cat([ids, cold]), torch.cat([torch.ones_like(ids), (cold != 0).long()])
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    expected = model_named("gemma3").generate(both, **options)
    output = cache.generate(model_named("gemma3"), both, prefill_chunk_size=4, **options)
    assert torch.equal(output, expected)
    cache.memory.check_memory(read_device=True)


def test_prompt_lookup_does_not_read_windows_that_are_gone():
    """It gives the model the whole prompt at once: without the windows, there must be room to compute them again."""
    options = dict(prompt_lookup_num_tokens=3, max_new_tokens=12)
    cache, ids = long_text()
    with pytest.raises(ShortageError):
        answer(cache, "gemma3", ids, **options)
    cache = cache_for("gemma3", tokens=512, window_tokens=96)
    for seed in (0, 1, 2, 0):
        answer(cache, "gemma3", prompt(60, seed))
    for seed in (0, 1, 2):
        assert torch.equal(
            answer(cache, "gemma3", prompt(60, seed), **options), own("gemma3", prompt(60, seed), **options)
        )


def test_a_window_side_that_keeps_less_than_a_layer_needs_is_refused():
    cache = cache_for("gemma3")
    for windows in ([9, None, 8], [None, None, 8]):
        with pytest.raises(ArgumentError, match="window side, which keeps 8 tokens"):
            JaxPagedCache(cache.memory, windows)


# What a model keeps beside its cache.


def picture() -> dict[str, torch.Tensor]:
    """A prompt with an image of 64 patches, 16 tokens that take 4 positions."""
    ids = torch.cat([prompt(5), torch.tensor([[62] + [60] * 16 + [63]], device=DEVICE), prompt(5, seed=1)], dim=1)
    image = dict(pixel_values=torch.ones(64, 12), image_grid_thw=torch.tensor([[1, 8, 8]]))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 60).long(), **image)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loop", [False, True])
def test_positions_of_an_image_do_not_move_those_of_the_next_text(seed, loop):
    name, cache, text = "qwen2_5_vl", cache_for("qwen2_5_vl"), prompt(39, seed)
    model, right = model_named(name), own(name, text)
    answer(cache, name, text[:, :30])
    model.generate(**picture(), max_new_tokens=2)
    assert model.model.rope_deltas.item() == -12
    if not loop:
        assert torch.equal(answer(cache, name, text), right)
        return
    with cache.session(text) as past:
        assert past.get_seq_length() == 28
        tokens = text
        for _ in range(NEW):
            model_deltas, model.model.rope_deltas = model.model.rope_deltas, torch.tensor([[-12]])
            assert model_deltas is None
            tokens = torch.cat([tokens, logits(name, past, tokens[:, past.get_seq_length() :])[:, -1:].argmax(-1)], 1)
        past.keep(tokens)
    assert torch.equal(tokens, right)
    require_right(cache, name, text)


def test_images_are_refused_before_the_model_runs():
    cache, inputs = cache_for("qwen2_5_vl"), picture()
    with Passes(model_named("qwen2_5_vl")) as passes, pytest.raises(UnsupportedError, match="KV may depend on it"):
        cache.generate(model_named("qwen2_5_vl"), inputs.pop("input_ids"), max_new_tokens=2, **inputs)
    assert passes.count == 0
    text = prompt(14, seed=5)
    zeros = torch.zeros_like(text)
    assert torch.equal(answer(cache, "qwen2_5_vl", text, mm_token_type_ids=zeros), own("qwen2_5_vl", text))


def test_an_encoder_decoder_is_refused_whoever_made_the_memory():
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        cache_for().generate(transformers.T5ForConditionalGeneration(t5).eval(), IDS, max_new_tokens=2)
