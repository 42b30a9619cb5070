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


def _llama_with_rope(**rope):
    def build():
        sizes = SIZES | dict(max_position_embeddings=64 if rope["rope_type"] == "dynamic" else 512)
        rope_parameters = dict(rope_theta=1e4) | rope
        config = transformers.LlamaConfig(
            **sizes, num_hidden_layers=2, num_key_value_heads=2, rope_parameters=rope_parameters
        )
        return transformers.LlamaForCausalLM(config)

    return build


def _phi3():
    """Rotates by other frequencies in sequences of more than 64 tokens, and then lets go of its cache."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    sizes = dict(num_hidden_layers=2, num_key_value_heads=2, original_max_position_embeddings=64)
    rope = dict(rope_type="longrope", rope_theta=1e4, **factors)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, **sizes, rope_parameters=rope))


def _mpt():
    """`use_cache` is False by default, and positions are in the scores, not in the keys."""
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=512, vocab_size=VOCABULARY)
    return transformers.MptForCausalLM(config)


def _qwen2_5_vl():
    """Keeps from one call to the next how far its positions are from the columns: images take fewer of them."""
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    text = dict(**SIZES, num_hidden_layers=2, num_key_value_heads=2, rope_parameters=rope)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, window_size=8)
    patches = dict(patch_size=2, spatial_merge_size=2, temporal_patch_size=1, in_channels=3, fullatt_block_indexes=[0])
    ids = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision | patches, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


_LONGROPE = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=64)

MODELS = {
    "llama": _llama,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "mimo": _mimo,
    "deepseek": _deepseek,
    "expanded_deepseek": _expanded_deepseek,
}


PECULIAR = {
    "dynamic": _llama_with_rope(rope_type="dynamic", factor=8.0),
    "longrope": _llama_with_rope(rope_type="longrope", factor=8.0, **_LONGROPE),
    "yarn": _llama_with_rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
    "phi3": _phi3,
    "mpt": _mpt,
    "qwen2_5_vl": _qwen2_5_vl,
}
"""Models of which something else than the tokens before has a say in keys and values, or could have."""


def make_sharp(name: str) -> torch.nn.Module:
    """The model of that name with weights six times as large, so that wrong KV shows in the very next tokens."""
    torch.manual_seed(0)
    model = (MODELS | PECULIAR)[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    return model


def make(name: str) -> torch.nn.Module:
    """The model of that name, the same each time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()
