"""Attention over latent rows: the reference and the Triton source against float64, decode and extend."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.launch import DecodeLaunch, ExtendLaunch, Launches
from jaxcache.kernels.attention.mla import mla_decode, mla_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.test_decode import one_row_a_request, plan_of
from tests.kernels.conftest import HAS_GPU, INTERPRETS

LAUNCHES = Launches(DecodeLaunch(32, 3, 4, 3, 16), DecodeLaunch(32, 2, 4, 3, 16), ExtendLaunch(2, 32, 4, 3, 16), 2)


def run(op, batch, plan, **options):
    case = batch.case
    jitted = jax.jit(lambda q, kv, layer, plan: op(q, kv, layer, plan, case.masking, **options))
    return jitted(batch.q, batch.kv, np.int32(case.layer), plan)


def both_steps(name: str, **changes):
    """The batch of a case as a decode step and as an extend step, each with its op and what is expected."""
    case = dataclasses.replace(cases.LATENTS[name], **changes)
    yield mla_decode, interpreted.mla_decode, *one_row_a_request(cases.decode_case(case))
    batch = cases.make(dataclasses.replace(case, lens=cases.MIXED))
    yield mla_extend, interpreted.mla_extend, batch, *cases.expected(batch)


@pytest.mark.parametrize("name", cases.LATENTS)
def test_reference(name):
    for as_cpu in {False, np.dtype(cases.LATENTS[name].dtype).itemsize < 4}:
        for op, _, batch, out, lse in both_steps(name, as_cpu=as_cpu):
            got_out, got_lse = run(op, batch, plan_of(batch, LAUNCHES))
            cases.close(got_out, out, cases.reference_tolerance(batch.q))
            cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", cases.LATENTS)
def test_triton(name):
    case = cases.LATENTS[name]
    for op, interpret, batch, out, lse in both_steps(name):
        plan = plan_of(batch, LAUNCHES)
        if HAS_GPU:
            got_out, got_lse = run(op, batch, plan, implementation=Implementation.TRITON)
        else:
            interpreted.require_interpreter(case, INTERPRETS)
            got_out, got_lse = interpret(batch.q, batch.kv, case.layer, plan, case.masking)
        cases.close(got_out, out, cases.tolerance(case))
        cases.close(got_lse, lse, cases.tolerance(case))
