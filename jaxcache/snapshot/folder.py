"""Where a snapshot lies, and how a new one takes the place of the old one: whole, or not at all.

    path/                            0700: it holds what users wrote
      jaxcache-snapshot.json         the manifest; names the folder that counts
      data-5f0c.../                  its files
      data-91ab.../                  those of a save that is under way, or that was killed

A save writes a folder of its own, and sees to it that the disk has all of it, before the manifest is exchanged by a
rename. Folders that no manifest names are removed by the next save.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxcache.errors import ArgumentError, SnapshotError, shown
from jaxcache.snapshot.manifest import FILE_NAME, FOLDER, Manifest

_MAX_NAME = 255  # bytes of a name in a folder, on every local file system


def as_path(path: str | os.PathLike) -> Path:
    """`path` as a Path.

    Raises:
      ArgumentError: It is none, or none that a file system could have.
    """
    try:
        names = os.fspath(path)
        longest = max(map(len, os.fsencode(names).split(b"/")))
    except (TypeError, UnicodeEncodeError) as error:
        raise ArgumentError(f"path must be a str or a Path, got {shown(path)}: {error}") from error
    if not isinstance(names, str) or "\0" in names or longest > _MAX_NAME:
        raise ArgumentError(f"path must be a str or a Path with names of at most {_MAX_NAME} bytes, got {shown(path)}")
    return Path(names)


@contextmanager
def locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Keeps other processes from replacing the snapshot in `path` meanwhile, or, exclusively, from reading it too.

    Raises:
      SnapshotError: There is no such folder, or another process has it locked.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SnapshotError(f"path: there is no snapshot in {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SnapshotError(
                f"path: another process saves or loads the snapshot in {path}: try again later"
            ) from error
        yield
    finally:
        os.close(folder)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder in `path` to write a snapshot to. It is gone afterwards, unless `publish` was called.

    Raises:
      ArgumentError: `path` is a file.
      SnapshotError: Another process saves there, or loads.
      OSError: as the file system says.
    """
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"path must be a folder, or where one can be made, got the file {path}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path, exclusive=True):
        _sweep(path)
        folder = path / f"data-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            yield folder
        except BaseException:
            _abandon(path, folder)
            raise
        _sweep(path)


def publish(path: Path, manifest: Manifest) -> None:
    """The files in the manifest's folder, which are all written, are the snapshot in `path` from now on.

    Raises:
      OSError: as the file system says. The snapshot is the old one or, if only the last wait failed, the new one.
    """
    _sync(path / manifest.folder)
    draft = path / f"{FILE_NAME}.new"
    with draft.open("wb") as file:
        file.write(manifest.encode())
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path / FILE_NAME)
    _sync(path)


def _sync(folder: Path) -> None:
    """Waits until the disk has the names in a folder."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _named(path: Path) -> str | None:
    """The folder that the manifest names; None if there is no manifest.

    Raises:
      SnapshotError: It is damaged.
    """
    return Manifest.read(path).folder if (path / FILE_NAME).exists() else None


def _abandon(path: Path, folder: Path) -> None:
    """Removes a folder, unless it is the snapshot already."""
    try:
        is_named = _named(path) == folder.name
    except SnapshotError:
        is_named = False
    if not is_named:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes the folders that the manifest does not name. With a damaged manifest none: it may be inspected by hand.

    A link or a file of such a name was not made by a save, and stays.
    """
    try:
        kept = _named(path)
    except SnapshotError:
        return
    for entry in path.iterdir():
        if FOLDER.fullmatch(entry.name) and entry.name != kept and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
