"""Four families of decoders at any size, over jaxcache's pools: what an engine's jitted step computes.

A model is a list of layers; each mixes tokens in one of four ways (`Mixer`) and has an MLP behind it. `FAMILIES` has a
Llama-like, a DeepSeek-like, a Gemma-like and a gated-delta hybrid one. `forward` is one step over a batch of prompt
chunks and single tokens: each layer writes its KV, then attends through the pool by `jaxcache.attention`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxcache import Batch, MambaConfig, MHAConfig, MLAConfig, SWAConfig
from jaxcache.attention import attention_plan, mla_attention, mla_extend, paged_attention, paged_extend
from jaxcache.steps.buckets import StepKind

Weights = dict[str, Any]


class Mixer(enum.Enum):
    """How a layer lets tokens see each other."""

    ATTENTION = "attention"  # grouped query heads, all tokens before
    WINDOW = "window"  # grouped query heads, the last tokens before
    LATENT = "latent"  # one latent row a token for all heads (MLA), absorbed
    DELTA = "delta"  # the gated delta rule: a state of fixed size instead of KV


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; float32 throughout.

    Attributes:
      layers: The mixer of each layer.
      width, ff_width: Of the residual stream and of the MLPs.
      heads, kv_heads, head_dim: Query heads, key-value heads, and the width of each.
      window: Tokens that window layers attend to.
      soft_cap: Attention logits become `soft_cap * tanh(logit / soft_cap)`; None for not.
      rank, rope_dim: Of latent layers: the width of the latent part, and of the part with positions.
      conv_width: Tokens that the convolution of delta layers sees.
      vocabulary: Token ids.
    """

    layers: tuple[Mixer, ...]
    width: int = 64
    ff_width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 24
    soft_cap: float | None = None
    rank: int = 32
    rope_dim: int = 8
    conv_width: int = 4
    vocabulary: int = 257

    def of(self, *mixers: Mixer) -> tuple[int, ...]:
        """The layers with one of these mixers."""
        return tuple(i for i, mixer in enumerate(self.layers) if mixer in mixers)

    @property
    def has_window(self) -> bool:
        """Whether some layers have a window."""
        return Mixer.WINDOW in self.layers

    @property
    def conv_channels(self) -> int:
        """Channels of a delta layer's convolution: its queries, keys and values."""
        return 3 * self.heads * self.head_dim

    def kv_config(self, size: int, page_size: int, window_size: int = 0) -> Any:
        """The pool for its attention layers, with room for `size` tokens; `window_size` in layers with a window."""
        sizes: dict[str, Any] = dict(page_size=page_size, dtype=jnp.float32)
        if Mixer.LATENT in self.layers:
            shape = dict(kv_lora_rank=self.rank, qk_rope_head_dim=self.rope_dim)
            return MLAConfig(size=size, layer_num=len(self.layers), **shape, **sizes)
        sizes |= dict(head_num=self.kv_heads, head_dim=self.head_dim)
        full_layers = self.of(Mixer.ATTENTION)
        full = MHAConfig(size=size, layer_num=len(full_layers), **sizes)
        if not self.has_window:
            return full
        window_layers = self.of(Mixer.WINDOW)
        window = MHAConfig(size=window_size, layer_num=len(window_layers), **sizes)
        return SWAConfig(full=full, window=window, full_layers=full_layers, window_layers=window_layers)

    def state_config(self, num_states: int) -> MambaConfig | None:
        """The pool for its delta layers; None without any."""
        layers = self.of(Mixer.DELTA)
        if not layers:
            return None
        return MambaConfig(
            num_states=num_states,
            layer_num=len(layers),
            conv_shape=(self.conv_channels, self.conv_width - 1),
            temporal_shape=(self.heads, self.head_dim, self.head_dim),
            conv_dtype=jnp.float32,
            temporal_dtype=jnp.float32,
        )


_FAMILIES = {
    "llama": ModelConfig((Mixer.ATTENTION,) * 4),
    "deepseek": ModelConfig((Mixer.LATENT,) * 4),
    "gemma": ModelConfig((Mixer.WINDOW, Mixer.ATTENTION) * 2, soft_cap=20.0),
    "gated-delta": ModelConfig((Mixer.DELTA,) * 3 + (Mixer.ATTENTION,)),
}
FAMILIES: Mapping[str, ModelConfig] = MappingProxyType(_FAMILIES)


