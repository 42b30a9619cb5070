"""SkyRL-tx' own `generate` against jaxcache's, in an environment that has both: run by `make integrations`.

Random Qwen3 and Llama3 models with LoRA adapters; several samples of each prompt, greedy and drawn, with top-k, top-p
and stop tokens. Tokens and reasons have to be equal, log-probabilities nearly so. It says how many prompt tokens were
computed, and how long it took.
"""

from __future__ import annotations

import sys
import time
import types as modules
from typing import Any

if "peft" not in sys.modules:  # SkyRL saves adapters with it, and it brings torch: not needed to sample
    try:
        import peft  # noqa: F401
    except ImportError:
        sys.modules["peft"] = modules.ModuleType("peft")

import jax
import numpy as np
from flax import nnx
from skyrl.tinker.types import SamplingParams
from skyrl.tx.models import llama3, qwen3
from skyrl.tx.models.configs import ModelConfig
from transformers import LlamaConfig, Qwen3Config

from integrations.skyrl_tx.adapter import switch_on
from jaxcache.steps.buckets import Buckets

SIZES: dict[str, Any] = dict(
    vocab_size=151,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
LORA: dict[str, Any] = dict(max_lora_adapters=3, max_lora_rank=4, shard_attention_heads=True)
KINDS = {"qwen3": (qwen3.Qwen3ForCausalLM, Qwen3Config), "llama3": (llama3.Llama3ForCausalLM, LlamaConfig)}
PROMPTS, SAMPLES, NEW = 6, 8, 24


def new_model(kind: str, config: ModelConfig, seed: int) -> Any:
    """A model with random weights, those of its adapters too."""
    model_type, _ = KINDS[kind]
    mesh = jax.make_mesh((1, 1, 1), ("fsdp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nnx.use_eager_sharding(True):
        model = model_type(config, dtype=jax.numpy.float32, rngs=nnx.Rngs(seed))
        graphdef, lora, rest = nnx.split(model, model.is_lora_param, ...)
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def random(x: Any) -> Any:
        is_float = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        return 0.2 * jax.random.normal(next(keys), x.shape, x.dtype) if is_float else x

    return nnx.merge(graphdef, jax.tree.map(random, lora), rest)


def workload(rng: np.random.Generator) -> tuple[Any, Any, list[SamplingParams], Any]:
    """Padded prompts as SkyRL makes them, each with several samples, on several adapters."""
    prompts = [rng.integers(151, size=int(rng.integers(150, 250))).tolist() for _ in range(PROMPTS)]
    rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
    ids, mask = np.zeros((len(rows), 256), np.int32), np.zeros((len(rows), 256), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    params = [
        SamplingParams(
            temperature=(0.0, 1.0, 0.7)[i % 3],
            max_tokens=NEW - i % 5,
            seed=i,
            stop_tokens=[int(token) for token in rng.integers(151, size=4)] if i % 2 else None,
            top_k=(-1, 20)[i % 4 == 1],
            top_p=(1.0, 0.9)[i % 4 == 2],
        )
        for i in range(len(rows))
    ]
    return ids, mask, params, np.repeat(np.arange(PROMPTS) % 3, SAMPLES).astype(np.int32)


def timed(model: Any, work: Any, scores: bool) -> tuple[Any, float]:
    """The output of a second call, when all is compiled, and its seconds."""
    ids, mask, params, adapters = work
    since = time.perf_counter()
    found = model.generate(
        jax.numpy.array(ids),
        jax.numpy.array(mask),
        sampling_params=params,
        adapter_indices=jax.numpy.array(adapters),
        prompt_logprobs=scores,
    )
    return found, time.perf_counter() - since


def runs(kind: str, work: Any, samplers: list[Any]) -> tuple[list[Any], float, tuple[int, int]]:
    """Outputs of a model, twice, with scores, and with other weights; of the second, seconds and prompt tokens."""
    config = ModelConfig(KINDS[kind][1](**SIZES), **LORA)
    model, other = new_model(kind, config, 0), new_model(kind, config, 1)
    outputs = [timed(model, work, False)[0]]
    (sampler,) = samplers or (None,)
    if sampler is not None:
        sampler.memory.reset()  # the second run begins with an empty cache as well
        sampler.prompt_tokens = sampler.cached_tokens = 0
    output, seconds = timed(model, work, False)
    counts = (sampler.prompt_tokens, sampler.cached_tokens) if sampler is not None else (0, 0)
    outputs += [output, timed(model, work, True)[0], timed(other, work, False)[0]]
    if sampler is not None:
        sampler.memory.check_memory()
        assert sampler.memory.get_token_info()[0] == 0
    samplers.clear()
    return outputs, seconds, counts


def main() -> None:
    """Both ways on both models."""
    work = workload(np.random.default_rng(0))
    own = {kind: runs(kind, work, []) for kind in KINDS}
    buckets = Buckets((16, 48), (64, 256), (8, 48))
    samplers = switch_on(device_tokens=16_384, max_running=48, max_context_len=512, chunk=256, buckets=buckets)
    for kind, (wanted, own_seconds, _) in own.items():
        found, seconds, (total, cached) = runs(kind, work, samplers)
        for want, got in zip(wanted, found, strict=True):
            assert got.generated_ids == want.generated_ids
            assert got.stop_reasons == want.stop_reasons
            np.testing.assert_allclose(*(np.concatenate(each.logprobs) for each in (got, want)), atol=1e-3)
        for want, got in zip(wanted[2].prompt_logprobs, found[2].prompt_logprobs, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-3)
        assert "stop" in wanted[0].stop_reasons and wanted[0].generated_ids != wanted[3].generated_ids
        assert total > 3 * (total - cached)
        print(
            f"{kind}: {PROMPTS * SAMPLES} samples, tokens equal; prompt tokens computed: {total - cached} of {total} "
            f"({total / (total - cached):.1f}x fewer); seconds: {seconds:.2f} of {own_seconds:.2f} "
            f"({own_seconds / seconds:.2f}x faster)"
        )


if __name__ == "__main__":
    main()
