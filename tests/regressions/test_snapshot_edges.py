"""Snapshots that somebody moved, or made up, which once ended in another way than with a SnapshotError."""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib

import pytest

import jaxcache
from jaxcache.errors import SnapshotError
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.snapshot.manifest import FILE_NAME, Manifest
from tests.snapshot.caches import MODEL, lived


@pytest.fixture(scope="module")
def life():
    return lived(1)


@pytest.fixture
def saved(life, tmp_path):
    jaxcache.save_snapshot(tmp_path / "s", life.memory, model=MODEL)
    return tmp_path / "s"


def test_a_snapshot_whose_files_were_moved_and_linked_to_is_saved_anew(saved, life, tmp_path):
    """Sweeping up refused the link when the new snapshot was in place already, and before every save after that."""
    folder = saved / Manifest.read(saved).folder
    elsewhere = folder.rename(tmp_path / "larger disk")
    folder.symlink_to(elsewhere)
    for _ in range(2):
        jaxcache.save_snapshot(saved, life.memory, model=MODEL)
        assert fingerprint(jaxcache.load_snapshot(saved, life.config, model=MODEL)) == fingerprint(life.memory)
    assert folder.is_symlink() and any(elsewhere.iterdir())


@pytest.mark.parametrize("name", [FILE_NAME, "books.safetensors"])
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(name, saved, life):
    file = next(saved.rglob(name))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SnapshotError):
        jaxcache.load_snapshot(saved, life.config, model=MODEL)


def test_a_fingerprint_of_names_that_are_none_is_refused(saved, life):
    """Names of several types cannot be sorted."""
    fields = json.loads(json.loads((saved / FILE_NAME).read_bytes())["manifest"])
    body = json.dumps(fields | {"fingerprint": [[1, 2], ["model", MODEL]]})
    (saved / FILE_NAME).write_text(json.dumps({"checksum": zlib.crc32(body.encode()), "manifest": body}))
    with pytest.raises(SnapshotError, match="no manifest"):
        jaxcache.load_snapshot(saved, life.config, model=MODEL)


@pytest.mark.parametrize("name", [FILE_NAME, "books.safetensors", "*-00000.safetensors"])
def test_a_folder_in_place_of_a_file_is_refused(name, saved, life):
    """It ended with an IsADirectoryError."""
    file = next(saved.rglob(name))
    file.unlink()
    file.mkdir()
    with pytest.raises(SnapshotError, match="folder"):
        jaxcache.load_snapshot(saved, life.config, model=MODEL)
    with pytest.raises(SnapshotError, match="folder"):
        jaxcache.verify_snapshot(saved)


def test_a_file_is_verified_a_piece_at_a_time(saved):
    """A sparse file of 3 GB took 3 GB of memory before its checksum was found to be wrong."""
    part = next(saved.rglob("kv-00000.safetensors"))
    length = 400 << 20
    header = json.dumps({"rows_0": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    with part.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + length)
    with_part(saved, "kv", num_bytes=8 + len(header) + length)
    tracemalloc.start()
    with pytest.raises(SnapshotError, match="checksum"):
        jaxcache.verify_snapshot(saved, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def with_part(saved, stack, **changes):
    """Changes what the manifest says of the first file of a stack."""
    fields = json.loads(json.loads((saved / FILE_NAME).read_bytes())["manifest"])
    fields["parts"][stack][0] |= changes
    body = json.dumps(fields)
    (saved / FILE_NAME).write_text(json.dumps({"checksum": zlib.crc32(body.encode()), "manifest": body}))
