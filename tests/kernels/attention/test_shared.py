"""Shared prefixes: the keys of a group are read once, and results are those of attention without sharing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.kernels.attention import plan as planning
from jaxcache.kernels.attention.plan import SharedPrefix
from tests.kernels.attention import cases, interpreted
from tests.kernels.attention.cases import LATENT_LAUNCHES, LAUNCHES, Case, plan_of
from tests.kernels.conftest import INTERPRETS

GROUP = ((0, 97), (0, 70), (0, 64), (0, 81), (0, 66), (0, 30), (0, 5))
CASE = Case(GROUP, share=64, sharers=5)


@pytest.fixture(autouse=True)
def low_threshold(monkeypatch):
    monkeypatch.setattr(planning, "SHARED_MEMBERS", 2)
    monkeypatch.setattr(planning, "SHARED_TOKENS", 16)


def shared_of(batch: cases.Batch, length: int = 70) -> SharedPrefix:
    """The first five share 64 tokens, and say so with some more that do not fill a page."""
    requests = batch.sequences.requests
    group = np.where(np.arange(requests) < 5, 3, -1).astype(np.int32)
    return SharedPrefix(group, np.full(requests, length, np.int32))


@pytest.mark.parametrize(
    "case", [CASE, dataclasses.replace(CASE, cap=2.0, sinks=True, page_major=True)], ids=["plain", "all_at_once"]
)
def test_triton(case):
    batch, out, lse = cases.decode_problem(case)
    plan = plan_of(batch, shared=shared_of(batch))
    assert plan.shared is not None
    assert int(jnp.max(plan.shared.units.first_block)) == 3 * 64 // LAUNCHES.shared.block  # three units of two members
    interpreted.require_interpreter(case, INTERPRETS)
    got_out, got_lse = interpreted.paged_decode(batch.q, batch.kv, case.layer, plan, case.masking, batch.sinks)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))


def test_latent_rows():
    case = dataclasses.replace(CASE, group=8, dim=48, latent=32)
    batch, out, lse = cases.decode_problem(case)
    plan = plan_of(batch, LATENT_LAUNCHES, shared=shared_of(batch))
    interpreted.require_interpreter(case, INTERPRETS)
    got_out, got_lse = interpreted.mla_decode(batch.q, batch.kv, case.layer, plan, case.masking)
    cases.close(got_out, out, cases.tolerance(case))
    cases.close(got_lse, lse, cases.tolerance(case))


@pytest.mark.parametrize(
    ("group", "length", "what"),
    [
        ([0, 0, 0, 1, 1, -1, -1, 0, 0], [64] * 9, {(0, 1, 2): 64, (3, 4): 64}),
        ([0, 0, 0, 1, 1, -1, -1, 0, 0], [64, 40, 64, 64, 15, 64, 64, 64, 64], {(0, 1, 2): 32}),  # shortest, whole pages
        ([-1] * 9, [64] * 9, {}),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], [64] * 9, {}),  # nobody else is in the group
        ([7, 7, 7, 7, 7, 7, 7, 7, 7], [0] * 9, {}),
    ],
)
def test_units(group, length, what):
    """Padding is in no group, a group reads what all of it has, and everybody attends to the rest alone."""
    batch, _, _ = cases.decode_problem(CASE)
    shared = SharedPrefix(np.array(group, np.int32), np.array(length, np.int32))
    plan = jax.jit(lambda: plan_of(batch, shared=shared))()
    units, alone = plan.shared.units, np.asarray(plan.units.start)
    found = {}
    for u in range(units.count):
        members = [b for b in np.asarray(units.member)[u].tolist() if b >= 0]
        if members:
            assert len(members) <= LAUNCHES.members
            key = tuple(sorted(b for b in range(len(group)) if group[b] == group[members[0]] and alone[b]))
            found.setdefault(key, set()).update(members)
            assert int(units.stop[u]) == alone[members[0]] and int(units.row[u]) == batch.sequences.row[members[0]]
            for place, b in enumerate(members):
                assert (int(plan.shared.unit[b]), int(plan.shared.place[b])) == (u, place)
    assert found == {key: set(key) for key in what}
    for b in range(len(group)):
        assert alone[b] == next((n for key, n in what.items() if b in key), 0)


def test_not_for_windows():
    batch, _, _ = cases.decode_problem(dataclasses.replace(CASE, window=8))
    with pytest.raises(ArgumentError, match="shared must be None for a window"):
        plan_of(batch, shared=shared_of(batch))


def test_queries_that_fill_a_block_alone_do_not_share():
    batch, _, _ = cases.decode_problem(CASE)
    plan = plan_of(batch, dataclasses.replace(LAUNCHES, members=1), shared=shared_of(batch))
    assert plan.shared is None and not np.asarray(plan.units.start).any()