def random_weights(config: ModelConfig, seed: int) -> Weights:
    """Weights of a model that has learnt nothing, but whose answers depend on all that it sees."""
    keys = iter(jax.random.split(jax.random.key(seed), 16 * len(config.layers) + 8))

    def normal(*shape: int, gain: float = 1.0) -> jax.Array:
        return gain * shape[0] ** -0.5 * jax.random.normal(next(keys), shape)

    def layer(mixer: Mixer) -> Weights:
        mlp = {"gate": normal(w, ff), "up": normal(w, ff), "down": normal(ff, w)}
        shared = {"norm": jnp.ones(w), "mlp_norm": jnp.ones(w), "out": normal(heads * dim, w, gain=2)}
        return shared | mlp | mixers[mixer]()

    def grouped() -> Weights:
        return {
            "q": normal(w, heads, dim, gain=2),
            "k": normal(w, kv_heads, dim, gain=2),
            "v": normal(w, kv_heads, dim),
        }

    def latent() -> Weights:
        return {
            "q": normal(w, heads, dim + config.rope_dim, gain=2),
            "down_kv": normal(w, config.rank + config.rope_dim),
            "latent_norm": jnp.ones(config.rank),
            "up_k": normal(config.rank, heads, dim, gain=2),
            "up_v": normal(config.rank, heads, dim, gain=2),
        }

    def delta() -> Weights:
        return {
            "qkv": normal(w, config.conv_channels),
            "conv": 0.5 * jax.random.normal(next(keys), (config.conv_channels, config.conv_width)),
            "beta": normal(w, heads),
            "decay": normal(w, heads),
            "rate": jnp.log(jnp.linspace(0.02, 0.3, heads)),
        }

    w, ff, heads, kv_heads, dim = config.width, config.ff_width, config.heads, config.kv_heads, config.head_dim
    mixers = {Mixer.ATTENTION: grouped, Mixer.WINDOW: grouped, Mixer.LATENT: latent, Mixer.DELTA: delta}
    return {
        "embed": jax.random.normal(next(keys), (config.vocabulary, w)),
        "norm": jnp.ones(w),
        "head": normal(w, config.vocabulary, gain=2),
        "layers": [layer(mixer) for mixer in config.layers],
    }


def forward(config: ModelConfig, pool: Any, batch: Batch, tokens: jax.Array, weights: Weights) -> tuple[Any, jax.Array]:
    """One step: the model over a batch. `jaxcache.serve.Scheduler` calls it, with the config bound.

    Args:
      config: Static.
      pool: The pool, consumed.
      batch: The step's tokens and where they belong.
      tokens: Indices of the tokens whose logits are wanted; out of range for padding.
      weights: From `random_weights`.

    Returns:
      The updated pool, and float32 logits `(len(tokens), vocabulary)`.
    """
    step = _Step(config, pool, batch)
    x = weights["embed"][batch.tokens]
    for i, layer in enumerate(weights["layers"]):
        x = x + step.mix(i, layer, rms_norm(x, layer["norm"])) @ layer["out"]
        x = x + mlp(layer, rms_norm(x, layer["mlp_norm"]))
    x = x.at[tokens].get(mode="clip")
    return step.pool, rms_norm(x, weights["norm"]) @ weights["head"]


