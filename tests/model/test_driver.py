"""A million random operations on allocator, cache and request table against the oracle. See `driver`."""

import pytest

from tests.model.driver import drive

PARTS = 25
QUICK = 4
OPS = 40_000


@pytest.mark.parametrize("part", range(QUICK))
def test_random_operations(part):
    drive(seed=10_000 * part, ops=OPS)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(QUICK, PARTS))
def test_a_million_operations(part):
    drive(seed=10_000 * part, ops=OPS)
