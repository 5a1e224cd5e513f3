"""An .npz with one large array that is written in place: rows come in any order, from any process, and never move.

An .npz is a ZIP archive of .npy files. Without compression it contains the bytes of an array unchanged, so they can be
written at their final position before the archive is complete. The checksum, which follows from the checksums of the
pieces, and the directory at the end are added later. The 10 GB of 50,000 images are written once.

Source: PKWARE's APPNOTE 6.3 (local header 4.3.7, directory 4.3.12 to 4.3.16, ZIP64 4.5.3); NumPy's NEP 1.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_ZIP64_VERSION, _UNIX = 45, 3
_MIDNIGHT_1980 = (0, 0x21)  # equal content, equal bytes
_IN_EXTRA = 0xFFFFFFFF  # sizes and offsets are always in the ZIP64 field
_READ_BYTES = 1 << 24
_WRITE_BYTES = 1 << 30  # of one call; macOS refuses 2 GB


class Piece(NamedTuple):
    """Consecutive bytes, by their checksum and number."""

    crc: int
    size: int


def crc_of(pieces: Iterable[Piece]) -> int:
    """CRC-32 of concatenated pieces, from their checksums.

    Appending n bytes multiplies the polynomial of the bytes before them by x^(8 n), modulo that of the checksum.
    """
    crc = 0
    for piece in pieces:
        crc = _times(_power_of_x(8 * piece.size), crc) ^ piece.crc
    return crc


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo that of CRC-32; bit 31 is the constant term."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=8)  # most pieces have one size
def _power_of_x(exponent: int) -> int:
    power, square = 1 << 31, 1 << 30  # 1 and x
    while exponent:
        if exponent & 1:
            power = _times(square, power)
        square = _times(square, square)
        exponent >>= 1
    return power


class _Entry(NamedTuple):
    """A file in the archive."""

    name: bytes
    piece: Piece
    offset: int

    def header(self) -> bytes:
        """Local header, before the data."""
        extra = struct.pack("<HHQQ", 1, 16, self.piece.size, self.piece.size)
        fixed = (_ZIP64_VERSION, 0, 0, *_MIDNIGHT_1980, self.piece.crc, _IN_EXTRA, _IN_EXTRA)
        return struct.pack("<4s5H3L2H", b"PK\3\4", *fixed, len(self.name), len(extra)) + self.name + extra

    def in_directory(self) -> bytes:
        """Entry of the directory."""
        extra = struct.pack("<HHQQQ", 1, 24, self.piece.size, self.piece.size, self.offset)
        fixed = (_ZIP64_VERSION, _UNIX, _ZIP64_VERSION, 0, 0, 0, *_MIDNIGHT_1980, self.piece.crc, _IN_EXTRA, _IN_EXTRA)
        rest = (len(self.name), len(extra), 0, 0, 0, 0o600 << 16, _IN_EXTRA)
        return struct.pack("<4s4B4H3L5H2L", b"PK\1\2", *fixed, *rest) + self.name + extra


def _directory(entries: list[_Entry], offset: int) -> bytes:
    """The end of the archive, which starts at `offset`."""
    listing = b"".join(entry.in_directory() for entry in entries)
    count, end = len(entries), offset + len(listing)
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count, len(listing), offset
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    return listing + record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, *[_IN_EXTRA] * 2, 0)


def npy_header(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> bytes:
    """Header of a .npy file."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class NpzFile:
    """An .npz in progress: `arr_0` in place, smaller arrays added at the end.

    Args:
        path: The file; not a valid .npz before `seal`.
        shape: Shape of the uint8 array `arr_0`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path = path
        self.row_bytes = int(np.prod(shape[1:], dtype=np.int64))
        self._npy_header = npy_header(shape, np.dtype(np.uint8))
        self._size = len(self._npy_header) + shape[0] * self.row_bytes
        self._start = len(self._entry(0).header()) + len(self._npy_header)

    def _entry(self, crc: int) -> _Entry:
        return _Entry(b"arr_0.npy", Piece(crc, self._size), 0)

    @property
    def bytes_reserved(self) -> int:
        """Size of the file between `create` and `seal`."""
        return self._start - len(self._npy_header) + self._size

    def create(self) -> None:
        """Reserve the file, replacing an existing one."""
        with self.path.open("wb") as file:
            file.write(self._entry(0).header() + self._npy_header)
            file.truncate(self.bytes_reserved)

    def write(self, start: int, rows: npt.NDArray[np.uint8]) -> Piece:
        """Store rows (n, ...) from row `start` on, and flush them to the disk."""
        data = np.ascontiguousarray(rows).data.cast("B")
        offset = self._start + start * self.row_bytes
        file = os.open(self.path, os.O_WRONLY)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done : done + _WRITE_BYTES], offset + done)
            getattr(os, "fdatasync", os.fsync)(file)  # macOS has no fdatasync
        finally:
            os.close(file)
        return Piece(zlib.crc32(data), len(data))

    def read_piece(self, start: int, stop: int) -> Piece:
        """Checksum of the bytes of rows start .. stop - 1."""
        size, crc, done = (stop - start) * self.row_bytes, 0, 0
        with self.path.open("rb") as file:
            file.seek(self._start + start * self.row_bytes)
            while block := file.read(min(_READ_BYTES, size - done)):
                crc, done = zlib.crc32(block, crc), done + len(block)
        return Piece(crc, done)

    def seal(self, pieces: Iterable[Piece], others: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Complete the archive from the pieces of all rows, in order, and further arrays by name; may be repeated."""
        crc = crc_of([Piece(zlib.crc32(self._npy_header), len(self._npy_header)), *pieces])
        entries = [self._entry(crc)]
        with self.path.open("rb+") as file:
            file.write(entries[0].header() + self._npy_header)
            file.seek(self.bytes_reserved)
            for name, array in others.items():
                content = npy_header(array.shape, array.dtype) + np.ascontiguousarray(array).tobytes()
                entries.append(_Entry(f"{name}.npy".encode(), Piece(zlib.crc32(content), len(content)), file.tell()))
                file.write(entries[-1].header() + content)
            file.write(_directory(entries, file.tell()))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
