"""Attention against float64 on the present device: the batches of the tests, in pools where all else is NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_peers import relative_error, torch_on_gpu
from jaxcache.kernels.attention.decode import paged_decode
from jaxcache.kernels.attention.extend import paged_extend
from jaxcache.kernels.attention.launch import Launches, heads_launches, latent_launches
from jaxcache.kernels.attention.mla import mla_decode, mla_extend
from jaxcache.kernels.attention.plan import make_plan
from jaxcache.kernels.dispatch import Implementation, Op, current_target, why_not
from tests.kernels.attention import cases

FEW = ("gqa", "latent")
RUNS = 5
"""Runs that must give the same bits."""


def checks(*, small: bool, only: str = "", among: str = "") -> Iterator[dict[str, Any]]:
    """A row for each case and implementation, with its error and, if that is too large, `failed`.

    `only` names an implementation, or is "torch", and `among` parts of names of cases, one of which a case must have.
    """
    if only in ("", "torch"):
        yield from torch_checks()
    for op, attend, table, implementation in _tables():
        if why_not(op, implementation, current_target()) is not None or only not in ("", implementation.value):
            continue
        if implementation is Implementation.REFERENCE and not small:
            continue
        for name, case in table.items():
            row = {"case": f"{op.value} {name}", "implementation": implementation.value}
            if (small and name not in FEW) or not any(part in row["case"] for part in among.split(",")):
                continue
            try:
                yield row | check(attend, case, implementation)
            except Exception as error:  # noqa: BLE001  one case must not stop the others
                yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def torch_checks() -> Iterator[dict[str, Any]]:
    """The same from PyTorch, where it has a GPU: a row for each op and layout."""
    torch = torch_on_gpu()
    if torch is None:
        return
    from jaxcache.kernels.attention import attention_torch as ops

    chunks = dataclasses.replace(cases.LATENTS["bf16"], lens=cases.MIXED)
    for op, case in (
        (ops.paged_decode, cases.DECODE["bf16"]),
        (ops.paged_decode, cases.DECODE["page_major"]),
        (ops.paged_extend, cases.EXTEND["bf16"]),
        (ops.mla_decode, cases.LATENTS["bf16"]),
        (ops.mla_extend, chunks),
    ):
        row = {"case": f"{op.__name__} {np.dtype(case.dtype)}", "implementation": "triton from torch"}
        try:
            is_decode = op in (ops.paged_decode, ops.mla_decode)
            batch, out, lse = cases.decode_problem(case) if is_decode else _with_expected(cases.make(case))
            launches = _launches(case, batch.sequences.requests, Implementation.TRITON)
            plan = cases.plan_of(batch, launches)
            given = jax.tree.map(jnp.asarray, (batch.q, batch.kv, np.full(1, case.layer, np.int32), plan))
            leaves, structure = jax.tree.flatten(jax.block_until_ready(given))
            q, kv, layer, plan = jax.tree.unflatten(structure, [torch.from_dlpack(leaf) for leaf in leaves])
            got = [tensor.float().cpu().numpy() for tensor in op(q, kv, layer, plan, case.masking)]
            cases.close(got[0], out, cases.tolerance(case))
            cases.close(got[1], lse, cases.tolerance(case))
            yield row | {"error": relative_error(got[0], out), "tolerance": cases.tolerance(case)}
        except Exception as error:  # noqa: BLE001  one case must not stop the others
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def _with_expected(batch: cases.Batch) -> tuple[cases.Batch, np.ndarray, np.ndarray]:
    return batch, *cases.expected(batch)


def _launches(case: cases.Case, requests: int, implementation: Implementation) -> Launches:
    """What the library would choose, for one implementation."""
    itemsize, capability = np.dtype(case.dtype).itemsize, current_target().compute_capability()
    if case.latent:
        return latent_launches(requests, case.group, case.dim, itemsize, capability, implementation)
    width = case.dim + (case.v_dim or case.dim)
    return heads_launches(requests, case.heads, case.group, width, itemsize, capability, implementation)


def _tables() -> Iterator[tuple[Op, Any, dict[str, cases.Case], Implementation]]:
    """What is checked: the kernels of Mosaic first."""
    yield Op.MLA_DECODE, mla_decode, cases.WGMMA_LATENTS, Implementation.MOSAIC
    yield Op.PAGED_EXTEND, paged_extend, cases.WGMMA_EXTEND, Implementation.MOSAIC
    chunks = {n: dataclasses.replace(c, lens=cases.MIXED) for n, c in cases.LATENTS.items()}
    for implementation in (Implementation.TRITON, Implementation.REFERENCE):
        yield Op.MLA_DECODE, mla_decode, cases.LATENTS, implementation
        yield Op.MLA_EXTEND, mla_extend, chunks, implementation
        yield Op.PAGED_DECODE, paged_decode, cases.DECODE, implementation
        yield Op.PAGED_EXTEND, paged_extend, cases.EXTEND, implementation


def check(attend: Any, case: cases.Case, implementation: Implementation) -> dict[str, Any]:
    """The error of one case, over several runs."""
    is_decode = attend in (paged_decode, mla_decode)
    if is_decode:
        batch, out, lse = cases.decode_problem(case)
    else:
        batch, out, lse = _with_expected(cases.make(case))
    launches = _launches(case, batch.sequences.requests, implementation)
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
