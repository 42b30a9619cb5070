"""Times of the page ops: allocation, copies of whole pages, moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checks import implementations
from benchmarks.peers import Peers, measure_copy, random_jax, random_torch, to_torch
from benchmarks.timing import Report, Time, time_jax, time_jax_donated, time_torch_graph, with_kernel_time
from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.copy_kv import move_rows
from jaxcache.kernels.copy_pages import gather_pages, scatter_pages
from jaxcache.kernels.dispatch import Op
from jaxcache.pools.layout import PageMajor
from tests.kernels import oracles

CALLS = 32
PAGE_SIZE = 16


def bench_alloc_extend(report: Report, small: bool, peers: Peers) -> None:
    """Slots of a prefill batch of fresh requests. From JAX, each call takes its pages from the one before."""
    for bs, length in [(4, 64)] if small else [(64, 1024), (256, 128), (1, 65_536)]:
        case, num_tokens = f"requests={bs},tokens={length},page={PAGE_SIZE}", bs * length
        *rows, pages = extend_batch(bs, length)
        for i in implementations(Op.ALLOC_EXTEND):
            op = partial(alloc_extend, page_size=PAGE_SIZE, num_tokens=num_tokens, implementation=i)
            took = time_chain(op, jnp.resize(pages, (num_tokens,)), *rows)
            report.add("alloc_extend", case, f"jaxcache-{i.value}", took)
        if peers.torch:
            torch_alloc_extend(report, case, num_tokens, [*rows, pages], peers)


def bench_alloc_decode(report: Report, small: bool, peers: Peers) -> None:
    """One more slot for each request. From JAX, each call takes its last slots from the one before."""
    for bs in [8] if small else [256, 4096]:
        case, rng = f"requests={bs},page={PAGE_SIZE}", np.random.default_rng(bs)
        _, seq, last, pages = oracles.random_batch(rng, bs, PAGE_SIZE, max_len=1000, decode=True)
        seq, last, pages = jax.device_put((seq, last, np.resize(pages, bs)))
        for i in implementations(Op.ALLOC_DECODE):
            op = partial(alloc_decode, page_size=PAGE_SIZE, implementation=i)
            took = time_chain(lambda seq, pages, last, op=op: op(seq, last, pages), last, seq, pages)
            report.add("alloc_decode", case, f"jaxcache-{i.value}", took)
        if peers.torch:
            torch_alloc_decode(report, case, (seq, last, pages), peers)


def time_chain(op: Callable[..., jax.Array], state: jax.Array, *batch: jax.Array) -> Time:
    """CALLS times `op(*batch, state) -> state` in one step, and what the kernels alone take.

    The batch is the same each time, in few arrays, because a step with a hundred arguments takes longer to dispatch
    than to run; the barrier keeps XLA from seeing that it is the same.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state, *batch):
        for _ in range(CALLS):
            batch, state = jax.lax.optimization_barrier((batch, state))
            state = op(*batch, state)
        return state

    took, state = time_jax_donated(step, jnp.copy(state), *batch, repeats=CALLS)
    return with_kernel_time(took, step, state, *batch, repeats=CALLS)


def bench_copy_pages(report: Report, small: bool, peers: Peers) -> None:
    """Pages of 16 tokens x 8 heads x 128 in bfloat16, in all layers: 32 KB a layer; page-major, 1 MB in one piece."""
    layers, row, n = (2, (2, 16), 8) if small else (32, (8, 128), 512)
    dtype = jnp.uint16 if small else jnp.bfloat16
    num_pages = 2 * n + 1
    pages = jnp.asarray(1 + np.random.default_rng(0).permutation(num_pages - 1)[:n], jnp.int32)
    for stack, page_size, note in ((layers, PAGE_SIZE, ""), (1, layers * PAGE_SIZE, ",PageMajor")):
        pool = random_jax(0, (stack, num_pages * page_size, *row), dtype)
        blocks = random_jax(1, (n, stack, page_size, *row), dtype)
        case = f"pages={n},layers={layers},bytes={blocks.nbytes // n // layers},pages=random{note}"
        moved = 2 * blocks.nbytes
        measure_copy(report, "copy_pages", case, moved, peers.torch)
        for i in implementations(Op.GATHER_PAGES):
            step = jax.jit(partial(gather_pages, page_size=page_size, implementation=i))
            report.add("gather_pages", case, f"jaxcache-{i.value}", time_jax(step, pool, pages), moved=moved)
        for i in implementations(Op.SCATTER_PAGES):
            step = jax.jit(partial(scatter_pages, page_size=page_size, implementation=i), donate_argnums=0)
            took, pool = time_jax_donated(step, pool, pages, blocks)
            report.add("scatter_pages", case, f"jaxcache-{i.value}", took, moved=moved)
        del blocks, pool
        if peers.torch and not note:
            torch_copy_pages(report, case, moved, peers.torch, (layers, num_pages, PAGE_SIZE * row[0] * row[1]), pages)


