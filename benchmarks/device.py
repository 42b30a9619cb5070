"""The kernels on the present device: first whether they are right to the bit, then how fast they are.

    python -m benchmarks.device [--small] [--out DIR] [--commit ID] [--skip-checks]

Beside each op stand the plain XLA scatter that one would write by hand, PyTorch's `pool[loc] = rows`, and a device copy
of the same bytes, which is what the hardware allows. PyTorch rows need torch with CUDA. Runs on a CPU with --small,
where the numbers only show that it runs. Writes DIR/device.jsonl, by default under benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch in the same process

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import checks
from benchmarks.timing import Report, time_jax, time_jax_donated, time_torch_graph
from jaxcache.kernels import alloc_pages
from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.dispatch import Op
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from tests.kernels import oracles

LAYERS = 8
REPEATS = 32
PAGE_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels: right to the bit, then timed.")
    parser.add_argument("--small", action="store_true", help="small pools and few cases: any device, under a minute")
    parser.add_argument("--out", type=Path, help="folder for device.jsonl")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    options = parser.parse_args()
    device = jax.devices()[0]
    is_gpu, name = device.platform == "gpu", device.device_kind.replace(" ", "-")
    folder = options.out or Path(__file__).parent / "results" / name
    began = time.perf_counter()
    print(f"jax {jax.__version__} on {device.device_kind}", flush=True)
    if not options.skip_checks:
        for line in checks.check_everything(huge=is_gpu and not options.small):
            print(f"bit-exact: {line}  [{time.perf_counter() - began:.0f} s]", flush=True)
    report = Report(folder / "device.jsonl", name, options.commit or current_commit())
    torch = torch_with_cuda() if is_gpu else None
    for bench in (bench_write_kv, bench_write_mla_kv, bench_alloc_extend, bench_alloc_decode):
        bench(report, options.small, torch)
        print(f"[{time.perf_counter() - began:.0f} s]", flush=True)
    print(f"{len(report.rows)} rows in {report.path}")


def bench_write_kv(report: Report, small: bool, torch: Any) -> None:
    """K and V rows of 8 heads x 128 to random slots, one layer after another."""
    heads, dim, slots = (2, 16, 4096) if small else (8, 128, 262_144)
    dtypes = [jnp.uint16] if small else [jnp.bfloat16, jnp.float8_e4m3fn]
    for dtype in dtypes:
        pools = [jnp.zeros((LAYERS, slots, heads, dim), dtype) for _ in range(2)]
        for n, loc in random_slots(small, slots):
            rows = [jnp.ones((n, heads, dim), dtype) for _ in range(2)]
            case, moved = f"n={n} {heads}x{dim} {jnp.dtype(dtype).name}", 4 * rows[0].nbytes
            measure_copy(report, "write_kv", case, moved, torch)
            ours = checks.implementations(Op.WRITE_KV)
            steps = {f"jaxcache-{i.value}": partial(write_kv, implementation=i) for i in ours}
            for label, write in {**steps, "xla-scatter": xla_write_kv}.items():
                step = jax.jit(partial(repeat_write_kv, write), donate_argnums=0)
                us, pools = time_jax_donated(step, pools, loc, *rows, repeats=REPEATS)
                report.add("write_kv", case, label, us, moved=moved, is_peer=label == "xla-scatter")
            if torch:
                torch_write_kv(report, case, moved, torch, (LAYERS, slots, heads, dim), np.asarray(loc), dtype)


def bench_write_mla_kv(report: Report, small: bool, torch: Any) -> None:
    """Latent rows of 512 + 64 to random slots, one layer after another."""
    rank, rope, slots = (96, 32, 4096) if small else (512, 64, 262_144)
    dtype = jnp.uint16 if small else jnp.bfloat16
    pool = jnp.zeros((LAYERS, slots, rank + rope), dtype)
    for n, loc in random_slots(small, slots):
        parts = jnp.ones((n, rank), dtype), jnp.ones((n, rope), dtype)
        case, moved = f"n={n} {rank}+{rope} {jnp.dtype(dtype).name}", 2 * (parts[0].nbytes + parts[1].nbytes)
        measure_copy(report, "write_mla_kv", case, moved, torch)
        ours = checks.implementations(Op.WRITE_MLA_KV)
        steps = {f"jaxcache-{i.value}": partial(write_mla_kv, implementation=i) for i in ours}
        for label, write in {**steps, "xla-scatter": xla_write_mla_kv}.items():
            step = jax.jit(partial(repeat_write_mla_kv, write), donate_argnums=0)
            us, pool = time_jax_donated(step, pool, loc, *parts, repeats=REPEATS)
            report.add("write_mla_kv", case, label, us, moved=moved, is_peer=label == "xla-scatter")
        if torch:
            torch_write_mla_kv(report, case, moved, torch, (LAYERS, slots, rank + rope), rank, np.asarray(loc))


def bench_alloc_extend(report: Report, small: bool, torch: Any) -> None:
    """Slots of a prefill batch of fresh requests, page size 16."""
    for bs, length in [(4, 64)] if small else [(64, 1024), (256, 128), (1, 65_536)]:
        batches = [extend_batch(seed, bs, length) for seed in range(REPEATS)]
        case, num_tokens = f"{bs}x{length} page={PAGE_SIZE}", bs * length
        for implementation in checks.implementations(Op.ALLOC_EXTEND):
            op = partial(alloc_extend, page_size=PAGE_SIZE, num_tokens=num_tokens, implementation=implementation)
            us = time_jax(jax.jit(lambda batches, op=op: [op(*batch) for batch in batches]), batches, repeats=REPEATS)
            report.add("alloc_extend", case, f"jaxcache-{implementation.value}", us)
        if torch:
            torch_alloc_extend(report, case, num_tokens, batches[0], torch)


def bench_alloc_decode(report: Report, small: bool, torch: Any) -> None:
    """One more slot for each request, page size 16."""
    for bs in [8] if small else [256, 4096]:
        batches = []
        for seed in range(REPEATS):
            rng = np.random.default_rng(seed)
            _, seq, last, pages = oracles.random_batch(rng, bs, PAGE_SIZE, max_len=1000, decode=True)
            batches.append(jax.device_put((seq, last, np.resize(pages, bs))))
        for implementation in checks.implementations(Op.ALLOC_DECODE):
            op = partial(alloc_decode, page_size=PAGE_SIZE, implementation=implementation)
            us = time_jax(jax.jit(lambda batches, op=op: [op(*batch) for batch in batches]), batches, repeats=REPEATS)
            report.add("alloc_decode", f"{bs} page={PAGE_SIZE}", f"jaxcache-{implementation.value}", us)
        if torch:
            torch_alloc_decode(report, bs, batches[0], torch)


def repeat_write_kv(write, pools, loc, k, v):
    for i in range(REPEATS):
        pools = write(pools[0], pools[1], i % LAYERS, loc, k, v)
    return list(pools)


def repeat_write_mla_kv(write, pool, loc, nope, rope):
    for i in range(REPEATS):
        pool = write(pool, i % LAYERS, loc, nope, rope)
    return pool


def xla_write_kv(k_pool, v_pool, layer, loc, k, v):
    """What one writes by hand."""
    return k_pool.at[layer, loc].set(k), v_pool.at[layer, loc].set(v)


def xla_write_mla_kv(pool, layer, loc, nope, rope):
    """What one writes by hand."""
    return pool.at[layer, loc].set(jnp.concatenate([nope, rope], axis=-1))


def random_slots(small: bool, slots: int) -> Iterator[tuple[int, jax.Array]]:
    for n in [64, 1024] if small else [256, 4096, 16_384, 65_536]:
        yield n, jnp.asarray(1 + np.random.default_rng(n).permutation(slots - 1)[:n], jnp.int32)


def extend_batch(seed: int, bs: int, length: int) -> tuple[jax.Array, ...]:
    prefix, seq, last = (np.full(bs, value, np.int32) for value in (0, length, -1))
    pages = 1 + np.random.default_rng(seed).permutation(bs * -(-length // PAGE_SIZE))
    return jax.device_put((prefix, seq, last, pages.astype(np.int32)))


def measure_copy(report: Report, bench: str, case: str, moved: int, torch: Any) -> None:
    """A device copy that reads and writes as many bytes: the ceiling, and the divisor of `ratio_to_copy`."""
    if torch:
        source = torch.zeros(REPEATS, moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.zeros_like(source)
        us = time_torch_graph(lambda: [target[i].copy_(source[i]) for i in range(REPEATS)], REPEATS)
    else:
        us = time_jax(jax.jit(jnp.copy), jnp.zeros(moved // 2, jnp.uint8))
    report.copy_us[moved] = us
    report.add(bench, case, "device-copy", us, moved=moved, is_peer=True)


def torch_write_kv(report, case, moved, torch, shape, loc, dtype) -> None:
    from jaxcache.kernels import write_kv_torch

    dtype = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}[jnp.dtype(dtype).name]
    k_pool, v_pool = (torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2))
    k, v = (torch.zeros(len(loc), *shape[2:], dtype=dtype, device="cuda") for _ in range(2))
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


def torch_write_mla_kv(report, case, moved, torch, shape, rank, loc) -> None:
    from jaxcache.kernels import write_kv_torch

    pool = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    rows = torch.zeros(len(loc), shape[-1], dtype=torch.bfloat16, device="cuda")
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


def torch_alloc_extend(report, case, num_tokens, batch, torch) -> None:
    """Both kernels: the prefix sums, and the slots."""
    from jaxcache.kernels import alloc_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    rows, new_pages = [to_torch(torch, array) for array in batch[:3]], to_torch(torch, batch[3])
    bs, num_pages = len(rows[0]), len(new_pages)
    plan = [torch.empty_like(rows[0]) for _ in alloc_pages.RowPlan._fields]
    slots = torch.empty(num_tokens, dtype=torch.int32, device="cuda")
    extend_launch = kernels.alloc_extend_launch(bs, num_tokens, PAGE_SIZE)

    def work():
        for _ in range(REPEATS):
            torch_call(kernels.row_plan_kernel, rows, (bs,), outputs=plan, **kernels.row_plan_launch(bs, PAGE_SIZE))
            torch_call(
                kernels.alloc_extend_kernel, (*plan, new_pages), (bs, num_pages), outputs=[slots], **extend_launch
            )

    report.add("alloc_extend", case, "jaxcache-triton-torch", time_torch_graph(work, REPEATS))


def torch_alloc_decode(report, bs, batch, torch) -> None:
    from jaxcache.kernels import alloc_pages_triton as kernels
    from jaxcache.kernels.triton_call import torch_call

    arrays, slots = [to_torch(torch, array) for array in batch], torch.empty(bs, dtype=torch.int32, device="cuda")
    launch = kernels.alloc_decode_launch(bs, PAGE_SIZE)

    def work():
        for _ in range(REPEATS):
            torch_call(kernels.alloc_decode_kernel, arrays, (bs, len(arrays[2])), outputs=[slots], **launch)

    report.add("alloc_decode", f"{bs} page={PAGE_SIZE}", "jaxcache-triton-torch", time_torch_graph(work, REPEATS))


def to_torch(torch: Any, array: jax.Array | np.ndarray) -> Any:
    return torch.from_numpy(np.array(array)).cuda()


def torch_with_cuda() -> Any:
    """The torch module, or None where it is missing or sees no GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        print("no torch: the PyTorch rows are left out", flush=True)
        return None
    return torch if torch.cuda.is_available() else None


def current_commit() -> str:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
