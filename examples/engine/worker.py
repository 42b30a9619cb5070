"""A scheduler in a thread of its own, and what an asyncio server asks of it.

    event loop ── submit, cancel ──► commands ──► thread: scheduler.step() ── tokens ──► the stream of each request

Only the thread touches the scheduler. It sleeps while there is nothing to do.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcache.errors import CacheError
from jaxcache.serve import FinishReason, Generation, SamplingParams, Scheduler


class EngineStopped(Exception):
    """The thread has ended: it was told to, or its engine failed."""


@dataclass(frozen=True)
class Token:
    """A sampled token, as a stream gives it.

    Attributes:
      token, logprob: The token, and its log-probability.
      top: The most likely tokens at its place, with theirs.
      finish_reason: Why it is the last one; None if it is not.
      cached_tokens: Prompt tokens that were found in the cache.
    """

    token: int
    logprob: float
    top: dict[int, float]
    finish_reason: FinishReason | None
    cached_tokens: int


@dataclass(eq=False)
class _Job:
    """A request on its way: what to submit, whom to tell, and its generation once it has one."""

    prompt: Sequence[int]
    params: SamplingParams
    options: dict[str, Any]
    tell: Callable[[Token | BaseException], Any]
    generation: Generation | None = None


class Worker:
    """Runs a scheduler in a thread.

    Args:
      scheduler: The worker's from `start` on.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        scheduler.memory.hand_over()  # to the thread that is about to drive it
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._jobs: dict[Generation, _Job] = {}
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._end: EngineStopped | None = None
        self._lock = threading.Lock()  # a command is either put before the end, and carried out, or refused

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._end is None and self._thread.is_alive()

    async def stream(
        self, prompt: Sequence[int], params: SamplingParams, **options: Any
    ) -> AsyncGenerator[Token, None]:
        """The tokens of a prompt as they are sampled. Closing the stream, or cancelling it, cancels the request.

        Args:
          prompt, params: As of `Scheduler.submit`, and `options` as well.

        Raises:
          ArgumentError: The request was refused.
          EngineStopped: The engine has failed, before or meanwhile.
        """
        events: asyncio.Queue[Token | BaseException] = asyncio.Queue()
        tell = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, events.put_nowait)
        job = _Job(prompt, params, options, tell)
        self._put(functools.partial(self._submit, job))
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._commands.put(functools.partial(self._cancel, job))

    def _put(self, command: Callable[[], Any]) -> None:
        with self._lock:
            if self._end is not None or not self._thread.is_alive():
                raise self._end or EngineStopped("the engine does not run")
            self._commands.put(command)

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                for output in self.scheduler.step():
                    self._tell(output.generation, len(output.generation.tokens) - 1)
        except BaseException as error:
            self._finish(EngineStopped(f"the engine failed: {error}"))
            raise
        self._finish(EngineStopped("the engine was stopped"))

    def _finish(self, end: EngineStopped) -> None:
        """Tells everybody who waits, those included whose request is still a command."""
        with self._lock:
            self._end = end
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        for job in self._jobs.values():
            job.tell(end)

    def _obey(self) -> bool:
        """Carries out the commands that wait; if there is no work, waits for some. False once it is to stop."""
        while not self.scheduler.has_work or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _submit(self, job: _Job) -> None:
        if self._end is not None:
            job.tell(self._end)
            return
        try:
            job.generation = self.scheduler.submit(job.prompt, job.params, **job.options)
        except CacheError as error:
            job.tell(error)
        else:
            self._jobs[job.generation] = job

    def _cancel(self, job: _Job) -> None:
        if job.generation is not None and self._end is None:
            self.scheduler.cancel(job.generation)
            self._jobs.pop(job.generation, None)

    def _tell(self, generation: Generation, i: int) -> None:
        job = self._jobs.get(generation)
        if job is None:
            return
        top = generation.top_logprobs[i] if generation.top_logprobs else {}
        is_last = i == len(generation.tokens) - 1
        reason = generation.finish_reason if is_last else None
        job.tell(Token(generation.tokens[i], generation.logprobs[i], top, reason, generation.cached_tokens or 0))
