"""Tiny models of transformers with random weights, made from configs: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def _llama():
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _mistral():
    config = transformers.MistralConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, sliding_window=9
    )
    return transformers.MistralForCausalLM(config)


def _gemma3():
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=layer_types)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **sizes))


def _mimo():
    """Keys and values of different widths, and more heads in the sliding layer."""
    sizes = dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=12, v_head_dim=8, sliding_window=9)
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    experts = dict(mlp_layer_types=["dense"] * 3, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = transformers.MiMoV2FlashConfig(**SIZES, **sizes, **experts, layer_types=layer_types)
    return transformers.MiMoV2FlashForCausalLM(config)


def _deepseek():
    """Latent attention with experts: transformers caches a latent row as key and its rope part as value."""
    heads = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16)
    config = transformers.DeepseekV3Config(
        **SIZES, **heads, **experts, num_hidden_layers=2, v_head_dim=12, first_k_dense_replace=1, n_shared_experts=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _expanded_deepseek():
    """The same as other releases of transformers have it, which cache what is expanded: keys wider than values."""
    model = _deepseek()
    for layer in model.model.layers:
        _expand_before_caching(layer.self_attn)
    return model


def _expand_before_caching(attention: torch.nn.Module) -> None:
    forward, expand = attention.forward, attention.expand_kv

    def forward_expanded(*args, past_key_values, **kwargs):
        attention.expand_kv = lambda kv, rope: past_key_values.update(*expand(kv, rope), attention.layer_idx)
        return forward(*args, past_key_values=_NoCache(), **kwargs)

    attention.forward = forward_expanded


class _NoCache:
    def update(self, keys, values, layer_idx):
        return keys, values


MODELS = {
    "llama": _llama,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "mimo": _mimo,
    "deepseek": _deepseek,
    "expanded_deepseek": _expanded_deepseek,
}


def make(name: str) -> torch.nn.Module:
    """The model of that name, the same each time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()
