"""Every implementation of an op stands the same tests: each takes NumPy arrays and gives NumPy arrays."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from jaxcache.kernels import alloc_pages, triton_call, write_kv
from jaxcache.kernels.dispatch import Implementation
from tests.kernels import h200

HAS_GPU = jax.default_backend() == "gpu"
# A process either interprets Triton source or compiles it: Triton reads this variable when it is imported.
INTERPRETS = not HAS_GPU and h200.missing() is not None
if INTERPRETS:
    os.environ["TRITON_INTERPRET"] = "1"


class JaxRunner:
    """The public ops, jitted, with one implementation forced."""

    def __init__(self, implementation: Implementation):
        self.options = {"implementation": implementation}
        self.write = jax.jit(write_kv.write_kv, static_argnames="implementation", donate_argnums=(0, 1))
        self.write_mla = jax.jit(write_kv.write_mla_kv, static_argnames="implementation", donate_argnums=0)

    def alloc_extend(self, *rows_and_pages, page_size: int, num_tokens: int):
        static = ("page_size", "num_tokens", "implementation")
        op = jax.jit(alloc_pages.alloc_extend, static_argnames=static)
        return np.asarray(op(*rows_and_pages, page_size=page_size, num_tokens=num_tokens, **self.options))

    def alloc_decode(self, *rows_and_pages, page_size: int):
        op = jax.jit(alloc_pages.alloc_decode, static_argnames=("page_size", "implementation"))
        return np.asarray(op(*rows_and_pages, page_size=page_size, **self.options))

    def write_kv(self, k_pool, v_pool, layer, loc, k, v):
        k_pool, v_pool = jax.numpy.array(k_pool), jax.numpy.array(v_pool)
        return tuple(map(np.asarray, self.write(k_pool, v_pool, np.int32(layer), loc, k, v, **self.options)))

    def write_mla_kv(self, pool, layer, loc, nope, rope):
        return np.asarray(self.write_mla(jax.numpy.array(pool), np.int32(layer), loc, nope, rope, **self.options))


class InterpretedRunner:
    """The Triton source on CPU, run by Triton's interpreter on torch tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.torch = pytest.importorskip("torch")
        pytest.importorskip("triton")
        from jaxcache.kernels import alloc_pages_triton, write_kv_torch, write_kv_triton

        if type(write_kv_triton.write_kv_kernel).__name__ != "InterpretedFunction":
            pytest.fail("Triton was imported before TRITON_INTERPRET was set")
        self.alloc, self.kv = alloc_pages_triton, write_kv_torch
        # Small tiles: several programs, several rows a program and several column tiles also on small inputs.
        monkeypatch.setattr(alloc_pages_triton, "TOKENS_PER_PROGRAM", 64)
        monkeypatch.setattr(alloc_pages_triton, "ROWS_PER_STEP", 8)
        monkeypatch.setattr(write_kv_triton, "MAX_BLOCK", 64)
        monkeypatch.setattr(write_kv_triton, "FULL_GRID", 4)
        monkeypatch.setattr(write_kv_triton, "LARGE_BYTES", 1000)  # both sides of it

    def tensor(self, array):
        array = np.array(array)
        if array.dtype.kind == "V" or array.dtype.name not in ("float32", "int32", "uint8"):
            array = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])  # the kernels copy bits
        if array.dtype != np.int32 or array.ndim != 1:
            return self.torch.from_numpy(array)
        poisoned = np.append(array, np.full(8, 123_456, np.int32))  # who reads past the end shall notice
        return self.torch.from_numpy(poisoned)[: len(array)]

    def alloc_extend(self, prefix_lens, seq_lens, last_loc, new_pages, *, page_size: int, num_tokens: int):
        arrays, bs = (prefix_lens, seq_lens, last_loc, new_pages), len(seq_lens)
        return self.call("alloc_extend", arrays, (bs, len(new_pages)), num_tokens, bs, num_tokens, page_size)

    def alloc_decode(self, seq_lens, last_loc, new_pages, *, page_size: int):
        bs = len(seq_lens)
        return self.call("alloc_decode", (seq_lens, last_loc, new_pages), (bs, len(new_pages)), bs, bs, page_size)

    def call(self, name, arrays, scalars, output_length, *launch_args):
        """One kernel of `alloc_pages_triton`, into an output full of poison."""
        output = self.torch.full((output_length,), -7, dtype=self.torch.int32)
        triton_call.torch_call(
            getattr(self.alloc, f"{name}_kernel"),
            [self.tensor(array) for array in arrays],
            scalars,
            outputs=[output],
            **getattr(self.alloc, f"{name}_launch")(*launch_args),
        )
        return output.numpy()

    def write_kv(self, k_pool, v_pool, layer, loc, k, v):
        arrays = (k_pool, v_pool, np.full(1, layer, np.int32), loc, k, v)
        pools_and_rows = [self.tensor(array) for array in arrays]
        self.kv.write_kv(*pools_and_rows)
        return pools_and_rows[0].numpy().view(k_pool.dtype), pools_and_rows[1].numpy().view(v_pool.dtype)

    def write_mla_kv(self, pool, layer, loc, nope, rope):
        tensors = [self.tensor(array) for array in (pool, np.full(1, layer, np.int32), loc, nope, rope)]
        self.kv.write_mla_kv(*tensors)
        return tensors[0].numpy().view(pool.dtype)


@pytest.fixture(params=["reference", "triton"])
def run(request, monkeypatch):
    """The ops of one implementation. Triton runs on the GPU where there is one, else interpreted."""
    if request.param == "reference":
        return JaxRunner(Implementation.REFERENCE)
    if HAS_GPU:
        return JaxRunner(Implementation.TRITON)
    if not INTERPRETS:
        pytest.skip("this process compiles Triton source for an H200 (test_compiled_for_h200.py)")
    return InterpretedRunner(monkeypatch)
