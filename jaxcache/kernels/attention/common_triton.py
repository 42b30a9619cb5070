"""What the Triton kernels of attention share: where a key lies, its numbers as tensor cores take them, the softmax."""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
COMPILES = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def first_page(layer, layers, pages, PAGE_MAJOR: tl.constexpr):
    """Page of the array that is page 0 of the layer: see `PageOrder.physical`. int64."""
    at = tl.minimum(tl.maximum(tl.load(layer), 0), layers - 1).to(tl.int64)
    return at if PAGE_MAJOR else at * pages


@triton.jit
def rows_of_block(
    table, i, stop, page0, stride, PAGE: tl.constexpr, BLOCK: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows of the array where keys [i * BLOCK, (i + 1) * BLOCK) lie: int64 (BLOCK,). Keys from `stop` on: any row.

    Page ids are read once a page where pages and blocks fit into one another. WHOLE: all keys are before `stop`.
    """
    j = tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        page = tl.load(table + (i * BLOCK) // PAGE).to(tl.int64)
        return (page * stride + page0) * PAGE + (i * BLOCK) % PAGE + j
    elif POWER and BLOCK % PAGE == 0:
        at = i * (BLOCK // PAGE) + tl.arange(0, BLOCK // PAGE)
        if WHOLE:
            page = tl.load(table + at).to(tl.int64)
        else:
            page = tl.load(table + at, mask=at * PAGE < stop, other=0).to(tl.int64)
        rows = (page * stride + page0)[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
        return tl.reshape(rows, [BLOCK])
    else:
        n = i * BLOCK + j
        if WHOLE:
            page = tl.load(table + n // PAGE).to(tl.int64)
        else:
            page = tl.load(table + n // PAGE, mask=n < stop, other=0).to(tl.int64)
        return (page * stride + page0) * PAGE + n % PAGE


@triton.jit
def load_tile(base, rows, keep, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix `(rows, D)`, zeros in columns up to DP and, if MASKED, in rows that are not kept."""
    d = tl.arange(0, DP)
    at = base + rows[:, None] * STRIDE + d[None, :]
    if MASKED and DP != D:
        return tl.load(at, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=keep[:, None], other=0.0)
    elif DP != D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def to_math(x, MATH: tl.constexpr):
    """Stored numbers as tensor cores take them, exactly. int8 to fp16 by its bits: the conversion is a slow one."""
    if x.dtype == tl.int8 and COMPILES:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, lo, hi, c;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 lo, t, 0x64646464, 0x4140;
            prmt.b32 hi, t, 0x64646464, 0x4342;
            mov.b32 c, 0x64806480;
            sub.f16x2 $0, lo, c;
            sub.f16x2 $1, hi, c;
            }""",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return x.to(MATH)


@triton.jit
def queries_to_math(q, MATH: tl.constexpr, SCALED: tl.constexpr):
    """Queries as tensor cores take them, and what to multiply logits by.

    8-bit keys are multiplied in fp16, whose range is narrow, so there each query is divided by its largest element.
    """
    if SCALED:
        q = q.to(tl.float32)
        most = tl.max(tl.abs(q), 1)
        most = tl.where(most > 0, most, 1.0)
        return (q / most[:, None]).to(MATH), most
    else:
        return q.to(MATH), tl.full([q.shape[0]], 1.0, tl.float32)


@triton.jit
def multiply(a, b, acc, PRECISE: tl.constexpr):
    """`a @ b + acc`; in float32 and not TF32, if PRECISE."""
    if PRECISE:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def cap_logits(s, CAP: tl.constexpr):
    """Logits to base 2, capped. `s` is in natural units if there is a cap; tanh(x) = 1 - 2 / (1 + exp(2 x))."""
    if CAP > 0:
        return (CAP * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / CAP))))
    else:
        return s


@triton.jit
def key_logits(
    qt, q_mul, k, rows, keep, k_scale, h, HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAP: tl.constexpr,
    KIND: tl.constexpr, MATH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of the keys of head `h` in `rows`, capped; what is not kept is any number."""
    kt = load_tile(k + h * D, rows, keep, HKV * D, D, DP, False)
    s = multiply(qt, to_math(kt, MATH).T, tl.zeros([qt.shape[0], rows.shape[0]], tl.float32), PRECISE)
    if KIND == 3:
        s = s * tl.load(k_scale + rows * HKV + h)[None, :]
    return cap_logits(s * q_mul[:, None], CAP)


