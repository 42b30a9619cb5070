"""Paged decode: the reference and the Triton source against float64, over pools in which all else is NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.attention.launch import DecodeLaunch, ExtendLaunch, Launches
from jaxcache.kernels.attention.plan import make_plan
from jaxcache.kernels.dispatch import Implementation
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.cases import Case
from tests.kernels.conftest import HAS_GPU, INTERPRETS

RAGGED = ((0, 70), (0, 1), (0, 0), (0, 130), (0, 32), (0, 64), (0, 33))
LAUNCHES = Launches(DecodeLaunch(32, 5, 1, 3), DecodeLaunch(32, 3, 4, 3), ExtendLaunch(4, 32, 4, 3), 2)

CASES = {
    "gqa": Case(RAGGED),
    "mha": Case(RAGGED, heads=3, group=1),
    "group_of_6": Case(RAGGED, heads=1, group=6),
    "wide_group": Case(RAGGED, heads=1, group=20),
    "narrow_values": Case(RAGGED, dim=48, v_dim=24),
    "page_1": Case(RAGGED, page=1),
    "page_3": Case(RAGGED, page=3),
    "page_64": Case(RAGGED, page=64),
    "page_128": Case(RAGGED, page=128),
    "page_48": Case(RAGGED, page=48),
    "page_major": Case(RAGGED, page_major=True),
    "window": Case(RAGGED, window=40),
    "window_in_a_page": Case(RAGGED, window=5),
    "cap": Case(RAGGED, cap=2.0),
    "sinks": Case(RAGGED, sinks=True),
    "all_at_once": Case(RAGGED, window=33, cap=3.0, sinks=True, page_major=True, page=4),
    "fp16": Case(RAGGED, dtype=np.float16),
    "bf16": Case(RAGGED, dtype=jnp.bfloat16),
    "tensor_scales": Case(RAGGED, dtype=np.float16, scales="tensor"),
    "e4m3": Case(RAGGED, dtype=jnp.float8_e4m3fn, scales="tensor"),
    "e4m3_bf16": Case(RAGGED, dtype=jnp.float8_e4m3fn, q_dtype=jnp.bfloat16),
    "e5m2": Case(RAGGED, dtype=jnp.float8_e5m2, scales="head"),
    "int8": Case(RAGGED, dtype=np.int8, scales="row"),
    "int8_page_major": Case(RAGGED, dtype=np.int8, scales="row", page_major=True),
    "one_token": Case(((0, 1),), padding=0),
    "nobody": Case(((0, 0),), padding=3),
    "last_layer": Case(RAGGED, layer=2),
}


def plan_of(batch, launches=LAUNCHES, **options):
    tokens = batch.q.shape[0]
    return make_plan(batch.sequences, tokens, batch.case.page, launches, window=batch.case.window, **options)


def decode_batch(case: Case) -> cases.Batch:
    return cases.decode_case(dataclasses.replace(case, tokens=None))


def run_reference(batch, plan, **options):
    case = batch.case
    op = jax.jit(lambda q, kv, layer, plan, sinks: paged_decode(q, kv, layer, plan, case.masking, sinks=sinks, **options))
    return op(batch.q, batch.kv, np.int32(case.layer), plan, batch.sinks)


def one_row_a_request(batch: cases.Batch) -> tuple[cases.Batch, np.ndarray, np.ndarray]:
    """Decode takes the query of request `i` as row `i`, also of requests that have none."""
    want_out, want_lse = cases.expected(batch)
    s = batch.sequences
    has_token = s.seq_len > 0
    at = np.where(has_token, s.first_token, len(batch.q) - 1)
    batch.q = batch.q[at]
    return batch, want_out[at], want_lse[at]


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case = CASES[name]
    for as_cpu in {False, np.dtype(case.dtype).itemsize < 4}:
        batch, out, lse = one_row_a_request(decode_batch(dataclasses.replace(case, as_cpu=as_cpu)))
        got_out, got_lse = run_reference(batch, plan_of(batch))
        cases.close(got_out, out, 8e-3 if batch.q.dtype == jnp.bfloat16 else 1e-3 if batch.q.dtype == np.float16 else 2e-5)
        cases.close(got_lse, lse, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    case = CASES[name]
    batch, out, lse = one_row_a_request(decode_batch(case))
    plan = plan_of(batch)
    if HAS_GPU:
        got_out, got_lse = run_reference(batch, plan, implementation=Implementation.TRITON)
    else:
        cases.require_interpreter(case, INTERPRETS)
        got_out, got_lse = interpreted.paged_decode(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))
