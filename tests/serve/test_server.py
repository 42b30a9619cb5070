"""The example server, driven by the `openai` package over a socket of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from examples.engine.engine import EngineConfig, decode, encode, new_engine
from examples.engine.models import FAMILIES, Mixer
from examples.engine.protocol import Answer
from examples.engine.server import new_app
from examples.engine.worker import EngineStopped, Token, Worker
from jaxcache.serve import SamplingParams, Scheduler
from jaxcache.steps.buckets import Buckets
from tests.support.waiting import wait_until

MODEL = dataclasses.replace(FAMILIES["llama"], layers=(Mixer.ATTENTION,) * 2)
CONFIG = EngineConfig(
    device_tokens=2048,
    page_size=8,
    max_running=8,
    max_context_len=256,
    chunk=64,
    top_logprobs=2,
    buckets=Buckets((8,), (64,), (8,)),
)


@dataclasses.dataclass
class Served:
    """A server that runs, and its engine."""

    url: str
    scheduler: Scheduler


@contextlib.contextmanager
def serving(scheduler: Scheduler) -> Iterator[Served]:
    """A server on a free port of the loopback interface."""
    app = new_app(scheduler, "llama")
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="on", timeout_graceful_shutdown=10)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    assert host == "127.0.0.1"
    try:
        yield Served(f"http://127.0.0.1:{port}/v1", scheduler)
    finally:
        server.should_exit = True
        thread.join()
        scheduler.memory.check_memory(read_device=True)  # the thread that drove it has ended


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_engine(MODEL, CONFIG)) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def alone() -> Scheduler:
    """The same engine without a server and without a cache."""
    return new_engine(MODEL, dataclasses.replace(CONFIG, share_prefixes=False))


def text_of(alone: Scheduler, prompt: str, params: SamplingParams) -> str:
    params = dataclasses.replace(params, stop_token_ids=(256,))
    return decode(list(alone.generate([encode(prompt)], params)[0].tokens))


def test_the_model_is_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["llama"]


def test_a_completion_is_what_the_engine_computes(client, alone) -> None:
    prompt = "The quick brown fox"
    found = client.completions.create(model="llama", prompt=prompt, max_tokens=20, temperature=0)
    assert found.choices[0].text == text_of(alone, prompt, SamplingParams(20))
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 20)


def test_a_chat_continues_from_the_cache(client, alone) -> None:
    messages = [{"role": "system", "content": "Be brief. " * 5}, {"role": "user", "content": "What is a page?"}]
    asked = dict(model="llama", messages=messages, max_tokens=10, temperature=0)
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages) + "<assistant>"
    assert first.choices[0].message.content == text_of(alone, text, SamplingParams(10))
    assert second.choices[0].message == first.choices[0].message
    assert second.usage.prompt_tokens_details.cached_tokens >= len(text) - 8


def test_a_stream_says_the_same_piece_by_piece(client) -> None:
    asked = dict(model="llama", prompt="To stream or not", max_tokens=24, temperature=0.8, seed=5)
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * 23 + ["length"]
    assert parts[-1].usage.completion_tokens == 24
    chat = client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "Hi"}], max_tokens=6, temperature=0, stream=True
    )
    deltas = [part.choices[0].delta for part in chat]
    assert deltas[0].role == "assistant" and all(isinstance(delta.content, str) for delta in deltas)


def test_several_choices_of_several_prompts(client, alone) -> None:
    found = client.completions.create(model="llama", prompt=["one", "two"], n=2, max_tokens=8, temperature=1.0, seed=3)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    want = [text_of(alone, prompt, SamplingParams(8, 1.0, seed=3 + i)) for prompt in ("one", "two") for i in range(2)]
    assert texts == want and len(set(texts)) == 4
    tokens = client.completions.create(model="llama", prompt=encode("one"), max_tokens=8, temperature=1.0, seed=3)
    assert tokens.choices[0].text == want[0]


def test_log_probabilities_have_the_protocols_form(client, alone) -> None:
    asked = dict(model="llama", max_tokens=4, temperature=0)
    found = client.completions.create(prompt="abc", logprobs=2, **asked).choices[0].logprobs
    generation = alone.generate([encode("abc")], SamplingParams(4, logprobs=2))[0]
    assert found.token_logprobs == pytest.approx(generation.logprobs, abs=1e-4)
    assert [len(top) for top in found.top_logprobs] == [2] * 4
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=1, **asked)
    for each in chat.choices[0].logprobs.content:
        assert each.top_logprobs[0].bytes == each.bytes and each.top_logprobs[0].logprob == each.logprob


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client, alone, served) -> None:
    whole = text_of(alone, "A long story", SamplingParams(60, 0.9, seed=1))
    stop = whole[20:22]
    asked = dict(model="llama", prompt="A long story", max_tokens=60, temperature=0.9, seed=1, stop=[stop, "\0\0\0"])
    found = client.completions.create(**asked)
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == (
        found.choices[0].text
    )
    wait_until(lambda: not served.scheduler.has_work)  # it was cancelled, not computed to its end


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt": "x" * 300}, "max_context_len is 256"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [1, 2, 999]}, "tokens must be in"),
        ({"prompt": ""}, "at least one token"),
        ({"logprobs": 3}, "at most 2"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"top_k": "many"}}, "top_k must be int"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_with_the_reason(client, changes: dict, match: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=match):
        client.completions.create(**{"model": "llama", "prompt": "x", "stream": stream} | changes)


def test_another_model_is_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError, match="llama"):
        client.completions.create(model="gpt", prompt="x")


def test_clients_that_go_away_cancel_their_requests(served: Served, monkeypatch) -> None:
    cancel, reached = served.scheduler.cancel, []

    def noted(generation) -> None:
        reached.append(len(generation.tokens))
        cancel(generation)

    monkeypatch.setattr(served.scheduler, "cancel", noted)

    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            asked = dict(model="llama", prompt="forever", max_tokens=240, extra_body={"ignore_eos": True})
            stream = await client.completions.create(**asked, stream=True)
            async for _ in stream:
                break
            assert served.scheduler.has_work
            await stream.close()
            await asyncio.to_thread(wait_until, lambda: not served.scheduler.has_work)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.completions.create(**asked, n=4), timeout=0.1)
        await asyncio.to_thread(wait_until, lambda: not served.scheduler.has_work)

    asyncio.run(go())
    assert len(reached) == 5 and max(reached) < 240


def test_many_clients_at_once(served: Served, alone: Scheduler) -> None:
    prompts = [f"A prefix that is shared. Question {i % 5}?" * (1 + i % 3) for i in range(24)]
    params = [SamplingParams(5 + i % 9, (0.0, 0.9)[i % 2], seed=i) for i in range(24)]

    async def ask(client, i: int) -> str:
        own = params[i]
        options = dict(max_tokens=own.max_tokens, temperature=own.temperature, seed=own.seed)
        found = await client.completions.create(model="llama", prompt=prompts[i], **options)
        return found.choices[0].text

    async def go() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(24)))

    assert asyncio.run(go()) == [text_of(alone, *pair) for pair in zip(prompts, params, strict=True)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_says_so() -> None:
    scheduler = new_engine(MODEL, CONFIG)
    scheduler._step = lambda pool, batch, *args: 1 / 0
    with serving(scheduler) as served, openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        for stream in (False, True, False):
            with pytest.raises(openai.InternalServerError, match="the engine"):
                client.completions.create(model="llama", prompt="x", stream=stream)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_asked_while_an_engine_fails_is_answered() -> None:
    """A request that is put between the failure and the end of the thread waited for ever."""
    scheduler = new_engine(MODEL, CONFIG)
    worker, fails = Worker(scheduler), threading.Event()

    def fail(pool, batch, *args):
        wait_until(lambda: worker._commands.qsize() == 1)  # the second request is asked meanwhile
        fails.set()
        raise ZeroDivisionError("no engine")

    scheduler._step = fail

    async def ask() -> None:
        async for _ in worker.stream([1, 2], SamplingParams(2)):
            pass

    async def go() -> list:
        first = asyncio.ensure_future(ask())
        await asyncio.to_thread(wait_until, lambda: scheduler.has_work)
        return await asyncio.wait_for(asyncio.gather(first, ask(), return_exceptions=True), 30)

    worker.start()
    answers = asyncio.run(go())
    assert fails.is_set() and [type(answer) for answer in answers] == [EngineStopped] * 2
    with pytest.raises(EngineStopped, match="no engine"):
        asyncio.run(ask())
    worker.stop()


def test_what_runs_when_the_engine_is_stopped_is_answered() -> None:
    worker = Worker(new_engine(MODEL, CONFIG))

    async def go() -> None:
        tokens = worker.stream([1, 2], SamplingParams(200))
        await anext(tokens)
        await asyncio.to_thread(worker.stop)
        with pytest.raises(EngineStopped, match="stopped"):
            async for _ in tokens:
                pass

    worker.start()
    asyncio.run(asyncio.wait_for(go(), 60))


def test_text_is_cut_at_whole_characters_and_before_stop_texts() -> None:
    answer = Answer(0, stops=("end",))
    tokens = "Käse e en end".encode()
    said = [answer.add(Token(token, 0.0, {}, None, 0)) for token in tokens]
    assert "".join(said) == answer.text == "Käse e en " and answer.finish_reason == "stop"
    assert "\ufffd" not in answer.text
