"""Mosaic GPU kernel of `mla_decode` for many heads: wgmma, and pages fetched by the copy engine. Hopper GPUs.

A program takes 64 query heads and an equal run of blocks of `BLOCK` tokens, across requests, as `plan` divides them.
Three warpgroups: one fetches pages into two buffers of `TOKENS` tokens each. Each of the other two multiplies queries
with the tokens of one buffer, and weights with one half of the latent columns of both: they tell one another their row
maxima and weights through shared memory. What a warpgroup needs first is fetched first and given back first.

Slots behind the last token of a request are zeroed in shared memory before weights meet them: 0 x NaN is NaN.
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
from jaxcache.kernels.attention.contract import Masking, PagedLatent
from jaxcache.kernels.attention.launch import WGMMA_LATENTS, WGMMA_ROWS
from jaxcache.kernels.attention.merge import merge_planned
from jaxcache.kernels.attention.plan import Plan
from jaxcache.kernels.dispatch import Implementation, Op, current_target, why_not

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray

HEADS = WGMMA_ROWS
"""Query heads of a program."""
BLOCK = WGMMA_LATENTS
"""Tokens of a step: the unit of balance of the plan."""
TOKENS = BLOCK // 2
"""Tokens of a warpgroup's buffer."""
ROPE = 64
"""Width of the rope part: its buffer holds the weights of a step when its numbers are used up."""


class Static(NamedTuple):
    """What the kernel is compiled for. `interprets`: see `accumulate`."""

    page_size: int
    rank: int
    scale: float
    cap: float
    interprets: bool


class Inputs(NamedTuple):
    """What the kernel reads, in the order of its arguments."""

    q: Any  # (requests, heads, rank + ROPE), absorbed
    rows: Any  # (rows of all layers, rank + ROPE)
    worth: Any  # (1,) float32: what an element of a row is worth
    page: Any  # (2,) int32: the array's page that is page 0 of the layer, and pages from one to the next
    table: Any  # (rows * max_pages,) int32
    row: Any  # (units,) int32: where the pages of a unit begin in the table
    stop: Any  # (units,) int32
    first_block: Any  # (units + 1,) int32
    first_unit: Any  # (programs,) int32


class Scratch(NamedTuple):
    """Shared memory and barriers of a program. Latent columns are in two halves, `lo` and `hi`."""

    q_lo: Any
    q_hi: Any
    q_rope: Any
    lo: Any  # two buffers each
    hi: Any
    rope: Any
    top: Any  # row maxima of either warpgroup
    lo_here: Any
    hi_here: Any
    rope_here: Any
    lo_used: Any
    hi_used: Any
    rope_used: Any
    q_here: Any
    q_used: Any
    tops: Any  # arrived at by the warpgroup whose maxima, or weights, are there
    weights: Any


def mla_decode(
    q: AnyArray,
    kv: PagedLatent,
    layer: int | AnyArray,
    plan: Plan,
    masking: Masking,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `mla.mla_decode`, and `decode_parts`. Parts are merged by the Triton kernel where there is Triton."""
    parts = decode_parts(q, kv, layer, plan, masking, interpret=interpret)
    if why_not(Op.MLA_DECODE, Implementation.TRITON, current_target()) is not None:
        return merge_planned(*parts, plan.units, q.dtype)
    from jaxcache.kernels.attention.decode_triton import merge_parts

    return merge_parts(parts, plan.units, None, None, None, q.dtype)


def decode_parts(
    q: AnyArray,
    kv: PagedLatent,
    layer: int | AnyArray,
    plan: Plan,
    masking: Masking,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The parts of all programs, float32 `(parts, heads, rank)`, and their log-sum-exp to base 2 `(parts, heads)`.

    Args:
      q, kv, layer, plan, masking: As of `mla.mla_decode`; what does not fit is refused there.
      interpret: A `plgpu.InterpretGPUParams`: no GPU needed.
    """
    order, units, pages = kv.order, plan.units, plan.sequences.pages
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, order.layers - 1)
    first, stride = (layer, order.layers) if order.page_major else (layer * order.pages, 1)
    inputs = Inputs(
        q=jnp.asarray(q),
        rows=jnp.asarray(kv.rows).reshape(order.rows, -1),
        worth=jnp.ones(1, jnp.float32) if kv.scale is None else jnp.asarray(kv.scale).reshape(1),
        page=jnp.stack([first, jnp.int32(stride)]),
        table=pages.reshape(-1),
        row=units.row * pages.shape[1],
        stop=units.stop,
        first_block=units.first_block,
        first_unit=units.first_unit,
    )
    scale, cap = float(masking.scale), float(masking.soft_cap or 0.0)
    static = Static(order.page_size, kv.rank, scale, cap, interpret is not None)
    return _call(inputs, static=static, interpret=interpret)


