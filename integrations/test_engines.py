"""Each adapter against the engine that it is for, in an environment of its own: `make integrations`.

`requirements.txt` of an adapter pins what its environment has; lines behind `# no-deps` are installed without what they
depend on. The environments lie in `build/integrations` and are made again when these files change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = sorted(path.parent.name for path in ROOT.glob("integrations/*/compare.py"))


def python312() -> str:
    """An interpreter that the engines run on."""
    pyenv = sorted(map(str, Path.home().glob(".pyenv/versions/3.12.*/bin/python")), reverse=True)
    given = [os.environ[name] for name in ("PYTHON312",) if name in os.environ]
    is_312 = ["-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"]
    for candidate in [*given, sys.executable, "python3.12", *pyenv]:  # a name on the path may be a shim of another one
        found = shutil.which(candidate)
        if found and subprocess.run([found, *is_312], stderr=subprocess.DEVNULL).returncode == 0:
            return found
    pytest.fail("the engines need Python 3.12: set PYTHON312=/path/to/python3.12")


def environment(engine: str) -> Path:
    """The interpreter of an engine's environment, installed unless it is there."""
    folder, wanted = ROOT / "build" / "integrations" / engine, ROOT / "integrations" / engine / "requirements.txt"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python312(), "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        with_deps, _, without = wanted.read_text().partition("# no-deps\n")
        (folder / "deps.txt").write_text(with_deps)
        (folder / "no-deps.txt").write_text(without)
        subprocess.run([*pip, "-r", str(folder / "deps.txt")], check=True)
        subprocess.run([*pip, "--no-deps", "-r", str(folder / "no-deps.txt")], check=True)
        installed.write_text(wanted.read_text())
    return python


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_are_those_of_the_engines_own_generate(engine: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [str(environment(engine)), "-m", f"integrations.{engine}.compare"]
    ran = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:]
