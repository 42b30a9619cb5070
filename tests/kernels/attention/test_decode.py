"""Paged decode: the reference and the Triton source against float64, over pools in which all else is NaN."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.attention.launch import DecodeLaunch, ExtendLaunch, Launches
from jaxcache.kernels.attention.plan import make_plan
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.cases import Case
from tests.kernels.conftest import HAS_GPU, INTERPRETS

LAUNCHES = Launches(DecodeLaunch(32, 5, 1, 3), DecodeLaunch(32, 3, 4, 3), ExtendLaunch(4, 32, 4, 3), 2)


def plan_of(batch, launches=LAUNCHES, **options):
    tokens = batch.q.shape[0]
    return make_plan(batch.sequences, tokens, batch.case.page, launches, window=batch.case.window, **options)


def decode_batch(case: Case) -> cases.Batch:
    return cases.decode_case(dataclasses.replace(case, tokens=None))


def run_reference(batch, plan, **options):
    case = batch.case
    op = jax.jit(
        lambda q, kv, layer, plan, sinks: paged_decode(q, kv, layer, plan, case.masking, sinks=sinks, **options)
    )
    return op(batch.q, batch.kv, np.int32(case.layer), plan, batch.sinks)


def one_row_a_request(batch: cases.Batch) -> tuple[cases.Batch, np.ndarray, np.ndarray]:
    """Decode takes the query of request `i` as row `i`, also of requests that have none."""
    want_out, want_lse = cases.expected(batch)
    s = batch.sequences
    has_token = s.seq_len > 0
    at = np.where(has_token, s.first_token, len(batch.q) - 1)
    batch.q = batch.q[at]
    return batch, want_out[at], want_lse[at]


@pytest.mark.parametrize("name", cases.DECODE)
def test_reference(name):
    case = cases.DECODE[name]
    for as_cpu in {False, np.dtype(case.dtype).itemsize < 4}:
        batch, out, lse = one_row_a_request(decode_batch(dataclasses.replace(case, as_cpu=as_cpu)))
        got_out, got_lse = run_reference(batch, plan_of(batch))
        cases.close(got_out, out, cases.reference_tolerance(batch.q))
        cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", cases.DECODE)
def test_triton(name):
    case = cases.DECODE[name]
    batch, out, lse = one_row_a_request(decode_batch(case))
    plan = plan_of(batch)
    if HAS_GPU:
        got_out, got_lse = run_reference(batch, plan, implementation=Implementation.TRITON)
    else:
        interpreted.require_interpreter(case, INTERPRETS)
        got_out, got_lse = interpreted.paged_decode(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
