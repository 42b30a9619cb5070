"""A layer of real attention in the proof: what a decode step attends to is what the request's own tokens ask for.

Each decode step writes its rows and then attends, in its first layer of full attention, through the pool, the device's
page table and the op that an engine would call. The proof computes the same softmax in float32 from the token ids
alone, which it knows from the requests. So a length, a page or a mask that is wrong where attention looks it up is
seen, also where every row holds what it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.attention import attention_plan, mla_attention, paged_attention
from jaxcache.manager.manager import MemoryManager
from jaxcache.pools.base import KVCacheConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.replay.config import Fault
from jaxcache.replay.content import Pool, row_content, token_seed
from jaxcache.request import Request
from jaxcache.steps.batch import Batch
from jaxcache.steps.buckets import StepKind
from jaxcache.steps.plan import StepPlan

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Shaped

GROUP = 2
"""Query heads of each KV head, and of latent rows."""
OWN_LOGIT = 6.0
"""About the logit of a query's own token, so that it counts among thousands."""
CHUNK_TOKENS = 1024
"""Tokens that the proof takes at a time: one shape serves every length."""
TOLERANCE = {4: 1e-4, 2: 2e-2, 1: 2e-2}
"""Of results, relative to the largest of them, by the bytes of an element of the pool."""
_HEADER = 4

Running = tuple[jax.Array, jax.Array, jax.Array]
"""A softmax over the tokens so far: largest logit, denominator, sum of values."""


def attending(step: Callable, fault: Fault | None) -> Callable:
    """`step`, which in a decode step also attends, and returns what it saw: `(requests, heads, width)`."""

    def attend(pool: Pool, batch: Batch) -> tuple[Pool, Any]:
        pool, out = step(pool, batch)
        if batch.kind is not StepKind.DECODE:
            return pool, out
        config = full_config(pool)
        q = queries(token_seed(batch.tag, batch.tokens[batch.last], batch.positions[batch.last]), config)
        seen = batch
        if fault is Fault.STALE_LENGTH:  # as of the step before
            seen = replace(batch, seq_len=jnp.maximum(batch.seq_len - 1, jnp.minimum(batch.seq_len, 1)))
        plan = attention_plan(seen, pool, q.shape[1])
        op = mla_attention if isinstance(config, MLAConfig) else paged_attention
        return pool, op(q, pool, config.start_layer, seen, plan, scale=_scale(config))

    return attend


def full_config(pool: Any) -> KVCacheConfig:
    """Sizes of the layers of full attention: the first stack of a pool."""
    return next(iter(pool.stacks().values())).config


def queries(seed: Shaped[Array, " requests"], config: KVCacheConfig) -> Float[Array, "requests heads width"]:
    """The queries of tokens of those seeds: their own keys, turned by an element from query head to query head."""
    keys = row_content(seed, 0, 0, config.row_shapes[0], config.dtype)
    keys = keys.reshape(len(seed), -1, keys.shape[-1])
    heads = jnp.stack([jnp.roll(keys, i, axis=-1) for i in range(GROUP)], axis=2)
    dtype = config.dtype if np.dtype(config.dtype).itemsize > 1 else jnp.float32
    return heads.reshape(len(seed), -1, keys.shape[-1]).astype(dtype)


def _scale(config: KVCacheConfig) -> float:
    """What makes the logit of a token's own key about `OWN_LOGIT`."""
    spread = 256 if np.dtype(config.dtype).itemsize > 1 else 16  # see `row_content`
    return OWN_LOGIT / (config.row_shapes[0][-1] * spread**2 / 12)


