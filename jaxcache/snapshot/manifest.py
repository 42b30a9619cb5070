"""What a snapshot says of itself: a version, what it is of, and its files with their sizes and checksums. JSON.

The fingerprint is every field of the `MemoryConfig` it was made with, but for what may change from one life of a cache
to the next, and the caller's name of the model. Sizes, policy and `need_sort` are in it, and may differ when
it is loaded: `jaxcache.snapshot.fit` makes them fit.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcache.errors import ArgumentError, SnapshotError, shown
from jaxcache.manager.config import MemoryConfig
from jaxcache.pools.identity import described
from jaxcache.snapshot.parts import Part, open_file

VERSION = 2
FILE_NAME = "jaxcache-snapshot.json"
FOLDER = re.compile(r"data-[0-9a-f]{16}")
_MAX_BYTES = 64 << 20
_MAY_DIFFER = {
    "axis_name",
    "shards",
    "chunk",
    "buckets",
    "state_interval",
    "max_running",
    "max_context_len",
    "enable_kv_cache_events",
}


@dataclass(frozen=True)
class Manifest:
    """See the module.

    Attributes:
      folder: Name of the folder with the files.
      fingerprint: What it is of, see `fingerprint`.
      parts: Files by what is in them: "books", and each stack of layers of the pool.
      rows_per_part: For each stack of layers, rows in a file, but for the last one.
    """

    folder: str
    fingerprint: dict[str, Any]
    parts: dict[str, list[Part]]
    rows_per_part: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(part.num_bytes for parts in self.parts.values() for part in parts)

    def encode(self) -> bytes:
        """As JSON, with a checksum."""
        fields = {"version": VERSION, **dataclasses.asdict(self)}
        body = json.dumps(fields, sort_keys=True)
        return json.dumps({"checksum": zlib.crc32(body.encode()), "manifest": body}).encode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """That of the snapshot in the folder `path`.

        Raises:
          SnapshotError: There is none, it is damaged, or of another version.
        """
        file = path / FILE_NAME
        try:
            with io.BufferedReader(open_file(file)) as opened:
                data = opened.read(min(_MAX_BYTES, os.fstat(opened.fileno()).st_size) + 1)
            outer = json.loads(data[:_MAX_BYTES])
            body, checksum = outer["manifest"], outer["checksum"]
            fields = json.loads(body)
            if checksum != zlib.crc32(body.encode()):
                raise SnapshotError(f"{file} does not have the checksum that it was written with: it is damaged")
            if fields["version"] != VERSION:
                raise SnapshotError(
                    f"{file} must be of version {VERSION}, got {fields['version']!r}: load it with the release of "
                    "jaxcache that wrote it, or start without it"
                )
            manifest = cls(
                _folder(fields["folder"]),
                dict(**fields["fingerprint"]),  # names only: they are sorted later
                {_name(what): [_part(**part) for part in parts] for what, parts in fields["parts"].items()},
                {_name(stack): _count(rows) for stack, rows in fields["rows_per_part"].items()},
            )
            if manifest.parts.keys() != {"books"} | manifest.rows_per_part.keys():
                raise ValueError(f"parts of {sorted(manifest.parts)}, rows of {sorted(manifest.rows_per_part)}")
            return manifest
        except FileNotFoundError as error:
            raise SnapshotError(f"path: there is no snapshot in {path}: it has no {FILE_NAME}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"{file} is no manifest of a snapshot: {error!r}") from error


def _folder(name: Any) -> str:
    if not FOLDER.fullmatch(name):
        raise ValueError(f"folder {name!r}")
    return name


def _name(what: str) -> str:
    if not re.fullmatch("[a-z]+", what):
        raise ValueError(f"{what!r} is no name")
    return what


def _part(num_bytes: Any, checksum: Any) -> Part:
    return Part(_count(num_bytes), _count(checksum))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def fingerprint(model: str, config: MemoryConfig) -> dict[str, Any]:
    """What a snapshot must have been made of to be of use: by name, as JSON has it.

    Raises:
      ArgumentError: `model` is no name.
    """
    if not isinstance(model, str) or not model:
        raise ArgumentError(f"model must name the weights, such as their revision, as a str, got {shown(model)}")
    return {"model": model, **described("config", config, _MAY_DIFFER)}


def require_same(path: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises SnapshotError with the first field in which two fingerprints differ."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise SnapshotError(
                f"{name} is {mine.get(name)!r}, but the snapshot in {path} was made with {theirs.get(name)!r}: what it "
                "holds would be wrong here; load it with what it was made with, or start without it"
            )
