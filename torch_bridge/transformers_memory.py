"""What memory a model of transformers needs: seen in its own cache, not guessed from names in its config."""

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
      UnsupportedError: It is not keys and values of its own.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedError("model is an encoder-decoder, whose cross attention is not in a prefix cache")
    seen = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=seen, use_cache=True)
    return [_seen_layer(i, layer) for i, layer in enumerate(seen.layers)]


def _seen_layer(index: int, layer: Any) -> SeenLayer:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
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
