"""Rules of the adapters that need no engine: they stay small, pinned, and say in a few lines how to switch them on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = sorted(ROOT.glob("integrations/*/adapter.py"))


@pytest.mark.parametrize("adapter", ENGINES, ids=lambda path: path.parent.name)
def test_an_adapter_is_small_pinned_and_explained(adapter: Path) -> None:
    assert len(adapter.read_text(encoding="utf-8").splitlines()) <= 200
    pins = (adapter.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in pins)
    readme = (adapter.parent / "README.md").read_text(encoding="utf-8")
    assert 1 <= len(re.findall(r"^    \S", readme, re.MULTILINE)) <= 5
    assert (adapter.parent / "compare.py").exists()


def test_there_are_adapters() -> None:
    assert ENGINES
