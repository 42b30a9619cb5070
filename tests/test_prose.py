"""Words that a reader of the field has to decode are not used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTEAD = {
    r"\bwho(m)?ever\b": "name the role: the caller, a request, another thread",
    r"\b(no|some|every)body('s)?\b": "name the role, or use the passive",
    r"\banew\b": "again, new",
    r"\bg(o|oes|one|oing) on (from|with)\b": "resume from, continue with",
    r"\b(let|lets|letting) go\b": "evict, free, drop, release",
    r"\b(is|are) no (int|float|integer|number|arra|tuple|list|string|dict)": "must be ...",
    r"\ball the same\b": "still, nevertheless",
    r"\bto be had\b": "available",
    r"\bis not heard of\b|\bhas not heard\b": "does not know yet",
}
FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("jaxcache/**/*.py", "torch_bridge/**/*.py", "docs/**/*.md", "*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # a history keeps its words
)


def findings(text: str) -> list[str]:
    """Line, word and what to say instead."""
    return [
        f"{number}: {match[0]!r}: {instead}"
        for number, line in enumerate(text.splitlines(), 1)
        for word, instead in INSTEAD.items()
        for match in re.finditer(word, line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", FILES)
def test_words(name: str) -> None:
    found = findings((ROOT / name).read_text(encoding="utf-8"))
    assert not found, f"{name}: see docs/concepts.md#glossary for the field's terms"


def test_each_word_is_found() -> None:
    for line in ("whoever", "Nobody's", "made anew", "gone on from", "was let go", "is no int32", "all the same"):
        assert findings(f"a {line} b"), line
    assert not findings("The list is not an int32 array, and no file is evicted.")
