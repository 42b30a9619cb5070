"""Random batches over paged pools, and what attention over them is: float64, one query and one head at a time.

Written from the contract. Whatever no request owns holds NaN: free pages, the sink, slots behind the last token, and
other layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent, PageOrder, Sequences
from jaxcache.kernels.attention.launch import DecodeLaunch, ExtendLaunch, Launches
from jaxcache.kernels.attention.plan import Plan, make_plan

INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class Case:
    """One batch over one pool. `lens` are (prefix, tokens of this step) of each request."""

    lens: tuple[tuple[int, int], ...]
    page: int = 16
    heads: int = 2
    group: int = 4
    dim: int = 32
    v_dim: int | None = None
    dtype: Any = np.float32
    q_dtype: Any = None
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    scales: str = "none"
    page_major: bool = False
    padding: int = 2
    tokens: int | None = None
    layers: int = 3
    layer: int = 1
    scale: float = 0.3
    as_cpu: bool = False  # floats of 8 and 16 bits are stored as integers
    share: int = 0  # the first requests have so many tokens in common
    sharers: int = 0
    latent: int = 0  # rank of latent rows, of `dim` elements in all

    @property
    def masking(self) -> Masking:
        return Masking(self.scale, self.window, self.cap)


@dataclass
class Batch:
    """What a case is made of: host arrays, and the oracle's view of each request."""

    case: Case
    q: np.ndarray
    kv: PagedKV | PagedLatent
    sequences: Sequences
    sinks: np.ndarray | None
    keys: list[np.ndarray] = field(default_factory=list)  # float64 (tokens, heads, dim) a request
    values: list[np.ndarray] = field(default_factory=list)


