"""`benchmarks.attention --tune`: launches of the attention kernels beside those that the library chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.attention_cases import (
    Case,
    arguments,
    attend,
    build,
    launch_name,
    launches_of,
    measure,
)
from jaxcache.kernels.attention.launch import DecodeLaunch, Launches
from jaxcache.kernels.dispatch import Implementation

TUNED = frozenset(
    {
        *("8 x 1k", "8 x 8k", "64 x 1k", "64 x 8k", "64 x 8k e4m3", "64 x 8k int8 row scales"),
        *("64 x 8k 16 heads", "8 x 8k 16 heads", "64 x 8k 16 heads e4m3", "64 x 8704 8k shared"),
    }
)
"""Cases whose launches are tried out."""


def variants(case: Case) -> list[tuple[int, int, int, int]]:
    """Launches to try: block, warps, stages, and programs of all heads or tokens of a tile."""
    if case.is_extend:
        return [(64, 8, 3, 32), (128, 8, 3, 32), (64, 4, 5, 16), (64, 8, 5, 64)]
    if not case.heads and case.q_heads > 16:
        return [(64, 8, 3, 132), (32, 8, 3, 132), (32, 8, 2, 132), (64, 4, 2, 132)]
    if not case.heads:
        return [(32, 4, 5, 396), (32, 4, 3, 396), (64, 4, 3, 264), (64, 8, 5, 264), (64, 8, 3, 132), (16, 4, 7, 264)]
    if np.dtype(case.dtype).itemsize == 1:
        return [(32, 1, 5, 528), (32, 1, 7, 792), (32, 1, 5, 1056), (64, 1, 5, 528), (64, 2, 5, 528), (64, 2, 5, 264)]
    if len(case.seq) <= 8:
        return [(32, 1, 7, 528), (32, 1, 7, 396), (32, 1, 7, 132), (32, 1, 9, 264), (64, 2, 5, 264), (64, 4, 5, 132)]
    return [(32, 1, 5, 528), (32, 1, 9, 528), (32, 1, 7, 660), (64, 2, 5, 264), (64, 4, 5, 264)]


def launches(base: Launches, case: Case) -> Iterator[Launches]:
    """`base`, and what else to try."""
    yield base
    blocks = case.heads or -(-case.q_heads // base.decode.heads)
    for block, warps, stages, size in variants(case):
        changes = dict(block=block, warps=warps, stages=stages)
        if case.is_extend:
            yield dataclasses.replace(base, extend=dataclasses.replace(base.extend, tokens=size, **changes))
        else:
            programs = max(size // blocks, 1)
            yield dataclasses.replace(base, decode=dataclasses.replace(base.decode, programs=programs, **changes))


def tune_case(case: Case, limit: float | None) -> Iterator[dict[str, Any]]:
    """A row for each launch, the library's first; errors are against that one. A launch that fails is a row as well."""
    if case.shared:
        yield from tune_shared(case, limit)
        return
    problem, want = build(case), None
    for candidate in launches(launches_of(case), case):
        if want is None:
            first = attend(problem, Implementation.TRITON, candidate, False)(*arguments(problem), 1)
            want = np.asarray(first, np.float32)
        row = {"case": case.name, "implementation": f"jaxcache-triton {launch_name(case, candidate)}"}
        try:
            yield row | measure(problem, Implementation.TRITON, candidate, False, want, limit)
        except Exception as error:  # noqa: BLE001  a launch may not fit, whatever it raises
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


SHARED = ((32, 64, 8, 5, 132), (64, 64, 8, 3, 132), (16, 64, 4, 5, 264), (32, 128, 8, 3, 132), (32, 64, 8, 5, 264))
"""Launches of a shared prefix to try: members, block, warps, stages, programs of all heads."""


def tune_shared(case: Case, limit: float | None) -> Iterator[dict[str, Any]]:
    """Other blocks of rows for the queries that attend to a prefix together."""
    problem, base = build(case), launches_of(case)
    alone = attend(problem, Implementation.TRITON, base, False)
    want = np.asarray(alone(*arguments(problem), 1), np.float32)
    for members, block, warps, stages, programs in SHARED:
        shared = DecodeLaunch(block, programs // case.heads, warps, stages)
        candidate = dataclasses.replace(base, shared=shared, members=members)
        name = f"jaxcache-triton shared {members}/{block}/{warps}/{stages}/{programs}"
        row = {"case": case.name, "implementation": name}
        try:
            yield row | measure(problem, Implementation.TRITON, candidate, True, want, limit)
        except Exception as error:  # noqa: BLE001  a launch may not fit, whatever it raises
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
