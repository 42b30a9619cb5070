"""The oracle of the scheduler: the same models over whole sequences, with no cache, no pages and no batching.

It knows nothing of pools or steps: attention is a matrix of all tokens by all tokens, and the delta rule a loop from
the first token. What it shares with the models under test are their parts for one token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from examples.engine.models import (
    Mixer,
    ModelConfig,
    Weights,
    delta_gates,
    delta_heads,
    delta_rule,
    mlp,
    rms_norm,
    rotary,
)


@functools.partial(jax.jit, static_argnums=0)
def dense_logits(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Logits after every token of whole sequences: `(sequences, length)` to `(sequences, length, vocabulary)`."""
    return jax.vmap(lambda row: _sequence(config, weights, row))(tokens)


def _sequence(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    x = weights["embed"][tokens]
    for mixer, layer in zip(config.layers, weights["layers"], strict=True):
        mixed = _mixed(config, mixer, layer, rms_norm(x, layer["norm"]))
        x = x + mixed.reshape(len(tokens), -1) @ layer["out"]
        x = x + mlp(layer, rms_norm(x, layer["mlp_norm"]))
    return rms_norm(x, weights["norm"]) @ weights["head"]


def _mixed(config: ModelConfig, mixer: Mixer, layer: Weights, x: jax.Array) -> jax.Array:
    if mixer is Mixer.DELTA:
        return _delta(config, layer, x)
    place = jnp.arange(len(x))
    seen = place[None, :] <= place[:, None]
    if mixer is Mixer.LATENT:
        down = x @ layer["down_kv"]
        latent = rms_norm(down[:, : config.rank], layer["latent_norm"])
        rope = rotary(down[:, None, config.rank :], place)
        q = jnp.einsum("tw,whd->thd", x, layer["q"])
        k = jnp.einsum("tr,rhd->thd", latent, layer["up_k"])
        v = jnp.einsum("tr,rhd->thd", latent, layer["up_v"])
        q = jnp.concatenate([q[..., : config.head_dim], rotary(q[..., config.head_dim :], place)], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(rope, (*k.shape[:2], config.rope_dim))], axis=-1)
        return _attention(q, k, v, seen, None)
    q, k, v = (jnp.einsum("tw,whd->thd", x, layer[name]) for name in "qkv")
    q, k, v = rotary(q, place), *(jnp.repeat(a, config.heads // config.kv_heads, 1) for a in (rotary(k, place), v))
    if mixer is Mixer.WINDOW:
        seen &= place[None, :] > place[:, None] - config.window
    return _attention(q, k, v, seen, config.soft_cap)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, soft_cap: float | None) -> jax.Array:
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)


def _delta(config: ModelConfig, layer: Weights, x: jax.Array) -> jax.Array:
    before = config.conv_width - 1
    projected = jnp.pad(x @ layer["qkv"], ((before, 0), (0, 0)))
    mixed = sum(projected[i : i + len(x)] * layer["conv"][:, i] for i in range(config.conv_width))
    start = jnp.zeros((config.heads, config.head_dim, config.head_dim))
    tokens = (*delta_heads(config, jnp.asarray(mixed)), *delta_gates(layer, x))
    return jax.lax.scan(lambda memory, token: delta_rule(memory, *token), start, tokens)[1]


def logits_of(config: ModelConfig, weights: Weights, sequences: list[list[int]], length: int) -> np.ndarray:
    """Dense logits of sequences of at most `length` tokens; what is behind their ends means nothing."""
    padded = np.zeros((len(sequences), length), np.int32)
    for row, tokens in zip(padded, sequences, strict=True):
        row[: len(tokens)] = tokens
    return np.concatenate([np.asarray(dense_logits(config, weights, part)) for part in _in_eights(padded)])


def _in_eights(rows: np.ndarray) -> list[np.ndarray]:
    """Eight rows at a time, so that one compiled function serves them all."""
    filled = np.concatenate([rows, np.zeros((-len(rows) % 8, rows.shape[1]), np.int32)])
    return np.split(filled, len(filled) // 8)
