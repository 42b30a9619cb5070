"""The choice of an implementation, its reason, and what the module must not import."""

import importlib.util
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxcache.errors import UnsupportedError
from jaxcache.kernels import dispatch, write_kv
from jaxcache.kernels.dispatch import Implementation, Op, choose


def pretend_installed(monkeypatch, *modules):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        dispatch.importlib.util,
        "find_spec",
        lambda name: object() if name in modules else (None if name in ("triton", "jax_triton") else real(name)),
    )


@pytest.mark.parametrize("op", Op)
def test_cpu_runs_the_reference(op):
    choice = choose(op, platform="cpu")
    assert choice.implementation is Implementation.REFERENCE and op.value in choice.why


def test_gpu_runs_triton_if_it_is_there(monkeypatch):
    pretend_installed(monkeypatch, "triton", "jax_triton")
    assert choose(Op.WRITE_KV, platform="gpu").implementation is Implementation.TRITON
    pretend_installed(monkeypatch, "triton")
    choice = choose(Op.WRITE_KV, platform="cuda")
    assert choice.implementation is not Implementation.TRITON and "jax-triton" in choice.why


def test_a_rule_may_be_for_few_rows(monkeypatch):
    pretend_installed(monkeypatch)
    monkeypatch.setattr(dispatch, "_missing_for_mosaic", lambda target: None)
    assert choose(Op.ALLOC_EXTEND, platform="gpu", rows=128).implementation is Implementation.MOSAIC
    for rows in (129, None):
        choice = choose(Op.ALLOC_EXTEND, platform="gpu", rows=rows)
        assert choice.implementation is Implementation.REFERENCE and "mosaic is for at most 128 rows" in choice.why


def test_few_latent_rows_are_scattered_by_xla(monkeypatch):
    pretend_installed(monkeypatch, "triton", "jax_triton")
    assert choose(Op.WRITE_MLA_KV, platform="gpu", rows=256).implementation is Implementation.REFERENCE
    assert choose(Op.WRITE_MLA_KV, platform="gpu", rows=4096).implementation is Implementation.TRITON
    assert choose(Op.WRITE_KV, platform="gpu", rows=256).implementation is Implementation.TRITON


def test_insisting(monkeypatch):
    pretend_installed(monkeypatch, "triton", "jax_triton")
    assert choose(Op.WRITE_KV, platform="gpu", implementation=Implementation.REFERENCE).why == "the caller asked for it"
    with pytest.raises(UnsupportedError, match="need an NVIDIA GPU, and the platform is 'cpu'"):
        choose(Op.WRITE_KV, platform="cpu", implementation=Implementation.TRITON)
    pretend_installed(monkeypatch)
    with pytest.raises(UnsupportedError, match="'triton', which is not installed"):
        choose(Op.WRITE_KV, platform="gpu", implementation=Implementation.TRITON)


def test_the_abstract_device_decides(monkeypatch):
    pretend_installed(monkeypatch, "triton", "jax_triton")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.current_target() == dispatch.Target("gpu", "NVIDIA H200")
        assert choose(Op.ALLOC_DECODE).implementation is Implementation.TRITON


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about a process with no GPU")
def test_the_default_device_decides():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        assert choose(Op.WRITE_KV).implementation is Implementation.REFERENCE
    assert dispatch.current_target().platform == "cpu"


def test_importing_the_ops_imports_no_triton():
    code = (
        "import sys, jaxcache.kernels.dispatch, jaxcache.kernels.write_kv, jaxcache.kernels.alloc_pages, "
        "jaxcache.kernels.copy_kv; print({'triton', 'jax_triton', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_mosaic_says_what_it_needs(monkeypatch):
    hopper, ampere = dispatch.Target("gpu", "NVIDIA H200"), dispatch.Target("gpu", "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(dispatch.jax, "__version_info__", (0, 10, 2))
    assert "JAX 0.11" in str(dispatch.why_not(Op.WRITE_KV, Implementation.MOSAIC, hopper))
    monkeypatch.setattr(dispatch.jax, "__version_info__", (0, 11, 2))
    assert dispatch.why_not(Op.WRITE_KV, Implementation.MOSAIC, hopper) is None
    assert "Hopper" in str(dispatch.why_not(Op.WRITE_KV, Implementation.MOSAIC, ampere))
    assert "no Mosaic kernel" in str(dispatch.why_not(Op.MOVE_ROWS, Implementation.MOSAIC, hopper))
    pretend_installed(monkeypatch)
    assert choose(Op.WRITE_KV, platform="gpu").implementation is Implementation.MOSAIC
    choice = choose(Op.WRITE_KV, platform="gpu", unfit={Implementation.MOSAIC: "rows of 33"})
    assert choice.implementation is Implementation.REFERENCE and "rows of 33" in choice.why


@pytest.mark.parametrize(
    ("shape", "dtype", "rank", "why"),
    [
        ((2, 40, 96 + 33), jnp.bfloat16, 96, "multiples of 16 bytes"),
        ((2, 40, 24), jnp.uint8, 16, "multiples of 16 bytes"),
        ((2, 40, 2**20), jnp.bfloat16, 2**19, "shared memory"),
        ((2**12, 2**19, 16), jnp.bfloat16, 8, "row ids are int32"),
    ],
    ids=str,
)
def test_mosaic_says_which_rows_it_cannot_move(monkeypatch, shape, dtype, rank, why):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    arrays = [(shape, dtype), ((), jnp.int32), ((7,), jnp.int32), ((7, rank), dtype), ((7, shape[2] - rank), dtype)]
    write = partial(write_kv.write_mla_kv, implementation=Implementation.MOSAIC)
    with pytest.raises(UnsupportedError, match=why):
        jax.eval_shape(write, *(jax.ShapeDtypeStruct(*array) for array in arrays))
