"""What README and docs say is true: each example runs alone and prints what stands below it, each link leads somewhere.

An example is a block marked `python`. A block marked `text` right behind it is what it prints; `...` there stands for
anything. An example whose imports need an extra that is missing is skipped.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import jaxcache
import jaxcache.errors

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
OPTIONAL = {"torch", "transformers", "zmq", "msgspec", "prometheus_client", "safetensors", "plotly", "rich"}
NEEDS = {"torch_bridge": "torch", "jaxcache.events.publisher": "zmq", "load_snapshot": "safetensors"}
"""Modules and names of ours that need one of them."""


@dataclass(frozen=True)
class Example:
    """A block of Python in a page, and what it prints."""

    page: str
    line: int
    source: str
    prints: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: str, text: str) -> Iterator[Example]:
    """The examples of a page."""
    for block in _BLOCK.finditer(text):
        yield Example(page, text.count("\n", 0, block.start()) + 1, block[1], block[2] or "")


EXAMPLES = [example for page, text in TEXTS.items() for example in examples(page, text)]


def missing(source: str) -> set[str]:
    """Extras that an example needs and that are not installed."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    needed = {NEEDS[name] for name in names if name in NEEDS}
    needed |= {name.partition(".")[0] for name in names if name.partition(".")[0] in NEEDS.keys() | OPTIONAL}
    needed = {NEEDS.get(name, name) for name in needed}
    return {name for name in needed if importlib.util.find_spec(name) is None}


def prints(wanted: str, got: str) -> bool:
    """Whether an example printed what its page says; `...` is anything, also nothing."""
    return doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_each_example_prints_what_its_page_says(example: Example, tmp_path: Path) -> None:
    if missing(example.source):
        pytest.skip(f"needs {', '.join(missing(example.source))}")
    path, out = tmp_path / "example.py", io.StringIO()
    path.write_text(example.source, encoding="utf-8")
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(path))
    assert prints(example.prints, out.getvalue()), f"{example}: it printed\n{out.getvalue()}"


def test_there_are_examples_and_they_would_be_missed() -> None:
    assert len(EXAMPLES) >= 12
    assert sum(bool(example.prints) for example in EXAMPLES) >= 12
    assert [e.prints for e in examples("p", "```python\nprint(1)\n```\n\n```text\n1\n```\n")] == ["1\n"]
    assert prints("a ... c\n", "a b c\n")
    assert not prints("a\n", "b\n")
    assert not prints("", "b\n")


def test_every_python_block_is_an_example() -> None:
    """A block that an example's pattern does not find, such as one that is indented, would never run."""
    for page, text in TEXTS.items():
        assert len(re.findall(r"```\s*py", text)) == sum(example.page == page for example in EXAMPLES), page


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    text = _FENCED.sub("", TEXTS[page])
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def anchors(text: str) -> set[str]:
    """What headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.(?:md|ipynb)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if (ROOT / "docs") in page.parents}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert pages | notebooks == listed


def test_every_error_has_its_entry() -> None:
    errors = {value.__name__ for value in vars(jaxcache.errors).values() if isinstance(value, type)}
    headings = set(re.findall(r"^## (\w+)$", TEXTS["docs/errors.md"], re.MULTILINE))
    assert headings == errors


def test_the_reference_lists_the_documented_names() -> None:
    """A name in code in the first column of its tables is one of ours, and every documented one is there."""
    rows = [line for line in TEXTS["docs/reference/index.md"].splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([A-Z]\w+|[a-z_]+)`", row.split("|")[1])}
    assert set(jaxcache.__all__) <= names
    assert sorted(names - {"jaxcache", "torch_bridge", *dir(jaxcache)}) == []


def test_commands_exist() -> None:
    """`make X` is a target, `python -m benchmarks.X` a module."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "\n".join(TEXTS.values())
    for target in set(re.findall(r"`?\bmake ([a-z0-9-]+)\b(?=[`\s#]|$)", "\n".join(_fenced_and_spans(text)))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for module in set(re.findall(r"python -m (benchmarks\.\w+|tests\.[\w.]+)", text)):
        assert importlib.util.find_spec(module) is not None, module


def _fenced_and_spans(text: str) -> list[str]:
    return _FENCED.findall(text) + re.findall(r"`[^`\n]+`", text)
