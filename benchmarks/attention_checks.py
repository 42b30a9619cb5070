"""Attention against float64 on the present device: the batches of the tests, in pools where all else is NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.attention.launch import heads_launches, latent_launches
from jaxcache.kernels.attention.mla import mla_decode, mla_extend
from jaxcache.kernels.attention.plan import make_plan
from jaxcache.kernels.dispatch import Implementation, Op, current_target, why_not
from tests.kernels.attention import cases

FEW = ("gqa", "latent")
RUNS = 5
"""Runs that must give the same bits."""


def checks(*, small: bool) -> Iterator[dict[str, Any]]:
    """A row for each case and implementation, with its error and, if that is too large, `failed`."""
    tables = (
        (Op.PAGED_DECODE, paged_decode, cases.DECODE),
        (Op.PAGED_EXTEND, paged_extend, cases.EXTEND),
        (Op.MLA_DECODE, mla_decode, cases.LATENTS),
        (Op.MLA_EXTEND, mla_extend, {n: dataclasses.replace(c, lens=cases.MIXED) for n, c in cases.LATENTS.items()}),
    )
    for op, attend, table in tables:
        for implementation in Implementation:
            if why_not(op, implementation, current_target()) is not None:
                continue
            if implementation is Implementation.REFERENCE and not small:
                continue
            for name, case in table.items():
                if small and name not in FEW:
                    continue
                row = {"case": f"{op.value} {name}", "implementation": implementation.value}
                try:
                    yield row | check(attend, case, implementation)
                except Exception as error:  # noqa: BLE001  one case must not stop the others
                    yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def check(attend: Any, case: cases.Case, implementation: Implementation) -> dict[str, Any]:
    """The error of one case, over several runs."""
    is_decode = attend in (paged_decode, mla_decode)
    batch = cases.decode_case(case) if is_decode else cases.make(case)
    out, lse = cases.expected(batch)
    if is_decode:
        s = batch.sequences
        at = np.where(s.seq_len > 0, s.first_token, len(batch.q) - 1)
        batch.q, out, lse = batch.q[at], out[at], lse[at]
    requests, itemsize = batch.sequences.requests, np.dtype(case.dtype).itemsize
    capability = current_target().compute_capability()
    if case.latent:
        launches = latent_launches(requests, case.group, case.dim, itemsize, capability)
    else:
        width = case.dim + (case.v_dim or case.dim)
        launches = heads_launches(requests, case.heads, case.group, width, itemsize, capability)
    sinks = {} if case.latent else {"sinks": batch.sinks}

    @jax.jit
    def step(q: Any, kv: Any, sequences: Any, layer: Any) -> Any:
        plan = make_plan(sequences, q.shape[0], case.page, launches, window=case.window)
        return attend(q, kv, layer, plan, case.masking, implementation=implementation, **sinks)

    arguments = jax.tree.map(jnp.asarray, (batch.q, batch.kv, batch.sequences, np.int32(case.layer)))
    runs = [jax.tree.map(np.asarray, step(*arguments)) for _ in range(RUNS)]
    same = all(a.tobytes() == b.tobytes() for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    tolerance = cases.tolerance(case)
    cases.close(runs[0][0], out, tolerance)
    cases.close(runs[0][1], lse, tolerance)
    row = {"error": relative_error(runs[0][0], out), "tolerance": tolerance}
    return row if same else row | {"failed": "other bits in another run"}


def relative_error(got: Any, want: Any) -> float:
    """The norm of the difference over that of what is wanted; NaN if there is one."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / norm if norm else float(np.abs(got).max(initial=0.0))
