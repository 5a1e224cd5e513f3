"""Images or clips in .npz files, read batch by batch, so that 50,000 of them need little memory.

The layout is ADM's: `arr_0` holds images (N, H, W, 3) uint8, or clips (N, F, H, W, 3); `mu`, `sigma`, `mu_s`,
`sigma_s`, where present, are statistics to be used instead of computing them. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from evaluator.statistics import Statistics
from runtime.errors import UserError

IMAGES = "arr_0"
POOL, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")  # statistics: ADM's references have both, others the first
LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name; two lengths follow byte 26
BYTES_AT_ONCE = 1 << 20  # read at a time where only a checksum is taken, or bytes are skipped
LARGEST_WHOLE = 2 * 10**9  # bytes of pixels that may be decompressed at once
REAL_KINDS = "fiu"  # NumPy's letters for floats and integers

# Raised by zipfile for damage; RuntimeError also for encryption and unknown compressions
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
NO_HEADER = (ValueError, TypeError, tokenize.TokenError)  # raised by NumPy for the header of an array

Images = npt.NDArray[np.uint8]


class BadImageFile(UserError, ValueError):
    """A file cannot be used; the message names it and the reason."""


class StoredStatistics(NamedTuple):
    """Statistics in a file: of pool features, and of spatial ones; None for those that it does not hold."""

    pool: Statistics | None
    spatial: Statistics | None


class _Layout(NamedTuple):
    """Position and layout of the images in the file."""

    shape: tuple[int, ...]  # (N, H, W, 3) or (N, F, H, W, 3)
    fortran_order: bool  # the first index changes fastest
    offset: int | None  # of the first pixel in the file; None if the pixels are compressed
    header_bytes: int  # before the first pixel within the entry
    crc: int  # recorded CRC-32 of the entry's bytes, header included


class ImageFile:
    """An .npz that is known to hold images, statistics or both.

    Opening reads headers only, and finds most mistakes. In Fortran order the pixels of an image are scattered: if they
    are stored, a batch touches pages of the whole file, which is slow for a file larger than the memory; if they are
    compressed, all are decompressed at once, up to 2 GB.

    Args:
        path: The file.

    Raises:
        BadImageFile: If it is missing, cut short, not an .npz, or holds something else.
    """

    warnings: Sequence[str] = ()  # lines about what cannot be used
    is_sorted_by_folder = False  # images of one folder after those of another

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                self._layout = self._read_layout(archive) if IMAGES in names else None
        except BadImageFile:
            raise
        except FileNotFoundError:
            raise BadImageFile(f"{path}: there is no such file") from None
        except OSError as error:
            raise BadImageFile(f"{path}: cannot be read ({error.strerror or error})") from error
        except DAMAGED as error:
            raise BadImageFile(f"{path}: not an .npz file, or cut short ({error})") from error
        self.keys = names
        self._pairs = [pair for pair in (POOL, SPATIAL) if {*pair} & {*names}]
        for pair in self._pairs:
            missing = [name for name in pair if name not in names]
            if missing:
                (present,) = {*pair} - {*missing}
                raise BadImageFile(f"{path}: has {present} but not {missing[0]}; a mean and a covariance go together")
        self.has_statistics = bool(self._pairs)
        if self._layout is None and not self.has_statistics:
            raise BadImageFile(f"{path}: has no array {IMAGES} (the images), only {', '.join(names) or 'nothing'}")

    @property
    def count(self) -> int:
        """Number of images or clips; 0 in a file of statistics only."""
        return 0 if self._layout is None else self._layout.shape[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images; None without images."""
        return None if self._layout is None else (self._layout.shape[-3], self._layout.shape[-2])

    @property
    def frames(self) -> int | None:
        """Number of frames of each clip; None for images."""
        return None if self._layout is None or len(self._layout.shape) == 4 else self._layout.shape[1]

    def as_frames(self) -> ImageFile:
        """Return the frames of all clips as images, in their order; a file of images is returned as it is."""
        if self.frames is None or self._layout is None:
            return self
        images = copy.copy(self)
        clips, frames, *shape = self._layout.shape
        images._layout = self._layout._replace(shape=(clips * frames, *shape))
        return images

    @cached_property
    def statistics(self) -> StoredStatistics | None:
        """The statistics in the file; None without any.

        Raises:
            BadImageFile: If they are damaged, or not a mean and a covariance.
        """
        if not self.has_statistics:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                numbers = {name: _real_numbers(file[name], name) for pair in self._pairs for name in pair}
            pool, spatial = (
                Statistics(numbers[mean], numbers[covariance]) if mean in numbers else None
                for mean, covariance in (POOL, SPATIAL)
            )
            return StoredStatistics(pool, spatial)
        except (*DAMAGED, *NO_HEADER, MemoryError) as error:  # a damaged header may ask for any number of bytes
            raise BadImageFile(f"{self.path}: its statistics cannot be used ({error})") from error

    def verified_sha256(self, *, read_to_end: bool = True) -> str:
        """Check the pixels against their checksum, and return the sha256 of the file's bytes in hexadecimal.

        Stored pixels are not read through zipfile, so their checksum is computed here, in the same pass as the digest.
        For compressed ones zipfile compares it at their end, which is not reached if only the first images are read.

        Args:
            read_to_end: True if `batches` is read up to the last image anyway.

        Raises:
            BadImageFile: If the pixels are damaged, or the file cannot be read.
        """
        layout = self._layout
        start, stop, recorded = 0, 0, 0  # range of the bytes to check; without any their CRC-32 is 0
        if layout is not None and layout.offset is not None:
            start, stop = layout.offset - layout.header_bytes, layout.offset + math.prod(layout.shape)
            recorded = layout.crc
        digest, crc, position = hashlib.sha256(), 0, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while block := file.read(BYTES_AT_ONCE):
                    digest.update(block)
                    crc = zlib.crc32(memoryview(block)[max(0, start - position) : max(0, stop - position)], crc)
                    position += len(block)
            if layout is not None and layout.offset is None and not read_to_end:
                with self._pixels(layout, 0) as stream:
                    while stream.read(BYTES_AT_ONCE):
                        pass
        except DAMAGED as error:
            raise BadImageFile(f"{self.path}: its images are damaged or cut short ({error})") from error
        if crc != recorded:
            raise BadImageFile(
                f"{self.path}: its images are damaged: {IMAGES} has the CRC-32 {crc:08x}, and had {recorded:08x} when "
                "it was written; make or fetch the file again"
            )
        return digest.hexdigest()

    def describe_source(self) -> dict[str, object]:
        """Describe the file's keys and the digests of its statistics, for the result."""
        stored = self.statistics
        digests = {} if stored is None else {name: each.sha256() for name, each in stored._asdict().items() if each}
        return {"keys": self.keys} | ({"statistics_sha256": digests} if digests else {})

    def count_starts(self, index: int, span: int) -> int:
        """Number of first frames that a window of so many frames may have in a clip."""
        return (self.frames or 0) - span + 1

    def windows(self, chosen: Mapping[int, range]) -> Iterator[Images]:
        """Yield the chosen frames of clips, (n, H, W, 3); clips are in rising order."""
        # in one pass, since compressed clips are decompressed from the first one on
        first, stop = min(chosen, default=0), max(chosen, default=-1) + 1
        for i, clip in enumerate(self.batches(first, stop, 1), first):
            if i in chosen:
                numbers = chosen[i]
                yield clip[0, numbers.start : numbers.stop : numbers.step]

    def windows_sha256(self, chosen: Mapping[int, range]) -> str:
        """Return the sha256 of what holds these frames, after a check; `windows` is read to the end anyway."""
        return self.verified_sha256(read_to_end=self.count - 1 in chosen)

    def describe_windows(self) -> dict[str, object]:
        """Describe how frames are read, for the result, where it is not from an array."""
        return {}

    def batches(self, start: int, stop: int, size: int) -> Iterator[Images]:
        """Yield images or clips start .. stop - 1 in batches.

        Args:
            start: First one, >= 0.
            stop: One past the last, at most `count`.
            size: Number at a time, >= 1; the last batch may be shorter.

        Yields:
            (n, H, W, 3) or (n, F, H, W, 3) uint8 arrays, each in memory that nothing else refers to.

        Raises:
            BadImageFile: If the data ends early or is damaged.
        """
        if self._layout is None or not 0 <= start <= stop <= self.count:
            raise ValueError(f"images {start} to {stop} of {self.count}")
        read = self._in_fortran_order if self._layout.fortran_order else self._in_order
        edges = [*range(start, stop, size), stop]
        try:
            yield from read(self._layout, list(zip(edges, edges[1:], strict=False)))
        except DAMAGED as error:
            raise BadImageFile(f"{self.path}: its images are damaged or cut short ({error})") from error

    def _in_order(self, layout: _Layout, slices: list[tuple[int, int]]) -> Iterator[Images]:
        row = math.prod(layout.shape[1:])
        with self._pixels(layout, slices[0][0] * row if slices else 0) as file:
            for begin, end in slices:
                batch = np.empty((end - begin, *layout.shape[1:]), np.uint8)
                _fill(file, batch)
                yield batch

    def _pixels(self, layout: _Layout, skip: int) -> IO[bytes]:
        """Open the pixels as a stream, from a given one on."""
        if layout.offset is not None:
            stored = self.path.open("rb")
            stored.seek(layout.offset + skip)
            return stored
        with zipfile.ZipFile(self.path) as archive:
            stream = archive.open(f"{IMAGES}.npy")  # keeps the file open
        to_skip = layout.header_bytes + skip
        while to_skip:  # seek() would decompress 16 MB at a time
            skipped = len(stream.read(min(to_skip, BYTES_AT_ONCE)))
            if not skipped:
                raise EOFError("it ends early")
            to_skip -= skipped
        return stream

    def _in_fortran_order(self, layout: _Layout, slices: list[tuple[int, int]]) -> Iterator[Images]:
        if layout.offset is not None:
            images: Images = np.memmap(self.path, np.uint8, "r", layout.offset, layout.shape, order="F")
        else:
            with self._pixels(layout, 0) as stream:
                images = np.frombuffer(stream.read(), np.uint8).reshape(layout.shape, order="F")
        for begin, end in slices:
            yield np.array(images[begin:end], order="C")

    def _read_layout(self, archive: zipfile.ZipFile) -> _Layout:
        info = archive.getinfo(f"{IMAGES}.npy")
        with archive.open(info) as entry:
            try:
                version = np.lib.format.read_magic(entry)
                # 3.0 differs from 2.0 in the alphabet of field names alone
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read_header(entry)
            except NO_HEADER as error:
                raise BadImageFile(f"{self.path}: {IMAGES} is no NumPy array ({error})") from error
            header_bytes = entry.tell()
        self._check_images(shape, dtype)
        expected, actual = math.prod(shape), info.file_size - header_bytes
        if actual != expected:
            raise BadImageFile(f"{self.path}: {IMAGES} is cut short: {actual:,} of {expected:,} bytes of pixels")
        stored = info.compress_type == zipfile.ZIP_STORED
        if fortran_order and len(shape) == 5:
            raise BadImageFile(
                f"{self.path}: {IMAGES} is in Fortran order; save clips in C order (np.ascontiguousarray)"
            )
        if fortran_order and not stored and expected > LARGEST_WHOLE:
            raise BadImageFile(
                f"{self.path}: {IMAGES} is compressed in Fortran order, and {expected:,} bytes of pixels are too many "
                "to decompress at once; save it in C order (np.ascontiguousarray)"
            )
        offset = self._start_of_entry(info) + header_bytes if stored else None
        if offset is not None and offset + expected > self.path.stat().st_size:
            raise BadImageFile(f"{self.path}: the file ends inside {IMAGES}")
        return _Layout(shape, fortran_order, offset, header_bytes, info.CRC)

    def _start_of_entry(self, info: zipfile.ZipInfo) -> int:
        """Position of an entry's content: after its local header, which holds its own length."""
        with self.path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        return info.header_offset + LOCAL_HEADER + int(lengths.sum())

    def _check_images(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        where = f"{self.path}: {IMAGES}"
        if dtype != np.uint8:
            raise BadImageFile(
                f"{where} is {dtype}; expected uint8 pixels, 0 to 255 (scale and round pixels of another range first)"
            )
        if len(shape) not in (4, 5) or shape[-1] != 3:
            forms = {4: "(N, H, W, 3)", 5: "(N, F, H, W, 3)"}
            expected = forms.get(len(shape)) or " or ".join(forms.values())
            first = " (channels come last: transpose it)" if len(shape) in forms and shape[-3] == 3 else ""
            if len(shape) == 4 and shape[-1] == 1:
                first = "; repeat the channel of grey images; digits and Fashion-MNIST: scripts/digits_report.py"
            raise BadImageFile(f"{where} is of shape {shape}; expected {expected}{first}")
        if min(shape) < 1:
            raise BadImageFile(f"{where} is empty: its shape is {shape}")


def _real_numbers(entry: npt.ArrayLike, name: str) -> torch.Tensor:
    """Convert an entry to a float64 tensor; NumPy returns the bytes of one that is not an array."""
    array = np.asarray(entry)
    if array.dtype.kind not in REAL_KINDS:
        raise ValueError(f"{name} is {array.dtype}; expected real numbers")
    return torch.from_numpy(array.astype(np.float64))


def _fill(file: IO[bytes], batch: Images) -> None:
    """Read until an array is full."""
    rest = batch.reshape(-1).data
    while len(rest):
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it ends early")
        rest = rest[count:]