class _Step:
    """One traced step: the pool as its layers update it, and what they share.

    Attributes:
      pool: As the last layer left it.
    """

    def __init__(self, config: ModelConfig, pool: Any, batch: Batch):
        self.pool, self._config, self._batch = pool, config, batch
        self._is_decode = batch.kind is StepKind.DECODE
        self._plan = attention_plan(batch, pool, config.heads)
        self._window_plan = (
            attention_plan(batch, pool, config.heads, window=config.window) if config.has_window else self._plan
        )

    def mix(self, i: int, layer: Weights, x: jax.Array) -> jax.Array:
        """Layer `i` over float32 `(tokens, width)`; returns `(tokens, heads * head_dim)`."""
        mixer = self._config.layers[i]
        if mixer is Mixer.LATENT:
            out = self._latent(i, layer, x)
        elif mixer is Mixer.DELTA:
            out = self._delta(self._config.of(Mixer.DELTA).index(i), layer, x)
        else:
            out = self._attention(i, layer, x, mixer is Mixer.WINDOW)
        return out.reshape(x.shape[0], -1)

    def _attention(self, i: int, layer: Weights, x: jax.Array, is_window: bool) -> jax.Array:
        config, batch = self._config, self._batch
        q, k, v = (jnp.einsum("tw,whd->thd", x, layer[name]) for name in "qkv")
        q, k = rotary(q, batch.positions), rotary(k, batch.positions)
        if config.of(Mixer.DELTA):  # the pool of a hybrid model counts its attention layers by themselves
            i = config.of(Mixer.ATTENTION).index(i)
            self.pool = self.pool.with_kv(self.pool.kv.set_kv_buffer(i, batch.slots, k, v))
        else:
            self.pool = self.pool.set_kv_buffer(i, batch.slots, k, v)
        attend = paged_attention if self._is_decode else paged_extend
        plan, window = (self._window_plan, config.window) if is_window else (self._plan, None)
        scale = config.head_dim**-0.5
        return attend(q, self.pool, i, batch, plan, scale=scale, window=window, soft_cap=config.soft_cap)

    def _latent(self, i: int, layer: Weights, x: jax.Array) -> jax.Array:
        config, batch = self._config, self._batch
        down = x @ layer["down_kv"]
        latent = rms_norm(down[:, : config.rank], layer["latent_norm"])
        rope = rotary(down[:, None, config.rank :], batch.positions)[:, 0]
        self.pool = self.pool.set_mla_kv_buffer(i, batch.slots, latent, rope)
        q = jnp.einsum("tw,whd->thd", x, layer["q"])
        absorbed = jnp.einsum("thd,rhd->thr", q[..., : config.head_dim], layer["up_k"])
        q = jnp.concatenate([absorbed, rotary(q[..., config.head_dim :], batch.positions)], axis=-1)
        attend = mla_attention if self._is_decode else mla_extend
        out = attend(q, self.pool, i, batch, self._plan, scale=(config.head_dim + config.rope_dim) ** -0.5)
        return jnp.einsum("thr,rhd->thd", out, layer["up_v"])

    def _delta(self, i: int, layer: Weights, x: jax.Array) -> jax.Array:
        """Token after token, each on the state of its own request."""
        batch, states = self._batch, self.pool.states
        projected = x @ layer["qkv"]
        beta, decay = delta_gates(layer, x)

        def one(carry: Any, token: Any) -> Any:
            conv, memory = carry
            u, b, g, request = token
            window = jnp.concatenate([conv.at[request].get(mode="clip"), u[:, None]], axis=1)
            q, k, v = delta_heads(self._config, jnp.sum(window * layer["conv"], axis=1))
            updated, out = delta_rule(memory.at[request].get(mode="clip"), q, k, v, b, g)
            return (conv.at[request].set(window[:, 1:]), memory.at[request].set(updated)), out  # padding is dropped

        start = states.read(batch.state, i)
        (conv, memory), out = jax.lax.scan(one, start, (projected, beta, decay, batch.request))
        self.pool = self.pool.with_states(states.write(batch.state, i, conv, memory))
        return out


# ---- parts -----------------------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Root mean square normalisation over the last axis."""
    return weight * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def mlp(layer: Weights, x: jax.Array) -> jax.Array:
    """A gated MLP."""
    return (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]


def rotary(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary embedding of `(..., tokens, heads, dim)` at positions `(..., tokens)`."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * base ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def delta_gates(layer: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How strongly each head writes a token, and how much of its state it keeps: `(tokens, heads)` each."""
    return jax.nn.sigmoid(x @ layer["beta"]), jnp.exp(-jnp.exp(layer["rate"]) * jax.nn.softplus(x @ layer["decay"]))


def delta_heads(config: ModelConfig, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values `(..., heads, head_dim)` of what the convolution gives, `(..., channels)`."""
    parts = jnp.split(jax.nn.silu(mixed), 3, axis=-1)
    q, k, v = (part.reshape(*part.shape[:-1], config.heads, config.head_dim) for part in parts)
    return unit(q), unit(k), v


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def delta_rule(memory: Any, q: Any, k: Any, v: Any, beta: Any, decay: Any) -> tuple[jax.Array, jax.Array]:
    """One token of the gated delta rule: the state `(..., heads, dim, dim)` afterwards, and what is read of it."""
    memory = memory * decay[..., None, None]
    error = v - jnp.einsum("...hk,...hkv->...hv", k, memory)
    memory = memory + jnp.einsum("...hk,...hv->...hkv", k, beta[..., None] * error)
    return memory, jnp.einsum("...hk,...hkv->...hv", q, memory)