@triton.jit
def no_softmax(M: tl.constexpr, DVP: tl.constexpr):
    """A running softmax before the first key: maximum, denominator, sum of values."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DVP], tl.float32)


@triton.jit
def add_sinks(top, den, acc, sinks, heads, inside):
    """A running softmax that also ran over the sinks of `heads`, a head a row."""
    sink = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
    new = tl.maximum(top, sink)
    fade = tl.exp2(top - new)
    return new, den * fade + tl.exp2(sink - new), acc * fade[:, None]


@triton.jit
def scale_of(scale, h, KIND: tl.constexpr):
    """What a tensor or head scale says of head `h`; 1 for others."""
    if KIND == 1:
        return tl.load(scale)
    elif KIND == 2:
        return tl.load(scale + h)
    else:
        return 1.0


@triton.jit
def scale_weights(w, fade, most, v_scale, rows, keep):
    """Scales of rows as part of the weights, relative to the largest of the block, so that fp16 holds any of them.

    `most` is what the sum of values was relative to; the fade makes it relative to the one returned. `v_scale` points
    at the scale of row 0.
    """
    scale = tl.load(v_scale + rows, mask=keep, other=0.0)
    new = tl.maximum(tl.max(scale, 0), 1e-15)
    return w * (scale * (1.0 / new))[None, :], fade * (most / new), new


@triton.jit
def weigh_values(w, v, acc, fade, MATH: tl.constexpr, PRECISE: tl.constexpr):
    """Folds values into their sum: `acc * fade + w @ v`."""
    return multiply(w.to(MATH), to_math(v, MATH), acc * fade[:, None], PRECISE)


@triton.jit
def load_pairs(base, rows, keep, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A tile of 8-bit rows as pairs of neighbours, int16 (rows, DP / 2); masked like `load_tile`. D is even."""
    return load_tile(base.to(tl.pointer_type(tl.int16)), rows, keep, STRIDE // 2, D // 2, DP // 2, True)


@triton.jit
def half(pairs, dtype: tl.constexpr, ODD: tl.constexpr):
    """One number of each pair, of type `dtype`, as fp16. Exact.

    Tensor cores take pairs of 16 bits that lie one below the other, and only 16-bit tiles are turned on their way from
    shared memory; so columns of bytes would be read one byte at a time. Read as pairs, even and odd columns are apart:
    two products, of half the width each.
    """
    if COMPILES and dtype == tl.int8:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, c; xor.b32 t, $1, 0x80808080; prmt.b32 t, t, 0x64646464, "
            + ("0x4341" if ODD else "0x4240")
            + "; mov.b32 c, 0x64806480; sub.f16x2 $0, t, c; }",
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif COMPILES and dtype == tl.float8e4nv:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 lo, hi; prmt.b32 t, $1, 0, "
            + ("0x4431" if ODD else "0x4420")
            + "; mov.b32 {lo, hi}, t; cvt.rn.f16x2.e4m3x2 $0, lo; }",
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif COMPILES and dtype == tl.float8e5:  # the upper byte of an fp16
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, " + ("0x3414" if ODD else "0x2404") + ";",
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        numbers = (pairs >> 8) if ODD else pairs
        return numbers.to(tl.int8).to(dtype, bitcast=True).to(tl.float16)


@triton.jit
def halves(x):
    """Even and odd columns of a tile."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def whole(even, odd):
    """The tile whose even and odd columns these are."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])
