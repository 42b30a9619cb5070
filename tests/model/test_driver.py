"""A million random operations on allocator, cache and request table against the oracle. See `driver`."""

import pytest

from tests.model.driver import drive

PARTS = 25
OPS = 40_000


@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_operations(part):
    drive(seed=10_000 * part, ops=OPS)
