"""The tree against its oracle, by random operations on every shape; `python -m tests.model.tree_driver` runs more."""

from pathlib import Path

import pytest

from tests.model.tree_driver import SHAPES, add_up, drive

PARTS = 30
OPS_PER_LIFE = 300
RUNS = Path(__file__).parents[1] / "model" / "tree_runs.jsonl"


@pytest.mark.parametrize("part", [pytest.param(i, marks=() if i % 3 == 0 else pytest.mark.slow) for i in range(PARTS)])
def test_tree_equals_the_oracle(part):
    count = -(-len(SHAPES) // PARTS)
    drive(range(part * count, (part + 1) * count), OPS_PER_LIFE)


def test_ten_million_operations_were_run():
    operations, violations = add_up(RUNS)
    assert operations >= 10_000_000 and violations == 0
