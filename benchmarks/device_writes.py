"""Times of the KV writes: rows of one layer after another, to random slots of a stacked pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checks import implementations
from benchmarks.flashinfer_append import append_kv, append_mla_kv
from benchmarks.peers import Peers, measure_copy, random_jax, random_torch, to_torch
from benchmarks.timing import Report, time_jax_donated, time_torch_graph
from jaxcache.kernels.dispatch import Op
from jaxcache.kernels.quantized_pool import QuantizedPool
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from jaxcache.kernels.write_quantized import write_kv_fp8, write_kv_int8
from jaxcache.pools.layout import LayerMajor, PageMajor

LAYERS = 4
"""Layers of the pool."""
WRITES = 64
"""Layers of the model, all in one jitted step; they take turns on the pool's layers."""
FEW_WRITES = 8
"""The same where each write is many ops for XLA, and slow to compile."""


def bench_write_kv(report: Report, small: bool, peers: Peers) -> None:
    """K and V rows of 8 heads x 128."""
    heads, dim, slots = (2, 16, 4096) if small else (8, 128, 262_144)
    for dtype in [jnp.uint16] if small else [jnp.bfloat16, jnp.float8_e4m3fn]:
        pools = tuple(random_jax(seed, (LAYERS, slots, heads, dim), dtype) for seed in range(2))
        for n, loc in random_slots(small, slots):
            rows = [random_jax(seed, (n, heads, dim), dtype) for seed in range(2)]
            case, moved = describe(n, f"{heads * dim}+{heads * dim}", dtype), 4 * rows[0].nbytes
            measure_copy(report, "write_kv", case, moved, peers.torch)
            writes = {f"jaxcache-{i.value}": partial(write_kv, implementation=i) for i in implementations(Op.WRITE_KV)}
            for label, write in {**writes, "xla-scatter": xla_write_kv}.items():
                took, pools = time_jax_donated(in_layers(write, 2), pools, loc, *rows, repeats=WRITES)
                report.add("write_kv", case, label, took, moved=moved, is_peer=label == "xla-scatter")
            if peers.torch:
                torch_write_kv(report, case, moved, peers, (LAYERS, slots, heads, dim), np.asarray(loc), dtype)


