"""The Triton source of attention on a CPU: launched on torch tensors, under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels import triton_call
from tests.kernels.attention.cases import QUICK, Case

TORCH_BITS = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


def names(table: dict[str, Case]) -> list[Any]:
    """The names of a table of cases as parameters of a test."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in table]


def require_interpreter(case: Case, interprets: bool) -> None:
    """Skips what Triton's interpreter cannot run here: it has no bfloat16."""
    if not interprets:
        pytest.skip("this process compiles Triton source instead of interpreting it")
    if np.dtype(case.dtype) == jnp.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16; the GPU and the compiler's tests run it")


def tensor(array: Any) -> Any:
    import torch

    if isinstance(array, torch.Tensor):
        return array
    host = np.array(array)
    if host.dtype.name in TORCH_BITS:
        return torch.from_numpy(host.view(TORCH_BITS[host.dtype.name])).view(getattr(torch, host.dtype.name))
    return torch.from_numpy(host)


def numpy_of(tensor: Any) -> np.ndarray:
    return tensor.float().numpy() if tensor.dtype.itemsize < 4 else tensor.numpy()


def launch(kernel: Any, arrays: tuple, scalars: tuple, shapes: tuple[jax.ShapeDtypeStruct, ...], options: dict) -> list:
    """The outputs of one launch, which were full of NaN before."""
    import torch

    outputs = [torch.full(s.shape, float("nan"), dtype=getattr(torch, np.dtype(s.dtype).name)) for s in shapes]
    arrays = tuple(tensor(array).reshape(-1) for array in arrays)
    with np.errstate(all="ignore"):  # what is masked is computed too
        triton_call.torch_call(kernel, arrays, scalars, outputs=outputs, **options)
    return outputs


def paged_decode(q: Any, kv: Any, layer: int, plan: Any, masking: Any, sinks: Any) -> tuple[np.ndarray, np.ndarray]:
    from jaxcache.kernels.attention import decode_triton as source

    if type(source.decode_kernel).__name__ != "InterpretedFunction":
        pytest.fail("Triton was imported before TRITON_INTERPRET was set")

    def attend(units: Any) -> list:
        return launch(source.decode_kernel, *source.decode_launch(q, kv, np.int32(layer), plan, units, masking))

    together = None if plan.shared is None else attend(plan.shared.units)
    merged = source.merge_launch(attend(plan.units), plan.units, together, plan.shared, sinks, q.dtype)
    out, lse = launch(source.merge_kernel, *merged)
    return numpy_of(out), numpy_of(lse)


def paged_extend(q: Any, kv: Any, layer: int, plan: Any, masking: Any, sinks: Any) -> tuple[np.ndarray, np.ndarray]:
    from jaxcache.kernels.attention import extend_triton as source

    outputs = launch(source.extend_kernel, *source.extend_launch(q, kv, np.int32(layer), plan, masking, sinks))
    out, lse = outputs
    return numpy_of(out), numpy_of(lse)


def mla_decode(q: Any, kv: Any, layer: int, plan: Any, masking: Any) -> tuple[np.ndarray, np.ndarray]:
    from jaxcache.kernels.attention import decode_triton, mla_triton

    def attend(units: Any) -> list:
        options = mla_triton.decode_launch(q, kv, np.int32(layer), plan, units, masking)
        return launch(mla_triton.decode_kernel, *options)

    together = None if plan.shared is None else attend(plan.shared.units)
    merged = decode_triton.merge_launch(attend(plan.units), plan.units, together, plan.shared, None, q.dtype)
    out, lse = launch(decode_triton.merge_kernel, *merged)
    return numpy_of(out), numpy_of(lse)


def mla_extend(q: Any, kv: Any, layer: int, plan: Any, masking: Any) -> tuple[np.ndarray, np.ndarray]:
    from jaxcache.kernels.attention import mla_triton

    out, lse = launch(mla_triton.extend_kernel, *mla_triton.extend_launch(q, kv, np.int32(layer), plan, masking))
    return numpy_of(out), numpy_of(lse)
