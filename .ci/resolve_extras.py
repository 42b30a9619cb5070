"""Resolves the CUDA extras without installing them.

A resolve that succeeds proves little (pip ignores an extra it does not know), so the plugin has to be in the answer,
and torch must not be.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PLUGINS = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}


def resolved(extra: str) -> set[str]:
    """Names of the packages pip would install for jaxcache with `extra`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
        # fast-deps reads the metadata inside a remote wheel, so a resolve costs seconds and downloads nothing.
        command += ["--use-feature=fast-deps"]
        command += ["--ignore-installed", "--report", str(report), "-c", "constraints.txt", f".[{extra}]"]
        subprocess.run(command, check=True)
        return {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}


def main() -> int:
    """Exit status: 0 when every extra brings its plugin and none brings torch."""
    failed = False
    for extra, plugin in PLUGINS.items():
        names = resolved(extra)
        right = plugin in names and "torch" not in names
        print(f"{extra}: {len(names)} packages, {plugin}: {plugin in names}, torch: {'torch' in names}")
        failed |= not right
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
