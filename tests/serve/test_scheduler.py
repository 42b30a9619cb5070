"""The scheduler against a dense oracle: whatever arrives, ends or gives way, tokens are those without a cache."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from examples.engine.engine import EngineConfig, new_engine
from examples.engine.models import FAMILIES, Mixer, random_weights
from jaxcache import RequestState
from jaxcache.errors import ArgumentError
from jaxcache.serve import FinishReason, Generation, SamplingParams, SamplingRows, Scheduler, sample
from jaxcache.steps.buckets import Buckets
from jaxcache.steps.compiled import CompiledSteps
from tests.serve.dense import logits_of

LAYERS = {
    "llama": (Mixer.ATTENTION,) * 2,
    "deepseek": (Mixer.LATENT,) * 2,
    "gemma": (Mixer.WINDOW, Mixer.ATTENTION),
    "gated-delta": (Mixer.DELTA, Mixer.ATTENTION),
}
SIZES = {"width": 32, "ff_width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 10, "vocabulary": 61}
MODELS = {name: dataclasses.replace(FAMILIES[name], layers=LAYERS[name], **SIZES) for name in LAYERS}
CONTEXT = 96
CONFIG = EngineConfig(
    device_tokens=512,
    page_size=4,
    max_running=4,
    max_context_len=CONTEXT,
    chunk=16,
    buckets=Buckets((4,), (4, 16), (4,)),
)
COMPILED = {name: CompiledSteps() for name in MODELS}
STEPS: dict[str, tuple] = {}
_sample = jax.jit(sample)


def scheduler(name: str = "llama", **changes) -> Scheduler:
    """A small engine. Those of one family share what is compiled."""
    top = changes.pop("top_logprobs", 2)
    config = dataclasses.replace(CONFIG, top_logprobs=top, **changes)
    found = new_engine(MODELS[name], config)
    if top == 2:
        found.memory.runner.compiled = COMPILED[name]
        found._step, found._scoring_step = STEPS.setdefault(name, (found._step, found._scoring_step))
    return found


def check(name: str, generations: list[Generation]) -> None:
    """Every token is the one that the dense model gives, and so is every log-probability."""
    logits = logits_of(
        MODELS[name],
        random_weights(MODELS[name], 0),
        [[*each.request.origin_input_ids, *each.tokens] for each in generations],
        CONTEXT,
    )
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for each, own_logits, own in zip(generations, logits, logprobs, strict=False):
        start, params = each.request.prompt_len, each.params
        after = np.arange(start - 1, start - 1 + len(each.tokens))
        if params.temperature == 0:
            want = np.argmax(own_logits[after], axis=-1)
        else:
            want = [drawn_alone(own_logits[i], params, i + 1 - start) for i in after]
        assert list(each.tokens) == list(want), each.request.rid
        assert len(each.logprobs) == len(each.tokens)
        np.testing.assert_allclose(each.logprobs, own[after, list(each.tokens)], atol=2e-4)
        for i, top in zip(after, each.top_logprobs, strict=bool(params.logprobs)):
            np.testing.assert_allclose(list(top.values()), np.sort(own[i])[::-1][: params.logprobs], atol=2e-4)
            assert all(abs(own[i, token] - value) < 2e-4 for token, value in top.items())
        if params.prompt_logprobs and each.tokens:
            prompt = np.asarray(each.request.origin_input_ids)
            assert np.isnan(each.prompt_logprobs[0])
            np.testing.assert_allclose(each.prompt_logprobs[1:], own[np.arange(start - 1), prompt[1:]], atol=2e-4)


def drawn_alone(logits: np.ndarray, params: SamplingParams, sampled: int) -> int:
    """The token that a request draws in a batch of its own."""
    rows = SamplingRows.of(1)
    rows.set(0, params, prompt_len=0)
    return int(_sample(logits[None], rows, np.array([sampled], np.int32))[0])


def check_ended(served: Scheduler) -> None:
    """Nothing runs, so nothing is owned by a request, and all that is cached can be evicted."""
    served.memory.check_memory(read_device=True)
    assert not served.memory.running and not served.has_work
    assert served.memory.get_token_info()[0] == 0
    assert served.memory.req_to_token_pool.available_size() == CONFIG.max_running


def random_prompt(rng: np.random.Generator, most: int) -> list[int]:
    """Prompts that begin alike in half of the cases, as chats do."""
    shared = np.random.default_rng(rng.integers(3)).integers(61, size=most).tolist()
    cut = int(rng.integers(0, most))
    return (shared[:cut] + rng.integers(61, size=int(rng.integers(1, 12))).tolist())[:most]


def random_params(rng: np.random.Generator, most: int) -> SamplingParams:
    """Greedy, drawn, restricted, with stop tokens, with log-probabilities."""
    return SamplingParams(
        max_tokens=int(rng.integers(1, most)),
        temperature=float(rng.choice([0, 0, 0.7, 1.3])),
        top_k=int(rng.choice([0, 0, 1, 5])),
        top_p=float(rng.choice([1, 1, 0.6, 0.9])),
        seed=int(rng.integers(2**32)),
        stop_token_ids=tuple(rng.integers(61, size=int(rng.integers(0, 3))).tolist()),
        logprobs=int(rng.integers(0, 3)),
        prompt_logprobs=bool(rng.random() < 0.15),
    )


def random_run(served: Scheduler, rng: np.random.Generator, requests: int, most: int) -> list[Generation]:
    """Requests that arrive and are cancelled at random times; memory is audited after every step."""
    generations: list[Generation] = []
    while len(generations) < requests or served.has_work:
        if len(generations) < requests and rng.random() < 0.6:
            prompt, params = random_prompt(rng, most // 2), random_params(rng, most // 2)
            generations.append(served.submit(prompt, params, priority=int(rng.integers(3))))
        if generations and rng.random() < 0.06:
            served.cancel(generations[int(rng.integers(len(generations)))])
        before = {each: len(each.tokens) for each in generations}
        outputs = served.step()
        for each in generations:
            new = [output.token for output in outputs if output.generation is each]
            assert list(each.tokens)[before[each] :] == new
        served.memory.check_memory()
    return generations


ROOMY_BY_DAY = "llama"


@pytest.mark.parametrize(
    ("name", "device_tokens"),
    [(name, 64) for name in MODELS]
    + [pytest.param(name, 512, marks=() if name == ROOMY_BY_DAY else pytest.mark.slow) for name in MODELS],
)
def test_tokens_are_those_without_a_cache(name: str, device_tokens: int) -> None:
    served = scheduler(name, device_tokens=device_tokens)
    generations = random_run(served, np.random.default_rng(device_tokens), requests=40, most=60)
    check_ended(served)
    check(name, generations)
    assert sum(each.cached_tokens or 0 for each in generations) > 0
    assert {each.finish_reason for each in generations} == set(FinishReason)
    if device_tokens == 64:
        assert sum(each.retractions for each in generations) > 5
    for each in generations:
        reason, tokens, params = each.finish_reason, each.tokens, each.params
        stops = [token in params.stop_token_ids for token in tokens]
        assert not any(stops[:-1])
        assert (reason is FinishReason.STOP) == (bool(stops) and stops[-1] and reason is not FinishReason.CANCELLED)
        assert len(tokens) == params.max_tokens or reason is not FinishReason.LENGTH
        assert each.request.state is RequestState.DONE


def test_an_offloaded_request_continues_with_its_own_tokens() -> None:
    served = scheduler(device_tokens=64)
    served._offload = True
    generations = random_run(served, np.random.default_rng(5), requests=25, most=60)
    check_ended(served)
    check("llama", generations)
    assert sum(each.retractions for each in generations) > 0


def test_draws_depend_on_the_seed_and_not_on_the_batch() -> None:
    prompt, params = list(range(20)), SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    alone = scheduler().generate([prompt], params)[0]
    served = scheduler(device_tokens=64)
    rng = np.random.default_rng(0)
    others = [served.submit(random_prompt(rng, 30), SamplingParams(10, 1.0), priority=i % 2) for i in range(6)]
    among = served.submit(prompt, params)
    others += [served.submit(random_prompt(rng, 30), SamplingParams(10, 1.0)) for _ in range(3)]
    while served.has_work:
        served.step()
    assert among.tokens == alone.tokens
    other_seed = scheduler().generate([prompt], dataclasses.replace(params, seed=8))[0]
    assert other_seed.tokens != alone.tokens


def test_what_can_never_fit_is_refused_with_the_reason() -> None:
    served = scheduler(device_tokens=64)
    with pytest.raises(ArgumentError, match=r"request-0 can never run here with max_tokens=40: .*there are 16"):
        served.submit(list(range(40)), SamplingParams(max_tokens=40))
    with pytest.raises(ArgumentError, match=r"max_context_len is 96"):
        served.submit(list(range(60)), SamplingParams(max_tokens=40))
    with pytest.raises(ArgumentError, match="top_logprobs"):
        served.submit([1], SamplingParams(logprobs=3))
    assert not served.has_work
    largest = served.generate([list(range(40))], SamplingParams(max_tokens=25))[0]  # the last token has no KV
    assert largest.finish_reason is FinishReason.LENGTH
    check_ended(served)
    check("llama", [largest])


def test_a_higher_priority_runs_first_and_a_lower_one_gives_way() -> None:
    served = scheduler(device_tokens=64)
    low = served.submit(list(range(30)), SamplingParams(max_tokens=20))
    while not low.tokens:
        served.step()
    high = served.submit(list(range(40, 61)) * 2, SamplingParams(max_tokens=10), priority=1)
    served.step()
    assert high.request.state is RequestState.RUNNING and low.request.state is RequestState.RETRACTED
    ended = []
    while served.has_work:
        ended += [output.generation for output in served.step() if output.generation.finish_reason]
    assert ended == [high, low]
    check("llama", ended)


def test_of_equal_priority_the_first_comes_first() -> None:
    served = scheduler()
    order = [served.submit([i] * 5, SamplingParams(max_tokens=3)) for i in range(9)]
    served.step()
    assert served.running == order[:4] and served.waiting == order[4:]


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    served = scheduler()
    short = served.submit([1, 2, 3], SamplingParams(max_tokens=30))
    served.step()
    long = served.submit(list(range(60)), SamplingParams(max_tokens=2))
    for _ in range(3):
        before = len(short.tokens)
        served.step()
        assert len(short.tokens) == before + 1 and not long.tokens


def test_cancelling_gives_everything_back() -> None:
    served = scheduler()
    generations = [served.submit([i] * 30, SamplingParams(max_tokens=30)) for i in range(6)]
    served.step()
    for each in generations:  # some prefill, some wait
        served.cancel(each)
        served.cancel(each)
        served.memory.check_memory()
    check_ended(served)
    assert {each.finish_reason for each in generations} == {FinishReason.CANCELLED}


def test_a_step_that_fails_has_taken_nothing() -> None:
    served = scheduler()
    served.submit([1, 2, 3])
    good, served._step = served._step, lambda pool, batch, *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        served.step()
    served.memory.check_memory()
    served._step = good
    while served.has_work:
        served.step()
    check_ended(served)


def test_other_weights_take_effect_after_a_reset() -> None:
    served = scheduler()
    prompt = list(range(20))
    first = served.generate([prompt])[0]
    served.args, _ = (random_weights(MODELS["llama"], 1),), served.memory.reset()
    second = served.generate([prompt])[0]
    assert second.cached_tokens == 0 and second.tokens != first.tokens


def test_many_decoding_requests_leave_room_for_prompts() -> None:
    """Decoding requests fill the chunk: prompts get steps of their own."""
    served = scheduler("llama", chunk=4, buckets=Buckets((4,), (4,), (4,)))
    generations = served.generate([[i] * 9 for i in range(8)], SamplingParams(max_tokens=9))
    check_ended(served)
    check("llama", generations)


def test_steps_that_cannot_hold_all_that_run_are_refused() -> None:
    with pytest.raises(ArgumentError, match="decode_sizes must reach max_running = 4, got 2"):
        scheduler(buckets=Buckets((2,), (16,), (4,)))
