"""The Mosaic kernels of attention: interpreted against float64, and compiled for an H200 without spilling registers."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels.attention.launch import heads_launches, latent_launches
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases

MOSAIC = Implementation.MOSAIC
SLOW = {"wgmma_128_heads", "wgmma_d_128", "wgmma_window", "wgmma_page_64"}


def names(table):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in table]


@pytest.fixture
def interpret():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


@pytest.mark.mosaic
@pytest.mark.parametrize("name", names(cases.WGMMA_LATENTS))
def test_mla_decode(name, interpret):
    from jaxcache.kernels.attention import mla_mosaic

    case = cases.WGMMA_LATENTS[name]
    batch, out, lse = cases.decode_problem(case)
    launches = latent_launches(batch.sequences.requests, case.group, case.dim, 2, decode_by=MOSAIC)
    few = dataclasses.replace(launches.decode, programs=3)  # requests are cut, and programs take several
    plan = cases.plan_of(batch, dataclasses.replace(launches, decode=few))
    got_out, got_lse = mla_mosaic.mla_decode(batch.q, batch.kv, case.layer, plan, case.masking, interpret=interpret)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))


@pytest.mark.mosaic
@pytest.mark.parametrize("name", names(cases.WGMMA_EXTEND))
def test_paged_extend(name, interpret):
    from jaxcache.kernels.attention import extend_mosaic

    case = cases.WGMMA_EXTEND[name]
    batch = cases.make(case)
    out, lse = cases.expected(batch)
    requests = batch.sequences.requests
    plan = cases.plan_of(batch, heads_launches(requests, case.heads, case.group, 2 * case.dim, 2, extend_by=MOSAIC))
    got_out, got_lse = extend_mosaic.paged_extend(
        batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks, interpret=interpret
    )
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))


@pytest.mark.mosaic
@pytest.mark.parametrize("kernel", ["mla_mosaic", "extend_mosaic"])
def test_slots_behind_the_last_token_must_be_cleared(kernel, interpret, monkeypatch):
    """A planted bug: without it, their NaN reaches results, though their weights are 0."""
    import importlib

    source = importlib.import_module(f"jaxcache.kernels.attention.{kernel}")
    monkeypatch.setattr(source, "clear", lambda *_: None)
    if kernel == "mla_mosaic":
        case = dataclasses.replace(cases.WGMMA_LATENT, lens=((0, 37),), padding=0)
        batch, _, _ = cases.decode_problem(case)
        launches = latent_launches(1, case.group, case.dim, 2, decode_by=MOSAIC)
        got, _ = source.decode_parts(
            batch.q, batch.kv, 1, cases.plan_of(batch, launches), case.masking, interpret=interpret
        )
    else:
        case = dataclasses.replace(cases.WGMMA_HEADS, lens=((0, 65),), padding=0)
        batch = cases.make(case)
        plan = cases.plan_of(batch, heads_launches(1, case.heads, case.group, 2 * case.dim, 2, extend_by=MOSAIC))
        got, _ = source.paged_extend(batch.q, batch.kv, 1, plan, case.masking, None, interpret=interpret)
    assert np.isnan(np.asarray(got, np.float32)).any()


@pytest.mark.h200
@pytest.mark.parametrize("kernel", ["mla_decode", "paged_extend", "paged_extend of windows"])
def test_no_spills(kernel):
    """A process of its own: what the assembler says goes to standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attention.test_mosaic", kernel],
        env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout + done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said and "spilled" not in said, said[-2000:]


def compile_kernel(name: str) -> None:
    """Compiles a kernel for an H200, in the size of a model."""
    from functools import partial

    import jax

    from tests.kernels import h200

    def like(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    n, tokens, programs = 64, 8192, 66
    if "mla" in name:
        from jaxcache.kernels.attention import mla_mosaic as source

        inputs = source.Inputs(
            like(n, 128, 576, dtype=jnp.bfloat16), like(2**20, 576, dtype=jnp.bfloat16), like(1, dtype=jnp.float32),
            like(2), like(n * 200), like(n), like(n), like(n + 1), like(programs),
        )  # fmt: skip
        static = source.Static(64, 512, 0.1, 0.0, False)
    else:
        from jaxcache.kernels.attention import extend_mosaic as source

        heads, rows, one_a_request = [like(8, dtype=jnp.float32)] * 2, like(2**20, 1024, dtype=jnp.bfloat16), like(n)
        tiles = like(tokens // source.TOKENS + n)
        inputs = source.Inputs(
            like(tokens, 32, 128, dtype=jnp.bfloat16), rows, rows, *heads, like(32, dtype=jnp.float32), like(2),
            like(n * 700), *[one_a_request] * 5, tiles, tiles,
        )  # fmt: skip
        static = source.Static(16, 4, 0.1, 0.0, 128 if "windows" in name else 0, "windows" in name, False)
    h200.compile_for_h200(partial(source._call, static=static, interpret=None), inputs)


if __name__ == "__main__":
    compile_kernel(sys.argv[1])
