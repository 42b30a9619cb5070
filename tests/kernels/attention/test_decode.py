"""Paged decode: the reference and the Triton source against float64, over pools in which all else is NaN."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.conftest import HAS_GPU, INTERPRETS


def run(batch, **options):
    """The op, jitted."""
    case = batch.case
    op = jax.jit(
        lambda q, kv, layer, plan, sinks: paged_decode(q, kv, layer, plan, case.masking, sinks=sinks, **options)
    )
    return op(batch.q, batch.kv, np.int32(case.layer), cases.plan_of(batch), batch.sinks)


@pytest.mark.parametrize("name", interpreted.names(cases.DECODE))
def test_reference(name):
    case = cases.DECODE[name]
    batch, out, lse = cases.decode_problem(case)
    got_out, got_lse = run(batch, implementation=Implementation.REFERENCE)
    cases.close(got_out, out, cases.reference_tolerance(batch.q))
    cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", ["fp16", "e4m3"])
def test_rows_stored_as_integers(name):
    """A pool on a CPU keeps floats of 16 and 8 bits as integers: the same bits, the same result."""
    case = cases.DECODE[name]
    results = [run(cases.decode_problem(dataclasses.replace(case, as_cpu=as_cpu))[0]) for as_cpu in (False, True)]
    np.testing.assert_array_equal(*(out for out, _ in results))


@pytest.mark.parametrize("name", interpreted.names(cases.DECODE))
def test_triton(name):
    case = cases.DECODE[name]
    batch, out, lse = cases.decode_problem(case)
    if HAS_GPU:
        got_out, got_lse = run(batch, implementation=Implementation.TRITON)
    else:
        interpreted.require_interpreter(case, INTERPRETS)
        plan = cases.plan_of(batch)
        got_out, got_lse = interpreted.paged_decode(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
