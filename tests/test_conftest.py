"""What runs where: marks say what a test needs, and JAXCACHE_NO_SKIP lets no skip pass for a success."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = {
    "test_body": "def test(): pytest.skip('in the body')",
    "test_mark": "@pytest.mark.skipif(True, reason='by a mark')\ndef test(): pass",
    "test_setup": "@pytest.fixture\ndef given(): pytest.importorskip('no_such_module')\n\ndef test(given): pass",
    "test_module": "pytest.skip('as a whole', allow_module_level=True)",
    "test_fine": "def test(): pass\n\n@pytest.mark.xfail\ndef test_known(): raise AssertionError",
}
REASONS = ["in the body", "by a mark", "could not import 'no_such_module'", "as a whole"]


@pytest.mark.parametrize(
    ("no_skip", "closing"),
    [("", "1 passed, 4 skipped, 1 xfailed"), ("1", "1 failed, 1 passed, 1 xfailed, 3 errors")],
    ids=["skips are skips", "skips are failures"],
)
def test_no_skip_fails_every_skip_with_its_reason(tmp_path, no_skip, closing):
    for name, source in SUITE.items():
        (tmp_path / f"{name}.py").write_text(f"import pytest\n\n{source}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rA", "--continue-on-collection-errors", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAXCACHE_NO_SKIP": no_skip}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert closing in done.stdout.splitlines()[-1], done.stdout + done.stderr
    assert done.returncode == bool(no_skip)
    for reason in REASONS:
        assert reason in done.stdout


def test_what_a_test_needs_for_an_h200_is_said_by_its_mark():
    """`make test-h200` selects by mark: a condition of the test's own would keep it out, unseen."""
    own_condition = re.compile(r"skipif\(.*(h200\.missing|__version)|\b(skip|importorskip)\(.*(h200|mosaic)", re.I)
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(ROOT.glob("tests/**/*.py"))
        for line in path.read_text().splitlines()
        if own_condition.search(line)
    ]
    assert own_condition.search('@pytest.mark.skipif(h200.missing() is not None, reason="")')
    assert not [line for line in found if not line.startswith(("tests/test_conftest.py", "tests/kernels/conftest.py"))]
