"""Mosaic GPU kernel of `extend`: wgmma, and pages fetched by the copy engine. Hopper GPUs.

A program takes a tile of `TOKENS` tokens of one request and two query heads of one KV head. Three warpgroups: one
fetches blocks of keys and values, `STAGES` ahead; each of the others attends for one head. Those two take turns at the
tensor cores: while one has its softmax the other multiplies.

Rows of a tile behind the tokens of its request are computed, and not stored. Slots behind the last token of the
request are zeroed in shared memory before weights meet them: 0 x NaN is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcache.kernels.attention.common_mosaic import (
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    LOG2E,
    NO_LOGIT,
    TILED,
    WGMMA,
    accumulate,
    base2_logits,
    clear,
    filled,
    load,
    pages_of_buffer,
    spread,
)
from jaxcache.kernels.attention.contract import Masking, PagedKV
from jaxcache.kernels.attention.launch import WGMMA_KEYS, WGMMA_ROWS
from jaxcache.kernels.attention.plan import Plan

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

TOKENS = WGMMA_ROWS
"""Tokens of a tile."""
HEADS = 2
"""Query heads of a program, a warpgroup each."""
BLOCK = WGMMA_KEYS
"""Keys of a step."""
STAGES = 2
"""Blocks of keys, and of values, in shared memory."""


class Static(NamedTuple):
    """What the kernel is compiled for. `interprets`: see `accumulate`."""

    page_size: int
    group: int
    scale: float
    cap: float
    window: int
    has_sinks: bool
    interprets: bool


class Inputs(NamedTuple):
    """What the kernel reads, in the order of its arguments."""

    q: Any  # (tokens, heads, dim)
    k: Any  # (rows of all layers, kv_heads * dim)
    v: Any
    k_scale: Any  # (kv_heads,) float32
    v_scale: Any
    sinks: Any  # (heads,) float32, unused unless has_sinks
    page: Any  # (2,) int32: the array's page that is page 0 of the layer, and pages from one to the next
    table: Any  # (rows * max_pages,) int32
    row: Any  # (requests,) int32: where the pages of a request begin in the table
    prefix_len: Any  # (requests,) int32
    seq_len: Any  # (requests,) int32
    first_token: Any  # (requests,) int32
    stop_token: Any  # (requests,) int32
    tile_request: Any  # (tiles,) int32, the number of requests for none
    tile_first: Any  # (tiles,) int32


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    raw: Any  # queries as they come, a head each
    q: Any
    k: Any
    v: Any
    lse: Any
    q_here: Any
    k_here: Any
    v_here: Any
    k_used: Any
    v_used: Any
    turn: Any  # arrived at by the warpgroup that leaves the tensor cores to the other
    weights: Any = None  # for JAX's interpreter, which takes none from registers


def paged_extend(
    q: AnyArray,
    kv: PagedKV,
    layer: int | AnyArray,
    plan: Plan,
    masking: Masking,
    sinks: AnyArray | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `extend.paged_extend`. `interpret` takes a `plgpu.InterpretGPUParams`: no GPU needed."""
    order, sequences, tiles = kv.order, plan.sequences, plan.tiles
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, order.layers - 1)
    first, stride = (layer, order.layers) if order.page_major else (layer * order.pages, 1)
    pages = sequences.pages
    inputs = Inputs(
        q=jnp.asarray(q),
        k=jnp.asarray(kv.k).reshape(order.rows, -1),
        v=jnp.asarray(kv.v).reshape(order.rows, -1),
        k_scale=_one_a_head(kv.k_scale, kv.heads),
        v_scale=_one_a_head(kv.v_scale, kv.heads),
        sinks=jnp.zeros(1, jnp.float32) if sinks is None else jnp.asarray(sinks),
        page=jnp.stack([first, jnp.int32(stride)]),
        table=pages.reshape(-1),
        row=sequences.row * pages.shape[1],
        prefix_len=sequences.prefix_len,
        seq_len=sequences.seq_len,
        first_token=sequences.first_token,
        stop_token=tiles.stop,
        tile_request=tiles.request,
        tile_first=tiles.first,
    )
    scale, cap, window = float(masking.scale), float(masking.soft_cap or 0.0), masking.window or 0
    group = q.shape[1] // kv.heads
    static = Static(order.page_size, group, scale, cap, window, sinks is not None, interpret is not None)
    out, edge, lse = _call(inputs, static=static, interpret=interpret)
    return _with_edges(out, edge, plan), _by_token(lse, plan, q.shape[0])


