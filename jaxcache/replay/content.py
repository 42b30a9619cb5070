"""KV and states that can be checked: every element is a fixed function of what it stands for.

    row of a token     f(namespace tag, token, position, layer, K or V, head, element)
    recurrent state    f(sum over every token before it of g(namespace tag, token, position), layer, element)

A page freed too early, a stale copy, a wrong page, a position off by one or a mixed-up namespace gives other values
there; a state that skipped or repeated a single token is another state. The functions are integer hashing, so CPU and
GPU agree bit for bit, and their values are small integers that every pool dtype holds exactly.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcache.pools.base import KVCache
from jaxcache.pools.mamba import MambaPool
from jaxcache.pools.stack import MemoryPool
from jaxcache.steps.batch import Batch
from jaxcache.tables.device_table import RequestTable

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Shaped

Pool = MemoryPool
DIGEST_LANES = 4
"""Elements at the start of a temporal state that hold its sum, a byte each: what the next step resumes from."""
_TEMPORAL, _CONV = 2, 3
"""Planes of a state, next to those of K and V."""


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
    """The replay's model: writes the content of every token of a batch into every layer, and advances the states."""
    return write_rows(pool, batch, batch.slots, batch.positions), None


def write_rows(pool: Pool, batch: Batch, slots: jax.Array, positions: jax.Array) -> Pool:
    """`write_step` with slots and positions of the caller's, which is where faults come in."""
    seed = token_seed(batch.tag[batch.request], batch.tokens, positions)
    stacks: dict[str, Any] = pool.stacks()
    rows = pool.token_rows(slots)
    for name, offset in _layer_offsets(stacks, rows).items():
        stacks[name] = _write_layers(stacks[name], rows[name], seed, offset)
    for name in stacks.keys() - rows.keys():  # a state for each request
        sums = jnp.zeros(batch.row.shape, jnp.uint32).at[batch.request].add(jnp.where(batch.valid, seed, 0))
        stacks[name] = _advance(stacks[name], batch.state, sums)
    return pool.with_stacks(stacks)


def _layer_offsets(stacks: dict[str, Any], rows: dict[str, Any]) -> dict[str, int]:
    """What tells the content of the first layer of each token stack from that of the stacks before it."""
    counts = [stacks[name].config.layer_num for name in rows]
    return dict(zip(rows, accumulate(counts, initial=0), strict=False))


def _write_layers(pool: KVCache, slots: jax.Array, seed: jax.Array, offset: int) -> KVCache:
    first, dtype = pool.config.start_layer, pool.config.dtype

    def one_layer(i: jax.Array, carried: Any) -> KVCache:
        planes = [
            row_content(seed, i + offset, plane, shape, dtype) for plane, shape in enumerate(pool.config.row_shapes)
        ]
        return carried.set_kv_buffer(first + i, slots, *planes)

    return jax.lax.fori_loop(0, pool.config.layer_num, one_layer, pool)


# ---- states ----------------------------------------------------------------------------------------------------------


def state_content(
    digest: Shaped[Array, " states"], layer: int | jax.Array, pool: MambaPool
) -> tuple[Shaped[Array, " states *conv"], Shaped[Array, " states *temporal"]]:
    """A layer's convolution and temporal states when the seeds of all tokens before them add up to `digest`."""
    config = pool.config
    mixed = _mix(digest)
    conv = row_content(mixed, layer, _CONV, config.conv_shape, config.conv_dtype)
    temporal = row_content(mixed, layer, _TEMPORAL, config.temporal_shape, config.temporal_dtype)
    parts = (digest[:, None] >> (8 * jnp.arange(DIGEST_LANES, dtype=jnp.uint32))[None]) & jnp.uint32(0xFF)
    flat = temporal.reshape(digest.shape[0], -1).at[:, :DIGEST_LANES].set(parts.astype(temporal.dtype))
    return conv, flat.reshape(temporal.shape)


def _digest_in(temporal: Shaped[Array, " states *temporal"]) -> Shaped[Array, " states"]:
    """The sum that a temporal state holds."""
    lanes = temporal.reshape(temporal.shape[0], -1)[:, :DIGEST_LANES].astype(jnp.uint32)
    return jnp.sum(lanes << (8 * jnp.arange(DIGEST_LANES, dtype=jnp.uint32))[None], axis=1, dtype=jnp.uint32)


