"""Sampling: how each request wants its next token chosen, and the choice itself, inside the jitted step.

A draw depends on the request's seed and on how many tokens it has sampled, on nothing else: not on the other requests
of the batch, nor on whether the request was retracted and resumed in between.

Source: jaxcache's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.arguments import as_count, as_integer
from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, UInt32


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
      max_tokens: Tokens to sample at most; at least 1.
      temperature: Logits are divided by it; 0 takes the most likely token.
      top_k: Draw from so many of the most likely tokens; 0 from all. Tokens as likely as the last of them count too.
      top_p: Draw from the most likely tokens that together have this probability, after `temperature` and `top_k`.
      seed: Equal seeds draw equal tokens for equal logits. Its lowest 32 bits count.
      stop_token_ids: The request ends with one of these; it is its last token.
      logprobs: Also report the log-probabilities of so many of the most likely tokens at each place.
      prompt_logprobs: Report the log-probability of each prompt token. The prompt is then computed from its first
        token, whatever is cached of it.

    Raises:
      ArgumentError: A value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("max_tokens", "top_k", "logprobs"):
            as_count(name, getattr(self, name))
        as_integer("seed", self.seed, bits=64)
        if self.max_tokens < 1:
            raise ArgumentError("max_tokens must be at least 1, got 0")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ArgumentError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p must be in (0, 1], got {self.top_p}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """What a step knows of each request's `SamplingParams`: a row for each row of the request table.

    Attributes:
      temperature, top_k, top_p, seed: As in `SamplingParams`.
      prompt_len: Tokens of the prompt: those behind it are sampled ones.
    """

    temperature: Float32[Array | np.ndarray, " rows"]
    top_k: Int32[Array | np.ndarray, " rows"]
    top_p: Float32[Array | np.ndarray, " rows"]
    seed: UInt32[Array | np.ndarray, " rows"]
    prompt_len: Int32[Array | np.ndarray, " rows"]

    @classmethod
    def of(cls, rows: int) -> SamplingRows:
        """On the host, for so many rows: greedy."""
        integers = [np.zeros(rows, dtype) for dtype in (np.int32, np.uint32, np.int32)]
        return cls(np.zeros(rows, np.float32), integers[0], np.ones(rows, np.float32), *integers[1:])

    def set(self, row: int, params: SamplingParams, prompt_len: int) -> None:
        """Writes a row; on the host."""
        seed = params.seed & 0xFFFFFFFF
        values = (params.temperature, min(params.top_k, 2**31 - 1), params.top_p, seed, prompt_len)
        for field, value in zip(fields(self), values, strict=True):
            getattr(self, field.name)[row] = value

    def of_requests(self, row: Int32[Array, " requests"]) -> SamplingRows:
        """Those of a batch, in its order; for padding those of some other request."""
        return jax.tree.map(lambda values: values.at[row].get(mode="clip"), self)

    def on_device(self) -> SamplingRows:
        """A copy on the device."""
        return jax.tree.map(jnp.array, self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTokens:
    """What a step sampled.

    Attributes:
      token: The token of each request.
      logprob: Its log-probability: the log-softmax of the logits as the model gave them, whatever was drawn from.
      top_token, top_logprob: The most likely tokens, most likely first, and theirs.
    """

    token: Int32[Array, " requests"]
    logprob: Float32[Array, " requests"]
    top_token: Int32[Array, "requests top"]
    top_logprob: Float32[Array, "requests top"]


def sample(
    logits: Float32[Array, "requests vocabulary"], rows: SamplingRows, sampled: Int32[Array, " requests"]
) -> Int32[Array, " requests"]:
    """The next token of each request.

    Args:
      logits: As the model gave them.
      rows: How each request wants it.
      sampled: Tokens that each has sampled before; the draw depends on it.

    Cost: a maximum and a draw over the vocabulary; a sort where a request of the batch has a `top_k` or `top_p`.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
        jnp.any(rows.temperature > 0),
        lambda: jnp.where(rows.temperature > 0, _draw(logits, rows, sampled), greedy),
        lambda: greedy,
    )


def _draw(logits: jax.Array, rows: SamplingRows, sampled: jax.Array) -> jax.Array:
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    is_restricted = jnp.any((rows.top_k > 0) | (rows.top_p < 1))
    least = jax.lax.cond(is_restricted, lambda: least_allowed(scaled, rows), lambda: jnp.full(len(scaled), -jnp.inf))
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(rows.seed, sampled)
    allowed = jnp.where(scaled >= least[:, None], scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)


def least_allowed(scaled: Float32[Array, "requests vocabulary"], rows: SamplingRows) -> Float32[Array, " requests"]:
    """The smallest logit that `top_k` and `top_p` let each request draw, after temperature; -inf where all may.

    Cost: a sort.
    """
    ranked = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    is_top = (rank < rows.top_k[:, None]) | (rows.top_k == 0)[:, None]
    probability = jax.nn.softmax(jnp.where(is_top, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    allowed = is_top & ((before < rows.top_p[:, None]) | (rank == 0) | (rows.top_p >= 1)[:, None])
    least = jnp.min(jnp.where(allowed, ranked, jnp.inf), axis=-1)
    return jnp.where((rows.top_k > 0) | (rows.top_p < 1), least, -jnp.inf)


def with_logprobs(
    logits: Float[Array, "requests vocabulary"], token: Int32[Array, " requests"], top: int
) -> SampledTokens:
    """The tokens with their log-probabilities, and those of the `top` most likely ones."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    top_logprob, top_token = jax.lax.top_k(logprobs, top)
    return SampledTokens(token, chosen, top_token.astype(jnp.int32), top_logprob)
