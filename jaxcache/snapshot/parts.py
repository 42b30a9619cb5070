"""Files of a snapshot: each a safetensors file with a checksum over its header and its arrays.

What a file says is believed only where it was checked: its size against the manifest, its header by safetensors, its
bytes by the checksum. Needs the extra `snapshot`.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache.errors import SnapshotError, UnsupportedError

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
    library = _safetensors()
    try:
        with open_file(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != part.num_bytes:
                raise SnapshotError(f"{path} must have {part.num_bytes} bytes, got {num_bytes}: it is damaged")
            arrays = _arrays_in(path)
            header = bytearray(num_bytes - sum(array.nbytes for array in arrays.values()))
            for piece in (header, *arrays.values()):
                _fill(file, piece)
    except FileNotFoundError as error:
        raise SnapshotError(f"{path} is missing: the snapshot was removed or replaced, load it again") from error
    except library.SafetensorError as error:
        raise SnapshotError(f"{path} is no safetensors file: {error}") from error
    if _checksum(bytes(header), arrays) != part.checksum:
        raise SnapshotError(f"{path} does not have the checksum that it was written with: it is damaged")
    return arrays


def open_file(path: Path) -> io.FileIO:
    """A file to be read, unbuffered. A pipe in its place reads as empty instead of blocking."""
    return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UnsupportedError("snapshots need safetensors: pip install 'jaxcache[snapshot]'") from error
    return safetensors


def _arrays_in(path: Path) -> dict[str, np.ndarray]:
    """Room for the arrays of a file, in the order in which they stand there. Their sizes are those of the file."""
    with _safetensors().safe_open(path, framework="numpy") as file:
        arrays: dict[str, np.ndarray] = {}
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise SnapshotError(
                    f"{path}: {name} must be of a dtype out of {list(_DTYPES)}, got {entry.get_dtype()}"
                )
            arrays[name] = np.empty(entry.get_shape(), _DTYPES[entry.get_dtype()])
    return arrays


def _fill(file: io.FileIO, piece: bytearray | np.ndarray) -> None:
    """Reads as many bytes as there is room for."""
    room = memoryview(piece) if isinstance(piece, bytearray) else _bytes_of(piece)
    while len(room):
        count = file.readinto(room)
        if not count:
            raise SnapshotError(f"{file.name} ends too early: it is damaged")
        room = room[count:]


def _checksum(header: bytes, arrays: Mapping[str, np.ndarray]) -> int:
    checksum = zlib.crc32(header)
    for name in sorted(arrays):
        checksum = zlib.crc32(_bytes_of(arrays[name]), checksum)
    return checksum


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
