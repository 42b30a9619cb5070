"""The engine behind OpenAI's protocol: completions, chat completions, models; whole or as a stream.

    python -m examples.engine.server --model llama --port 8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="llama", messages=[{"role": "user", "content": "Hello"}])

It needs the `serve` extra. It listens on the loopback interface unless told otherwise: there is no authentication. A
client that goes away cancels what it asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from examples.engine.engine import EngineConfig, new_engine
from examples.engine.models import FAMILIES
from examples.engine.protocol import Answer, Asked, Form
from examples.engine.worker import EngineStopped, Worker
from jaxcache.errors import ArgumentError
from jaxcache.serve import Scheduler
from jaxcache.steps.warm_up import show_progress

TOP_LOGPROBS = 5
"""Most log-probabilities that a client can ask for at each place."""


def new_app(scheduler: Scheduler, model: str) -> Starlette:
    """The server of one engine.

    Args:
      scheduler: The server's from its start on.
      model: The name that clients call it by.
    """
    worker, started = Worker(scheduler), int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    async def models(request: Request) -> Response:
        data = [{"id": model, "object": "model", "created": started, "owned_by": "jaxcache"}]
        return JSONResponse({"object": "list", "data": data})

    async def health(request: Request) -> Response:
        return Response(status_code=200 if worker.is_alive else 503)

    def answering(is_chat: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                body = await request.json()
                asked = Asked.read(body, is_chat)
            except json.JSONDecodeError as error:
                return refusal(f"the body must be JSON: {error}")
            except ArgumentError as error:
                return refusal(str(error))
            if body.get("model", model) != model:
                return refusal(f"model must be {model!r}, got {body['model']!r}", status=404)
            form = Form(asked, model)
            if asked.is_stream:
                return await streamed(worker, form)
            return await whole(worker, form, request)

        return answer

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", answering(is_chat=False), methods=["POST"]),
            Route("/v1/chat/completions", answering(is_chat=True), methods=["POST"]),
        ],
    )


def refusal(message: str, status: int = 400) -> Response:
    """An error as clients expect it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def failure(error: BaseException) -> Response:
    """The answer to a request that the engine refused, or could not finish."""
    return refusal(str(error), 503 if isinstance(error, EngineStopped) else 400)


async def grow(worker: Worker, asked: Asked, answer: Answer, prompt: list[int], i: int) -> AsyncIterator[str]:
    """Computes one choice; yields the new text after each token. It ends, and is cancelled, at a stop text."""
    stream = worker.stream(prompt, asked.params[i], priority=asked.priority, extra_key=asked.key)
    async with contextlib.aclosing(stream):
        async for token in stream:
            yield answer.add(token)
            if answer.finish_reason is not None:
                return


def choices(worker: Worker, asked: Asked) -> list[tuple[Answer, AsyncIterator[str]]]:
    """All choices of all prompts, none of them begun."""
    pairs = [(prompt, i) for prompt in asked.prompts for i in range(len(asked.params))]
    answers = [Answer(index, asked.stops) for index in range(len(pairs))]
    return [(answer, grow(worker, asked, answer, *pair)) for answer, pair in zip(answers, pairs, strict=True)]


async def whole(worker: Worker, form: Form, request: Request) -> Response:
    """The answer at once. If its client goes away meanwhile, the work ends."""

    async def finish(texts: AsyncIterator[str]) -> None:
        async for _ in texts:
            pass

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    begun = choices(worker, form.asked)
    work = asyncio.gather(*(finish(texts) for _, texts in begun))
    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        work.result()
    except (ArgumentError, EngineStopped) as error:
        return failure(error)
    finally:
        gone.cancel()
        work.cancel()
    return JSONResponse(form.whole([answer for answer, _ in begun]))


async def streamed(worker: Worker, form: Form) -> Response:
    """The answer as server-sent events, the choices as their tokens come."""
    begun, parts = choices(worker, form.asked), asyncio.Queue[dict[str, Any] | BaseException | None]()

    async def pump(answer: Answer, texts: AsyncIterator[str]) -> None:
        try:
            async for new in texts:
                parts.put_nowait(form.part(answer, new))
        except (ArgumentError, EngineStopped) as error:
            parts.put_nowait(error)
        else:
            parts.put_nowait(None)

    async def events(first: dict[str, Any] | None) -> AsyncIterator[str]:
        part, open_choices = first, len(begun)
        try:
            while True:
                if part is None:
                    open_choices -= 1
                else:
                    yield f"data: {json.dumps(part)}\n\n"
                if not open_choices:
                    break
                part = await parts.get()
                if isinstance(part, BaseException):
                    raise part
            if form.asked.has_usage:
                yield f"data: {json.dumps(form.usage([answer for answer, _ in begun]))}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for pump_task in pumps:
                pump_task.cancel()

    pumps = [asyncio.ensure_future(pump(*choice)) for choice in begun]
    first = await parts.get()  # a refusal comes before any token: it is an answer of its own
    if isinstance(first, BaseException):
        for task in pumps:
            task.cancel()
        return failure(first)
    return StreamingResponse(events(first), media_type="text/event-stream")


def main() -> None:
    """Serves one of the families."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server over jaxcache, with random weights.")
    parser.add_argument("--model", choices=FAMILIES, default="llama")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication: think before you open it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device-tokens", type=int, default=EngineConfig.device_tokens)
    parser.add_argument("--max-running", type=int, default=EngineConfig.max_running)
    parser.add_argument("--max-context-len", type=int, default=EngineConfig.max_context_len)
    parser.add_argument("--warm-up", action="store_true", help="compile every step before the first request")
    options = parser.parse_args()
    config = EngineConfig(
        device_tokens=options.device_tokens,
        max_running=options.max_running,
        max_context_len=options.max_context_len,
        top_logprobs=TOP_LOGPROBS,
    )
    scheduler = new_engine(FAMILIES[options.model], config)
    if options.warm_up:
        scheduler.warm_up(show_progress)
    uvicorn.run(new_app(scheduler, options.model), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
