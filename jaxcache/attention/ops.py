"""The attention ops as a model calls them, over a pool and a plan of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.attention.plan import AttentionPlan, page_order, pool_with_windows, side_of
from jaxcache.errors import ArgumentError
from jaxcache.kernels.attention import decode, extend, mla
from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent
from jaxcache.kernels.dispatch import Implementation
from jaxcache.pools.config import KVCacheConfig
from jaxcache.pools.mha import HeadsConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.sharding import require_one_shard
from jaxcache.pools.swa import SWAKVPool

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Float32

    from jaxcache.pools.stack import LayerId, MemoryPool
    from jaxcache.steps.batch import Batch
    from jaxcache.steps.loop import DecodeLoop


def paged_attention(
    q: Float[Array, "requests heads dim"],
    pool: MemoryPool,
    layer: LayerId,
    batch: Batch | DecodeLoop,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float32[Array, " heads"] | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Decode: attention of the last token of each request to all its tokens, which are in the pool already.

    Args:
      q: The query of each request of the batch. Query head `i` belongs to KV head `i // (heads / kv_heads)`.
      pool: The pool that the plan was made for, as the last update returned it; read in place. Of a pool with windows
        also a side alone, whose layers count from 0, so that a scan can go over them.
      layer: Global layer id; may be traced, and is then the nearest one if there is no such layer.
      batch: The batch that the plan was made for.
      plan: `attention_plan` of this step, for this window.
      scale: Multiplies `q . k`: a number, part of the compiled step.
      window: That of the plan.
      soft_cap: Logits become `soft_cap * tanh(logit / soft_cap)`.
      sinks: float32, a logit without a value for each query head.
      k_scale: What an element of a key is worth: a number, one for each KV head, or one for each row and head in an
        array like the pool's, as `QuantizedPool.scales`. Needed for int8.
      v_scale: The same for values.
      return_lse: Also returns the log-sum-exp, for `merge_attention`.
      implementation: Overrides the measured choice of `jaxcache.kernels.dispatch`.

    Returns:
      `(requests, heads, v_dim)` in the dtype of `q`, zeros for padding; and, if asked, float32 `(requests, heads)`, the
      natural log-sum-exp of the logits, sinks included, -inf for padding.

    Raises:
      StalePoolError: if the pool was consumed.
      ArgumentError: (tracing) on a pool, dtype, width or layer that does not fit, or a plan of another batch, pool or
        window.
      ShardingError: if the pool is sharded and this is not inside a `jax.shard_map` over its axis.
      UnsupportedError: if an implementation is insisted on that cannot run, or a gradient is asked for.

    Cost: reads the keys and values of all requests once, in place; it is bound by that.
    """
    side, index = _layer_of(pool, layer, plan, batch)
    masking = Masking(scale, window, soft_cap)
    kv = _keys_and_values(side, k_scale, v_scale)
    _check_heads(q, plan)
    result = decode.paged_decode(q, kv, index, plan.plan, masking, sinks=sinks, implementation=implementation)
    return result if return_lse else result[0]


