"""KV that can be checked: every element is a fixed function of what it stands for.

    value = f(namespace tag, token, position, layer, K or V, head, element)

A page freed too early, a stale copy, a wrong page, a position off by one or a mixed-up namespace gives other values
there. The function is integer hashing, so CPU and GPU agree bit for bit, and its values are small integers that every
pool dtype holds exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool
from jaxcache.pools.requests import RequestTable
from jaxcache.step import Batch

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

Pool = MHATokenToKVPool | MLATokenToKVPool


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit finaliser (two multiply-xorshift rounds). Source: Wellons, hash-prospector, lowbias32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def token_seed(
    tag: Int32[Array, " tokens"], token: Int32[Array, " tokens"], position: Int32[Array, " tokens"]
) -> Shaped[Array, " tokens"]:
    """What the elements of one token's row derive from, uint32."""
    seed = _mix(tag.astype(jnp.uint32) + jnp.uint32(0x9E3779B9))
    seed = _mix(seed ^ token.astype(jnp.uint32))
    return _mix(seed ^ (position.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B)))


def row_content(
    seed: Shaped[Array, " tokens"], layer: int | jax.Array, plane: int, shape: tuple[int, ...], dtype: DTypeLike
) -> Shaped[Array, " tokens *shape"]:
    """Rows of one layer and plane (0 = K or latent, 1 = V) for tokens of those seeds."""
    width = int(np.prod(shape))
    lane = jnp.arange(width, dtype=jnp.uint32) + jnp.asarray(2 * layer + plane).astype(jnp.uint32) * jnp.uint32(width)
    bits = _mix(seed[:, None] ^ (lane * jnp.uint32(0xC2B2AE35))[None, :])
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        value = (bits >> 25).astype(jnp.int32)
    else:  # 5 bits are exact in every float of 8 bits and more, 8 bits in every one of 16 bits
        keep = 5 if np.dtype(dtype).itemsize == 1 and jnp.issubdtype(dtype, jnp.floating) else 8
        value = (bits >> (32 - keep)).astype(jnp.int32) - (1 << (keep - 1))
        if keep == 5:
            value = value // 2
    return value.astype(dtype).reshape(-1, *shape)


def write_step(pool: Pool, batch: Batch) -> tuple[Pool, None]:
    """The replay's model: writes the content of every token of a batch into every layer."""
    return write_rows(pool, batch, batch.slots, batch.positions), None


def write_rows(pool: Pool, batch: Batch, slots: jax.Array, positions: jax.Array) -> Pool:
    """`write_step` with slots and positions of the caller's, which is where faults come in."""
    seed = token_seed(batch.tag[batch.request], batch.tokens, positions)
    first = pool.config.start_layer

    def one_layer(i: jax.Array, carried: Pool) -> Pool:
        planes = [
            row_content(seed, i, plane, shape, pool.config.dtype) for plane, shape in enumerate(pool.config.row_shapes)
        ]
        return carried.set_kv_buffer(first + i, slots, *planes)

    return jax.lax.fori_loop(0, pool.config.layer_num, one_layer, pool)


def count_mismatches(
    pool: Pool, table: RequestTable, packed: Int32[Array, " size"], mismatched: Int32[Array, ""]
) -> Int32[Array, ""]:
    """Reads rows of one request back through the device table and adds the slots that are wrong.

    Args:
      pool: Read, not consumed.
      table: Read, not consumed.
      packed: [row, tag, first position, number of tokens, token ids ... (padded)].
      mismatched: The count so far.
    """
    row, tag, start, count = packed[0], packed[1], packed[2], packed[3]
    tokens = packed[4:]
    offset = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    position = jnp.minimum(start + offset, start + count - 1)
    slots = table.slots(jnp.full_like(position, row), position, pool.config.page_size)
    seed = token_seed(jnp.full_like(tokens, tag), tokens, start + offset)

    def one_layer(i: jax.Array, wrong: jax.Array) -> jax.Array:
        stored = pool.gather(slots, pool.config.start_layer + i)
        for plane, (rows, shape) in enumerate(zip(_planes(stored), pool.config.row_shapes, strict=True)):
            expected = row_content(seed, i, plane, shape, pool.config.dtype)
            wrong |= (rows != expected).reshape(rows.shape[0], -1).any(axis=1)
        return wrong

    wrong = jax.lax.fori_loop(0, pool.config.layer_num, one_layer, jnp.zeros(tokens.shape[0], bool))
    return mismatched + jnp.sum(wrong & (offset < count), dtype=jnp.int32)


def _planes(stored: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return stored if isinstance(stored, tuple) else (stored,)
