"""A file that is damaged, made up, or of another cache is refused by name, whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcache
from jaxcache.errors import SnapshotError
from jaxcache.index.policies.registry import Policy
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.pools import stacks
from jaxcache.snapshot import books, manifest, save
from jaxcache.snapshot.manifest import FILE_NAME, Manifest
from jaxcache.snapshot.parts import write_part
from tests.snapshot.caches import MODEL, lived
from tests.support.recorded_lives import make_config


@pytest.fixture(scope="module")
def life():
    return lived(7, "both", Policy.ADAPTIVE)


@pytest.fixture
def saved(life, tmp_path, monkeypatch):
    """A snapshot of some parts, to be spoilt."""
    monkeypatch.setattr(stacks, "PART_BYTES", 80)
    jaxcache.save_snapshot(tmp_path / "s", life.memory, model=MODEL)
    return tmp_path / "s"


def load(path, life, **changes):
    return jaxcache.load_snapshot(path, dataclasses.replace(life.config, **changes), model=MODEL)


def folder_of(path):
    return path / Manifest.read(path).folder


def test_any_flipped_bit_in_any_file_is_noticed(saved, life):
    files = [saved / FILE_NAME, *folder_of(saved).iterdir()]
    assert len(files) > 5
    before = fingerprint(load(saved, life))
    dice = random.Random(1)
    for file in files:
        data = file.read_bytes()
        for position in {0, 7, 8, 9, len(data) - 1, *(dice.randrange(len(data)) for _ in range(12))}:
            spoilt = bytearray(data)
            spoilt[position] ^= 1 << dice.randrange(8)
            file.write_bytes(spoilt)
            with pytest.raises(SnapshotError):
                load(saved, life)
        file.write_bytes(data)
    assert fingerprint(load(saved, life)) == before == fingerprint(life.memory)


def test_files_cut_grown_swapped_or_gone_are_noticed(saved, life):
    first, second = (save.part_path(folder_of(saved), "full", i) for i in (0, 1))
    data, other = first.read_bytes(), second.read_bytes()
    assert len(data) == len(other) and data != other
    for file, content in ((first, data), (saved / FILE_NAME, (saved / FILE_NAME).read_bytes())):
        for spoilt in (b"", content[:-1], content + b"\0", content[: len(content) // 2], bytes(len(content))):
            file.write_bytes(spoilt)
            with pytest.raises(SnapshotError, match=r"damaged|no manifest|no safetensors"):
                load(saved, life)
        file.unlink()
        with pytest.raises(SnapshotError, match=r"missing|there is no snapshot"):
            load(saved, life)
        file.write_bytes(content)
    first.write_bytes(other)
    with pytest.raises(SnapshotError, match="checksum"):
        load(saved, life)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"null", b"[" * 100_000, b'{"manifest": 3}', b"\xff"])
def test_what_is_no_manifest_is_refused(content, life, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(SnapshotError):
        load(tmp_path, life)


def with_manifest(path, change):
    """Writes a manifest with a change, and with the checksum that it must have."""
    fields = json.loads(json.loads((path / FILE_NAME).read_bytes())["manifest"])
    change(fields)
    body = json.dumps(fields)
    (path / FILE_NAME).write_text(json.dumps({"checksum": zlib.crc32(body.encode()), "manifest": body}))


MANIFESTS = {
    "another version": (lambda m: m.update(version=1), "must be of version 2, got 1"),
    "a folder elsewhere": (lambda m: m.update(folder="../elsewhere"), "no manifest"),
    "a folder that is none": (lambda m: m.update(folder=3), "no manifest"),
    "no parts": (lambda m: m.pop("parts"), "no manifest"),
    "other parts": (lambda m: m["parts"].pop("full"), "no manifest.*parts of"),
    "no books": (lambda m: m["parts"].pop("books"), "no manifest.*parts of"),
    "books without end": (lambda m: m["parts"]["books"][0].update(num_bytes=2**50), "at most"),
    "a part too few": (lambda m: m["parts"]["window"].pop(), "parts of window must be"),
    "a part that is none": (lambda m: m["parts"]["window"].append(4), "no manifest"),
    "a size that is none": (lambda m: m["parts"]["window"][0].update(num_bytes=-1), "no manifest"),
    "a size of another type": (lambda m: m["parts"]["window"][0].update(num_bytes=True), "no manifest"),
    "a name that is a path": (lambda m: m["rows_per_part"].update({"../../etc": 3}), "no manifest"),
    "rows without end": (lambda m: m["parts"]["full"][0].update(num_bytes=2**40), "at most"),
    "parts of no rows": (lambda m: m["rows_per_part"].update(full=0), "rows_per_part of full"),
    "parts of too many rows": (lambda m: m["rows_per_part"].update(full=10**9), "rows_per_part of full"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_made_up_manifests_are_refused(name, saved, life):
    change, message = MANIFESTS[name]
    with_manifest(saved, change)
    with pytest.raises(SnapshotError, match=message):
        load(saved, life)
    if "no manifest" in message:
        with pytest.raises(SnapshotError, match=message):
            jaxcache.verify_snapshot(saved)


def with_books(path, change):
    """Writes books with a change, and with the checksums that they must have."""
    file = folder_of(path) / "books.safetensors"
    arrays = load_file(file)
    change(arrays)
    part = write_part(file, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with_manifest(path, lambda m: m["parts"].update(books=[dataclasses.asdict(part)]))


def at(name, index, value):
    def change(books):
        books[name][index] = value

    return change


def repeat(name):
    def change(books):
        books[name][0] = books[name][1]

    return change


BOOKS = {
    "an array is missing": lambda b: b.pop("tree.parent"),
    "an array of another kind": lambda b: b.update({"tree.parent": b["tree.parent"].astype(np.float64)}),
    "an array of two dimensions": lambda b: b.update({"tree.tokens": b["tree.tokens"].reshape(-1, 1)}),
    "an array too short": lambda b: b.update({"tree.tokens": b["tree.tokens"][:-1]}),
    "keys too short": lambda b: b.update({"tree.keys": b["tree.keys"][:-4]}),
    "a node is its own parent": at("tree.parent", 1, 1),
    "a parent comes later": at("tree.parent", 0, 2),
    "no such root": at("tree.parent", 0, -9),
    "a part of a page": at("tree.tokens", 0, 3),
    "no tokens": at("tree.tokens", 0, 0),
    "tokens beyond all bounds": at("tree.tokens", 0, 2**62),
    "a namespace of nonsense": lambda b: b.update(
        {"tree.namespaces": np.arange(9, dtype=np.uint8), "tree.namespace_bytes": np.array([9])}
    ),
    "a page in two nodes": repeat("tree.value.0"),
    "a page that is none": at("tree.value.0", 0, 2**30),
    "a page that is the sink": at("tree.value.0", 0, 0),
    "a state of two nodes": repeat("tree.value.2"),
    "values too many": at("tree.count.0", 0, 9),
    "a hole in the first component": at("tree.count.0", 0, 0),
    "a node twice in the order": repeat("tree.policy.0.order"),
    "a node that is none in the order": at("tree.policy.0.order", 0, 10**6),
    "a use in the future": at("tree.policy.0.used", 0, 10**9),
    "two uses at once": repeat("tree.policy.0.used"),
    "hits below nothing": at("tree.policy.0.hits", 0, -1),
    "what is no number": at("tree.policy.0.found", 0, np.nan),
    "what is infinite": at("tree.policy.0.seen", 0, np.inf),
    "a page free and cached": lambda b: at("pages.states", b["tree.value.0"][0], 0)(b),
    "a page of a request that is gone": lambda b: at("pages.states", b["tree.value.0"][0], 1)(b),
    "a page in no known state": at("pages.states", 1, 77),
    "no sink": at("pages.states", 0, 0),
    "a page twice in the free list": repeat("pages.free"),
    "a free page lost": lambda b: b.update({"pages.free": b["pages.free"][1:]}),
    "a cached page lost": lambda b: at("pages.states", b["tree.value.0"][0], 4)(b),
    "a window page of two pages": lambda b: at("pages.full_to_window", 0, b["pages.full_to_window"].max())(b),
    "a map to nowhere": at("pages.full_to_window", 3, 10**6),
    "a state free and cached": lambda b: at("states.states", b["tree.value.2"][0], 0)(b),
    "a row twice": repeat("rows.free_rows"),
}


@pytest.mark.parametrize("name", BOOKS)
def test_made_up_books_are_refused(name, saved, life):
    with_books(saved, BOOKS[name])
    with pytest.raises(SnapshotError):
        load(saved, life)


def test_made_up_rows_are_refused(saved, life):
    file = save.part_path(folder_of(saved), "full", 0)
    rows = load_file(file)
    for changed in ({}, {"rows_0": rows["rows_0"]}, rows | {"rows_1": rows["rows_1"][:, :1]},
                    {name: array.astype(np.uint16) for name, array in rows.items()}):  # fmt: skip
        part = write_part(file, {"x": np.zeros(3, np.uint8)} | changed)
        with_manifest(saved, lambda m, part=part: m["parts"]["full"].__setitem__(0, dataclasses.asdict(part)))
        with pytest.raises(SnapshotError, match="rows_"):
            load(saved, life)
    part = write_part(file, {"rows_0": np.zeros(3, np.float16)})
    with_manifest(saved, lambda m: m["parts"]["full"].__setitem__(0, dataclasses.asdict(part)))
    with pytest.raises(SnapshotError, match="rows_0 must be of a dtype out of"):
        load(saved, life)


def deep(config, **changes):
    """The config, with changes of its KV pools."""
    sides = {side: dataclasses.replace(getattr(config.kv, side), **changes) for side in ("full", "window")}
    return dataclasses.replace(config, kv=dataclasses.replace(config.kv, **sides))


DIFFERENT = {
    "config.sliding_window_size": lambda c: dataclasses.replace(c, sliding_window_size=6),
    "config.is_eagle": lambda c: dataclasses.replace(c, is_eagle=True),
    "config.kv.full.dtype": lambda c: deep(c, dtype=jnp.bfloat16),
    "config.kv.full.page_size": lambda c: deep(c, page_size=2),
    "config.kv.full.head_dim": lambda c: deep(c, head_dim=4, v_head_dim=None),
    "config.kv.full.head_num": lambda c: deep(c, head_num=2),
    "config.states.conv_shape": lambda c: dataclasses.replace(
        c, states=dataclasses.replace(c.states, conv_shape=(2, 1))
    ),
    "config.states": lambda c: make_config("window", policy=c.policy),
    "config.kv": lambda c: make_config("state", policy=c.policy),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_config_is_refused_by_name(name, saved, life):
    with pytest.raises(
        SnapshotError, match=rf"{name.replace('.', '[.]')}.* is .*, but the snapshot in .* was made with"
    ):
        jaxcache.load_snapshot(saved, DIFFERENT[name](life.config), model=MODEL)


def test_another_model_is_refused(saved, life):
    with pytest.raises(SnapshotError, match=r"model is 'another', but the snapshot in .* was made with 'tiny"):
        jaxcache.load_snapshot(saved, life.config, model="another")


def test_every_field_of_a_config_counts_but_for_those_that_say_so(life):
    """A field that is added later is part of the fingerprint, unless somebody decides otherwise."""
    names = {name.rpartition(".")[2] for name in manifest.fingerprint(MODEL, life.config)}
    fields = [field.name for part in (life.config, life.config.kv.full, life.config.states)
              for field in dataclasses.fields(part)]  # fmt: skip
    free = {"axis_name", "shards", "chunk", "buckets", "state_interval", "max_running", "max_context_len"}
    assert set(fields) - names == free | {"enable_kv_cache_events"}


def test_books_fit_their_bound(saved, life):
    assert (folder_of(saved) / "books.safetensors").stat().st_size < books.max_bytes(life.config)


def test_where_there_is_nothing_nothing_is_found(life, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SnapshotError, match="there is no snapshot in"):
            load(path, life)


def test_a_snapshot_can_be_carried_elsewhere(saved, life, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(saved)
    assert fingerprint(load(tmp_path / "copy", life)) == fingerprint(life.memory)
