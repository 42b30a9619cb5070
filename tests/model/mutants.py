"""Do the drivers see bugs? `python -m tests.model.mutants [--ops 20000] [--jobs 2] [NAME ...]`

Each mutant of `mutants.txt` is one textual change to a copy of the package; a driver then runs over the copy and has to
fail. Mutants of manager, plans and device table go to `manager_driver`, with a quarter of the operations, those of the
tree's further components ("components: ...") to `tree_driver`, all others to `driver`. What no driver reaches names the
tests that have to fail instead.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.model.tree_driver import OPS_PER_LIFE

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.txt")
WITH_A_STEP = (
    *(
        "manager/manager.py",
        "manager/stepping.py",
        "manager/admission.py",
        "manager/forking.py",
        "manager/swap.py",
        "device/packing.py",
        "steps/decode_batch.py",
        "steps/planner.py",
    ),
    *("steps/runner.py", "steps/compiled.py", "steps/plan.py", "steps/batch.py", "steps/buckets.py"),
)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """`old`, which must occur exactly once in `file`, becomes `new`; `tests` must fail then, or else a driver."""

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def driver(self) -> str:
        if self.name.startswith("components:"):
            return "tree_driver"
        needs_a_step = self.file in WITH_A_STEP or self.name.startswith("table changes")
        return "manager_driver" if needs_a_step else "driver"

    def command(self, ops: int) -> list[str]:
        if self.tests:
            return ["pytest", "-x", "-q", "-p", "no:cacheprovider", *self.tests]
        if self.driver == "tree_driver":
            return ["tests.model.tree_driver", "--seeds", f"0:{ops // OPS_PER_LIFE}"]
        return [f"tests.model.{self.driver}", "--ops", str(ops // 4 if self.driver == "manager_driver" else ops)]

    def apply(self, package: Path) -> None:
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise LookupError(f"{self.old!r} occurs {source.count(self.old)} times in {self.file}, not once")
        mutated = source.replace(self.old, self.new)
        compile(mutated, self.file, "exec")
        path.write_text(mutated, encoding="utf-8")


def read_mutants() -> list[Mutant]:
    mutants = []
    for title, body in re.findall(r"^# (.+)\n((?:[-+].*\n)+)", LIST.read_text(encoding="utf-8"), re.MULTILINE):
        title, _, tests = title.partition(" | ")
        file, _, name = title.partition(": ")
        lines = body.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        mutants.append(Mutant(file, name, old, new, tuple(tests.split())))
    return mutants


def is_caught(mutant: Mutant, ops: int) -> tuple[bool, str]:
    """Runs a driver over the mutated package; returns whether it failed, and why."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        shutil.copytree(ROOT / "jaxcache", place / "jaxcache", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "benchmarks", "pyproject.toml"):
            (place / name).symlink_to(ROOT / name)
        try:
            mutant.apply(place / "jaxcache")
        except (LookupError, SyntaxError) as error:
            return False, f"does not apply: {error}"
        command = [sys.executable, "-m", *mutant.command(ops)]
        environment = {**os.environ, "PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return True, "hangs"
    if not done.returncode:
        return False, "no violation"
    if mutant.tests:
        failed = re.findall(r"^FAILED .*::(.*)", done.stdout, re.MULTILINE)
        return bool(failed), (failed or done.stdout.splitlines()[-1:] or [f"exit code {done.returncode}"])[0][:110]
    errors = [line for line in done.stderr.splitlines() if re.match(r"\w+(\.\w+)*(: |$)", line)]
    return True, (errors or [f"exit code {done.returncode}"])[-1][:110]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--ops", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in read_mutants() if not arguments.names or mutant.name in arguments.names]
    started = time.perf_counter()
    missed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, (caught, why) in zip(
            chosen, pool.map(lambda mutant: is_caught(mutant, arguments.ops), chosen), strict=True
        ):
            missed += not caught
            print(f"{'caught' if caught else 'MISSED'}  {mutant.name:45} {why}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught in {time.perf_counter() - started:.0f} s")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
