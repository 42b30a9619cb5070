"""What the prefix cache saves: chats of several turns under one system prompt, with the cache and without.

    python -m examples.engine.demo --model llama --chats 6 --turns 4

Every turn's prompt is all that was said before, so without a cache it is computed again. Both runs compile first, serve
the same chats, and have to give the same answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass

import numpy as np

from examples.engine.engine import END, EngineConfig, encode, new_engine
from examples.engine.models import FAMILIES, ModelConfig
from jaxcache.serve import Generation, SamplingParams, Scheduler
from jaxcache.steps.buckets import Buckets
from jaxcache.steps.warm_up import show_progress

CONFIG = EngineConfig(
    device_tokens=16_384,
    max_running=4,
    max_context_len=1280,
    chunk=256,
    buckets=Buckets((1, 2, 4), (16, 64, 256), (4,)),
)
SYSTEM = encode("You are a careful assistant. Answer briefly, and say so where you are not sure. " * 5)
WIDTHS = {"width": 256, "ff_width": 768, "head_dim": 32, "heads": 8, "kv_heads": 2, "rank": 64}


@dataclass(frozen=True)
class Served:
    """What became of the chats.

    Attributes:
      seconds: All of it.
      sampled: Tokens sampled.
      first_token: Seconds from each turn's arrival to its first token.
      prompt_tokens, cached_tokens: Tokens of all prompts, and those found in the cache.
      answers: Of each chat, turn by turn.
    """

    seconds: float
    sampled: int
    first_token: list[float]
    prompt_tokens: int
    cached_tokens: int
    answers: list[list[list[int]]]


def questions(chats: int, turns: int, seed: int = 0) -> list[list[list[int]]]:
    """What is asked in each turn of each chat: text of 20 to 60 characters."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    return [
        [
            encode("\n<user>") + rng.choice(letters, rng.integers(20, 60)).tolist() + encode("\n<assistant>")
            for _ in range(turns)
        ]
        for _ in range(chats)
    ]


def serve(scheduler: Scheduler, asked: list[list[list[int]]], answer_tokens: int, name: str) -> Served:
    """Serves all chats; the next turn of a chat arrives when its last one is answered."""
    params = SamplingParams(answer_tokens, temperature=0.8, seed=1, stop_token_ids=(END,))
    said, answers = [list(SYSTEM) for _ in asked], [[] for _ in asked]
    arrived: dict[Generation, tuple[int, float]] = {}
    first_token: dict[Generation, float] = {}
    total, done, started = sum(map(len, asked)), 0, time.perf_counter()

    def arrive(chat: int) -> None:
        said[chat] += asked[chat][len(answers[chat])]
        turn = dataclasses.replace(params, seed=1000 * chat + len(answers[chat]))
        arrived[scheduler.submit(said[chat], turn)] = chat, time.perf_counter()

    for chat in range(len(asked)):
        arrive(chat)
    while scheduler.has_work:
        for output in scheduler.step():
            generation, now = output.generation, time.perf_counter()
            chat, since = arrived[generation]
            first_token.setdefault(generation, now - since)
            if generation.finish_reason is not None:
                answers[chat].append(list(generation.tokens))
                said[chat] += generation.tokens
                done += 1
                show(name, done, total, now - started)
                if len(answers[chat]) < len(asked[chat]):
                    arrive(chat)
    scheduler.memory.check_memory()
    return Served(
        seconds=time.perf_counter() - started,
        sampled=sum(len(each.tokens) for each in arrived),
        first_token=list(first_token.values()),
        prompt_tokens=sum(each.request.prompt_len for each in arrived),
        cached_tokens=sum(each.cached_tokens or 0 for each in arrived),
        answers=answers,
    )


def show(name: str, done: int, total: int, seconds: float) -> None:
    """A bar on stderr, drawn over itself."""
    bar = "#" * (30 * done // total)
    end = "\n" if done == total else ""
    print(f"\r{name:13} [{bar:.<30}] {done} of {total} turns, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


def table(shared: Served, alone: Served) -> str:
    """Both runs side by side."""

    def row(name: str, with_cache: float, without: float, form: str, gain: float) -> str:
        return f"{name:28}{with_cache:>14{form}}{without:>14{form}}{gain:>9.2f}x"

    rate = shared.sampled / shared.seconds, alone.sampled / alone.seconds
    lines = [f"{'':28}{'with cache':>14}{'without':>14}{'gain':>10}", row("tokens/s", *rate, ".1f", rate[0] / rate[1])]
    for name, percent in (("median", 50), ("90th percentile", 90)):
        first = [1000 * float(np.percentile(run.first_token, percent)) for run in (shared, alone)]
        lines.append(row(f"first token, {name}, ms", first[0], first[1], ".1f", first[1] / first[0]))
    hit_rate = [100 * run.cached_tokens / run.prompt_tokens for run in (shared, alone)]
    lines.append(f"{'prompt tokens cached, %':28}{hit_rate[0]:>14.1f}{hit_rate[1]:>14.1f}")
    return "\n".join(lines)


def compare(model: ModelConfig, asked: list[list[list[int]]], answer_tokens: int) -> tuple[Served, Served]:
    """Serves the chats with and without the cache."""
    runs = []
    for name, share in (("with cache", True), ("without cache", False)):
        scheduler = new_engine(model, dataclasses.replace(CONFIG, share_prefixes=share))
        scheduler.warm_up(show_progress)
        runs.append(serve(scheduler, asked, answer_tokens, name))
    return runs[0], runs[1]


def main() -> None:
    """Runs the demonstration and prints its table."""
    parser = argparse.ArgumentParser(description="Chats of several turns, with the prefix cache and without.")
    parser.add_argument("--model", choices=FAMILIES, default="llama")
    parser.add_argument("--chats", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=24)
    options = parser.parse_args()
    model = dataclasses.replace(FAMILIES[options.model], **WIDTHS)
    asked = questions(options.chats, options.turns)
    shared, alone = compare(model, asked, options.answer_tokens)
    print(f"{options.model}: {options.chats} chats of {options.turns} turns, a system prompt of {len(SYSTEM)} tokens")
    print(table(shared, alone))
    if shared.answers != alone.answers:
        raise SystemExit("the cache changed an answer")
    print("The answers are the same.")


if __name__ == "__main__":
    main()