def bench_move(report: Report, small: bool, peers: Peers) -> None:
    """Rows of 8 heads x 128 from slot to slot in all layers, as after speculative decoding."""
    layers, row, slots = (2, (2, 16), 1024) if small else (32, (8, 128), 16_384)
    dtype = jnp.uint16 if small else jnp.bfloat16
    pool = random_jax(0, (layers, slots, *row), dtype)
    for n in [16] if small else [64, 512]:
        order = 1 + np.random.default_rng(n).permutation(slots - 1).astype(np.int32)
        tgt, src = jnp.asarray(order[:n]), jnp.asarray(order[n // 2 : n // 2 + n])
        case, moved = f"rows={n},layers={layers},width={row[0] * row[1]},overlap=half", 2 * n * pool.nbytes // slots
        measure_copy(report, "move_rows", case, moved, peers.torch)
        for i in implementations(Op.MOVE_ROWS):
            move = partial(move_rows, implementation=i)

            def step(pool, tgt, src, move=move):
                for _ in range(CALLS):
                    pool = move(pool, tgt, src)
                return pool

            took, pool = time_jax_donated(jax.jit(step, donate_argnums=0), pool, tgt, src, repeats=CALLS)
            report.add("move_rows", case, f"jaxcache-{i.value}", took, moved=moved)
        if peers.sglang:
            torch_move(report, case, moved, peers, (layers, slots, row[0] * row[1]), tgt, src)
        lying = PageMajor(layers, slots, PAGE_SIZE)

        def step_by_page(pool, tgt, src, lying=lying):
            for _ in range(CALLS):
                pool = move_rows(pool, lying.locate_all(tgt), lying.locate_all(src))
            return pool

        by_page = pool.reshape(*lying.dims, *row)
        took, _ = time_jax_donated(jax.jit(step_by_page, donate_argnums=0), by_page, tgt, src, repeats=CALLS)
        report.add("move_rows", f"{case},PageMajor", "jaxcache", took, moved=moved)


BENCHES = (bench_alloc_extend, bench_alloc_decode, bench_copy_pages, bench_move)


def extend_batch(bs: int, length: int) -> tuple[jax.Array, ...]:
    prefix, seq, last = (np.full(bs, value, np.int32) for value in (0, length, -1))
    pages = 1 + np.random.default_rng(bs).permutation(bs * -(-length // PAGE_SIZE))
    return jax.device_put((prefix, seq, last, pages.astype(np.int32)))


def torch_alloc_extend(report: Report, case: str, num_tokens: int, batch: Any, peers: Peers) -> None:
    from jaxcache.kernels import alloc_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    torch = peers.torch
    rows, new_pages = [to_torch(torch, array) for array in batch[:3]], to_torch(torch, batch[3])
    bs, num_pages = len(rows[0]), len(new_pages)
    slots = torch.empty(num_tokens, dtype=torch.int32, device="cuda")
    launch = kernels.alloc_extend_launch(bs, num_tokens, PAGE_SIZE)

    def work():
        for _ in range(CALLS):
            torch_call(kernels.alloc_extend_kernel, (*rows, new_pages), (bs, num_pages), outputs=[slots], **launch)

    report.add("alloc_extend", case, "jaxcache-triton-torch", time_torch_graph(work, CALLS))
    if peers.sglang and bs > 1:
        wide = [tensor.long() for tensor in (*rows, new_pages)]
        out, total = slots.long(), torch.empty((), dtype=torch.int64, device="cuda")
        kernel, bs_upper = peers.sglang.alloc_extend, 1 << (bs - 1).bit_length()

        def sglang():
            for _ in range(CALLS):
                kernel[(bs,)](*wide, out, total, bs_upper, PAGE_SIZE, 1 << (num_tokens - 1).bit_length())

        report.add("alloc_extend", case, "sglang-triton", time_torch_graph(sglang, CALLS), is_peer=True)


def torch_alloc_decode(report: Report, case: str, batch: Any, peers: Peers) -> None:
    from jaxcache.kernels import alloc_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    torch, bs = peers.torch, len(batch[0])
    arrays, slots = [to_torch(torch, array) for array in batch], torch.empty(bs, dtype=torch.int32, device="cuda")
    launch = kernels.alloc_decode_launch(bs, PAGE_SIZE)

    def work():
        for _ in range(CALLS):
            torch_call(kernels.alloc_decode_kernel, arrays, (bs, len(arrays[2])), outputs=[slots], **launch)

    report.add("alloc_decode", case, "jaxcache-triton-torch", time_torch_graph(work, CALLS))
    if peers.sglang:
        wide, total = [tensor.long() for tensor in arrays], torch.empty((), dtype=torch.int64, device="cuda")
        out, kernel, bs_upper = slots.long(), peers.sglang.alloc_decode, 1 << (bs - 1).bit_length()

        def sglang():
            for _ in range(CALLS):
                kernel[(bs,)](*wide, out, total, bs_upper, PAGE_SIZE)

        report.add("alloc_decode", case, "sglang-triton", time_torch_graph(sglang, CALLS), is_peer=True)


def torch_copy_pages(report: Report, case: str, moved: int, torch: Any, shape: tuple[int, ...], pages: Any) -> None:
    from jaxcache.kernels import copy_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    layers, num_pages, width = shape
    pool, ids = random_torch(torch, shape, torch.bfloat16), to_torch(torch, pages)
    blocks = random_torch(torch, (len(ids), layers, width), torch.bfloat16)
    launch = kernels.pages_launch(len(ids), layers, width, 2)
    sizes = (layers, num_pages)
    took = time_torch_graph(
        lambda: torch_call(kernels.gather_pages_kernel, (pool, ids), sizes, outputs=[blocks], **launch)
    )
    report.add("gather_pages", case, "jaxcache-triton-torch", took, moved=moved)
    took = time_torch_graph(
        lambda: torch_call(kernels.scatter_pages_kernel, (pool, ids, blocks), sizes, num_updates=1, **launch)
    )
    report.add("scatter_pages", case, "jaxcache-triton-torch", took, moved=moved)
    ids = ids.long()
    took = time_torch_graph(lambda: torch.index_select(pool, 1, ids))
    report.add("gather_pages", case, "torch-index-select", took, moved=moved, is_peer=True)
    by_layer = blocks.transpose(0, 1)
    took = time_torch_graph(lambda: pool.index_copy_(1, ids, by_layer))
    report.add("scatter_pages", case, "torch-index-copy", took, moved=moved, is_peer=True)


def torch_move(report: Report, case: str, moved: int, peers: Peers, shape: tuple[int, ...], tgt: Any, src: Any) -> None:
    torch, kernel = peers.torch, peers.sglang.copy_all_layers  # pyright: ignore[reportOptionalMemberAccess]
    pool = random_torch(torch, shape, torch.bfloat16)
    pointers = torch.tensor([layer.data_ptr() for layer in pool], dtype=torch.uint64, device="cuda")
    strides = torch.full((shape[0],), shape[2] * 2, dtype=torch.int64, device="cuda")
    target, source = to_torch(torch, tgt).long(), to_torch(torch, src).long()
    took = time_torch_graph(
        lambda: kernel[(shape[0],)](pointers, strides, target, source, len(target), 1 << (len(target) - 1).bit_length())
    )
    report.add("move_rows", case, "sglang-triton", took, moved=moved, is_peer=True)
