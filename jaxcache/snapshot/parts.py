"""Files of a snapshot: each a safetensors file with a checksum over its header and its arrays.

What a file says is believed only where it was checked: its size against the manifest, its header by safetensors, its
bytes by the checksum. Needs the extra `snapshot`.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache.errors import SnapshotError, UnsupportedError

_PIECE_BYTES = 1 << 20  # of a file that is only checked
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64, "F64": np.float64}


@dataclass(frozen=True)
class Part:
    """What a file must be.

    Attributes:
      num_bytes: Its size.
      checksum: CRC-32 of its header, then of its arrays in the order of their names.
    """

    num_bytes: int
    checksum: int


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> Part:
    """Writes contiguous arrays to a new file, and waits until the device below has it. Threads may call it at once.

    Raises:
      UnsupportedError: safetensors is not installed.
      OSError: as the file system says.
    """
    _safetensors().numpy.save_file(dict(arrays), path)
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header = file.read(num_bytes - sum(array.nbytes for array in arrays.values()))
        os.fsync(file.fileno())
    return Part(num_bytes, _checksum(header, arrays))


def read_part(path: Path, part: Part) -> dict[str, np.ndarray]:
    """The arrays of a file. Threads may call it at once.

    Raises:
      SnapshotError: It is missing, or not what was written.
      UnsupportedError: safetensors is not installed.
    """
    with _opened(path, part) as file:
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in _arrays_in(path).items()}
        header = bytearray(part.num_bytes - sum(array.nbytes for array in arrays.values()))
        for piece in (header, *arrays.values()):
            _fill(file, piece)
    _require_checksum(path, part, _checksum(bytes(header), arrays))
    return arrays


def check_part(path: Path, part: Part) -> None:
    """Reads a file a piece at a time and compares its checksum. Threads may call it at once.

    Raises:
      SnapshotError, UnsupportedError: as `read_part`.
    """
    with _opened(path, part) as file:
        sizes = {name: math.prod(shape) * dtype().itemsize for name, (shape, dtype) in _arrays_in(path).items()}
        header_bytes = part.num_bytes - sum(sizes.values())
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=header_bytes), strict=False))
        checksum = _checksum_of(file, 0, header_bytes, 0)
        for name in sorted(sizes):
            checksum = _checksum_of(file, starts[name], sizes[name], checksum)
    _require_checksum(path, part, checksum)


@contextmanager
def _opened(path: Path, part: Part) -> Iterator[io.FileIO]:
    """A file of the size that it must have; whatever else is wrong with it is a SnapshotError."""
    library = _safetensors()
    try:
        with open_file(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != part.num_bytes:
                raise SnapshotError(f"{path} must have {part.num_bytes} bytes, got {num_bytes}: it is damaged")
            yield file
    except FileNotFoundError as error:
        raise SnapshotError(f"{path} is missing: the snapshot was removed or replaced, load it again") from error
    except library.SafetensorError as error:
        raise SnapshotError(f"{path} is no safetensors file: {error}") from error


def _require_checksum(path: Path, part: Part, checksum: int) -> None:
    if checksum != part.checksum:
        raise SnapshotError(f"{path} does not have the checksum that it was written with: it is damaged")


def open_file(path: Path) -> io.FileIO:
    """A file to be read, unbuffered. A pipe in its place is empty, instead of waiting for a writer.

    Raises:
      SnapshotError: It is a folder.
      OSError: as the file system says.
    """
    try:
        return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except IsADirectoryError as error:
        raise SnapshotError(f"{path} is a folder, and must be a file: the snapshot is damaged") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UnsupportedError("snapshots need safetensors: pip install 'jaxcache[snapshot]'") from error
    return safetensors


def _arrays_in(path: Path) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shapes and dtypes of the arrays of a file, in the order in which they stand there; they fill it."""
    with _safetensors().safe_open(path, framework="numpy") as file:
        arrays: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {}
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise SnapshotError(
                    f"{path}: {name} must be of a dtype out of {list(_DTYPES)}, got {entry.get_dtype()}"
                )
            arrays[name] = (tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
    return arrays


def _fill(file: io.FileIO, piece: bytearray | np.ndarray) -> None:
    """Reads as many bytes as there is room for."""
    room = memoryview(piece) if isinstance(piece, bytearray) else _bytes_of(piece)
    while len(room):
        count = file.readinto(room)
        if not count:
            raise SnapshotError(f"{file.name} ends too early: it is damaged")
        room = room[count:]


def _checksum_of(file: io.FileIO, start: int, length: int, checksum: int) -> int:
    """The checksum continued over so many bytes of a file from `start` on."""
    piece = bytearray(min(length, _PIECE_BYTES))
    file.seek(start)
    for done in range(0, length, _PIECE_BYTES):
        del piece[length - done :]
        _fill(file, piece)
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _checksum(header: bytes, arrays: Mapping[str, np.ndarray]) -> int:
    checksum = zlib.crc32(header)
    for name in sorted(arrays):
        checksum = zlib.crc32(_bytes_of(arrays[name]), checksum)
    return checksum


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
