"""Paged extend: the reference and the Triton source against float64, over pools in which all else is NaN."""

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.conftest import HAS_GPU, INTERPRETS


def run(batch, **options):
    """The op, jitted."""
    case = batch.case
    op = jax.jit(
        lambda q, kv, layer, plan, sinks: paged_extend(q, kv, layer, plan, case.masking, sinks=sinks, **options)
    )
    return op(batch.q, batch.kv, np.int32(case.layer), cases.plan_of(batch), batch.sinks)


@pytest.mark.parametrize("name", interpreted.names(cases.EXTEND))
def test_reference(name):
    batch = cases.make(cases.EXTEND[name])
    out, lse = cases.expected(batch)
    got_out, got_lse = run(batch, implementation=Implementation.REFERENCE)
    cases.close(got_out, out, cases.reference_tolerance(batch.q))
    cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", interpreted.names(cases.EXTEND))
def test_triton(name):
    case = cases.EXTEND[name]
    batch = cases.make(case)
    out, lse = cases.expected(batch)
    if HAS_GPU:
        got_out, got_lse = run(batch, implementation=Implementation.TRITON)
    else:
        interpreted.require_interpreter(case, INTERPRETS)
        plan = cases.plan_of(batch)
        got_out, got_lse = interpreted.paged_extend(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
