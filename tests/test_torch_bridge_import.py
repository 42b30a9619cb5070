"""Without torch, the bridge says which extra it needs, and jaxcache itself does not need it."""

import subprocess
import sys

HIDE_TORCH = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Hidden())
import jaxcache, jaxcache.manager.manager
"""


def run(source: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120)


def test_the_missing_extra_is_named() -> None:
    done = run(HIDE_TORCH + "import torch_bridge")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: torch_bridge needs PyTorch, which is the extra `torch`: pip install 'jaxcache[torch]'"
    )


def test_jaxcache_does_not_import_torch() -> None:
    assert run(HIDE_TORCH + "print('fine')").stdout == "fine\n"
