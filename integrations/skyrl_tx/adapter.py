"""SkyRL-tx (PyPI `skyrl` 0.4.0) sampling over jaxcache: continuous batching, shared prompts, LoRA adapters.

The model code is not changed: each token of the flat batch is a row of the model, and the two functions that touch KV
take a `_Layer` where they expect a layer's keys and values. Tokens are drawn with SkyRL's own chain of keys.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from skyrl.tx.models import llama3, qwen3
from skyrl.tx.utils import generator

from jaxcache import Batch, MemoryConfig, MHAConfig, Namespace, init_memory_pool_and_cache
from jaxcache.attention import AttentionPlan, attention_plan, paged_attention, paged_extend
from jaxcache.serve import FinishReason, Generation, SamplingParams, SamplingRows, Scheduler, least_allowed
from jaxcache.steps.buckets import StepKind

MODELS = qwen3.Qwen3ForCausalLM, llama3.Llama3ForCausalLM


@dataclass
class _Step:  # a traced step: the pool as its layers update it, and how they attend
    pool: Any
    batch: Batch
    plan: AttentionPlan


@dataclass(frozen=True)
class _Layer:  # what stands where SkyRL expects the keys and values of a layer
    step: _Step
    index: int


def _update_layer(kv_cache: Any, k: jax.Array, v: jax.Array, positions: jax.Array) -> Any:
    """Writes `(tokens, 1, heads, dim)` into the pool."""
    layer = kv_cache[0]
    if not isinstance(layer, _Layer):
        return _OWN_UPDATE(kv_cache, k, v, positions)
    step = layer.step
    step.pool = step.pool.set_kv_buffer(layer.index, step.batch.slots, k[:, 0], v[:, 0])
    return layer, layer


def _attend(q: jax.Array, k: Any, v: Any, attention_mask: Any, is_causal: bool, head_dim: int) -> jax.Array:
    """Attention of `(tokens, 1, heads, dim)` through the pool."""
    if not isinstance(k, _Layer):
        return _OWN_ATTEND(q, k, v, attention_mask, is_causal, head_dim)
    step = k.step
    attend = paged_attention if step.batch.kind is StepKind.DECODE else paged_extend
    return attend(q[:, 0], step.pool, k.index, step.batch, step.plan, scale=head_dim**-0.5)[:, None]


_OWN_UPDATE, _OWN_ATTEND = generator.KVCache.update_layer, qwen3.dot_product_attention
_OWN_GENERATE = generator.GeneratorMixin.generate


def _forward(graphdef: Any, pool: Any, batch: Batch, tokens: jax.Array, state: Any) -> tuple[Any, jax.Array]:
    """SkyRL's model over a batch, as `Scheduler` calls it."""
    model = nnx.merge(graphdef, state)
    config = model.get_model_config()
    step = _Step(pool, batch, attention_plan(batch, pool, config.num_attention_heads))
    layers = [_Layer(step, i) for i in range(config.num_hidden_layers)]
    adapter = batch.tag.at[batch.request].get(mode="clip")
    out = model(
        batch.tokens[:, None],
        attention_mask=jnp.ones((len(batch.tokens), 1), jnp.int32),
        positions=batch.positions[:, None],
        kv_cache=generator.KVCache(layers, layers, batch.positions),  # pyright: ignore[reportArgumentType]
        adapter_indices=adapter,
    )
    hidden, own = (array.at[tokens].get(mode="clip") for array in (out.last_hidden_state, adapter))
    return step.pool, model.compute_logits(hidden, own)[:, 0].astype(jnp.float32)