def make(case: Case, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(case.dtype)
    v_dim = case.dim if case.v_dim is None else case.v_dim
    requests = len(case.lens) + case.padding
    seq = np.array([p + n for p, n in case.lens] + [0] * case.padding, np.int32)
    prefix = np.array([p for p, _ in case.lens] + [0] * case.padding, np.int32)
    counts = -(-seq // case.page)
    max_pages = max(int(counts.max()), 1) + 1
    pages = int(counts.sum()) + 4
    free = rng.permutation(np.arange(1, pages))
    table = rng.integers(0, pages, (requests + 2, max_pages)).astype(np.int32)  # stale entries are any page
    row = rng.permutation(requests + 2)[:requests].astype(np.int32)
    taken = 0
    for b in range(requests):
        table[row[b], : counts[b]] = free[taken : taken + counts[b]]
        if b and b < case.sharers:
            table[row[b], : case.share // case.page] = table[row[0], : case.share // case.page]
        taken += int(counts[b])
    order = PageOrder(case.layers, pages, case.page, case.page_major)
    stack = (1, order.rows) if case.page_major else (case.layers, pages * case.page)
    arrays, scales = [], []
    widths = (case.dim,) if case.latent else (case.dim, v_dim)
    shape = stack if case.latent else (*stack, case.heads)
    for width in widths:
        arrays.append(_poison((*shape, width), dtype))
        scales.append(_scales(rng, case.scales, shape))
    batch = Batch(case, np.empty(0), None, None, None)  # type: ignore[arg-type]
    for b in range(requests):
        slots = (table[row[b], : counts[b]][:, None] * case.page + np.arange(case.page)).reshape(-1)[: seq[b]]
        at = np.array([_row(order, case.layer, int(s)) for s in slots], np.int64)
        for array, scale, out in zip(arrays, scales, (batch.keys, batch.values), strict=False):
            flat = array.reshape(-1, *array.shape[2:])
            fresh = at if case.sharers <= b or b == 0 else at[case.share :]
            flat[fresh] = _numbers(rng, (len(fresh), *array.shape[2:]), dtype)
            out.append(_worth(flat[at], scale, case.scales, at))
    if case.latent:
        batch.keys = [k[:, None] for k in batch.keys]
        batch.values = [k[..., : case.latent] for k in batch.keys]
    tokens = int((seq - prefix).sum()) + 3 if case.tokens is None else case.tokens
    first = np.cumsum(seq - prefix) - (seq - prefix)
    q_dtype = np.dtype(case.q_dtype or (dtype if dtype.itemsize > 1 else np.float32))
    heads = case.group if case.latent else case.heads * case.group
    batch.q = rng.standard_normal((tokens, heads, case.dim)).astype(q_dtype)
    batch.sequences = Sequences(table, row, prefix, seq, first.astype(np.int32))
    batch.sinks = rng.standard_normal(heads).astype(np.float32) if case.sinks else None
    if case.as_cpu:
        arrays = [a if a.dtype.itemsize == 4 else a.view({2: np.uint16, 1: np.uint8}[a.dtype.itemsize]) for a in arrays]
    if case.latent:
        batch.kv = PagedLatent(arrays[0], scales[0], order, dtype, case.latent)
    else:
        batch.kv = PagedKV(arrays[0], arrays[1], scales[0], scales[1], order, dtype)
    return batch


def decode_case(case: Case, seed: int = 0) -> Batch:
    """A batch whose step has one token a request."""
    return make(replace(case, lens=tuple((max(p + n - 1, 0), min(p + n, 1)) for p, n in case.lens)), seed)


def expected(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Results and log-sum-exp of every token of the step, by request: rows of padding are zeros and -inf."""
    case, q = batch.case, batch.q.astype(np.float64)
    heads = q.shape[1]
    v_dim = batch.values[0].shape[2] if batch.values else 0
    out, lse = np.zeros((len(q), heads, v_dim)), np.full((len(q), heads), -np.inf)
    s = batch.sequences
    if batch.sinks is not None:
        lse[:] = batch.sinks
    for b in range(len(s.seq_len)):
        for t in range(int(s.seq_len[b] - s.prefix_len[b])):
            position, token = int(s.prefix_len[b]) + t, int(s.first_token[b]) + t
            first = 0 if case.window is None else max(position - case.window + 1, 0)
            for h in range(heads):
                kv_head = h // (heads // batch.keys[b].shape[1])
                logits = batch.keys[b][first : position + 1, kv_head] @ q[token, h] * case.scale
                if case.cap is not None:
                    logits = case.cap * np.tanh(logits / case.cap)
                extra = [] if batch.sinks is None else [float(batch.sinks[h])]
                top = max([*logits, *extra])
                weights = np.exp(logits - top)
                total = weights.sum() + sum(np.exp(e - top) for e in extra)
                out[token, h] = weights @ batch.values[b][first : position + 1, kv_head] / total
                lse[token, h] = top + np.log(total)
    return out, lse


def close(got: Any, want: np.ndarray, tolerance: float) -> None:
    """The largest difference, relative to the largest number, is within tolerance; infinities are the same."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    if finite.any():
        error = np.abs(got[finite] - want[finite]).max() / max(np.abs(want[finite]).max(), 1e-6)
        assert error < tolerance, f"relative error {error:.2e}"


def reference_tolerance(q: np.ndarray) -> float:
    """The reference rounds once: its results, to the dtype of the queries."""
    return {"bfloat16": 8e-3, "float16": 1e-3}.get(q.dtype.name, 2e-5)


def tolerance(case: Case) -> float:
    """By what is rounded: the numbers are exact, weights are of the pool's dtype (fp16 for 8 bits), results of q's."""
    itemsize, q = np.dtype(case.dtype).itemsize, case.q_dtype
    if np.dtype(case.dtype) == jnp.bfloat16 or (q is not None and np.dtype(q) == jnp.bfloat16):
        return 1.5e-2
    return 2e-5 if itemsize == 4 else 4e-3


def _row(order: PageOrder, layer: int, slot: int) -> int:
    page, offset = divmod(slot, order.page_size)
    physical = page * order.layers + layer if order.page_major else layer * order.pages + page
    return physical * order.page_size + offset


def _poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, 127 if dtype == INT8 else np.nan).astype(dtype)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype == INT8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)


def _scales(rng: np.random.Generator, kind: str, rows: tuple[int, ...]) -> Any:
    if kind == "none":
        return None
    shape = {"tensor": (), "head": rows[2:], "row": rows}[kind]
    return np.asarray(rng.uniform(0.005, 0.02, shape), np.float32)


def _worth(stored: np.ndarray, scale: Any, kind: str, at: np.ndarray) -> np.ndarray:
    numbers = stored.astype(np.float64)
    if kind == "row":
        scale = scale.reshape(-1, *scale.shape[2:])[at]
    return numbers if scale is None else numbers * np.asarray(scale, np.float64)[..., None]


RAGGED = ((0, 70), (0, 1), (0, 0), (0, 32), (0, 33))
MIXED = ((59, 7), (0, 1), (33, 1), (0, 0), (29, 9), (31, 1), (0, 5))

DECODE = {
    "gqa": Case(RAGGED),
    "mha": Case(RAGGED, heads=3, group=1),
    "group_of_6": Case(RAGGED, heads=1, group=6, dim=24),
    "wide_group": Case(RAGGED, heads=1, group=20),
    "narrow_values": Case(RAGGED, dim=48, v_dim=24),
    "page_1": Case(RAGGED, page=1),
    "page_3": Case(RAGGED, page=3),
    "page_64": Case(RAGGED, page=64),
    "page_128": Case(RAGGED, page=128),
    "page_48": Case(RAGGED, page=48),
    "page_major": Case(RAGGED, page_major=True),
    "window": Case(RAGGED, window=40),
    "window_in_a_page": Case(RAGGED, window=5),
    "cap": Case(RAGGED, cap=2.0),
    "sinks": Case(RAGGED, sinks=True),
    "all_at_once": Case(RAGGED, window=33, cap=3.0, sinks=True, page_major=True, page=4),
    "fp16": Case(RAGGED, dtype=np.float16),
    "bf16": Case(RAGGED, dtype=jnp.bfloat16),
    "tensor_scales": Case(RAGGED, dtype=np.float16, scales="tensor"),
    "e4m3": Case(RAGGED, dtype=jnp.float8_e4m3fn, scales="tensor"),
    "e4m3_bf16": Case(RAGGED, dtype=jnp.float8_e4m3fn, q_dtype=jnp.bfloat16),
    "e5m2": Case(RAGGED, dtype=jnp.float8_e5m2, scales="head"),
    "int8": Case(RAGGED, dtype=np.int8, scales="row"),
    "int8_page_major": Case(RAGGED, dtype=np.int8, scales="row", page_major=True),
    "one_token": Case(((0, 1),), padding=0),
    "nobody": Case(((0, 0),), padding=3),
    "last_layer": Case(RAGGED, layer=2),
}
EXTEND = {
    "gqa": Case(MIXED),
    "mha": Case(MIXED, heads=3, group=1),
    "group_of_6": Case(MIXED, heads=1, group=6),
    "narrow_values": Case(MIXED, dim=48, v_dim=24),
    "page_1": Case(MIXED, page=1),
    "page_3": Case(MIXED, page=3),
    "page_64": Case(MIXED, page=64),
    "page_major": Case(MIXED, page_major=True),
    "window": Case(MIXED, window=40),
    "window_in_a_page": Case(MIXED, window=5),
    "cap": Case(MIXED, cap=2.0),
    "sinks": Case(MIXED, sinks=True),
    "all_at_once": Case(MIXED, window=33, cap=3.0, sinks=True, page_major=True, page=4),
    "fp16": Case(MIXED, dtype=np.float16),
    "bf16": Case(MIXED, dtype=jnp.bfloat16),
    "e4m3": Case(MIXED, dtype=jnp.float8_e4m3fn, scales="tensor"),
    "e5m2": Case(MIXED, dtype=jnp.float8_e5m2, scales="head"),
    "int8": Case(MIXED, dtype=np.int8, scales="row"),
    "no_padding": Case(((9, 4), (0, 3)), padding=0, tokens=7),
    "drafts": Case(((20, 4), (31, 4), (64, 4)), padding=1),
    "nobody": Case(((0, 0),), tokens=5),
}
LATENT = Case(RAGGED, group=8, dim=48, latent=32)

LATENTS = {
    "latent": LATENT,
    "few_heads": replace(LATENT, group=3),
    "many_heads": replace(LATENT, group=20),
    "odd_widths": replace(LATENT, dim=33, latent=24),
    "latent_page_1": replace(LATENT, page=1),
    "latent_page_64": replace(LATENT, page=64),
    "page_major": replace(LATENT, page_major=True),
    "window_cap": replace(LATENT, window=20, cap=2.0),
    "fp16": replace(LATENT, dtype=np.float16),
    "bf16": replace(LATENT, dtype=jnp.bfloat16),
    "e4m3": replace(LATENT, dtype=jnp.float8_e4m3fn, scales="tensor"),
    "latent_int8": replace(LATENT, dtype=np.int8, scales="tensor"),
}

LONG = ((0, 300), (0, 1), (0, 0), (0, 128), (0, 65))
WGMMA_LATENT = Case(LONG, group=64, dim=192, latent=128, dtype=jnp.bfloat16, scale=0.1)
WGMMA_LATENTS = {
    "wgmma": WGMMA_LATENT,
    "wgmma_page_64": replace(WGMMA_LATENT, page=64, layer=2),
    "wgmma_all_at_once": replace(WGMMA_LATENT, page=8, page_major=True, cap=3.0, scales="tensor", scale=9.0),
    "wgmma_128_heads": replace(WGMMA_LATENT, group=128, dim=576, latent=512, page=128, dtype=np.float16),
    "wgmma_nobody": replace(WGMMA_LATENT, lens=((0, 0),)),
}
"""Latent rows that the Mosaic kernel takes."""
CHUNKS = ((59, 7), (0, 1), (33, 1), (0, 0), (127, 70), (150, 150), (0, 5))
WGMMA_HEADS = Case(CHUNKS, heads=2, group=2, dim=64, dtype=jnp.bfloat16, scale=0.2)
WGMMA_EXTEND = {
    "wgmma": WGMMA_HEADS,
    "wgmma_d_128": replace(WGMMA_HEADS, dim=128, page=64, group=4, heads=1, dtype=np.float16, layer=2),
    "wgmma_window": replace(WGMMA_HEADS, window=40, page=128),
    "wgmma_all_at_once": replace(WGMMA_HEADS, window=33, cap=3.0, sinks=True, page_major=True, page=8),
    "wgmma_scales": replace(WGMMA_HEADS, scales="head", scale=20.0, cap=5.0),
    "wgmma_no_padding": replace(WGMMA_HEADS, lens=((9, 64), (0, 130)), padding=0, tokens=194),
}
"""Keys and values that the Mosaic kernel takes."""

QUICK = frozenset(
    {
        *("page_3", "page_64", "all_at_once", "window_in_a_page", "group_of_6", "narrow_values"),
        *("e4m3", "int8", "no_padding", "drafts", "nobody", "latent_page_1", "odd_widths", "window_cap"),
    }
)
"""Cases of every run; the others are marked slow."""

LAUNCHES = Launches(DecodeLaunch(32, 5, 1, 3), DecodeLaunch(32, 3, 4, 3), ExtendLaunch(4, 32, 4, 3), 2)
"""Small launches: requests are cut among programs, and programs take several requests."""
LATENT_LAUNCHES = Launches(
    DecodeLaunch(32, 3, 4, 3, 16), DecodeLaunch(32, 2, 4, 3, 16), ExtendLaunch(2, 32, 4, 3, 16), 2
)


def plan_of(batch: Batch, launches: Launches = LAUNCHES, **options: Any) -> Plan:
    return make_plan(batch.sequences, len(batch.q), batch.case.page, launches, window=batch.case.window, **options)


def one_row_a_request(batch: Batch) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Decode takes the query of request `i` as row `i`, also of requests that have none."""
    want_out, want_lse = expected(batch)
    s = batch.sequences
    at = np.where(np.asarray(s.seq_len) > 0, s.first_token, len(batch.q) - 1)
    batch.q = batch.q[at]
    return batch, want_out[at], want_lse[at]


def decode_problem(case: Case) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A decode step of a case, and what is expected of it."""
    return one_row_a_request(decode_case(replace(case, tokens=None)))
