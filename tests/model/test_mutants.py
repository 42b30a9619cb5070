"""The list of mutants fits the code, and a few of them are really caught; `python -m tests.model.mutants` runs all."""

import pytest

from tests.model.mutants import ROOT, is_caught, read_mutants

MUTANTS = {mutant.name: mutant for mutant in read_mutants()}
SAMPLE = [
    "insert spares one page too few",
    "split forgets the locks",
    "old lock is not given back",
    "evict rounds down",
    "states: a snapshot that was taken is still there",
    "components: a narrowed lock is released again in full",
]


def test_there_are_enough_and_each_has_its_name():
    assert len(MUTANTS) == len(read_mutants()) >= 230


@pytest.mark.parametrize("name", MUTANTS)
def test_each_changes_one_place(name):
    mutant = MUTANTS[name]
    source = (ROOT / "jaxcache" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"mend mutants.txt: {mutant.old!r} must occur once in {mutant.file}"
    assert mutant.new != mutant.old


@pytest.mark.parametrize("name", SAMPLE)
def test_a_driver_or_test_sees(name):
    caught, why = is_caught(MUTANTS[name], ops=4000)
    assert caught, why