def _sample(logits: jax.Array, rows: SamplingRows, sampled: jax.Array) -> jax.Array:
    """The token that SkyRL's `generate` draws: its keys are a chain of splits from the seed."""

    def draw(seed: jax.Array, count: jax.Array, scaled: jax.Array) -> jax.Array:
        key = jax.lax.fori_loop(0, count, lambda _, key: jax.random.split(key)[0], jax.random.PRNGKey(seed))
        return jax.random.categorical(jax.random.split(key)[1], scaled)

    scaled = logits / jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    scaled = jnp.where(scaled >= least_allowed(scaled, rows)[:, None], scaled, -jnp.inf)
    drawn = jax.vmap(draw)(rows.seed, sampled, scaled)
    return jnp.where(rows.temperature == 0, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


class Sampler:
    """One model's memory and scheduler.

    Args:
      model: A Qwen3 or Llama3 of SkyRL-tx.
      device_tokens: Tokens that the pool has room for.
      max_running, max_context_len, **sizes: As of `MemoryConfig`.

    Attributes:
      config: Of the model.
      prompt_tokens, cached_tokens: Of all prompts so far, and those found in the cache.
    """

    def __init__(self, model: Any, device_tokens: int, max_running: int, max_context_len: int, **sizes: Any):
        self.config = config = model.get_model_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = dict(layer_num=config.num_hidden_layers, head_num=config.num_key_value_heads, head_dim=head_dim)
        kv = MHAConfig(size=device_tokens, page_size=16, dtype=model.model.embed_tokens.embedding.dtype, **shape)
        self.memory = init_memory_pool_and_cache(MemoryConfig(kv, max_running, max_context_len, **sizes))
        self._scheduler = Scheduler(self.memory, functools.partial(_forward, nnx.split(model)[0]), sampler=_sample)
        self._weights: list[weakref.ref[jax.Array]] = []
        self.prompt_tokens = self.cached_tokens = 0

    def generate(
        self, model: Any, input_ids: Any, attention_mask: Any, *, sampling_params: Sequence[Any],
        adapter_indices: Any = None, prompt_logprobs: bool = False, tokenizer: Any = None
    ) -> generator.GenerateOutput:  # fmt: skip
        """What `GeneratorMixin.generate` does, with the weights that the model has now."""
        state = nnx.split(model)[1]
        arrays = jax.tree.leaves(state)
        if len(arrays) != len(self._weights) or any(a is not b() for a, b in zip(arrays, self._weights, strict=True)):
            self.memory.reset()  # what was computed with other weights is of no use
            self._weights = [weakref.ref(array) for array in arrays]
        rows = zip(np.asarray(input_ids), np.asarray(attention_mask).sum(axis=1), strict=True)
        prompts = [tuple(row[:length].tolist()) for row, length in rows]
        adapters = [0] * len(prompts) if adapter_indices is None else np.asarray(adapter_indices).tolist()
        self._scheduler.args = (state,)
        try:
            found = self._run(prompts, sampling_params, adapters, prompt_logprobs)
        finally:
            self._scheduler.args = ()  # the weights are the trainer's: keep none alive
        output, scores = generator.GenerateOutput([], [], []), list[list[float]]()
        for each, params in zip(found, sampling_params, strict=True):
            tokens = list(each.tokens)
            end = generator.find_string_stop_position(tokens, tokenizer, params.stop_strings or [])
            output.generated_ids.append(tokens[:end])
            output.logprobs.append(each.logprobs[:end])
            has_stopped = end is not None or each.finish_reason is FinishReason.STOP
            output.stop_reasons.append("stop" if has_stopped else "length")
            scores.append([] if each.prompt_logprobs is None else each.prompt_logprobs[1:].tolist())
        output.prompt_logprobs = scores if prompt_logprobs else None
        return output

    def _run(self, prompts: Any, params: Any, adapters: Sequence[int], scores: bool) -> list[Generation]:
        """Samples of one prompt are planned together, so that one of them computes it, and alone is scored."""
        first = {group: i for i, group in reversed([*enumerate(zip(adapters, prompts, strict=True))])}
        found: list[Generation] = []
        try:
            for i, group in enumerate(zip(adapters, prompts, strict=True)):
                asked, key = params[i], Namespace(lora_id=str(adapters[i]))
                limits = asked.max_tokens, asked.temperature, max(asked.top_k, 0), asked.top_p
                is_scored, stops = scores and first[group] == i, tuple(asked.stop_tokens or ())
                own = SamplingParams(*limits, asked.seed, stops, prompt_logprobs=is_scored)
                found.append(self._scheduler.submit(prompts[i], own, extra_key=key, tag=adapters[i]))
            while self._scheduler.has_work:
                self._scheduler.step()
        finally:
            for each in found:
                self._scheduler.cancel(each)  # a no-op for those that have ended
        for each, group in zip(found, zip(adapters, prompts, strict=True), strict=True):
            each.prompt_logprobs = found[first[group]].prompt_logprobs
        self.prompt_tokens += sum(map(len, prompts))
        self.cached_tokens += sum(each.cached_tokens or 0 for each in found)
        return found


def switch_on(**sizes: Any) -> list[Sampler]:
    """From now on `generate` of Qwen3 and Llama3 models, and so `JaxBackend.sample`, runs on jaxcache.

    Args:
      **sizes: As of `Sampler`.

    Returns:
      A sampler for each model that was sampled from: of each configuration, whatever its weights.
    """
    samplers: list[Sampler] = []

    def generate(model: Any, *args: Any, **options: Any) -> generator.GenerateOutput:
        if not isinstance(model, MODELS):
            return _OWN_GENERATE(model, *args, **options)
        if not any(sampler.config is model.get_model_config() for sampler in samplers):
            samplers.append(Sampler(model, **sizes))
        mine = next(sampler for sampler in samplers if sampler.config is model.get_model_config())
        return mine.generate(model, *args, **options)

    generator.KVCache.update_layer = staticmethod(_update_layer)
    qwen3.dot_product_attention = llama3.dot_product_attention = _attend
    generator.GeneratorMixin.generate = generate
    return samplers
