"""A small model of linear-attention layers: short convolution, then a gated delta rule. What states are for.

Each layer reads its input once, token by token, and keeps of it a window of the last inputs (`conv`) and a matrix a
head (`temporal`). So a prompt may be computed in pieces, whose states lie in a pool in between, and the outputs must be
those of the whole prompt in one piece.

Source: Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464), equation 10, without its chunked form.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.pools.mamba import MambaConfig, MambaPool

LAYERS, WIDTH, HEADS, KEY, VALUE, KERNEL, VOCABULARY = 2, 8, 2, 4, 3, 4, 50
CHANNELS = HEADS * (2 * KEY + VALUE)


class Weights(NamedTuple):
    """Of all layers, stacked."""

    project: jax.Array  # (layers, width, channels)
    conv: jax.Array  # (layers, channels, kernel)
    gates: jax.Array  # (layers, width, 2 * heads): decay and writing strength
    out: jax.Array  # (layers, heads * value, width)


def make_weights(seed: int = 0) -> tuple[jax.Array, Weights]:
    """Embeddings (vocabulary, width), and the layers'."""
    rng = np.random.default_rng(seed)
    shapes = (WIDTH, CHANNELS), (CHANNELS, KERNEL), (WIDTH, 2 * HEADS), (HEADS * VALUE, WIDTH)
    layers = [rng.standard_normal((LAYERS, *shape), np.float32) / shape[-1] ** 0.5 for shape in shapes]
    return jnp.asarray(rng.standard_normal((VOCABULARY, WIDTH), np.float32)), Weights(*map(jnp.asarray, layers))


def state_config(num_states: int, dtype=jnp.float32) -> MambaConfig:
    """What the model keeps of a prefix."""
    return MambaConfig(
        num_states=num_states,
        layer_num=LAYERS,
        conv_shape=(CHANNELS, KERNEL - 1),
        temporal_shape=(HEADS, VALUE, KEY),
        conv_dtype=dtype,
        temporal_dtype=dtype,
    )


def layer(weights: Weights, conv: jax.Array, temporal: jax.Array, x: jax.Array, is_token: jax.Array):
    """Tokens `x` (batch, tokens, width) through one layer, from the given states on.

    Returns:
      The states after the last token, and the outputs. What is no token leaves the state as it is.
    """

    def one_token(states, inputs):
        (conv, temporal), (x, is_token) = states, inputs
        window = jnp.concatenate([conv, (x @ weights.project)[..., None]], axis=-1)
        mixed = jax.nn.silu((window * weights.conv).sum(-1)).reshape(-1, HEADS, 2 * KEY + VALUE)
        q, k, v = jnp.split(mixed, [KEY, 2 * KEY], axis=-1)
        k = k / (1e-6 + jnp.linalg.norm(k, axis=-1, keepdims=True))
        decay, strength = jnp.split(jax.nn.sigmoid(x @ weights.gates)[..., None], 2, axis=1)
        decayed = decay[..., None] * temporal
        delta = strength * (v - (decayed * k[:, :, None]).sum(-1))
        new = window[..., 1:], decayed + delta[..., None] * k[:, :, None]
        y = x + (new[1] * q[:, :, None]).sum(-1).reshape(-1, HEADS * VALUE) @ weights.out
        new = [jnp.where(is_token[(...,) + (None,) * (a.ndim - 1)], a, b) for a, b in zip(new, states, strict=True)]
        return tuple(new), y

    states, y = jax.lax.scan(one_token, (conv, temporal), (x.swapaxes(0, 1), is_token.T))
    return states, y.swapaxes(0, 1)


def model_step(
    pool: MambaPool, model: tuple[jax.Array, Weights], states: jax.Array, tokens: jax.Array, is_token: jax.Array
):
    """The next `tokens` (batch, tokens) of each request, whose working states are `states` (batch,), 0 for padding."""
    embeddings, weights = model

    def one_layer(carry, inputs):
        (pool, x), (index, weights) = carry, inputs
        conv, temporal = pool.read(states, index)
        (conv, temporal), x = layer(weights, conv.astype(x.dtype), temporal.astype(x.dtype), x, is_token)
        return (pool.write(states, index, conv, temporal), x), None

    (pool, x), _ = jax.lax.scan(one_layer, (pool, embeddings[tokens]), (jnp.arange(LAYERS, dtype=jnp.int32), weights))
    return pool, x


@jax.jit
def in_one_piece(model: tuple[jax.Array, Weights], tokens: jax.Array) -> jax.Array:
    """Outputs (batch, tokens, width) of whole sequences, without any pool."""
    embeddings, weights = model

    def one_layer(x, weights):
        empty = [jnp.zeros((len(tokens), *shape)) for shape in state_config(1).row_shapes]
        return layer(weights, *empty, x, jnp.ones(tokens.shape, bool))[1], None

    return jax.lax.scan(one_layer, embeddings[tokens], weights)[0]
