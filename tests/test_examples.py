"""The examples run, and what they claim holds; the notebooks are committed with pictures that GitHub can show."""

import json
from pathlib import Path

import pytest

from examples import engine
from jaxcache import init_memory_pool_and_cache
from jaxcache.steps.compiled import CompiledSteps

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    """All engines of these tests share what is compiled: they differ in the size of their memory only."""
    compiled = CompiledSteps()

    def with_shared_steps(config):
        memory = init_memory_pool_and_cache(config)
        memory.runner.compiled = compiled
        return memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "init_memory_pool_and_cache", with_shared_steps)
        yield


def test_the_engine_answers_the_same_with_and_without_the_cache(capsys) -> None:
    engine.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.endswith("same as without cache") for line in lines)
    assert "0 of 57 tokens cached" in lines[0]
    assert all(" 0 of " not in line for line in lines[1:])


def test_the_engine_answers_the_same_when_memory_is_short() -> None:
    model, prompts = engine.random_model(0), engine.chats()
    roomy, tight = engine.Engine(model), engine.Engine(model, device_tokens=120)
    retract, retracted = tight.memory.retract, []
    tight.memory.retract = lambda request: (retracted.append(request), retract(request))
    want = [answer.tokens for answer in roomy.generate(prompts, num_tokens=12)]
    assert [answer.tokens for answer in tight.generate(prompts, num_tokens=12)] == want
    assert any(request.output_ids for request in retracted)


def test_the_answers_depend_on_what_is_cached() -> None:
    prompt = engine.chats()[0]
    other = [(prompt[0] + 1) % engine.VOCABULARY, *prompt[1:]]
    answers = engine.Engine(engine.random_model(0)).generate([prompt, other], num_tokens=12)
    assert answers[0].tokens != answers[1].tokens


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
