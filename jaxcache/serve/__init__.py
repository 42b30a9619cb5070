"""A small scheduler over the manager: continuous batching for an engine that has a model and wants tokens.

    scheduler = Scheduler(memory, forward, weights)           # forward(pool, batch, tokens, weights) -> pool, logits
    generation = scheduler.submit(prompt, SamplingParams(max_tokens=100, temperature=0.7, seed=1))
    while scheduler.has_work:
        for output in scheduler.step():                       # one token of one generation each
            ...

It decides who runs; what is cached, where KV goes and what is evicted, the manager knows. It knows nothing of text,
HTTP or threads: call it from one thread.
"""

from jaxcache.serve.sampling import SampledTokens, SamplingParams, SamplingRows, least_allowed, sample
from jaxcache.serve.scheduler import FinishReason, Generation, Output, Scheduler

__all__ = [
    "FinishReason",
    "Generation",
    "Output",
    "SampledTokens",
    "SamplingParams",
    "SamplingRows",
    "Scheduler",
    "least_allowed",
    "sample",
]
