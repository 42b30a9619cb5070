"""Files that a replay reads and writes: what the system refuses is a `TraceError` that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxcache.errors import TraceError

_SHOWN = 160


@contextmanager
def naming(path: str | Path, what: str) -> Iterator[None]:
    """Around what is done with the file at `path`, such as "read".

    Raises:
      TraceError: The system refuses it, or this is no file name: too long, or with a NUL in it.
    """
    try:
        yield
    except OSError as error:
        raise TraceError(f"{shown(path)}: cannot be {what}: {error.strerror or error}") from error
    except ValueError as error:
        raise TraceError(f"{shown(path)!r}: is no file name: {error}") from error


def require_writable(path: Path) -> None:
    """Whether `path` could be a file, asked before the work whose result is to be written there.

    Raises:
      TraceError: It is a directory, in none, or no file name.
    """
    with naming(path, "written"):
        is_possible = path.absolute().parent.is_dir() and not path.is_dir()
    if not is_possible:
        raise TraceError(f"{shown(path)}: cannot be written: it must be a file in a folder that exists")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file.

    Raises:
      TraceError: It cannot be written.
    """
    with naming(path, "written"):
        Path(path).write_text(text, encoding="utf-8")


def shown(path: str | Path) -> str:
    """`path` for a message, whose length is bounded."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