# Jitted, so that all layers of a step are one kernel, compiled once.
@partial(jax.jit, static_argnames=("static", "interpret"))
def _call(inputs: Inputs, *, static: Static, interpret: Any) -> tuple[jax.Array, jax.Array]:
    heads, programs = inputs.q.shape[1], inputs.first_unit.shape[0]
    parts, half = programs + inputs.row.shape[0], static.rank // 2
    copies = TOKENS // min(static.page_size, TOKENS)
    buffer = partial(plgpu.SMEM, dtype=inputs.rows.dtype, transforms=TILED)
    here, used = plgpu.Barrier(num_arrivals=copies, num_barriers=2), plgpu.Barrier(num_barriers=2)
    scratch = Scratch(
        q_lo=buffer((1, HEADS, half)),
        q_hi=buffer((1, HEADS, half)),
        q_rope=buffer((1, HEADS, ROPE)),
        lo=buffer((2, TOKENS, half)),
        hi=buffer((2, TOKENS, half)),
        rope=buffer((2, TOKENS, ROPE)),
        top=plgpu.SMEM((2, HEADS), jnp.float32),
        lo_here=here,
        hi_here=here,
        rope_here=here,
        lo_used=used,
        hi_used=used,
        rope_used=used,
        q_here=plgpu.Barrier(num_arrivals=3),
        q_used=plgpu.Barrier(num_arrivals=2),
        tops=used,
        weights=used,
    )

    def body(*refs: Any) -> None:
        n = len(Inputs._fields)
        program = Program(static, Inputs(*refs[:n]), Scratch(*refs[n + 2 :]), *refs[n : n + 2])
        me = lax.axis_index("warpgroup")
        pl.when(me == 0)(partial(program.compute, 0))
        pl.when(me == 1)(partial(program.compute, 1))
        pl.when(me == 2)(program.fetch)

    part_o, part_lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((parts, heads, static.rank), jnp.float32),
            jax.ShapeDtypeStruct((parts, heads), jnp.float32),
        ],
        grid=(heads // HEADS, programs),
        grid_names=("heads", "program"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*inputs)
    return part_o, part_lse


@dataclass(frozen=True)
class Program:
    """One program, as its warpgroups see it."""

    static: Static
    inputs: Inputs
    scratch: Scratch
    part_o: Any  # (programs + units, heads, rank) float32
    part_lse: Any  # (programs + units, heads) float32, to base 2

    def blocks(self) -> tuple[Any, Any]:
        """The run of blocks of this program."""
        total, programs = self.inputs.first_block[self.inputs.row.shape[0]], self.inputs.first_unit.shape[0]
        share = lax.div(total + (programs - 1), jnp.int32(programs))
        begin = lax.axis_index("program") * share
        return begin, jnp.minimum(begin + share, total)

    def segments(self, work: Any) -> None:
        """Calls `work(unit, first, count, steps before)` for each unit of this program, with its blocks of the unit."""
        blocks, (begin, end) = self.inputs.first_block, self.blocks()

        def segment(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            at, unit = carry
            unit = lax.while_loop(lambda u: blocks[u + 1] <= at, lambda u: u + 1, unit)  # those without keys
            stop = jnp.minimum(end, blocks[unit + 1])
            work(unit, at - blocks[unit], stop - at, at - begin)
            return stop, unit + 1

        lax.while_loop(
            lambda carry: carry[0] < end, segment, (begin, self.inputs.first_unit[lax.axis_index("program")])
        )

    @property
    def heads(self) -> Any:
        """The query heads of this program."""
        return pl.ds(pl.multiple_of(lax.axis_index("heads") * HEADS, HEADS), HEADS)

    def fetch(self) -> None:
        """The warpgroup that fetches."""
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        self.segments(self._fetch_unit)
        begin, end = self.blocks()

        @pl.when(begin < end)
        def _() -> None:  # nothing is under way when the program ends
            s = self.scratch
            plgpu.barrier_wait(s.q_used)
            for used in (s.lo_used, s.hi_used, s.rope_used):
                plgpu.barrier_wait(used.at[0])
                plgpu.barrier_wait(used.at[1])

    def _fetch_unit(self, unit: Any, first: Any, count: Any, before: Any) -> None:
        s, rank = self.scratch, self.static.rank
        parts = (
            (s.q_lo, s.lo, s.lo_here, s.lo_used, pl.ds(0, rank // 2)),
            (s.q_hi, s.hi, s.hi_here, s.hi_used, pl.ds(rank // 2, rank // 2)),
            (s.q_rope, s.rope, s.rope_here, s.rope_used, pl.ds(rank, ROPE)),
        )

        @pl.when(before > 0)
        def _() -> None:
            plgpu.barrier_wait(s.q_used)

        for part in parts:
            plgpu.copy_gmem_to_smem(self.inputs.q.at[unit, self.heads, part[4]], part[0].at[0], s.q_here)

        def one(i: Any, _: Any) -> None:
            rows = [self._rows(unit, (first + i) * BLOCK + b * TOKENS) for b in range(2)]
            for part, b in ((0, 0), (1, 1), (1, 0), (0, 1), (2, 0), (2, 1)):  # in the order in which they are free
                buffers, here, used, columns = parts[part][1:]

                @pl.when(before + i > 0)
                def _(used: Any = used, b: int = b) -> None:
                    plgpu.barrier_wait(used.at[b])

                for place, at in rows[b]:
                    plgpu.copy_gmem_to_smem(self.inputs.rows.at[at, columns], buffers.at[b, place], here.at[b])

        lax.fori_loop(0, count, one, None)

    def _rows(self, unit: Any, token: Any) -> list[tuple[Any, Any]]:
        """Where the tokens of one buffer go, and where they are."""
        inputs = self.inputs
        return pages_of_buffer(
            inputs.table, inputs.row[unit], inputs.page, token, inputs.stop[unit], TOKENS, self.static.page_size
        )

    def compute(self, me: int) -> None:
        """One of the two warpgroups that multiply: `me` is its buffer, and its half of the columns."""
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        self.segments(partial(self._compute_unit, me))

    def _compute_unit(self, me: int, unit: Any, first: Any, count: Any, before: Any) -> None:
        s, stop, half = self.scratch, self.inputs.stop[unit], self.static.rank // 2
        plgpu.barrier_wait(s.q_here)
        step = partial(self._step, me, stop=stop, first=first, before=before)
        whole = jnp.clip(lax.div(stop, jnp.int32(BLOCK)) - first, 0, count)
        carry = filled((HEADS, half), 0.0), filled((HEADS,), NO_LOGIT), filled((HEADS,), 0.0)
        carry = lax.fori_loop(0, whole, partial(step, is_whole=True), carry)
        acc, top, den = lax.fori_loop(whole, count, partial(step, is_whole=False), carry)
        plgpu.barrier_arrive(s.q_used)
        den = den + self._swap(me, den)
        acc = acc * spread(self.inputs.worth[0] / den, acc)
        part = lax.axis_index("program") + unit
        self.part_o.at[part, self.heads, pl.ds(me * half, half)][...] = acc
        if me == 0:
            s.top[0] = top + jnp.log(den) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.top.at[0], self.part_lse.at[part, self.heads])
            plgpu.wait_smem_to_gmem(0)

    def _step(
        self, me: int, i: Any, carry: tuple[Any, Any, Any], *, stop: Any, first: Any, before: Any, is_whole: bool
    ) -> tuple[Any, Any, Any]:
        """Folds two buffers of tokens into the running softmax. `is_whole`: all of them are before `stop`."""
        acc, top, den = carry
        s, other = self.scratch, 1 - me
        # 0, but the compiler cannot know: it would keep all descriptors of the matrix products in registers.
        zero = lax.shift_right_logical(before + i, jnp.int32(30))
        own, own_here, own_used = ((s.lo, s.lo_here, s.lo_used), (s.hi, s.hi_here, s.hi_used))[me]
        token = (first + i) * BLOCK
        logits = self._logits(me, zero)
        seen = None
        if not is_whole:
            seen = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA) + (token + me * TOKENS) < stop
            logits = jnp.where(seen, logits, NO_LOGIT)
        mine = logits.max(axis=1)
        new = jnp.maximum(top, jnp.maximum(mine, self._tell_and_hear(me, mine)))
        weight, fade = jnp.exp2(logits - spread(new, logits)), jnp.exp2(top - new)
        if seen is not None:
            weight = jnp.where(seen, weight, 0.0)
        den, acc = den * fade + weight.sum(axis=1), acc * spread(fade, acc)
        if not is_whole:
            clear(own.at[me], token + me * TOKENS, stop)
        s.rope[me] = weight.astype(own.dtype)  # its numbers are used up
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.weights.at[me])

        def weigh(ref: Any) -> None:
            self._weigh_own(me, zero, weight, own, ref)
            plgpu.barrier_wait(s.weights.at[other])
            plgpu.barrier_wait(own_here.at[other])
            if not is_whole:
                clear(own.at[other], token + other * TOKENS, stop)
            plgpu.wgmma(ref, s.rope.at[other + zero], own.at[other + zero])
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(own_used.at[me])

        acc = accumulate(acc, weigh, self.static.interprets)
        plgpu.barrier_arrive(own_used.at[other])
        plgpu.barrier_arrive(s.rope_used.at[other])
        return acc, new, den

    def _logits(self, me: int, zero: Any) -> Any:
        """Logits to base 2 of the tokens in the own buffer."""
        s, static = self.scratch, self.static
        lo, hi = (s.q_lo, s.lo, s.lo_here), (s.q_hi, s.hi, s.hi_here)
        order = (lo, hi) if me == 0 else (hi, lo)

        def multiply(ref: Any) -> Any:
            for queries, buffers, here in (*order, (s.q_rope, s.rope, s.rope_here)):
                plgpu.barrier_wait(here.at[me])
                plgpu.wgmma(ref, queries.at[zero], buffers.at[me + zero].transpose((1, 0)))
            return ref[...]

        logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((HEADS, TOKENS), jnp.float32))
        return base2_logits(logits, self.inputs.worth[0] * static.scale, static.cap)

    def _weigh_own(self, me: int, zero: Any, weight: Any, own: Any, ref: Any) -> None:
        """Adds the values of the own buffer; weights are in registers, where JAX's interpreter takes none."""
        if self.static.interprets:
            self.scratch.rope[me] = weight.astype(own.dtype)
            plgpu.wgmma(ref, self.scratch.rope.at[me], own.at[me])
        else:
            plgpu.wgmma(ref, weight.astype(own.dtype), own.at[me + zero])

    def _tell_and_hear(self, me: int, mine: Any) -> Any:
        """Leaves a number a row for the other warpgroup, and takes its own."""
        s = self.scratch
        s.top[me] = mine
        plgpu.barrier_arrive(s.tops.at[me])
        plgpu.barrier_wait(s.tops.at[1 - me])
        return load(s.top.at[1 - me], WGMMA.reduce(1))

    def _swap(self, me: int, mine: Any) -> Any:
        """`_tell_and_hear`, after which both may write there again."""
        theirs = self._tell_and_hear(me, mine)
        plgpu.barrier_arrive(self.scratch.weights.at[me])
        plgpu.barrier_wait(self.scratch.weights.at[1 - me])
        return theirs
