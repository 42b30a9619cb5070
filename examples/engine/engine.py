"""A model on memory and scheduler: everything that a server needs but the network.

    python -m examples.engine.engine

answers chats that share a system prompt, with the prefix cache and without, and checks that the answers are the same:
what the cache saves is work, never a different answer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from examples.engine.models import FAMILIES, ModelConfig, forward, random_weights
from jaxcache import MemoryConfig, init_memory_pool_and_cache
from jaxcache.serve import SamplingParams, Scheduler
from jaxcache.steps.buckets import Buckets

END = 256
"""The token that ends a text; the others are bytes."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      device_tokens: Tokens that the pool has room for.
      page_size: Tokens a page.
      max_running: Requests at once.
      max_context_len: Longest request, in tokens.
      chunk: Tokens that a step computes at most.
      share_prefixes: False computes every prompt from its first token.
      top_logprobs: Most likely tokens that a client can ask for, at each place.
      buckets: Sizes that steps are compiled for; by default those of `MemoryConfig`.
    """

    device_tokens: int = 8192
    page_size: int = 16
    max_running: int = 8
    max_context_len: int = 1024
    chunk: int = 256
    share_prefixes: bool = True
    top_logprobs: int = 0
    buckets: Buckets | None = None


def new_engine(model: ModelConfig, config: EngineConfig, seed: int = 0) -> Scheduler:
    """A scheduler over a model with random weights.

    Args:
      model: Sizes of the model, such as one of `FAMILIES`.
      config: Sizes of the engine.
      seed: Of the weights.
    """
    page, running = config.page_size, config.max_running
    window_tokens = config.chunk + running * (model.window + 3 * page)
    kv = model.kv_config(config.device_tokens, page, -(-window_tokens // page) * page)
    memory = init_memory_pool_and_cache(
        MemoryConfig(
            kv,
            max_running=running,
            max_context_len=config.max_context_len,
            chunk=config.chunk,
            disable_radix_cache=not config.share_prefixes,
            sliding_window_size=model.window if model.has_window else None,
            states=model.state_config(8 * running),
            buckets=config.buckets,
        )
    )
    step = functools.partial(forward, model)
    return Scheduler(memory, step, random_weights(model, seed), top_logprobs=config.top_logprobs)


def encode(text: str) -> list[int]:
    """A text as tokens: its bytes."""
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    """Tokens as a text; what is no UTF-8 is replaced."""
    return bytes(token for token in tokens if token < END).decode(errors="replace")


def main() -> None:
    """Answers the same prompts with and without shared prefixes, and compares."""
    system = "You are a careful assistant. Answer briefly, and say so where you are not sure. " * 2
    prompts = [
        encode(system + question) for question in ("What is a page?", "What is a slot?", "What is a page table?")
    ]
    params = SamplingParams(max_tokens=24)
    for name, model in FAMILIES.items():
        shared = new_engine(model, EngineConfig())
        alone = new_engine(model, EngineConfig(share_prefixes=False))
        generations = [shared.generate([prompt], params)[0] for prompt in prompts]
        same = [each.tokens for each in generations] == [each.tokens for each in alone.generate(prompts, params)]
        cached = [each.cached_tokens for each in generations]
        print(f"{name}: cached {cached} of {[len(prompt) for prompt in prompts]}, same answers: {same}")
        if not same:
            raise SystemExit(f"{name}: the cache changed an answer")


if __name__ == "__main__":
    main()
