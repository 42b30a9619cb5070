"""Several decode steps in one jitted call: a `lax.scan` whose steps take pages, write the table and roll back drafts.

    host                                     device, inside one jitted call         host again
    manager.decode_loop(requests, steps) ─►  scan: loop, slots = loop.grow()    ─►  plan.replay(accepted, stopped)
      lends a window of pages                      pool = write KV at slots         manager.absorb(replay)
                                                   loop = loop.accept(accepted)       keeps what holds tokens,
                                                   loop = loop.stop(stopped)          gives the rest back

Nothing travels to the host in between, and no allocator state ever does: what the rows do follows from the accepted
lengths and the stops alone, which come back with the sampled tokens. `DecodeRows` is that arithmetic, once, for NumPy
and JAX; `jaxcache.steps.loop_plan` is the host's side.

Source: jaxcache's own. SGLang 0.5.2 takes the pages of every step on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcache.device.packing import NOWHERE, Field, Packing
from jaxcache.errors import ArgumentError
from jaxcache.kernels.alloc_pages import SINK_SLOT
from jaxcache.pages.allocator import FreeOrder
from jaxcache.pages.graph import PageAllocatorState
from jaxcache.steps.paged_attention import PagedAttention
from jaxcache.tables.device_table import RequestTable

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32

PER_ROW = "row", "seq_len", "limit", "tag", "state", "tokens"
"""Names of what a plan says of each row in one number."""


@dataclass(frozen=True)
class LoopShape:
    """The static part of a loop: one shape compiles once.

    Attributes:
      requests: Rows, padding included.
      steps: Most steps.
      width: Tokens each row computes in a step: 1, or one and its drafts.
      page_size: Slots a page.
    """

    requests: int
    steps: int
    width: int
    page_size: int

    def __post_init__(self):
        for name in ("requests", "steps", "width", "page_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def window(self) -> int:
        """Pages that all rows together can take at most."""
        return self.requests * -(-self.steps * self.width // self.page_size)

    @functools.cached_property
    def packing(self) -> Packing:
        """Where everything stands in the packed vector."""
        per_row = (Field(name, self.requests) for name in PER_ROW)
        return Packing((*per_row, Field("window", self.window), Field("num_pages", 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """How far each row of a loop is. The same methods run on JAX arrays in the graph and on NumPy arrays on the host.

    Attributes:
      seq_len: int32 (rows,), tokens whose KV counts.
      num_pages: int32 (rows,), pages in the table's row: those of `seq_len` tokens, and those that rejected drafts had.
      limit: int32 (rows,), most tokens the row may have.
      granted: int32 (rows,), tokens of the present step that got a slot and were not accepted yet.
      active: bool (rows,), False for padding and for rows that stopped.
      ok: bool scalar, False from the first step on whose pages could not be had.
    """

    seq_len: Int32[Any, " rows"]
    num_pages: Int32[Any, " rows"]
    limit: Int32[Any, " rows"]
    granted: Int32[Any, " rows"]
    active: Bool[Any, " rows"]
    ok: Bool[Any, ""]

    @classmethod
    def start(cls, seq_len: Int32[Any, " rows"], limit: Int32[Any, " rows"], page_size: int) -> DecodeRows:
        """Rows before their first step. A limit of 0 marks padding."""
        xp = _namespace(seq_len)
        return cls(seq_len, -(-seq_len // page_size), limit, xp.zeros_like(seq_len), limit > 0, xp.asarray(True))

    def grown(self, width: int, page_size: int, available: Any) -> tuple[DecodeRows, Int32[Any, " rows"]]:
        """Grants each active row slots for `width` tokens more, as far as its limit goes.

        Returns:
          The rows, and how many of the `available` pages each one takes for it, row after row. If those are short in
          all, no row is granted anything, in this step and every later one.
        """
        xp = _namespace(self.seq_len)
        granted = xp.where(self.active, xp.clip(self.limit - self.seq_len, 0, width), 0)
        need = xp.maximum(-(-(self.seq_len + granted) // page_size) - self.num_pages, 0)
        ok = self.ok & (need.sum() <= available)
        granted, need = xp.where(ok, granted, 0), xp.where(ok, need, 0)
        return dataclasses.replace(self, num_pages=self.num_pages + need, granted=granted, ok=ok), need

    def accepted(self, lengths: Int32[Any, " rows"]) -> DecodeRows:
        """Keeps the first `lengths` tokens of those that were granted; the pages of the others stay with the row."""
        xp = _namespace(self.seq_len)
        kept = xp.clip(lengths, 0, self.granted).astype(self.seq_len.dtype)
        return dataclasses.replace(self, seq_len=self.seq_len + kept, granted=xp.zeros_like(self.granted))

    def stopped(self, mask: Bool[Any, " rows"]) -> DecodeRows:
        """Ends rows. What a step samples after pages ran short is ignored (`ok` is False), so no row stops."""
        return dataclasses.replace(self, active=self.active & ~(mask & self.ok))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeLoop:
    """Everything the steps of a loop carry, next to the pool. Immutable; made by `unpack_loop`, used in a scan.

    One step is `grow`, then `accept`, then perhaps `stop`, each exactly once, in this order: the host replays it so.

    Attributes:
      rows: How far each row is.
      table: The request table. Donated with the call; the steps write their new pages into it.
      allocator: The window of pages that the host lent to the loop, and how many of them are taken.
      row: int32 (rows,), row of the request table; the number of its rows for padding, as in `Batch`.
      tag: int32 (rows,), a number of the engine's own, such as an adapter.
      state: int32 (rows,), recurrent state; 0 for padding and without states. A step uses `computing_state`.
      tokens: int32 (rows,), token id that each row computes first.
      shape: Static.
    """

    rows: DecodeRows
    table: RequestTable
    allocator: PageAllocatorState
    row: Int32[Array, " rows"]
    tag: Int32[Array, " rows"]
    state: Int32[Array, " rows"]
    tokens: Int32[Array, " rows"]
    shape: LoopShape = dataclasses.field(metadata={"static": True})

    @property
    def positions(self) -> Int32[Array, "rows width"]:
        """Position, in its request, of each token of the present step. Those that got no slot have one, too."""
        return self.rows.seq_len[:, None] + jnp.arange(self.shape.width, dtype=jnp.int32)[None]

    @property
    def computing_state(self) -> Int32[Array, " rows"]:
        """Recurrent state of each row that computes a token in this step; of others 0, which no write reaches."""
        return jnp.where(self.rows.granted > 0, self.state, 0)

    def attention(self, pool: Any, layer: Any) -> PagedAttention:
        """What an attention op over pages is told of one layer in the present step, after `grow`: as `Batch.attention`.

        The queries are the tokens of the step, row after row, `width` of each. Rows that compute nothing in this step
        attend to nothing. Where a row got fewer slots than `width`, what its other queries find means nothing.
        """
        kv, width, computes = pool.pages(layer), self.shape.width, self.rows.granted > 0
        prefix_len = jnp.where(computes, self.rows.seq_len, 0)
        held = prefix_len + self.rows.granted
        block_table = kv.locate(self.table.block_table(self.row, held, self.shape.page_size))
        cu_q = jnp.arange(self.shape.requests + 1, dtype=jnp.int32) * width
        return PagedAttention(kv, block_table, prefix_len, jnp.where(computes, prefix_len + width, 0), cu_q)

    def grow(self) -> tuple[DecodeLoop, Int32[Array, "rows width"]]:
        """Gives the next `width` tokens of each active row a slot, taking pages where the row's own are full.

        Returns:
          The loop, and the slots. Slot 0, which every pool write drops, stands for a token that has none: of padding,
          of a row that stopped or is at its limit, and of every row once pages ran short (`rows.ok` is False then).

        Cost: O(rows * width), whatever the size of pool and table.
        """
        shape = self.shape
        rows, need = self.rows.grown(shape.width, shape.page_size, self.allocator.count)
        a_row = -(-shape.width // shape.page_size)
        total = jnp.sum(need, dtype=jnp.int32)
        allocator, pages, _ = self.allocator.alloc_pages(total, most=shape.requests * a_row)
        table = self.table.patched(*self._new_entries(need, pages, a_row))
        has_slot = jnp.arange(shape.width, dtype=jnp.int32)[None] < rows.granted[:, None]
        slots = table.slots(self.row[:, None], jnp.where(has_slot, self.positions, 0), shape.page_size)
        loop = dataclasses.replace(self, rows=rows, table=table, allocator=allocator)
        return loop, jnp.where(has_slot, slots, SINK_SLOT)

    def accept(self, lengths: Int32[Array, " rows"] | None = None) -> DecodeLoop:
        """Keeps the first tokens of this step; the next one takes up behind them.

        Args:
          lengths: How many each row keeps: 0 .. width, and no more than got a slot. None keeps all.

        Raises:
          ArgumentError: (tracing) on another shape or dtype.
        """
        if lengths is None:
            lengths = self.rows.granted
        self._check("lengths", lengths, jnp.integer, "integers")
        return dataclasses.replace(self, rows=self.rows.accepted(lengths))

    def stop(self, mask: Bool[Array, " rows"]) -> DecodeLoop:
        """Ends the rows of `mask`: from the next step on they take no page and have no slots.

        Raises:
          ArgumentError: (tracing) on another shape or dtype.
        """
        self._check("mask", mask, jnp.bool_, "booleans")
        return dataclasses.replace(self, rows=self.rows.stopped(mask))

    def _new_entries(
        self, need: Int32[Array, " rows"], pages: Int32[Array, " most"], a_row: int
    ) -> tuple[Int32[Array, " entries"], Int32[Array, " entries"]]:
        """Flat index and page of every new entry of the table: row after row takes its share of `pages`."""
        ordinal = jnp.arange(a_row, dtype=jnp.int32)
        first = jnp.cumsum(need, dtype=jnp.int32) - need
        page = pages.at[first[:, None] + ordinal[None]].get(mode="clip")
        max_pages = self.table.pages.shape[1]
        index = (self.row * max_pages + self.rows.num_pages)[:, None] + ordinal[
            None
        ]  # of padding: nowhere, it needs none
        index = jnp.where(ordinal[None] < need[:, None], index, NOWHERE)
        return index.ravel(), page.ravel()

    def _check(self, name: str, values: Any, kind: Any, words: str) -> None:
        rows = (self.shape.requests,)
        if values.shape != rows or not jnp.issubdtype(values.dtype, kind):
            raise ArgumentError(f"{name} must be {words} of shape {rows}, got {values.dtype}{list(values.shape)}")


def unpack_loop(packed: Int32[Array, " size"], shape: LoopShape, table: RequestTable) -> DecodeLoop:
    """The loop of a packed plan (`LoopPlan.pack`), before its first step. For use inside the jitted call."""
    parts = shape.packing.unpack(packed)
    window = PageAllocatorState(
        ring=parts["window"],
        head=jnp.int32(0),
        count=parts["num_pages"][0],
        page_size=shape.page_size,
        free_order=FreeOrder.LIFO,  # no step of a loop frees
    )
    rows = DecodeRows.start(parts["seq_len"], parts["limit"], shape.page_size)
    row = jnp.where(rows.limit > 0, parts["row"], table.pages.shape[0])
    tokens = table.known(parts["tokens"], row)
    return DecodeLoop(rows, table, window, row, parts["tag"], parts["state"], tokens, shape)


def _namespace(array: Any) -> Any:
    """`numpy` or `jax.numpy`, whichever the array is of."""
    return array.__array_namespace__()
