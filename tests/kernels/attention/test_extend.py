"""Paged extend: the reference and the Triton source against float64, over pools in which all else is NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.cases import Case
from tests.kernels.attention.test_decode import plan_of
from tests.kernels.conftest import HAS_GPU, INTERPRETS

MIXED = ((50, 20), (0, 1), (33, 1), (0, 0), (90, 40), (31, 1), (0, 37))

CASES = {
    "gqa": Case(MIXED),
    "mha": Case(MIXED, heads=3, group=1),
    "group_of_6": Case(MIXED, heads=1, group=6),
    "narrow_values": Case(MIXED, dim=48, v_dim=24),
    "page_1": Case(MIXED, page=1),
    "page_3": Case(MIXED, page=3),
    "page_64": Case(MIXED, page=64),
    "page_major": Case(MIXED, page_major=True),
    "window": Case(MIXED, window=40),
    "window_in_a_page": Case(MIXED, window=5),
    "cap": Case(MIXED, cap=2.0),
    "sinks": Case(MIXED, sinks=True),
    "all_at_once": Case(MIXED, window=33, cap=3.0, sinks=True, page_major=True, page=4),
    "fp16": Case(MIXED, dtype=np.float16),
    "bf16": Case(MIXED, dtype=jnp.bfloat16),
    "e4m3": Case(MIXED, dtype=jnp.float8_e4m3fn, scales="tensor"),
    "e5m2": Case(MIXED, dtype=jnp.float8_e5m2, scales="head"),
    "int8": Case(MIXED, dtype=np.int8, scales="row"),
    "no_padding": Case(((9, 4), (0, 3)), padding=0, tokens=7),
    "drafts": Case(((20, 4), (31, 4), (64, 4)), padding=1),
    "nobody": Case(((0, 0),), tokens=5),
}


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case = CASES[name]
    for as_cpu in {False, np.dtype(case.dtype).itemsize < 4}:
        batch = cases.make(dataclasses.replace(case, as_cpu=as_cpu))
        out, lse = cases.expected(batch)
        op = jax.jit(lambda q, kv, layer, plan, sinks: paged_extend(q, kv, layer, plan, case.masking, sinks=sinks))
        got_out, got_lse = op(batch.q, batch.kv, np.int32(case.layer), plan_of(batch), batch.sinks)
        cases.close(got_out, out, 8e-3 if batch.q.dtype == jnp.bfloat16 else 1e-3 if batch.q.dtype == np.float16 else 2e-5)
        cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    case = CASES[name]
    batch = cases.make(case)
    out, lse = cases.expected(batch)
    plan = plan_of(batch)
    if HAS_GPU:
        got_out, got_lse = paged_extend(
            batch.q, batch.kv, case.layer, plan, case.masking, sinks=batch.sinks, implementation=Implementation.TRITON
        )
    else:
        cases.require_interpreter(case, INTERPRETS)
        got_out, got_lse = interpreted.paged_extend(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