def bench_write_one(report: Report, small: bool, peers: Peers) -> None:
    """One buffer: rows of 1,024, as two halves side by side."""
    width, slots = (64, 4096) if small else (1024, 262_144)
    dtype = jnp.uint16 if small else jnp.bfloat16
    pool = random_jax(0, (LAYERS, slots, width), dtype)
    for n, loc in random_slots(small, slots):
        halves = [random_jax(seed, (n, width // 2), dtype) for seed in range(2)]
        case, moved = describe(n, str(width), dtype), 4 * halves[0].nbytes
        measure_copy(report, "write_one_buffer", case, moved, peers.torch)
        for i in implementations(Op.WRITE_MLA_KV):
            write = partial(write_mla_kv, implementation=i)
            took, (pool,) = time_jax_donated(in_layers(write, 1), (pool,), loc, *halves, repeats=WRITES)
            report.add("write_one_buffer", case, f"jaxcache-{i.value}", took, moved=moved)


def bench_write_mla_kv(report: Report, small: bool, peers: Peers) -> None:
    """Latent rows of 512 + 64."""
    rank, rope, slots = (96, 32, 4096) if small else (512, 64, 262_144)
    dtype = jnp.uint16 if small else jnp.bfloat16
    pool = random_jax(0, (LAYERS, slots, rank + rope), dtype)
    for n, loc in random_slots(small, slots):
        parts = random_jax(1, (n, rank), dtype), random_jax(2, (n, rope), dtype)
        case, moved = describe(n, f"{rank}+{rope}", dtype), 2 * (parts[0].nbytes + parts[1].nbytes)
        measure_copy(report, "write_mla_kv", case, moved, peers.torch)
        ours = implementations(Op.WRITE_MLA_KV)
        writes = {f"jaxcache-{i.value}": partial(write_mla_kv, implementation=i) for i in ours}
        for label, write in {**writes, "xla-scatter": xla_write_mla_kv}.items():
            took, (pool,) = time_jax_donated(in_layers(write, 1), (pool,), loc, *parts, repeats=WRITES)
            report.add("write_mla_kv", case, label, took, moved=moved, is_peer=label == "xla-scatter")
        if peers.torch:
            torch_write_mla_kv(report, case, moved, peers, (LAYERS, slots, rank + rope), rank, np.asarray(loc))


def bench_row_widths(report: Report, small: bool, peers: Peers) -> None:
    """Why the latent write is slower than that of K and V: the same bytes in rows of four widths, in order and not.

    A row that begins or ends in the middle of 256 bytes of memory costs more than one that does not, if its neighbour
    is not written at the same time; and 1,152 bytes are four and a half times 256. All parts are powers of two wide,
    which the kernel covers exactly.
    """
    slots, dtype = (4096, jnp.uint16) if small else (262_144, jnp.bfloat16)
    moved = 2 * 1152 * (slots // 4)
    for widths in ((256, 256), (512, 64), (512, 128), (512, 512)):
        n = moved // (4 * sum(widths))
        pool = random_jax(0, (LAYERS, slots, sum(widths)), dtype)
        parts = [random_jax(1 + i, (n, width), dtype) for i, width in enumerate(widths)]
        write = in_layers(write_mla_kv, 1)
        orders = {"random": np.random.default_rng(n).permutation(slots - 1)[:n], "in-order": np.arange(n)}
        for kind, order in orders.items():
            case, exact = describe(n, "+".join(map(str, widths)), dtype, kind), 4 * n * sum(widths)
            measure_copy(report, "write_rows", case, exact, peers.torch)
            took, (pool,) = time_jax_donated(write, (pool,), jnp.asarray(1 + order, jnp.int32), *parts, repeats=WRITES)
            report.add("write_rows", case, "jaxcache", took, moved=exact)


def bench_write_to_pages(report: Report, small: bool, peers: Peers) -> None:
    """Both writes once more, to the slots that a prefill of an engine has: whole pages of 16, in random order."""
    slots, page_size, dtype = (4096, 16, jnp.uint16) if small else (262_144, 16, jnp.bfloat16)
    n = slots // 4
    order = np.random.default_rng(n).permutation(slots // page_size - 1)[: n // page_size]
    loc = jnp.asarray((page_size * (1 + order)[:, None] + np.arange(page_size)).ravel(), jnp.int32)
    for op, write, widths in ((Op.WRITE_KV, write_kv, (1024, 1024)), (Op.WRITE_MLA_KV, write_mla_kv, (512, 64))):
        is_mla = op is Op.WRITE_MLA_KV
        row_shapes = [(width,) for width in widths] if is_mla else [(width // 128, 128) for width in widths]
        rows = [random_jax(seed, (n, *shape), dtype) for seed, shape in enumerate(row_shapes)]
        pool_rows = [(sum(widths),)] if is_mla else row_shapes
        pools = tuple(random_jax(seed, (LAYERS, slots, *shape), dtype) for seed, shape in enumerate(pool_rows))
        case = describe(n, "+".join(map(str, widths)), dtype, "pages-of-16")
        moved = 2 * sum(row.nbytes for row in rows)
        measure_copy(report, op.value, case, moved, peers.torch)
        for i in implementations(op):
            step = in_layers(partial(write, implementation=i), len(pools))
            took, pools = time_jax_donated(step, pools, loc, *rows, repeats=WRITES)
            report.add(op.value, case, f"jaxcache-{i.value}", took, moved=moved)


def bench_write_layouts(report: Report, small: bool, peers: Peers) -> None:
    """K and V rows to pools of both orders, of as many layers as there are writes: each finds its rows by itself."""
    heads, dim, slots = (2, 16, 4096) if small else (8, 128, 16_400)
    dtype = jnp.uint16 if small else jnp.bfloat16
    for placement in (LayerMajor(WRITES, slots), PageMajor(WRITES, slots, page_size=16)):
        pools = tuple(random_jax(seed, (*placement.dims, heads, dim), dtype) for seed in range(2))
        for n, loc in random_slots(small, slots):
            rows = [random_jax(seed, (n, heads, dim), dtype) for seed in range(2)]
            case = f"{describe(n, f'{heads * dim}+{heads * dim}', dtype)},layers={WRITES},{type(placement).__name__}"
            moved = 4 * rows[0].nbytes
            measure_copy(report, "write_kv", case, moved, peers.torch)

            def write(k_pool, v_pool, layer, loc, k, v, placement=placement):
                layer, loc = placement.locate(layer, loc)
                return write_kv(k_pool, v_pool, layer, loc, k, v)

            took, pools = time_jax_donated(in_layers(write, 2, layers=WRITES), pools, loc, *rows, repeats=WRITES)
            report.add("write_kv", case, "jaxcache", took, moved=moved)
        del pools


def bench_write_quantized(report: Report, small: bool, peers: Peers) -> None:
    """K and V rows of 8 heads x 128 in bfloat16, stored in a byte an element."""
    heads, dim, slots = (2, 16, 4096) if small else (8, 128, 262_144)
    per_head, per_tensor = jnp.ones(heads, jnp.float32), jnp.full((), 0.7, jnp.float32)
    for n, loc in random_slots(small, slots):
        rows = [jax.random.normal(jax.random.key(seed), (n, heads, dim), jnp.bfloat16) for seed in range(2)]
        case, moved = describe(n, f"{heads * dim}+{heads * dim}", jnp.bfloat16), 2 * rows[0].size * (2 + 1)
        measure_copy(report, "write_kv_fp8", case, moved, peers.torch)
        kinds = [("e4m3", "tensor", per_tensor), ("e4m3", "head", per_head), ("e5m2", "tensor", per_tensor)]
        for i, (name, kind, scale) in product(implementations(Op.WRITE_KV_FP8), kinds):
            dtype = jnp.float8_e4m3fn if name == "e4m3" else jnp.float8_e5m2
            write = partial(write_kv_fp8, k_scale=scale, v_scale=scale, dtype=dtype, implementation=i)
            pools = tuple(random_jax(seed, (LAYERS, slots, heads, dim), jnp.uint8) for seed in range(2))
            took, _ = time_jax_donated(in_layers(write, 2, FEW_WRITES), pools, loc, *rows, repeats=FEW_WRITES)
            exact = f"{case},to={name},scale={kind}"
            report.add("write_kv_fp8", exact, f"jaxcache-{i.value}", took, moved=moved)
        moved += 2 * 4 * n * heads
        measure_copy(report, "write_kv_int8", case, moved, peers.torch)
        for i in implementations(Op.WRITE_KV_INT8):
            pools = tuple(
                QuantizedPool(random_jax(s, (LAYERS, slots, heads, dim), jnp.int8), jnp.zeros((LAYERS, slots, heads)))
                for s in range(2)
            )
            write = partial(write_kv_int8, implementation=i)
            took, _ = time_jax_donated(in_layers(write, 2, FEW_WRITES), pools, loc, *rows, repeats=FEW_WRITES)
            report.add("write_kv_int8", f"{case},to=int8,scale=token", f"jaxcache-{i.value}", took, moved=moved)


BENCHES = (
    bench_write_kv,
    bench_write_one,
    bench_write_mla_kv,
    bench_row_widths,
    bench_write_to_pages,
    bench_write_layouts,
    bench_write_quantized,
)


def in_layers(
    write: Callable[..., Any], num_pools: int, writes: int = WRITES, *, layers: int = LAYERS
) -> Callable[..., Any]:
    """A jitted step of so many writes, to one layer after another, that donates its pools."""

    def step(pools, loc, *rows):
        for i in range(writes):
            pools = write(*pools, i % layers, loc, *rows)
            pools = pools if num_pools > 1 else (pools,)
        return tuple(pools)

    return jax.jit(step, donate_argnums=0)


def xla_write_kv(k_pool, v_pool, layer, loc, k, v):
    """What one writes by hand."""
    return k_pool.at[layer, loc].set(k), v_pool.at[layer, loc].set(v)


def xla_write_mla_kv(pool, layer, loc, nope, rope):
    """What one writes by hand."""
    return pool.at[layer, loc].set(jnp.concatenate([nope, rope], axis=-1))


def random_slots(small: bool, slots: int) -> Iterator[tuple[int, jax.Array]]:
    for n in [64, 1024] if small else [n for n in (256, 4096, 16_384, 65_536) if n < slots]:
        yield n, jnp.asarray(1 + np.random.default_rng(n).permutation(slots - 1)[:n], jnp.int32)


def describe(n: int, width: str, dtype: Any, slots: str = "random") -> str:
    return f"rows={n},width={width},dtype={jnp.dtype(dtype).name},slots={slots}"


def torch_write_kv(report, case, moved, peers, shape, loc, dtype) -> None:
    from jaxcache.kernels import write_kv_torch

    torch = peers.torch
    dtype = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}[jnp.dtype(dtype).name]
    k_pool, v_pool = (random_torch(torch, shape, dtype) for _ in range(2))
    k, v = (random_torch(torch, (len(loc), *shape[2:]), dtype) for _ in range(2))
    slots = to_torch(torch, loc)
    layers = torch.arange(LAYERS, dtype=torch.int32, device="cuda")

    def kernel():
        for i in range(LAYERS):
            write_kv_torch.write_kv(k_pool, v_pool, layers[i], slots, k, v)

    report.add("write_kv", case, "jaxcache-triton-torch", time_torch_graph(kernel, LAYERS), moved=moved)
    if dtype is not torch.bfloat16:  # an index_put of bytes is the only one that PyTorch has for float8
        k_pool, v_pool, k, v = (tensor.view(torch.uint8) for tensor in (k_pool, v_pool, k, v))
    slots = slots.long()

    def index_put():
        for i in range(LAYERS):
            k_pool[i][slots] = k
            v_pool[i][slots] = v

    report.add("write_kv", case, "torch-index-put", time_torch_graph(index_put, LAYERS), moved=moved, is_peer=True)
    if peers.flashinfer and dtype is torch.bfloat16:
        append = append_kv(peers.flashinfer, k_pool, v_pool, slots, k, v)
        report.add("write_kv", case, "flashinfer", time_torch_graph(append, LAYERS), moved=moved, is_peer=True)


def torch_write_mla_kv(report, case, moved, peers, shape, rank, loc) -> None:
    from jaxcache.kernels import write_kv_torch

    torch = peers.torch
    pool = random_torch(torch, shape, torch.bfloat16)
    rows = random_torch(torch, (len(loc), shape[-1]), torch.bfloat16)
    nope, rope = rows[:, :rank].contiguous(), rows[:, rank:].contiguous()
    slots = to_torch(torch, loc)
    layers = torch.arange(LAYERS, dtype=torch.int32, device="cuda")

    def kernel():
        for i in range(LAYERS):
            write_kv_torch.write_mla_kv(pool, layers[i], slots, nope, rope)

    report.add("write_mla_kv", case, "jaxcache-triton-torch", time_torch_graph(kernel, LAYERS), moved=moved)
    slots = slots.long()

    def index_put():
        for i in range(LAYERS):
            pool[i][slots] = rows

    report.add("write_mla_kv", case, "torch-index-put", time_torch_graph(index_put, LAYERS), moved=moved, is_peer=True)
    if peers.sglang:

        def sglang():
            for i in range(LAYERS):
                peers.sglang.set_mla_kv_buffer(pool[i], slots, nope, rope)

        report.add("write_mla_kv", case, "sglang-triton", time_torch_graph(sglang, LAYERS), moved=moved, is_peer=True)
    if peers.flashinfer:
        parts = pool[..., :rank].contiguous(), pool[..., rank:].contiguous()
        append = append_mla_kv(peers.flashinfer, *parts, slots, nope, rope)
        report.add("write_mla_kv", case, "flashinfer", time_torch_graph(append, LAYERS), moved=moved, is_peer=True)