def paged_extend(
    q: Float[Array, "tokens heads dim"],
    pool: MemoryPool,
    layer: LayerId,
    batch: Batch | DecodeLoop,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float32[Array, " heads"] | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Prompts, chunks on a cached prefix, drafts: attention of each token to those of its request up to itself.

    Args and errors are those of `paged_attention`, but that `q` has a row for each token of the batch, padding
    included. In a decode loop of several tokens a row, those of a row follow one another: `(rows * width, heads, dim)`.

    Returns:
      `(tokens, heads, v_dim)` in the dtype of `q`, zeros for padding; and, if asked, float32 `(tokens, heads)`.

    Cost: `4 * heads * dim` operations for each pair of a token and a key that it sees.
    """
    side, index = _layer_of(pool, layer, plan, batch)
    masking = Masking(scale, window, soft_cap)
    kv = _keys_and_values(side, k_scale, v_scale)
    _check_heads(q, plan)
    result = extend.paged_extend(q, kv, index, plan.plan, masking, sinks=sinks, implementation=implementation)
    return result if return_lse else result[0]


def mla_attention(
    q: Float[Array, "requests heads rank+rope"],
    pool: MemoryPool,
    layer: LayerId,
    batch: Batch | DecodeLoop,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """`paged_attention` over latent rows, with absorbed queries: the value of a row is its latent part.

    Args:
      q: The absorbed query of each request: its latent part, then its rope part.
      pool: An MLA pool.
      kv_scale: What an element of a row is worth, one number.
      layer, batch, plan, scale, window, soft_cap, return_lse, implementation: As of `paged_attention`.

    Returns:
      `(requests, heads, kv_lora_rank)` in the dtype of `q`, zeros for padding; and, if asked, the log-sum-exp.

    Raises:
      StalePoolError, ArgumentError, ShardingError, UnsupportedError: As `paged_attention`.

    Cost: reads the rows of all requests once for each 64 heads.
    """
    side, index = _layer_of(pool, layer, plan, batch)
    masking, kv = Masking(scale, window, soft_cap), _latent_rows(side, kv_scale)
    _check_heads(q, plan)
    result = mla.mla_decode(q, kv, index, plan.plan, masking, implementation=implementation)
    return result if return_lse else result[0]


def mla_extend(
    q: Float[Array, "tokens heads rank+rope"],
    pool: MemoryPool,
    layer: LayerId,
    batch: Batch | DecodeLoop,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """`paged_extend` over latent rows, with absorbed queries. See `mla_attention`."""
    side, index = _layer_of(pool, layer, plan, batch)
    masking, kv = Masking(scale, window, soft_cap), _latent_rows(side, kv_scale)
    _check_heads(q, plan)
    result = mla.mla_extend(q, kv, index, plan.plan, masking, implementation=implementation)
    return result if return_lse else result[0]


def _layer_of(pool: Any, layer: Any, plan: AttentionPlan, batch: Any) -> tuple[Any, Any]:
    """The stack that has the layer, and its index there, both checked against the plan."""
    if not isinstance(plan, AttentionPlan):
        raise ArgumentError(f"plan must be what attention_plan returned, got {type(plan).__name__}")
    pool.require_live()
    side, _ = side_of(pool, False)
    with_windows = pool_with_windows(pool)
    if isinstance(with_windows, SWAKVPool):
        layer, is_window = with_windows.config.locate(layer)
        side = with_windows.window if is_window else with_windows.full
        if is_window != (plan.plan.window is not None):
            raise ArgumentError(
                f"plan must be for the kind of layer: this one is {'a window' if is_window else 'full attention'}, "
                f"and the plan's window is {plan.plan.window}"
            )
    config = side.config
    if config != plan.config:
        raise ArgumentError(f"plan must be made for this pool, {config}, and is for {plan.config}")
    require_one_shard(config, side.buffers)
    if batch.row.shape[0] != plan.plan.sequences.requests:
        raise ArgumentError(
            f"plan must be of this batch of {batch.row.shape[0]} requests, and is of one of "
            f"{plan.plan.sequences.requests}: make it in the step"
        )
    return side, _index(layer, config)


def _index(layer: Any, config: KVCacheConfig) -> Any:
    """The index into the stack of a global layer id."""
    first, count = config.start_layer, config.layer_num
    if isinstance(layer, (int, np.integer)):
        if not first <= layer < first + count:
            raise ArgumentError(f"layer must be in [{first}, {first + count}), got {layer}")
        return np.int32(layer - first)
    return layer - first if first else layer


def _keys_and_values(side: Any, k_scale: Any, v_scale: Any) -> PagedKV:
    if not isinstance(side.config, HeadsConfig):
        raise ArgumentError(f"pool must hold keys and values, got one of a {type(side.config).__name__}")
    scales = _as_scale(k_scale), _as_scale(v_scale)
    return PagedKV(side.k, side.v, *scales, page_order(side.config), np.dtype(side.config.dtype))


def _latent_rows(side: Any, scale: Any) -> PagedLatent:
    config = side.config
    if not isinstance(config, MLAConfig):
        raise ArgumentError(f"pool must hold latent rows, got one of a {type(config).__name__}")
    return PagedLatent(side.kv, _as_scale(scale), page_order(config), np.dtype(config.dtype), config.kv_lora_rank)


def _as_scale(scale: Any) -> Any:
    """A scale as a float32 array; also as the setters take it, `(heads, 1)`."""
    if scale is None:
        return None
    array = scale if isinstance(scale, jax.Array) else np.asarray(scale, np.float32)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return array if array.dtype == np.float32 else jnp.asarray(array, jnp.float32)


def _check_heads(q: Any, plan: AttentionPlan) -> None:
    if jnp.ndim(q) == 3 and q.shape[1] != plan.num_heads:
        raise ArgumentError(f"q must have the {plan.num_heads} heads of the plan, got {q.shape[1]}")