class AttentionProof:
    """Compares what decode steps attended to. Nothing waits for the device until `mismatched` is asked for.

    Attributes:
      verified: Queries compared.
    """

    def __init__(self, manager: MemoryManager):
        self._config = full_config(manager.pool)
        self._place = manager.table.pages.sharding
        self._wrong = self._zero()
        self._fold = jax.jit(partial(_fold, config=self._config))
        self._compare = jax.jit(partial(_compare, config=self._config))
        self.verified = 0

    def warm_up(self, manager: MemoryManager, step: Callable) -> None:
        """Compiles every shape, by empty decode steps."""
        running = self._expected(0, np.zeros(1, np.int32))
        for bucket in manager.buckets:
            if bucket.kind is StepKind.DECODE:
                out = manager.run(step, StepPlan.empty(bucket))
                self._compare(out, np.int32(0), running, self._wrong)
        self._wrong = self._zero()

    def verify(self, requests: Sequence[Request], out: Float[Array, "requests heads width"]) -> None:
        """Compares the first rows of a decode step's result, which are those of `requests`."""
        for i, request in enumerate(requests):
            tokens = np.asarray(request.key.token_ids[: request.kv_len], np.int32)
            self._wrong = self._compare(out, np.int32(i), self._expected(request.tag, tokens), self._wrong)
        self.verified += len(requests)

    @property
    def mismatched(self) -> int:
        """Queries that saw something else. Waits for the device."""
        return int(self._wrong)

    def _expected(self, tag: int, tokens: Int32[np.ndarray, " tokens"]) -> Running:
        running = self._nothing()
        for start in range(0, len(tokens), CHUNK_TOKENS):
            part = tokens[start : start + CHUNK_TOKENS]
            packed = np.zeros(_HEADER + CHUNK_TOKENS, np.int32)
            packed[:_HEADER] = tag, start, len(tokens), tokens[-1]
            packed[_HEADER : _HEADER + len(part)] = part
            running = self._fold(packed, running)
        return running

    def _nothing(self) -> Running:
        shape: Any = self._config.row_shapes[-1]
        heads = GROUP * (shape[0] if len(shape) > 1 else 1)
        width = self._config.kv_lora_rank if isinstance(self._config, MLAConfig) else shape[-1]
        host = np.full(heads, -np.inf, np.float32), np.zeros(heads, np.float32), np.zeros((heads, width), np.float32)
        return jax.device_put(host, self._place)

    def _zero(self) -> jax.Array:
        return jax.device_put(np.zeros((), np.int32), self._place)


def _fold(packed: Int32[Array, " size"], running: Running, *, config: KVCacheConfig) -> Running:
    """Folds a chunk of a request's tokens into the softmax of its last token, in float32.

    `packed` is [tag, first position, number of tokens of the request, its last token, token ids ... (padded)].
    """
    tag, start, count, last = (packed[i] for i in range(_HEADER))
    tokens = packed[_HEADER:]
    position = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    seed = token_seed(jnp.full_like(tokens, tag), tokens, position)
    own = token_seed(tag[None], last[None], count[None] - 1)
    planes = [
        row_content(seed, 0, plane, shape, config.dtype).astype(jnp.float32)
        for plane, shape in enumerate(config.row_shapes)
    ]
    planes = [rows.reshape(rows.shape[0], -1, rows.shape[-1]) for rows in planes]
    keys, values = planes[0], planes[-1]
    if isinstance(config, MLAConfig):
        values = values[..., : config.kv_lora_rank]
    q = queries(own, config)[0].astype(jnp.float32).reshape(keys.shape[1], GROUP, -1)
    logits = jnp.einsum("hgd,thd->hgt", q, keys, precision="highest") * _scale(config)
    logits = jnp.where(position < count, logits, -jnp.inf).reshape(-1, tokens.shape[0])
    top, den, acc = running
    new = jnp.maximum(top, logits.max(-1))
    fade, weight = jnp.exp(top - new), jnp.exp(logits - new[:, None])
    seen = jnp.einsum("hgt,thd->hgd", weight.reshape(*q.shape[:2], -1), values, precision="highest")
    return new, den * fade + weight.sum(-1), acc * fade[:, None] + seen.reshape(acc.shape)


def _compare(
    out: Float[Array, "requests heads width"],
    row: Int32[Array, ""],
    running: Running,
    wrong: Int32[Array, ""],
    *,
    config: KVCacheConfig,
) -> Int32[Array, ""]:
    """Adds 1 if row `row` is not what the softmax gives. A NaN is wrong."""
    _, den, acc = running
    want: Float32[Array, "heads width"] = acc / den[:, None]
    error = jnp.abs(out[row].astype(jnp.float32) - want).max()
    is_close = error <= TOLERANCE[np.dtype(config.dtype).itemsize] * jnp.maximum(jnp.abs(want).max(), 1.0)
    return wrong + (~is_close).astype(jnp.int32)
