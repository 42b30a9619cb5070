"""Builds wheel and sdist, and tries each in an empty environment: `python .ci/smoke_dist.py FOLDER`.

Both have to say the version of pyproject.toml, bring what a user needs and nothing that only a checkout needs, and run
the README's first example with the core's two dependencies alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
TRY = """
import importlib.metadata, importlib.util, sys
import jaxcache, jaxcache.errors
assert jaxcache.__version__ == importlib.metadata.version("jaxcache") == sys.argv[1], jaxcache.__version__
assert sys.prefix in jaxcache.__file__, jaxcache.__file__
assert jaxcache.PagedTokenToKVPoolAllocator and jaxcache.InsertResult
try:
    import torch_bridge
except ModuleNotFoundError as error:
    assert "jaxcache[torch]" in str(error), error
else:
    raise SystemExit("the core brings torch")
"""


def run(*command: str | Path, **options: object) -> str:
    """What a command prints; ends this program if it fails."""
    return subprocess.run([str(c) for c in command], check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def require_contents(wheel: Path, sdist: Path) -> None:
    """Ends this program unless both hold what they should."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    if missing := {"jaxcache/py.typed", "torch_bridge/py.typed", "jaxcache/__init__.py"} - in_wheel:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)}")
    if strange := {name.partition("/")[0] for name in in_wheel} - {
        "jaxcache", "torch_bridge", f"jaxcache-{VERSION}.dist-info"
    }:  # fmt: skip
        raise SystemExit(f"{wheel.name} has {sorted(strange)}")
    wanted = {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "docs/index.md", "Makefile"}
    if missing := wanted - in_sdist:
        raise SystemExit(f"{sdist.name} lacks {sorted(missing)}")


def require_works(python: Path, example: str, prints: str) -> None:
    """Ends this program unless what is installed for `python` works, seen from a folder that is no checkout."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-c", TRY, VERSION, cwd=folder)
        printed = run(python, "-c", example, cwd=folder)
        if printed != prints:
            raise SystemExit(f"the README's example printed {printed!r}, not {prints!r}")
        refused = subprocess.run([python.parent / "jaxcache"], cwd=folder, text=True, capture_output=True, check=False)
        if refused.returncode != 2 or "jaxcache[cli]" not in refused.stderr:
            raise SystemExit(f"the command without its extra said {refused.stderr!r}")


def main(folder: Path) -> None:
    """Builds into `folder`, which is emptied, and tries what was built."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    if not (wheel.name.startswith(f"jaxcache-{VERSION}-") and sdist.name == f"jaxcache-{VERSION}.tar.gz"):
        raise SystemExit(f"{wheel.name} and {sdist.name} must be of version {VERSION}")
    require_contents(wheel, sdist)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```\n+^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit("README.md has no example with its output")
    with tempfile.TemporaryDirectory() as empty:
        venv.create(empty, with_pip=True)
        python = Path(empty) / "bin" / "python"
        pip = python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"
        run(*pip, "-c", ROOT / "constraints.txt", wheel)
        require_works(python, found[1], found[2])
        run(*pip, "--force-reinstall", "--no-deps", sdist)
        require_works(python, found[1], found[2])
    print(f"{wheel.name} and {sdist.name}: installed and tried")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
