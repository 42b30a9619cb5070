"""The examples run, and what they claim holds; the notebooks are committed with pictures that GitHub can show."""

import json
from pathlib import Path

import pytest

from examples.engine import demo, engine

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.mark.slow
def test_every_family_answers_the_same_with_and_without_the_cache(capsys) -> None:
    engine.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("cached [0, 160, 160]" in line and line.endswith("same answers: True") for line in lines)


@pytest.mark.slow
def test_chats_are_answered_sooner_from_the_cache() -> None:
    shared, alone = demo.compare(engine.FAMILIES["llama"], demo.questions(4, 3), answer_tokens=8)
    assert shared.answers == alone.answers and alone.cached_tokens == 0
    assert shared.cached_tokens > 0.6 * shared.prompt_tokens
    assert sorted(shared.first_token)[6] < sorted(alone.first_token)[6]
    assert "prompt tokens cached" in demo.table(shared, alone)


def test_text_is_bytes() -> None:
    assert engine.decode(engine.encode("Käse")) == "Käse"
    assert engine.decode([0xC3, engine.END]) == "�"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_outputs_that_show_without_a_kernel(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    pictures = [output["data"] for output in outputs if "data" in output]
    has_drawings = sum("image/svg+xml" in data for data in pictures) >= 4
    assert has_drawings or all(cell["outputs"] for cell in cells[1:])  # pictures, or words in every cell
    assert all("image/svg+xml" in data for data in pictures if "application/vnd.plotly.v1+json" in data)
