"""A folder of images in the place of an .npz: photos as a reference, or samples as separate files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from evaluator.npz import BadImageFile, ImageFile, Images

LOSSLESS = {"PNG", "BMP", "PPM"}
THREADS = 4  # that decode; bounds memory


class Pictures(Protocol):
    """Images of a folder (`data.photos.Photos`)."""

    files: list[Path]
    left_out: str

    def header(self, index: int) -> tuple[tuple[int, int], str, str]:
        """Height and width, the format, and why pixels are not plain 8-bit RGB."""

    def read(self, index: int, size: tuple[int, int] | None = None) -> Images:
        """Decode an image to (H, W, 3) uint8, and crop it if a size is given."""


PictureOpener = Callable[[Path], Pictures]


class PictureFolder(ImageFile):
    """The images under a folder, in the order of their names, then of their folders.

    Opening reads every file's header; a batch is decoded when it is needed.

    Args:
        path: The folder.
        open_pictures: Opens it.
        size: Height and width that images are cropped to, as ADM crops images, in 8-bit RGB; None keeps them as they
            are, which must be of one size and format, and 8-bit RGB.

    Attributes:
        warnings: Lines about what is left out, enlarged or compressed.
        is_sorted_by_folder: True if all images of one folder come before those of the next, as of classes.

    Raises:
        BadImageFile: If it has no images, or one cannot be used.
    """

    has_statistics, statistics = False, None

    def __init__(self, path: Path, open_pictures: PictureOpener, size: tuple[int, int] | None) -> None:
        self.path = path
        try:
            self._pictures = open_pictures(path)
            with ThreadPoolExecutor(THREADS) as pool:
                headers = list(pool.map(self._pictures.header, range(len(self._pictures.files))))
        except (OSError, ValueError) as error:
            hint = "; run the sampling job's command again" if path.suffix == ".partial" else ""
            raise BadImageFile(f"{_reason(error)}{hint}") from error
        sizes, formats, flaws = zip(*headers, strict=True)
        if size is None:
            self._check_alike(sizes, formats, flaws)
        self._size: tuple[int, int] = size or sizes[0]
        self._crops = any(each != self._size for each in sizes)
        self._formats = Counter(formats)
        folders = [file.parent for file in self._pictures.files]
        changes = sum(a != b for a, b in zip(folders, folders[1:], strict=False))
        self.is_sorted_by_folder = 0 < changes == len(set(folders)) - 1
        self.warnings = list(self._list_warnings(sizes, is_cropped=size is not None))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._pictures.files)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, cropped where they are."""
        return self._size

    @property
    def frames(self) -> None:
        """None: files are images, not frames of clips."""
        return None

    def verified_sha256(self, *, read_to_end: bool = True) -> str:
        """Return the sha256 of the sha256 of all files, in their order, and of the crop; decoding finds damage."""
        digest = hashlib.sha256()
        for file in self._pictures.files:
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise BadImageFile(f"{file}: cannot be read ({error.strerror or error})") from error
        if self._crops:
            digest.update(self._crop.encode())
        return digest.hexdigest()

    def batches(self, start: int, stop: int, size: int) -> Iterator[Images]:
        """Yield images start .. stop - 1 in batches, as `ImageFile` does."""
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(start, stop, size):
                yield np.stack(list(pool.map(self._read, range(first, min(first + size, stop)))))

    def describe_source(self) -> dict[str, object]:
        """Describe where the images are from, for the result."""
        return {"source": "folder of images", "formats": dict(self._formats.most_common()), "crop": self._crop}

    @property
    def _crop(self) -> str:
        return f"to {self._size[0]} x {self._size[1]} pixels, as ADM crops images" if self._crops else "none"

    def _check_alike(self, sizes: Sequence[tuple[int, int]], formats: Sequence[str], flaws: Sequence[str]) -> None:
        """Check that images, which will be used as they are, are plain and alike."""
        for file, size, kind, flaw in zip(self._pictures.files, sizes, formats, flaws, strict=True):
            if flaw:
                raise BadImageFile(f"{file}: {flaw}; expected 8-bit RGB without transparency (convert it first)")
            if kind != formats[0]:
                raise BadImageFile(f"{file}: is {kind}, but the first image is {formats[0]}; one format is needed")
            if size != sizes[0]:
                sides = (f"{width} x {height}" for height, width in (size, sizes[0]))
                raise BadImageFile(f"{file}: {' pixels, but the first image has '.join(sides)}; one size is needed")

    def _list_warnings(self, sizes: Sequence[tuple[int, int]], is_cropped: bool) -> Iterator[str]:
        if self._pictures.left_out:
            yield f"{self.path}: left out {self._pictures.left_out}"
        small = sum(size[0] < self._size[0] or size[1] < self._size[1] for size in sizes)
        if small:
            yield (
                f"{self.path}: {small:,} of {len(sizes):,} images are smaller than the samples, and are enlarged to "
                f"{self._size[0]} x {self._size[1]} pixels"
            )
        lossy = [] if is_cropped else [name for name in self._formats if name not in LOSSLESS]
        if lossy:
            yield f"{self.path}: samples in {lossy[0]}: compression changes the scores; save them as PNG or .npz"

    def _read(self, index: int) -> Images:
        try:
            pixels = self._pictures.read(index, self._size if self._crops else None)
        except (OSError, ValueError) as error:
            raise BadImageFile(_reason(error)) from error
        if pixels.shape != (*self._size, 3):
            file, (height, width) = self._pictures.files[index], self._size
            raise BadImageFile(
                f"{file}: {pixels.shape[1]} x {pixels.shape[0]} pixels upright, but {width} x {height} are expected"
            )
        return pixels


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read ({error.strerror})"
    return str(error)