def _one_a_head(scale: Any, heads: int) -> jax.Array:
    return jnp.broadcast_to(jnp.float32(1) if scale is None else jnp.asarray(scale), (heads,))


def _with_edges(out: jax.Array, edge: jax.Array, plan: Plan) -> jax.Array:
    """All results: also those of tiles that are not full, which a program cannot write without the rows behind them."""
    stop = plan.tiles.stop[:, None]
    rest = lax.rem(stop - plan.sequences.first_token[:, None], jnp.int32(TOKENS))
    row = jnp.arange(TOKENS, dtype=jnp.int32)
    token = jnp.where(row < rest, stop - rest + row, out.shape[0]).reshape(-1)
    return out.at[token].set(edge.swapaxes(1, 2).reshape(-1, *out.shape[1:]), mode="drop")


def _by_token(tile_lse: jax.Array, plan: Plan, tokens: int) -> jax.Array:
    """The log-sum-exp of each token, from that of each row of each tile."""
    tiles, sequences = plan.tiles, plan.sequences
    b = jnp.minimum(tiles.request, sequences.requests - 1)
    token = (sequences.first_token[b] + tiles.first)[:, None] + jnp.arange(TOKENS, dtype=jnp.int32)
    is_mine = (token < tiles.stop[b][:, None]) & (tiles.request < sequences.requests)[:, None]
    token = jnp.where(is_mine, token, tokens).reshape(-1)
    rows = tile_lse.swapaxes(1, 2).reshape(-1, tile_lse.shape[1])
    return jnp.full((tokens, tile_lse.shape[1]), -jnp.inf).at[token].set(rows, mode="drop")


