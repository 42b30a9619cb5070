"""The plan of a step: how the work of attention is divided, made once in the graph and used by all layers.

Decode. The keys of all requests, in blocks, stand in one line, and each program takes an equal run of it, across the
borders of requests. So a batch of any lengths keeps every program equally busy:

    requests     |  a: 5 blocks  |b: 2 |      c: 6 blocks     |
    programs     |   p0: 4   |   p1: 4   |   p2: 4   |  p3: 1 |
    parts         p0,a         p1,a p1,b  p2,c         p3,c       -> part p + unit, which no other pair has

A unit is what has its own run of keys: a request, or a few requests that attend together to a prefix that they share.
Parts of a request are merged by their log-sum-exp.

Extend. A tile is some tokens of one request; every token of the step, padding included, is in one tile.

The arrays are a few integers a request; nothing here depends on how long the requests are but for their values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.errors import ArgumentError
from jaxcache.kernels.arguments import AnyArray
from jaxcache.kernels.attention.contract import Sequences
from jaxcache.kernels.attention.launch import Launches

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

SHARED_MEMBERS = 4
"""Fewest requests that attend to a shared prefix together."""
SHARED_TOKENS = 512
"""Shortest shared prefix that is attended to apart."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedPrefix:
    """Which requests of a batch begin with the same pages.

    Attributes:
      group: int32, one a request: a number that requests with the same prefix have in common; negative for none.
      length: int32, one a request: tokens that the pages of its group agree in. Cut to whole pages, and to the shortest
        of the group.
    """

    group: Int32[AnyArray, " requests"]
    length: Int32[AnyArray, " requests"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """Runs of keys, and how programs divide them.

    Attributes:
      row: int32, row of the page table.
      start: int32, first key.
      stop: int32, behind the last key.
      first_block: int32, blocks of keys in all units before each one, and in all of them.
      first_unit: int32, the unit that each program begins with.
      member: int32, requests that attend to the unit, -1 for none. None where unit and request are the same.
    """

    row: Int32[Array, " units"]
    start: Int32[Array, " units"]
    stop: Int32[Array, " units"]
    first_block: Int32[Array, " units+1"]
    first_unit: Int32[Array, " programs"]
    member: Int32[Array, "units members"] | None = None

    @property
    def count(self) -> int:
        """Units."""
        return self.row.shape[0]

    @property
    def programs(self) -> int:
        """Programs for each KV head."""
        return self.first_unit.shape[0]

    @property
    def parts(self) -> int:
        """Partial results: room for one of each pair of program and unit that meet."""
        return self.programs + self.count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedUnits:
    """What requests attend to together.

    Attributes:
      units: The shared prefixes; a group of many requests has several units of one prefix.
      unit: int32, one a request: its unit; -1 for none.
      place: int32, one a request: which of the members it is.
    """

    units: Units
    unit: Int32[Array, " requests"]
    place: Int32[Array, " requests"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Tiles of tokens.

    Attributes:
      request: int32, request of each tile; the number of requests for a tile that is not used.
      first: int32, its first token, counted within the request.
      stop: int32, one a request: where its tokens and the padding behind them end, in the step.
    """

    request: Int32[Array, " tiles"]
    first: Int32[Array, " tiles"]
    stop: Int32[Array, " requests"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """How the layers of one kind, in one step, attend. Make it with `make_plan`.

    Attributes:
      sequences: Who attends to what, through a page table of this kind of layers.
      units: The keys of each request that it attends to alone.
      shared: Those that it attends to with others; None where nothing is shared.
      tiles: The tokens of the step.
      tokens: How many those are, padding included.
      window: Tokens that a query attends to; None for all.
      page_size: Tokens a page.
      launches: How the kernels are launched.
    """

    sequences: Sequences
    units: Units
    shared: SharedUnits | None
    tiles: Tiles
    tokens: int = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    launches: Launches = field(metadata={"static": True})


def make_plan(
    sequences: Sequences,
    tokens: int,
    page_size: int,
    launches: Launches,
    *,
    window: int | None = None,
    shared: SharedPrefix | None = None,
) -> Plan:
    """The plan of a step.

    Args:
      sequences: Who attends to what. Lengths beyond the page table count as what it can hold.
      tokens: Tokens of the step, padding included.
      page_size: Tokens a page.
      launches: How the kernels are launched.
      window: Tokens that a query attends to; None for all.
      shared: Prefixes that decode attends to once for all who share them; None attends to each by itself.

    Raises:
      ArgumentError: on arrays that do not fit together, lengths on the host beyond the table, or a shared prefix with a
        window.

    Cost: a few small kernels; O(requests * (requests + programs)).
    """
    sequences.check(page_size)
    capacity = sequences.pages.shape[1] * page_size
    sequences = jax.tree.map(jnp.asarray, sequences)
    sequences = dataclasses.replace(sequences, seq_len=jnp.minimum(sequences.seq_len, capacity))
    if shared is not None and window is not None:
        raise ArgumentError("shared must be None for a window: its layers do not attend to a prefix")
    start = jnp.zeros_like(sequences.seq_len)
    if window is not None:
        start = jnp.maximum(sequences.seq_len - window, 0)
    together = None
    if shared is not None and launches.members > 1:  # queries that fill a block of rows alone gain nothing
        together, start = _share(sequences, shared, page_size, launches)
    return Plan(
        sequences=sequences,
        units=_units(sequences.row, start, sequences.seq_len, launches.decode),
        shared=together,
        tiles=_tiles(sequences, tokens, launches.extend.tokens),
        tokens=tokens,
        window=window,
        page_size=page_size,
        launches=launches,
    )


def _units(row: Any, start: Any, stop: Any, launch: Any, member: Any = None) -> Units:
    """Units with the blocks of each, divided among the programs."""
    block = launch.block
    blocks = jnp.where(stop > start, -(-stop // block) - start // block, 0)
    first_block = _sums(blocks)
    share = jnp.maximum(-(-first_block[-1] // launch.programs), 1)
    begin = jnp.arange(launch.programs, dtype=jnp.int32) * share
    first_unit = _count(first_block[None, 1:] <= begin[:, None])
    return Units(row, start, stop, first_block, jnp.minimum(first_unit, row.shape[0] - 1), member)


def _tiles(sequences: Sequences, tokens: int, tile: int) -> Tiles:
    """Tiles that cover every token of the step; padding belongs to the request before it."""
    first = sequences.first_token
    stop = jnp.append(first[1:], jnp.int32(tokens))
    end = _sums(-(-(stop - first) // tile))
    number = jnp.arange(-(-tokens // tile) + sequences.requests, dtype=jnp.int32)
    request = _count(end[None, 1:] <= number[:, None])
    at = jnp.minimum(request, sequences.requests - 1)
    return Tiles(request, (number - end[at]) * tile, stop)


def _share(sequences: Sequences, shared: SharedPrefix, page_size: int, launches: Launches) -> tuple[SharedUnits, Any]:
    """The units of shared prefixes, and where the keys begin that each request attends to alone."""
    n, members = sequences.requests, launches.members
    for name in ("group", "length"):
        array = getattr(shared, name)
        if array.shape != (n,) or array.dtype != jnp.int32:
            raise ArgumentError(f"shared.{name} must be int32, one a request, got {array.dtype}{list(array.shape)}")
    shared = jax.tree.map(jnp.asarray, shared)
    me = jnp.arange(n, dtype=jnp.int32)
    before = me[None, :] < me[:, None]
    length = jnp.clip(shared.length, 0, sequences.seq_len) // page_size * page_size
    is_in = (shared.group >= 0) & (sequences.seq_len > 0)
    same = (shared.group[:, None] == shared.group[None, :]) & is_in[:, None] & is_in[None, :]
    length = jnp.min(jnp.where(same, length[None, :], jnp.int32(2**31 - 1)), axis=1)
    pays = is_in & (_count(same) >= SHARED_MEMBERS) & (length >= SHARED_TOKENS)
    length = jnp.where(pays, length, 0)
    rank = _count(same & before)
    place = rank % members
    is_head = pays & (place == 0)
    head_number = _count(is_head[None, :] & before)
    is_mine = same & is_head[None, :] & (rank[None, :] == (rank - place)[:, None])
    unit = jnp.where(pays, jnp.sum(jnp.where(is_mine, head_number[None, :], 0), axis=1, dtype=jnp.int32), -1)
    nowhere = jnp.where(pays, unit, n)
    member = jnp.full((n, members), -1, jnp.int32).at[nowhere, place].set(me, mode="drop")
    head = jnp.maximum(member[:, 0], 0)
    stop = jnp.where(member[:, 0] >= 0, length[head], 0)
    units = _units(sequences.row[head], jnp.zeros_like(stop), stop, launches.shared, member)
    return SharedUnits(units, unit, place), length


def _count(mask: Any) -> jax.Array:
    """How many are true along the last axis."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _sums(values: Any) -> jax.Array:
    """Sums of the values before each one, and of all: as one reduction, which XLA makes one small kernel of."""
    n = values.shape[0]
    is_before = jnp.arange(n)[None, :] < jnp.arange(n + 1)[:, None]
    return jnp.sum(jnp.where(is_before, values[None, :], 0), axis=1, dtype=jnp.int32)
