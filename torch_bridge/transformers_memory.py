"""What a model of transformers keeps of tokens, and what has a say in it: seen in its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from jaxcache.errors import UnsupportedError
from jaxcache.manager.config import MemoryConfig
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from torch_bridge.dtypes import jax_dtype

_SOME, _OTHER = 5, 6
"""Two tokens, neither of which is likely to stand for padding."""


class SeenLayer(NamedTuple):
    """What a layer keeps of a token: keys and values of so many heads, and for how long."""

    window: int | None
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


def memory_config_for(
    model: Any, tokens: int, page_size: int, max_batch: int, window_tokens: int | None
) -> tuple[MemoryConfig, list[int | None]]:
    """Memory for `JaxPagedCache.for_model`, which has the contract, and the window of each layer.

    Layers with a window have a side of their own if there are others too: alone they need no more room than the others
    would, and no map.
    """
    seen = layers_of(model)
    windows = [layer.window for layer in seen]
    full = [i for i, window in enumerate(windows) if window is None]
    sliding = [i for i, window in enumerate(windows) if window is not None]
    if not full or not sliding:
        return MemoryConfig(_mha_config(seen, tokens, page_size), max_batch, max_context_len=tokens), windows
    kv = SWAConfig(
        full=_mha_config([seen[i] for i in full], tokens, page_size),
        window=_mha_config([seen[i] for i in sliding], tokens if window_tokens is None else window_tokens, page_size),
        full_layers=tuple(full),
        window_layers=tuple(sliding),
    )
    longest = max(window for window in windows if window is not None)
    return MemoryConfig(kv, max_batch, max_context_len=tokens, sliding_window_size=longest), windows


def layers_of(model: Any) -> list[SeenLayer]:
    """What each layer of a model keeps, seen in a `DynamicCache` after one token.

    Raises:
      UnsupportedError: It is not keys and values of its own, one of each token; or they depend on later tokens.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedError("model is an encoder-decoder, whose cross attention is not in a prefix cache")
    seen = _after(model, DynamicCache(config=model.config), [_SOME])
    layers = [_seen_layer(i, layer) for i, layer in enumerate(seen.layers)]
    if not layers:
        raise UnsupportedError("model keeps no keys and values: a JaxPagedCache has nothing to hold")
    at_once = _after(model, DynamicCache(), [_SOME, _OTHER])
    if _differ(at_once, _after(model, _after(model, DynamicCache(), [_SOME]), [_OTHER])):
        raise UnsupportedError(
            "model: KV of a token changes with those after it, or with how a prompt is cut, so it does not belong to a "
            "prefix: the model attends in both directions, or is in training mode (call model.eval())"
        )
    return layers


def ignores_padding(model: Any, position_dims: tuple[int, ...] | None) -> bool:
    """Whether KV of tokens is the same behind padding. Some models count positions from the first column nevertheless.

    Args:
      model: The model.
      position_dims: The model is told positions, `(*position_dims, batch, columns)`; None if it is not.

    Cost: three forward passes of one or two tokens.
    """

    def inputs(mask: list[int], *positions: int) -> dict[str, torch.Tensor]:
        told = {} if position_dims is None else {"position_ids": torch.tensor(positions).expand(*position_dims, 1, -1)}
        return {"attention_mask": torch.tensor([mask]), **told}

    alone = _after(model, DynamicCache(), [_SOME, _OTHER], **inputs([1, 1], 0, 1))
    padded = _after(model, DynamicCache(), [0, _SOME], **inputs([0, 1], 0, 0))
    return not _differ(alone, _after(model, padded, [_OTHER], **inputs([0, 1, 1], 1)))


def _after(model: Any, cache: DynamicCache, tokens: list[int], **inputs: torch.Tensor) -> DynamicCache:
    """The cache, after a forward pass over tokens of one sequence."""
    given = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, **given)
    return cache


def _differ(some: Any, others: Any) -> bool:
    """Whether KV of the last columns differs, by more than rounding, in the first two layers.

    What goes in beside a token shows there: its position in the first layer, other tokens in the second.
    """
    for mine, theirs in zip(some.layers[:2], others.layers[:2], strict=True):
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            away = (one - other[:, :, -one.shape[2] :]).float().norm()
            if away > torch.finfo(one.dtype).eps ** 0.5 * one.float().norm():
                return True
    return False


def _seen_layer(index: int, layer: Any) -> SeenLayer:
    is_known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    if not is_known or layer.keys is None or layer.keys.shape[2] != 1:
        raise UnsupportedError(
            f"model: layer {index} keeps a {type(layer).__name__}, not just keys and values of its own: a "
            "JaxPagedCache cannot hold it; use a DynamicCache"
        )
    (_, heads, _, key_dim), (_, value_heads, _, value_dim) = layer.keys.shape, layer.values.shape
    if heads != value_heads:
        raise UnsupportedError(f"model: layer {index} has {heads} heads of keys and {value_heads} of values")
    return SeenLayer(layer.sliding_window if layer.is_sliding else None, heads, key_dim, value_dim, layer.keys.dtype)


def _mha_config(layers: Sequence[SeenLayer], size: int, page_size: int) -> MHAConfig:
    """The pool of some layers, which must be alike but for their windows."""
    kinds = {layer._replace(window=None) for layer in layers}
    if len(kinds) > 1:
        raise UnsupportedError(f"model: layers that share a pool must have KV of one shape and dtype, got {kinds}")
    (kind,) = kinds
    return MHAConfig(
        size=size,
        page_size=page_size,
        dtype=jax_dtype("model", kind.dtype),
        layer_num=len(layers),
        head_num=kind.heads,
        head_dim=kind.key_dim,
        v_head_dim=kind.value_dim,
    )
