"""Pools in which requests have random keys and values, and what their tokens attend to: float64, a head at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.swa import SWAConfig, SWAKVPool
from jaxcache.steps.batch import Batch
from jaxcache.steps.buckets import StepKind
from jaxcache.tables.device_table import RequestTable

SCALE = 0.4
MAX_PAGES = 6


@dataclass
class Problem:
    """A step over a pool whose requests' tokens, those of the step included, are written in all layers."""

    pool: Any
    batch: Batch
    q: np.ndarray  # (tokens of the step, heads, width)
    keys: list[np.ndarray]  # one a request: (layers, tokens, heads, width)
    values: list[np.ndarray]

    def expected(self, layer: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        """Results and log-sum-exp of the step's tokens; of padding, zeros and -inf."""
        prefix, seq = np.asarray(self.batch.prefix_len), np.asarray(self.batch.seq_len)
        outs, lses = [], []
        for b, position in ((i, p) for i in range(len(seq)) for p in range(prefix[i], seq[i])):
            k, v = (a[b][layer, : position + 1] for a in (self.keys, self.values))
            out, lse = attend(self.q[len(outs)], k, v, **how)
            outs.append(out)
            lses.append(lse)
        missing = len(self.q) - len(outs)
        shape = outs[0].shape
        out = np.stack([*outs, *[np.zeros(shape)] * missing])
        return out, np.stack([*lses, *[np.full(shape[0], -np.inf)] * missing])


def attend(q: Any, k: Any, v: Any, *, window: int | None = None, soft_cap: float | None = None) -> tuple[Any, Any]:
    """One query `(heads, width)` over keys `(n, kv_heads, width)`: results `(heads, width)`, log-sum-exp `(heads,)`."""
    first = 0 if window is None else max(len(k) - window, 0)
    q, k, v = np.asarray(q, np.float64), np.asarray(k, np.float64)[first:], np.asarray(v, np.float64)[first:]
    heads = [h * k.shape[1] // q.shape[0] for h in range(q.shape[0])]
    logits = np.stack([k[:, kv_head] @ q[h] * SCALE for h, kv_head in enumerate(heads)])
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    lse = np.log(np.exp(logits).sum(1))
    return np.stack([np.exp(logits[h] - lse[h]) @ v[:, kv_head] for h, kv_head in enumerate(heads)]), lse


def decode_rows(problem: Problem) -> np.ndarray:
    """Row of `q` of each request, where each has at most one token: padding has a row behind them."""
    count = np.asarray(problem.batch.seq_len) > 0
    return np.where(count, np.cumsum(count) - 1, len(problem.q) - 1)


def make_problem(
    config: Any, lens: tuple[tuple[int, int], ...], *, heads: int = 4, mesh: Any = None, seed: int = 0
) -> Problem:
    """Requests of `lens` (tokens before the step, tokens of the step) in a new pool; (0, 0) is padding.

    Pages are anywhere, and what no request has written is NaN in a pool of floats.
    """
    rng = np.random.default_rng(seed)
    page = config.page_size
    prefix, new = np.array(lens, np.int32).T
    seq = (prefix + new).astype(np.int32)
    free = list(1 + rng.permutation(config.size // page))
    pages = rng.integers(0, config.size // page + 1, (len(lens) + 1, MAX_PAGES)).astype(np.int32)
    row = rng.permutation(len(lens) + 1)[: len(lens)].astype(np.int32)
    for b, n in enumerate(seq):
        for i in range(-(-n // page)):
            pages[row[b], i] = free.pop()
    slots = [pages[r].repeat(page)[:n] * page + np.arange(n) % page for r, n in zip(row, seq, strict=True)]
    side = config.full if isinstance(config, SWAConfig) else config
    dtype, is_latent = np.dtype(side.dtype), isinstance(side, MLAConfig)
    shapes = [(side.row_shapes[0])] if is_latent else side.row_shapes
    rows = [[_numbers(rng, (config.layer_num, n, *shape), dtype) for n in seq] for shape in shapes]
    pool = config.pool_type.create(config) if mesh is None else config.pool_type.create(config, mesh=mesh)
    if isinstance(pool, SWAKVPool):
        last = config.size_swa // page
        index = np.unique(np.concatenate(slots) // page).astype(np.int32)
        pool = pool.with_window_map(index, (1 + rng.permutation(last))[: len(index)].astype(np.int32))
    pool = _filled(pool, np.concatenate(slots), [np.concatenate(part, 1) for part in rows])
    if is_latent:
        rank = side.kv_lora_rank
        keys = [part[:, :, None] for part in rows[0]]
        values = [part[..., :rank] for part in keys]
    else:
        keys, values = rows
    tokens = int(new.sum()) + 1  # one of padding
    q_dtype = dtype if dtype.itemsize > 1 else np.dtype(np.float32)
    q = rng.standard_normal((tokens, heads, keys[0].shape[-1])).astype(q_dtype)
    return Problem(pool, _batch(pages, row, prefix, seq, slots, tokens, page), q, keys, values)


def _batch(pages: Any, row: Any, prefix: Any, seq: Any, slots: list[np.ndarray], tokens: int, page: int) -> Batch:
    steps = [np.arange(p, n) for p, n in zip(prefix, seq, strict=True)]
    request = np.concatenate([np.full(len(step), b) for b, step in enumerate(steps)])
    missing = tokens - len(request)

    def padded(array: Any) -> Any:
        return jnp.asarray(np.pad(np.asarray(array), (0, missing)), jnp.int32)

    batch_slots = np.concatenate([s[step] for s, step in zip(slots, steps, strict=True)])
    whole = [jnp.asarray(a, jnp.int32) for a in (row, prefix, seq, np.zeros_like(seq))]
    valid = jnp.arange(tokens) < len(request)
    table = RequestTable(jnp.asarray(pages))
    return Batch(
        padded(request * 0),
        padded(np.concatenate(steps)),
        padded(batch_slots),
        padded(request),
        valid,
        *whole,
        table,
        None,
        StepKind.EXTEND,
        page,
        page * np.shape(pages)[1],
    )


def _filled(pool: Any, slots: np.ndarray, rows: list[np.ndarray]) -> Any:
    """The pool with these rows in all layers, and NaN in all others of a pool of float32."""
    pool = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if a.dtype == jnp.float32 else a, pool)

    def fill(pool: Any, rows: Any) -> Any:
        for layer in range(pool.config.layer_num):
            pool = pool.set_kv_buffer(layer, jnp.asarray(slots, jnp.int32), *(part[layer] for part in rows))
        return pool

    if pool.mesh is not None:
        from jax.sharding import PartitionSpec

        specs = pool.partition_specs(), [PartitionSpec(None, None, "tp")] * len(rows)
        fill = jax.shard_map(fill, mesh=pool.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return jax.jit(fill, donate_argnums=0)(pool, rows)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype == np.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)
