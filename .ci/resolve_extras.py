"""Resolves the CUDA extras without installing them.

A resolve that succeeds proves little (pip ignores an extra it does not know), so what an extra is for has to
be in the answer, and torch must not be.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BRINGS = {
    "cuda12,triton": {"jax-cuda12-plugin", "jax-triton", "triton"},
    "cuda13,triton": {"jax-cuda13-plugin", "jax-triton", "triton"},
}


def resolved(extras: str) -> set[str]:
    """Names of the packages pip would install for jaxcache with `extras`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
        # fast-deps reads the metadata inside a remote wheel, so a resolve costs seconds and downloads nothing.
        command += ["--use-feature=fast-deps"]
        command += ["--ignore-installed", "--report", str(report), "-c", "constraints.txt", f".[{extras}]"]
        subprocess.run(command, check=True)
        return {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}


def main() -> int:
    """Exit status: 0 when all extras bring what they are for and none brings torch."""
    failed = False
    for extras, wanted in BRINGS.items():
        names = resolved(extras)
        missing = wanted - names
        print(f"{extras}: {len(names)} packages, missing: {sorted(missing) or 'none'}, torch: {'torch' in names}")
        failed |= bool(missing) or "torch" in names
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
