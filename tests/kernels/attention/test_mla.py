"""Attention over latent rows: the reference and the Triton source against float64, decode and extend."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.mla import mla_decode, mla_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.conftest import HAS_GPU, INTERPRETS


def run(op, batch, implementation):
    case = batch.case
    jitted = jax.jit(lambda q, kv, layer, plan: op(q, kv, layer, plan, case.masking, implementation=implementation))
    return jitted(batch.q, batch.kv, np.int32(case.layer), cases.plan_of(batch, cases.LATENT_LAUNCHES))


def both_steps(name):
    """The batch of a case as a decode step and as an extend step, each with its op and what is expected."""
    case = cases.LATENTS[name]
    yield mla_decode, interpreted.mla_decode, *cases.decode_problem(case)
    batch = cases.make(dataclasses.replace(case, lens=cases.MIXED))
    yield mla_extend, interpreted.mla_extend, batch, *cases.expected(batch)


@pytest.mark.parametrize("name", interpreted.names(cases.LATENTS))
def test_reference(name):
    for op, _, batch, out, lse in both_steps(name):
        got_out, got_lse = run(op, batch, Implementation.REFERENCE)
        cases.close(got_out, out, cases.reference_tolerance(batch.q))
        cases.close(got_lse, lse, 2e-5)


def test_rows_stored_as_integers():
    case = cases.LATENTS["bf16"]
    batches = [cases.decode_problem(dataclasses.replace(case, as_cpu=as_cpu))[0] for as_cpu in (False, True)]
    results = [run(mla_decode, batch, Implementation.REFERENCE) for batch in batches]
    np.testing.assert_array_equal(*(out for out, _ in results))


@pytest.mark.parametrize("name", interpreted.names(cases.LATENTS))
def test_triton(name):
    case = cases.LATENTS[name]
    for op, interpret, batch, out, lse in both_steps(name):
        if HAS_GPU:
            got_out, got_lse = run(op, batch, Implementation.TRITON)
        else:
            interpreted.require_interpreter(case, INTERPRETS)
            plan = cases.plan_of(batch, cases.LATENT_LAUNCHES)
            got_out, got_lse = interpret(batch.q, batch.kv, case.layer, plan, case.masking)
        cases.close(got_out, out, cases.tolerance(case))
        cases.close(got_lse, lse, cases.tolerance(case))
