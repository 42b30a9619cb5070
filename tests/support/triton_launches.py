"""Attention's launches, compiled by Triton for a GPU that need not be there: what they need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.attention.contract import Masking, PagedKV, PagedLatent, PageOrder, Sequences
from jaxcache.kernels.attention.launch import Launches, heads_launches, latent_launches
from jaxcache.kernels.attention.plan import Plan, SharedPrefix, make_plan
from jaxcache.kernels.triton_call import is_aligned

TYPES = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int32": "*i32",
    "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv",
    "float8_e5m2": "*fp8e5",
}
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""What a program can have at most, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class Model:
    """Layers of one kind, and a batch."""

    dtype: Any = jnp.bfloat16
    heads: int = 8  # KV heads; 0 for latent rows
    q_heads: int = 32
    dim: int = 128
    rank: int = 512
    requests: int = 64
    page: int = 16
    row_scales: bool = False

    def launches(self, capability: int) -> Launches:
        """What the library would choose."""
        itemsize = np.dtype(self.dtype).itemsize
        if not self.heads:
            return latent_launches(self.requests, self.q_heads, self.dim, itemsize, capability)
        group = self.q_heads // self.heads
        return heads_launches(self.requests, self.heads, group, 2 * self.dim, itemsize, capability)


def kernels(model: Model, capability: int) -> dict[str, tuple[Any, ...]]:
    """Each kernel of the model with its launch: `decode`, `extend`, and `shared` if queries share blocks of rows."""
    from jaxcache.kernels.attention import decode_triton, extend_triton, mla_triton

    n, tokens, dtype = model.requests, 16 * model.requests, np.dtype(model.dtype)
    plan = _plan(n, tokens, model.page, model.launches(capability))
    order, masking, layer = PageOrder(2, 100, model.page), Masking(0.1), np.int32(0)
    q_dtype = dtype if dtype.itemsize > 1 else np.dtype(jnp.bfloat16)
    q, many = (np.zeros((rows, model.q_heads, model.dim), q_dtype) for rows in (n, tokens))
    units = {"decode": plan.units} | ({} if plan.shared is None else {"shared": plan.shared.units})
    if not model.heads:
        scale = np.float32(1) if dtype.itemsize == 1 else None
        kv = PagedLatent(np.zeros((2, 100 * model.page, model.dim), dtype), scale, order, dtype, model.rank)  # type: ignore[arg-type]
        decode, extend = mla_triton.decode_kernel, mla_triton.extend_kernel
        launches = {
            name: (decode, *mla_triton.decode_launch(q, kv, layer, plan, u, masking)) for name, u in units.items()
        }
        return launches | {"extend": (extend, *mla_triton.extend_launch(many, kv, layer, plan, masking))}
    rows = np.zeros((2, 100 * model.page, model.heads, model.dim), dtype)
    scale = np.zeros(rows.shape[:3], np.float32) if model.row_scales else None
    kv = PagedKV(rows, rows, scale, scale, order, dtype)
    decode, extend = decode_triton.decode_kernel, extend_triton.extend_kernel
    launches = {
        name: (decode, *decode_triton.decode_launch(q, kv, layer, plan, u, masking)) for name, u in units.items()
    }
    return launches | {"extend": (extend, *extend_triton.extend_launch(many, kv, layer, plan, masking, None))}


def compile_launch(kernel: Any, arrays: tuple, scalars: tuple, shapes: tuple, options: dict, capability: int) -> Any:
    """What Triton makes of one launch: `metadata.shared` are its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name not in ("grid", "num_warps")}
    kinds = [TYPES[np.dtype(array.dtype).name] for array in arrays]
    types = [*kinds, *["i32"] * len(scalars), *(TYPES[np.dtype(shape.dtype).name] for shape in shapes)]
    names = kernel.arg_names
    signature = {name: types[i] if i < len(types) else "constexpr" for i, name in enumerate(names)}
    arguments = [*arrays, *scalars, *shapes]
    pointers = [i for i, kind in enumerate(types) if kind.startswith("*") and is_aligned(arguments[i])]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": options["num_warps"]})


def _plan(requests: int, tokens: int, page: int, launches: Launches) -> Plan:
    """A plan of these shapes, in which everything may be shared."""
    n = np.zeros(requests, np.int32)
    first = np.arange(requests, dtype=np.int32) * (tokens // requests)
    sequences = Sequences(np.zeros((requests, 64), np.int32), n, n, n, first)
    return jax.eval_shape(lambda: make_plan(sequences, tokens, page, launches, shared=SharedPrefix(n, n)))
