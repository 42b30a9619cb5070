"""A save that fails or dies, wherever that may be, leaves a snapshot that is whole; so does one that is killed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

import jaxcache
from jaxcache.errors import SnapshotError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pools import stacks
from jaxcache.snapshot.folder import locked
from jaxcache.snapshot.manifest import FOLDER
from tests.snapshot.caches import MODEL, assert_same, lived

SAVE_AGAIN_AND_AGAIN = """
import itertools, sys
import jaxcache
from jaxcache.pools import stacks
from tests.snapshot.caches import MODEL, lived

stacks.PART_BYTES = 40
lives = [lived(1), lived(2)]
for i in itertools.count():
    jaxcache.save_snapshot(sys.argv[1], lives[i % 2].memory, model=MODEL)
    print(i, flush=True)
"""


class Died(BaseException):
    """What a killed process does not do any more."""


class Faults:
    """Counts what a save does to the file system, and has it fail once, or die, at one of these points."""

    def __init__(self, monkeypatch, at: int, error: BaseException):
        self.count, self.at, self.error = 0, at, error
        self.is_dead = False
        for owner, name in (
            (os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree"),
            (safetensors.numpy, "save_file"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name, call):
        def watch(*args, **kwargs):
            if self.is_dead:
                raise Died
            self.count += 1
            if self.count != self.at:
                return call(*args, **kwargs)
            self.is_dead = isinstance(self.error, Died)
            if name == "save_file":  # half of it is there
                call(*args, **kwargs)
                os.truncate(args[1], Path(args[1]).stat().st_size // 2)
            if name == "open" and "wb" in args:  # the file is there, and empty
                call(*args, **kwargs).close()
            if name == "rmtree":
                next(Path(args[0]).iterdir()).unlink()
            raise self.error

        return watch


def folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if FOLDER.fullmatch(entry.name)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Died()], ids=["fails", "dies"])
def test_wherever_a_save_ends_the_snapshot_is_whole(error, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "PART_BYTES", 400)
    old, new = lived(1), lived(2)
    path, prints = tmp_path / "s", {fingerprint(life.memory): life for life in (old, new)}
    outcomes = []
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            jaxcache.save_snapshot(path, old.memory, model=MODEL, threads=1)
            faults = Faults(patch, at, error)
            try:
                jaxcache.save_snapshot(path, new.memory, model=MODEL, threads=1)
            except (OSError, Died) as raised:
                assert raised is error or isinstance(raised, Died)
        if faults.count < at:
            break
        loaded = jaxcache.load_snapshot(path, old.config, model=MODEL)
        outcomes.append(fingerprint(loaded))
        if outcomes[-1] == fingerprint(old.memory) and not isinstance(error, Died):
            assert len(folders(path)) == 1  # nothing is left of a save that failed
        assert_same(prints[outcomes[-1]].memory, loaded)
    assert len(outcomes) > 15 and set(outcomes) == set(prints)
    assert outcomes == sorted(outcomes, key=[fingerprint(old.memory), fingerprint(new.memory)].index)
    assert len(folders(path)) == 1  # of the last save, which did not fail; it swept up after all those before


@pytest.mark.parametrize("kills", [2])
def test_a_killed_process_leaves_a_whole_snapshot(kills, tmp_path):
    lives = {fingerprint(life.memory): life for life in (lived(1), lived(2))}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    dice = random.Random()
    for _ in range(kills):
        command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
            try:
                assert child.stdout is not None and child.stdout.readline()
                time.sleep(dice.random() * 0.3)
            finally:
                child.kill()
        loaded = jaxcache.load_snapshot(tmp_path, next(iter(lives.values())).config, model=MODEL)
        assert_same(lives[fingerprint(loaded)].memory, loaded)
    jaxcache.save_snapshot(tmp_path, next(iter(lives.values())).memory, model=MODEL)
    assert len(folders(tmp_path)) == 1


def test_two_do_not_save_to_one_place_at_once(tmp_path):
    life = lived(1)
    jaxcache.save_snapshot(tmp_path, life.memory, model=MODEL)
    with locked(tmp_path, exclusive=False):
        jaxcache.load_snapshot(tmp_path, life.config, model=MODEL)
        with pytest.raises(SnapshotError, match="another process saves or loads"):
            jaxcache.save_snapshot(tmp_path, life.memory, model=MODEL)
    with locked(tmp_path, exclusive=True), pytest.raises(SnapshotError, match="another process saves or loads"):
        jaxcache.load_snapshot(tmp_path, life.config, model=MODEL)


def test_what_else_is_in_the_folder_stays(tmp_path):
    life = lived(1)
    (tmp_path / "data-of-the-user").mkdir()
    (tmp_path / "data-0123456789abcdef").symlink_to(tmp_path / "data-of-the-user")
    (tmp_path / "data-of-the-user" / "file").touch()
    jaxcache.save_snapshot(tmp_path, life.memory, model=MODEL)
    assert (tmp_path / "data-0123456789abcdef").is_symlink()
    assert (tmp_path / "data-of-the-user" / "file").exists()