# Jitted, so that all layers of a step are one kernel, compiled once.
@partial(jax.jit, static_argnames=("static", "interpret"))
def _call(inputs: Inputs, *, static: Static, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    (tokens, heads, dim), tiles = inputs.q.shape, inputs.tile_request.shape[0]
    dtype, copies = inputs.k.dtype, BLOCK // min(static.page_size, BLOCK)
    scratch = Scratch(
        raw=plgpu.SMEM((HEADS, TOKENS, dim), dtype),
        q=plgpu.SMEM((HEADS, TOKENS, dim), dtype, transforms=TILED),
        k=plgpu.SMEM((STAGES, BLOCK, dim), dtype, transforms=TILED),
        v=plgpu.SMEM((STAGES, BLOCK, dim), dtype, transforms=TILED),
        lse=plgpu.SMEM((HEADS, TOKENS), jnp.float32),
        q_here=plgpu.Barrier(num_barriers=HEADS),
        k_here=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        v_here=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        k_used=plgpu.Barrier(num_arrivals=HEADS, num_barriers=STAGES),
        v_used=plgpu.Barrier(num_arrivals=HEADS, num_barriers=STAGES),
        turn=plgpu.Barrier(num_barriers=HEADS),
        weights=plgpu.SMEM((HEADS, TOKENS, BLOCK), dtype) if static.interprets else None,
    )

    def body(*refs: Any) -> None:
        n = len(Inputs._fields)
        ours, (out, edge, lse), shared = Inputs(*refs[:n]), refs[n : n + 3], Scratch(*refs[n + 3 :])
        tile = (tiles - 1) - lax.axis_index("tile")  # the longest first
        requests = ours.row.shape[0]

        @pl.when(ours.tile_request[tile] < requests)
        def _() -> None:
            program = Program(static, ours, shared, out, edge, lse, tile, ours.tile_request[tile])
            me = lax.axis_index("warpgroup")
            pl.when(me == 0)(partial(program.compute, 0))
            pl.when(me == 1)(partial(program.compute, 1))
            pl.when(me == 2)(program.fetch)

    out, edge, lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((tokens, heads, dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((inputs.row.shape[0], heads, TOKENS, dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((tiles, heads, TOKENS), jnp.float32),
        ],
        grid=(heads // HEADS, tiles),
        grid_names=("heads", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[one for one in scratch if one is not None],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*inputs)
    return out, edge, lse


@dataclass(frozen=True)
class Program:
    """One program, as its warpgroups see it."""

    static: Static
    inputs: Inputs
    scratch: Scratch
    out: Any  # (tokens, heads, dim)
    edge: Any  # (requests, heads, TOKENS, dim): the last tile of a request, if it is not full
    lse: Any  # (tiles, heads, TOKENS) float32, natural
    tile: Any
    request: Any

    @property
    def position(self) -> Any:
        """Position of the tile's first token in its request."""
        return self.inputs.prefix_len[self.request] + self.inputs.tile_first[self.tile]

    @property
    def token(self) -> Any:
        """The tile's first token in the step."""
        return self.inputs.first_token[self.request] + self.inputs.tile_first[self.tile]

    @property
    def kv_head(self) -> Any:
        """The KV head of both query heads."""
        return lax.div(lax.axis_index("heads") * HEADS, jnp.int32(self.static.group))

    def blocks(self) -> tuple[Any, Any, Any]:
        """First block that the tile sees, first that not all of its rows see whole, and the end."""
        total, window = self.inputs.seq_len[self.request], self.static.window
        last = jnp.minimum(self.position + TOKENS, total)
        end = jnp.where(self.position < total, lax.div(last + (BLOCK - 1), jnp.int32(BLOCK)), 0)
        if window:
            begin = lax.div(jnp.maximum(self.position - (window - 1), 0), jnp.int32(BLOCK))
            return jnp.minimum(begin, end), jnp.minimum(begin, end), end
        return jnp.minimum(end, 0), jnp.minimum(lax.div(self.position + 1, jnp.int32(BLOCK)), end), end

    def fetch(self) -> None:
        """The warpgroup that fetches."""
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        s, inputs, (begin, _, end) = self.scratch, self.inputs, self.blocks()
        columns = pl.ds(self.kv_head * s.k.shape[2], s.k.shape[2])
        count = end - begin

        def one(i: Any, _: Any) -> None:
            stage = lax.rem(i, jnp.int32(STAGES))
            row, stop = inputs.row[self.request], inputs.seq_len[self.request]
            token = (begin + i) * BLOCK
            rows = pages_of_buffer(inputs.table, row, inputs.page, token, stop, BLOCK, self.static.page_size)
            for source, buffer, here, used in (
                (inputs.k, s.k, s.k_here, s.k_used),
                (inputs.v, s.v, s.v_here, s.v_used),
            ):

                @pl.when(i >= STAGES)
                def _(used: Any = used) -> None:
                    plgpu.barrier_wait(used.at[stage])

                for place, at in rows:
                    plgpu.copy_gmem_to_smem(source.at[at, columns], buffer.at[stage, place], here.at[stage])

        lax.fori_loop(0, count, one, None)

        def drain(i: Any, _: Any) -> None:  # nothing is under way when the program ends
            stage = lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(s.k_used.at[stage])
            plgpu.barrier_wait(s.v_used.at[stage])

        lax.fori_loop(jnp.maximum(count - STAGES, 0), count, drain, None)

    def compute(self, me: int) -> None:
        """One of the warpgroups that attend."""
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        s, dim, head = self.scratch, self.scratch.q.shape[2], lax.axis_index("heads") * HEADS + me
        begin, whole, end = self.blocks()
        plgpu.copy_gmem_to_smem(self.inputs.q.at[pl.ds(self.token, TOKENS), head], s.raw.at[me], s.q_here.at[me])
        plgpu.barrier_wait(s.q_here.at[me])
        s.q[me] = load(s.raw.at[me], optimized=False)
        plgpu.commit_smem()
        carry = filled((TOKENS, dim), 0.0), filled((TOKENS,), NO_LOGIT), filled((TOKENS,), 0.0)

        @pl.when(begin < end)
        def _() -> None:
            plgpu.barrier_wait(s.k_here.at[0])
            if me == 1:
                plgpu.barrier_wait(s.turn.at[1])

        step = partial(self._step, me, begin=begin, end=end)
        carry = lax.fori_loop(begin, whole, partial(step, is_whole=True), carry)
        acc, top, den = lax.fori_loop(whole, end, partial(step, is_whole=False), carry)

        @pl.when(begin < end)
        def _() -> None:
            if me == 0:
                plgpu.barrier_arrive(s.turn.at[1])

        self._store(me, head, acc, top, den)

    def _step(
        self, me: int, i: Any, carry: tuple[Any, Any, Any], *, begin: Any, end: Any, is_whole: bool
    ) -> tuple[Any, Any, Any]:
        """Folds one block of keys into the running softmax. `is_whole`: every row sees all of it."""
        acc, top, den = carry
        s, inputs, static = self.scratch, self.inputs, self.static
        stage = lax.rem(i - begin, jnp.int32(STAGES))

        def multiply(ref: Any) -> Any:
            plgpu.wgmma(ref, s.q.at[me], s.k.at[stage].transpose((1, 0)))
            plgpu.barrier_arrive(s.turn.at[1 - me])
            return ref[...]

        logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TOKENS, BLOCK), jnp.float32))
        plgpu.barrier_arrive(s.k_used.at[stage])
        logits = base2_logits(logits, inputs.k_scale[self.kv_head] * static.scale, static.cap)
        seen = None if is_whole else self._seen(logits.shape, i * BLOCK)
        if seen is not None:
            logits = jnp.where(seen, logits, NO_LOGIT)
        new = jnp.maximum(top, logits.max(axis=1))
        weight, fade = jnp.exp2(logits - spread(new, logits)), jnp.exp2(top - new)
        if seen is not None:  # a row may see none of the block
            weight = jnp.where(seen, weight, 0.0)
        den, acc = den * fade + weight.sum(axis=1), acc * spread(fade, acc)
        narrow = weight.astype(s.v.dtype)
        plgpu.barrier_wait(s.v_here.at[stage])
        plgpu.barrier_wait(s.turn.at[me])
        if not is_whole:
            pl.when((i + 1) * BLOCK > inputs.seq_len[self.request])(
                lambda: clear(s.v.at[stage], i * BLOCK, inputs.seq_len[self.request])
            )

        def weigh(ref: Any) -> None:
            if static.interprets:
                s.weights[me] = narrow
            plgpu.wgmma(ref, s.weights.at[me] if static.interprets else narrow, s.v.at[stage])

            @pl.when(i + 1 < end)
            def _() -> None:
                plgpu.barrier_wait(s.k_here.at[lax.rem(i + 1 - begin, jnp.int32(STAGES))])

        acc = accumulate(acc, weigh, static.interprets)
        plgpu.barrier_arrive(s.v_used.at[stage])
        return acc, new, den

    def _seen(self, shape: tuple[int, int], key: Any) -> Any:
        """Which keys, from `key` on, each row sees."""
        at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + key
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + self.position
        seen = (at <= position) & (at < self.inputs.seq_len[self.request])
        return seen & (at > position - self.static.window) if self.static.window else seen

    def _store(self, me: int, head: Any, acc: Any, top: Any, den: Any) -> None:
        """Writes the rows of the tile; those of the last tile of a request, if it is not full, apart."""
        s, inputs, total = self.scratch, self.inputs, self.inputs.seq_len[self.request]
        is_live = plgpu.broadcasted_iota(jnp.int32, top.shape, 0, layout=WGMMA.reduce(1)) + self.position < total
        top, den = jnp.where(is_live, top, NO_LOGIT), jnp.where(is_live, den, 0.0)
        if self.static.has_sinks:
            sink = inputs.sinks[head] * LOG2E
            new = jnp.maximum(top, sink)
            fade = jnp.exp2(top - new)
            den, acc, top = den * fade + jnp.exp2(sink - new), acc * spread(fade, acc), new
        value = jnp.where(is_live, inputs.v_scale[self.kv_head] / jnp.maximum(den, 1e-30), 0.0)
        rows = (acc * spread(value, acc)).astype(self.out.dtype)
        s.lse[me] = (top + jnp.log(den) * LOG2E) / LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.lse.at[me], self.lse.at[self.tile, head])
        is_full = inputs.stop_token[self.request] - self.token >= TOKENS

        @pl.when(is_full)
        def _() -> None:
            self.out.at[pl.ds(self.token, TOKENS), head][...] = rows

        @pl.when(jnp.logical_not(is_full))
        def _() -> None:
            self.edge.at[self.request, head][...] = rows

        plgpu.wait_smem_to_gmem(0)
