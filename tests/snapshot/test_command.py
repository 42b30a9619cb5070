"""`jaxcache snapshot PATH`: what a saved cache is of, and whether it is whole."""

from __future__ import annotations

import jaxcache
from jaxcache.cli.main import main
from tests.snapshot.caches import MODEL, lived


def test_a_whole_snapshot_is_shown(tmp_path, capsys):
    manifest = jaxcache.save_snapshot(tmp_path, lived(7).memory, model=MODEL)
    assert jaxcache.verify_snapshot(tmp_path, threads=1) == manifest
    assert main(["snapshot", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert ["config.kv.page_size", "4"] in lines and ["model", *MODEL.split()] in lines
    assert f"{manifest.num_bytes} bytes, all as they were written" in out and not err


def test_a_damaged_one_and_none_are_exit_code_one(tmp_path, capsys):
    manifest = jaxcache.save_snapshot(tmp_path, lived(7).memory, model=MODEL)
    file = tmp_path / manifest.folder / "kv-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    for path, why in ((tmp_path, "does not have the checksum"), (tmp_path / "nowhere", "there is no snapshot")):
        assert main(["snapshot", str(path)]) == 1
        out, err = capsys.readouterr()
        assert why in err and not out