def _advance(pool: MambaPool, states: Any, sums: jax.Array) -> MambaPool:
    """Each layer resumes from what it finds in the state itself, as a recurrent layer does."""

    def one_layer(i: jax.Array, carried: MambaPool) -> MambaPool:
        _, temporal = carried.read(states, i)
        return carried.write(states, i, *state_content(_digest_in(temporal) + sums, i, carried))

    return jax.lax.fori_loop(0, pool.config.layer_num, one_layer, pool)


def prefix_digest(tag: int, tokens: Int32[np.ndarray, " tokens"]) -> np.uint32:
    """What the state after `tokens` must hold. NumPy, so that the proof does not rest on the code it proves."""
    positions = np.arange(len(tokens), dtype=np.uint32)
    seed = _mix_host(np.uint32(tag) + np.full(len(tokens), 0x9E3779B9, np.uint32))
    seed = _mix_host(seed ^ tokens.astype(np.uint32))
    return _mix_host(seed ^ (positions * np.uint32(0x85EBCA6B))).sum(dtype=np.uint32)


def _mix_host(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def count_wrong_states(pool: MambaPool, packed: Shaped[Array, " 2"], mismatched: Int32[Array, ""]) -> Int32[Array, ""]:
    """Adds 1 if the state is not, in every layer and element, what the digest asks for.

    Args:
      pool: Read, not consumed.
      packed: uint32 [state, digest].
      mismatched: The count so far.
    """
    state, digest = packed[:1].astype(jnp.int32), packed[1:]

    def one_layer(i: jax.Array, wrong: jax.Array) -> jax.Array:
        for stored, expected in zip(pool.read(state, i), state_content(digest, i, pool), strict=True):
            wrong |= (stored != expected).any()
        return wrong

    wrong = jax.lax.fori_loop(0, pool.config.layer_num, one_layer, jnp.zeros((), bool))
    return mismatched + wrong.astype(jnp.int32)


# ---- reading back ----------------------------------------------------------------------------------------------------

READ_BACK_HEADER = 4
"""Entries of a packed read-back before the first positions of its stacks and its token ids."""


def count_mismatches(
    pool: MemoryPool, table: RequestTable, packed: Int32[Array, " size"], mismatched: Int32[Array, ""]
) -> Int32[Array, ""]:
    """Reads rows of one request back through the device table and adds the tokens that are wrong in any layer.

    Args:
      pool: Read, not consumed.
      table: Read, not consumed.
      packed: [row, tag, first position, number of tokens, for each stack with a row a token the first position that it
        must have, token ids ... (padded)].
      mismatched: The count so far.
    """
    stacks: dict[str, Any] = pool.stacks()
    row, tag, start, count = (packed[i] for i in range(READ_BACK_HEADER))
    some_slots = jnp.zeros(1, jnp.int32)
    first_tokens = READ_BACK_HEADER + len(pool.token_rows(some_slots))
    firsts, tokens = packed[READ_BACK_HEADER:first_tokens], packed[first_tokens:]
    offset = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    position = jnp.minimum(start + offset, start + count - 1)
    is_read = offset < count
    page_size = next(iter(stacks.values())).config.page_size
    rows = pool.token_rows(table.slots(jnp.full_like(position, row), position, page_size))
    seed = token_seed(jnp.full_like(tokens, tag), tokens, start + offset)
    wrong = jnp.zeros(tokens.shape, bool)
    for i, (name, layer_offset) in enumerate(_layer_offsets(stacks, rows).items()):
        must_have = is_read & (start + offset >= firsts[i])
        wrong |= _wrong_rows(stacks[name], rows[name], seed, layer_offset) & must_have
    return mismatched + jnp.sum(wrong, dtype=jnp.int32)


def _wrong_rows(pool: KVCache, slots: jax.Array, seed: jax.Array, offset: int) -> jax.Array:
    def one_layer(i: jax.Array, wrong: jax.Array) -> jax.Array:
        stored = pool.gather(slots, pool.config.start_layer + i)
        for plane, (rows, shape) in enumerate(zip(_planes(stored), pool.config.row_shapes, strict=True)):
            expected = row_content(seed, i + offset, plane, shape, pool.config.dtype)
            wrong |= (rows != expected).reshape(rows.shape[0], -1).any(axis=1)
        return wrong

    return jax.lax.fori_loop(0, pool.config.layer_num, one_layer, jnp.zeros(slots.shape[0], bool))


def _planes(stored: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return stored if isinstance(stored, tuple) else (stored,)
