"""Paged extend: the reference and the Triton source against float64, over pools in which all else is NaN."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.test_decode import plan_of
from tests.kernels.conftest import HAS_GPU, INTERPRETS


@pytest.mark.parametrize("name", cases.EXTEND)
def test_reference(name):
    case = cases.EXTEND[name]
    for as_cpu in {False, np.dtype(case.dtype).itemsize < 4}:
        batch = cases.make(dataclasses.replace(case, as_cpu=as_cpu))
        out, lse = cases.expected(batch)
        op = jax.jit(lambda q, kv, layer, plan, sinks: paged_extend(q, kv, layer, plan, case.masking, sinks=sinks))
        got_out, got_lse = op(batch.q, batch.kv, np.int32(case.layer), plan_of(batch), batch.sinks)
        cases.close(got_out, out, cases.reference_tolerance(batch.q))
        cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", cases.EXTEND)
def test_triton(name):
    case = cases.EXTEND[name]
    batch = cases.make(case)
    out, lse = cases.expected(batch)
    plan = plan_of(batch)
    if HAS_GPU:
        got_out, got_lse = paged_extend(
            batch.q, batch.kv, case.layer, plan, case.masking, sinks=batch.sinks, implementation=Implementation.TRITON
        )
    else:
        interpreted.require_interpreter(case, INTERPRETS)
        got_out, got_lse = interpreted.paged_extend(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
