"""What attention is measured beside: a plain read of memory, PyTorch's SDPA over gathered pages, Pallas, SGLang."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Time, time_jax, time_torch_graph, with_kernel_time
from jaxcache.kernels.attention.contract import PagedKV

if TYPE_CHECKING:
    from benchmarks.attention_cases import Problem

READ_BYTES = 4 << 30
PALLAS_BLOCK = 128
"""Keys that Pallas' op takes at a time: twice as many do not fit into shared memory."""
MOST_GATHERED = 8 << 30
"""Bytes of keys and values that a peer which copies them is given."""


def relative_error(got: Any, want: Any) -> float:
    """The norm of the difference over that of what is wanted; NaN if there is one."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / norm if norm else float(np.abs(got).max(initial=0.0))


def read_limit() -> float | None:
    """GB/s of a Triton kernel that reads 4 GiB and keeps one number a program; None without Triton."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("jax_triton") is None:
        return None
    from benchmarks.attention_read_triton import BLOCK, read_kernel
    from jaxcache.kernels.triton_call import triton_call

    data = jnp.zeros(READ_BYTES // 4, jnp.int32)
    programs = READ_BYTES // 4 // BLOCK

    @jax.jit
    def step(data: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((programs,), jnp.int32)
        (out,) = triton_call(read_kernel, (data,), outputs=(shape,), grid=(programs,), num_warps=8, BLOCK=BLOCK)
        return out

    took = with_kernel_time(time_jax(step, data), lambda _, data: step(data), None, data)
    return READ_BYTES / (took.kernel_us or took.median_us) / 1e3


def measure(problem: Problem, want: np.ndarray, sglang: Path | None) -> Iterator[tuple[str, Time, float]]:
    """Name, time and error of each peer that can take the case."""
    case = problem.case
    kv = problem.kv
    if jax.default_backend() != "gpu" or not isinstance(kv, PagedKV) or case.is_extend:
        return
    if kv.dtype.itemsize != 2 or case.window:
        return
    if case.read_bytes * 2 <= MOST_GATHERED:
        yield from _pallas(problem, kv, want)
        yield from _torch_sdpa(problem, kv, want)
    yield from _sglang(problem, kv, want, sglang)


def _pallas(problem: Problem, kv: PagedKV, want: np.ndarray) -> Iterator[tuple[str, Time, float]]:
    """JAX's own op, deprecated: one layer, transposed beforehand."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    except ImportError:
        return
    case = problem.case
    k, v = (a[0].reshape(-1, case.page, *a.shape[2:]).transpose(2, 0, 1, 3) for a in (kv.k, kv.v))
    block = max(PALLAS_BLOCK // case.page, 1)  # pages; it takes whole blocks, as many in each split
    blocks = -(-max(case.seq) // (case.page * block))
    splits = max(n for n in range(1, 17) if blocks % n == 0)
    pages = problem.sequences.pages[:, : blocks * block]
    if pages.shape[1] < blocks * block:
        return
    q = problem.q * jnp.asarray(problem.masking.scale, problem.q.dtype)  # it has no scale

    @jax.jit
    def step(q: Any, k: Any, v: Any, pages: Any, lengths: Any) -> Any:
        return paged_attention(q, k, v, pages, lengths, k_splits=splits, pages_per_compute_block=block)

    args = q, k, v, pages, problem.sequences.seq_len
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = relative_error(step(*args), want)
        took = with_kernel_time(time_jax(step, *args), lambda _, *args: step(*args), None, *args)
    yield "pallas paged_attention", took, error


def _torch_sdpa(problem: Problem, kv: PagedKV, want: np.ndarray) -> Iterator[tuple[str, Time, float]]:
    torch = torch_on_gpu()
    if torch is None:
        return
    case, seq = problem.case, problem.case.seq
    if len(set(seq)) > 1:
        return
    k, v = (torch.from_dlpack(a)[0].view(-1, case.page, *a.shape[2:]) for a in (kv.k, kv.v))
    q = torch.from_dlpack(problem.q)[:, :, None]
    pages = torch.from_dlpack(problem.sequences.pages).long()[:, : -(-seq[0] // case.page)]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def work() -> Any:
        keys, values = (a[pages].flatten(1, 2)[:, : seq[0]].transpose(1, 2) for a in (k, v))
        return sdpa(q, keys, values, scale=problem.masking.scale, enable_gqa=True)

    error = relative_error(work()[:, :, 0].float().cpu().numpy(), want)
    yield "torch gather + SDPA", time_torch_graph(work), error


def _sglang(problem: Problem, kv: PagedKV, want: np.ndarray, folder: Path | None) -> Iterator[tuple[str, Time, float]]:
    """SGLang's Triton decode kernel, launched as its backend does."""
    torch = torch_on_gpu()
    decode = None if torch is None else _sglang_decode(folder)
    if torch is None or decode is None:
        return
    case = problem.case
    k, v = (torch.from_dlpack(a)[0] for a in (kv.k, kv.v))
    q = torch.from_dlpack(problem.q)
    seq = torch.tensor(case.seq, device="cuda", dtype=torch.int32)
    indptr = torch.nn.functional.pad(torch.cumsum(seq, 0), (1, 0)).to(torch.int32)
    pages = np.asarray(problem.sequences.pages)
    slots = [(pages[b][:, None] * case.page + np.arange(case.page)).reshape(-1)[:n] for b, n in enumerate(case.seq)]
    indices = torch.tensor(np.concatenate(slots), device="cuda", dtype=torch.int64)
    most = 8
    splits = torch.full((len(case.seq),), most, device="cuda", dtype=torch.int32)
    out = torch.empty((*q.shape[:2], v.shape[-1]), device="cuda", dtype=q.dtype)
    logits = torch.empty((*q.shape[:2], most, v.shape[-1]), device="cuda", dtype=torch.float32)
    lse = torch.empty((*q.shape[:2], most), device="cuda", dtype=torch.float32)

    def work() -> None:
        decode(q, k, v, out, indptr, indices, logits, lse, splits, most, problem.masking.scale)

    work()
    yield "sglang triton decode", time_torch_graph(work), relative_error(out.float().cpu().numpy(), want)


def torch_on_gpu() -> Any:
    """PyTorch, if it is there and has a GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    return torch if torch.cuda.is_available() else None


def _sglang_decode(folder: Path | None) -> Any:
    from benchmarks.sglang_kernels import load_decode_attention

    return load_decode_attention(folder)
