"""What a step's batch and pool say to attention: who attends to what, where it lies, and how the kernels divide it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.kernels.attention.contract import PageOrder, Sequences
from jaxcache.kernels.attention.fit import wgmma_extend, wgmma_latents
from jaxcache.kernels.attention.launch import WGMMA_ROWS, Launches, heads_launches, latent_launches
from jaxcache.kernels.attention.plan import Plan, SharedPrefix, make_plan
from jaxcache.kernels.dispatch import Implementation, Op, choose, current_target
from jaxcache.pools.config import KVCacheConfig
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import HeadsConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.sharding import require_one_shard
from jaxcache.pools.swa import SWAKVPool
from jaxcache.steps.batch import Batch
from jaxcache.steps.loop import DecodeLoop

if TYPE_CHECKING:
    from jaxcache.pools.stack import MemoryPool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionPlan:
    """How the layers of one kind attend in one step. Make it with `attention_plan`, in the step.

    Attributes:
      plan: How the kernels divide the work.
      config: Sizes of the pool of those layers, or of that side of it.
      num_heads: Query heads on this device.
    """

    plan: Plan
    config: KVCacheConfig = field(metadata={"static": True})
    num_heads: int = field(metadata={"static": True})


def attention_plan(
    batch: Batch | DecodeLoop,
    pool: MemoryPool,
    num_heads: int,
    *,
    window: int | None = None,
    shared: SharedPrefix | None = None,
    implementation: Implementation | None = None,
) -> AttentionPlan:
    """The plan of a step for all layers of one kind: those of full attention, or those of one window.

    Args:
      batch: The step's batch; or a decode loop whose present step has its slots (`loop.grow()`).
      pool: The pool that the ops will read. Of a pool with windows, the side that `window` says: a window goes through
        its map of pages.
      num_heads: Query heads on this device: of a shard, its own.
      window: Last tokens that a token attends to, its own included; None for all.
      shared: Prefixes that requests of the batch have in common: decode reads them once a group. None switches it off.
      implementation: Whose blocks and tiles to cut the work into, where several have an op; None is the measured choice
        of `jaxcache.kernels.dispatch`. An op that insists on an implementation needs a plan that does.

    Returns:
      A pytree of a few integers a request. It is made in the graph; layers of a scan may close over it.

    Raises:
      ArgumentError: on a pool that attention cannot read, heads that its heads do not divide, a shared prefix with a
        window, or lengths, known on the host, beyond the page table.
      UnsupportedError: if an implementation is insisted on that cannot run.
      ShardingError: if the pool is sharded and this is not inside a `jax.shard_map` over its axis.

    Cost: a few small kernels, once a step.
    """
    side, is_window = side_of(pool, window is not None)
    config = side.config
    require_one_shard(config, side.buffers)
    sequences, tokens = sequences_of(batch)
    if is_window:
        sequences = _through_map(sequences, pool_with_windows(pool).full_to_window)
    launches = _launches(config, (sequences.requests, tokens), num_heads, window, implementation)
    plan = make_plan(sequences, tokens, config.page_size, launches, window=window, shared=shared)
    return AttentionPlan(plan, config, num_heads)


def side_of(pool: Any, is_window: bool) -> tuple[Any, bool]:
    """The stack of layers that attention of this kind reads, and whether it is reached through the map of windows."""
    if isinstance(pool, HybridKVPool):
        pool = pool.kv
    if not isinstance(pool, SWAKVPool):
        return pool, False
    return (pool.window, True) if is_window else (pool.full, False)


def pool_with_windows(pool: Any) -> Any:
    """The pool itself, or the KV pool of a hybrid one."""
    return pool.kv if isinstance(pool, HybridKVPool) else pool


def sequences_of(batch: Batch | DecodeLoop) -> tuple[Sequences, int]:
    """Who attends to what, and how many tokens the step has.

    Raises:
      ArgumentError: if it is neither a batch nor a loop.
    """
    if isinstance(batch, DecodeLoop):
        rows, width = batch.rows, batch.shape.width
        first = jnp.arange(batch.shape.requests, dtype=jnp.int32) * width
        has_slot = rows.granted > 0
        seq_len = jnp.where(has_slot, rows.seq_len + rows.granted, 0)
        prefix_len = jnp.where(has_slot, rows.seq_len, 0)
        return Sequences(batch.table.pages, _inside(batch), prefix_len, seq_len, first), batch.shape.requests * width
    if not isinstance(batch, Batch):
        raise ArgumentError(f"batch must be a Batch or a DecodeLoop, got {type(batch).__name__}")
    new = batch.seq_len - batch.prefix_len
    before = jnp.arange(new.shape[0])[None, :] < jnp.arange(new.shape[0])[:, None]
    first = jnp.sum(jnp.where(before, new[None, :], 0), axis=1, dtype=jnp.int32)
    sequences = Sequences(batch.table.pages, _inside(batch), batch.prefix_len, batch.seq_len, first)
    return sequences, batch.tokens.shape[0]


def _inside(batch: Batch | DecodeLoop) -> jax.Array:
    """The rows of a batch, those of padding, which are past the end, moved inside: kernels may look them up."""
    return jnp.minimum(batch.row, batch.table.pages.shape[0] - 1)


def page_order(config: KVCacheConfig) -> PageOrder:
    """Where the pages of a pool lie, as the kernels are told."""
    pages = config.rows // config.page_size
    return PageOrder(config.layer_num, pages, config.page_size, config.layout is Layout.PAGE_MAJOR)


def _through_map(sequences: Sequences, full_to_window: jax.Array) -> Sequences:
    """The same requests, with a table of their window pages; 0, which no query sees, where there is none."""
    pages = full_to_window.at[sequences.pages[sequences.row]].get(mode="clip")
    row = jnp.arange(sequences.requests, dtype=jnp.int32)
    return Sequences(pages, row, sequences.prefix_len, sequences.seq_len, sequences.first_token)


def _launches(
    config: KVCacheConfig,
    rows: tuple[int, int],
    num_heads: int,
    window: int | None,
    implementation: Implementation | None,
) -> Launches:
    """The launches for a step of so many requests and tokens."""
    if not isinstance(num_heads, (int, np.integer)) or num_heads < 1:
        raise ArgumentError(f"num_heads must be a positive integer, got {num_heads!r}")
    (requests, tokens), dtype, order = rows, np.dtype(config.dtype), page_order(config)
    capability = current_target().compute_capability()
    if isinstance(config, MLAConfig):
        (width,), rank = config.row_shapes[0], config.kv_lora_rank
        why = wgmma_latents(rank, width - rank, num_heads, dtype, order, window)
        by = _cut_for(Op.MLA_DECODE, implementation, requests, why)
        return latent_launches(requests, num_heads, width, dtype.itemsize, capability, by)
    if not isinstance(config, HeadsConfig):
        raise ArgumentError(f"pool must hold keys and values, or latent rows, got one of a {type(config).__name__}")
    heads, dim = config.shard_row_shapes[0]
    if num_heads % heads:
        raise ArgumentError(
            f"num_heads must be a multiple of the {heads} KV heads of this shard, got {num_heads}: "
            "count the query heads of one device"
        )
    v_dim = config.shard_row_shapes[1][1]
    why = wgmma_extend(dim, v_dim, num_heads, heads, dtype, order, tokens)
    if tokens < WGMMA_ROWS * requests and implementation is None:
        why = why or f"tiles of {WGMMA_ROWS} tokens would be empty for the most part"
    by = _cut_for(Op.PAGED_EXTEND, implementation, tokens, why)
    group = num_heads // heads
    return heads_launches(requests, heads, group, dim + v_dim, dtype.itemsize, capability, by)


def _cut_for(op: Op, implementation: Implementation | None, rows: int, why: str | None) -> Implementation:
    """Whose blocks or tiles an op's plan has: those of Mosaic, if it is chosen, else those of Triton."""
    if implementation in (None, Implementation.MOSAIC):
        unfit = {} if why is None else {Implementation.MOSAIC: why}
        if choose(op, implementation=implementation, rows=rows, unfit=unfit).implementation is Implementation.MOSAIC:
            return Implementation.MOSAIC
    return Implementation.TRITON
