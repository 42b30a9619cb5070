"""What our kernels are measured beside: device copies, PyTorch, SGLang and FlashInfer."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sglang_kernels import SGLangKernels, load_kernels
from benchmarks.timing import Report, time_jax, time_torch_graph

COPIES = 8


class Peers(NamedTuple):
    """The torch module, SGLang's kernels and the flashinfer module, each None where it is missing."""

    torch: Any = None
    sglang: SGLangKernels | None = None
    flashinfer: Any = None


def find_peers(folder: Path | None) -> Peers:
    """PyTorch, if it sees a GPU, SGLang's kernels out of `folder` or installed, and FlashInfer if it is installed."""
    if importlib.util.find_spec("torch") is None:
        print("no torch: the PyTorch, SGLang and FlashInfer rows are left out", flush=True)
        return Peers()
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Peers()
    sglang = load_kernels(folder)
    if sglang is None:
        print("no sglang: its rows are left out", flush=True)
    if importlib.util.find_spec("flashinfer") is None:
        print("no flashinfer: its rows are left out", flush=True)
        return Peers(torch, sglang)
    return Peers(torch, sglang, importlib.import_module("flashinfer"))


def measure_copy(report: Report, bench: str, case: str, moved: int, torch: Any) -> None:
    """A device copy that reads and writes as many bytes: the ceiling, and the divisor of `ratio_to_copy`.

    The better of PyTorch's copy, which is a third slower for some large sizes, and a kernel that inverts every bit.
    """
    if torch:
        source = torch.randint(256, (COPIES, moved // 2), dtype=torch.uint8, device="cuda").view(torch.int64)
        target = torch.empty_like(source)
        ways = torch.Tensor.copy_, lambda to, data: torch.bitwise_not(data, out=to)
        times = [
            time_torch_graph(lambda way=way: [way(target[i], source[i]) for i in range(COPIES)], COPIES) for way in ways
        ]
        took = min(times, key=lambda time: time.median_us)
    else:
        took = time_jax(jax.jit(jnp.copy), jnp.zeros(moved // 2, jnp.uint8))
    report.copy_us[moved] = took.median_us
    report.add(bench, case, "device-copy", took, moved=moved, is_peer=True)


def to_torch(torch: Any, array: jax.Array | np.ndarray) -> Any:
    """A copy on the GPU; of dtypes that NumPy has by itself."""
    return torch.from_numpy(np.array(array)).cuda()


def random_torch(torch: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random bits."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, device="cuda").view(dtype)


def random_jax(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bits."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(dtype).itemsize]
    return jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(seed), shape, unsigned), dtype)
