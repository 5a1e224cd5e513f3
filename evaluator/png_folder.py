"""A folder of PNG files in the place of an .npz: `sample_ddp.py --save-png`, or samples of other programs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evaluator.npz import BadImageFile, ImageFile, Images

LOSSY = (".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".heic", ".gif")
OTHER = (".bmp", ".tif", ".tiff", ".ppm", ".tga", ".jp2")
DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # raised by Pillow


class PngFolder(ImageFile):
    """PNG files of one size in 8-bit RGB, also in subfolders, in the order of their paths.

    Opening reads every file's header; a batch is decoded when it is needed. Hidden files and folders are ignored.

    Args:
        path: The folder.

    Raises:
        BadImageFile: If there are none, one is damaged or of another size or mode, or there are other pictures, too.
    """

    has_statistics, statistics = False, None

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = sorted(each.relative_to(path) for each in path.rglob("*") if each.suffix)
        shown = [each for each in entries if not any(part.startswith((".", "__MACOSX")) for part in each.parts)]
        for name in shown:
            if name.suffix.lower() in LOSSY:
                raise BadImageFile(
                    f"{path / name}: lossy compression changes the scores; save the samples as PNG, and a reference "
                    "as .npz (docs/evaluation.md)"
                )
            if name.suffix.lower() in OTHER:
                raise BadImageFile(f"{path / name}: is no PNG; a folder of images holds PNG files only")
        self._names = [name for name in shown if name.suffix.lower() == ".png"]
        if not self._names:
            hint = "run the sampling job's command again" if path.suffix == ".partial" else "give an .npz, or PNG files"
            raise BadImageFile(f"{path}: a folder without PNG files; {hint}")
        sizes = {name: self._read_size(path / name) for name in self._names}
        self._size = sizes[self._names[0]]
        for name, size in sizes.items():
            if size != self._size:
                sides = (f"{width} x {height}" for height, width in (size, self._size))
                raise BadImageFile(
                    f"{path / name}: {' pixels, but the first image has '.join(sides)}; one size is needed"
                )

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self._size

    @property
    def frames(self) -> None:
        """None: files are images, not frames of clips."""
        return None

    def verified_sha256(self, *, read_to_end: bool = True) -> str:
        """Return the sha256 of the sha256 of all files, in their order; PNG has its own checksums."""
        digest = hashlib.sha256()
        for name in self._names:
            try:
                digest.update(hashlib.sha256((self.path / name).read_bytes()).digest())
            except OSError as error:
                raise BadImageFile(f"{self.path / name}: cannot be read ({error.strerror or error})") from error
        return digest.hexdigest()

    def batches(self, start: int, stop: int, size: int) -> Iterator[Images]:
        """Yield images start .. stop - 1 in batches, as `ImageFile` does."""
        for first in range(start, stop, size):
            yield np.stack([self._read(self.path / name) for name in self._names[first : min(first + size, stop)]])

    def _read_size(self, path: Path) -> tuple[int, int]:
        """Height and width, from the header."""
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                raw_mode = picture.tile[0][3] if picture.tile else ""
                size = picture.height, picture.width
                plain = picture.mode == "RGB" and "transparency" not in picture.info and "16" not in str(raw_mode)
                frames = getattr(picture, "n_frames", 1)
        except DAMAGED as error:
            raise BadImageFile(f"{path}: is no PNG, or damaged ({error})") from error
        if not plain or frames != 1:
            what = f"is in mode {picture.mode}" if picture.mode != "RGB" else "has transparency, 16 bits or frames"
            raise BadImageFile(f"{path}: {what}; expected 8-bit RGB without transparency (convert it first)")
        return size

    def _read(self, path: Path) -> Images:
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except DAMAGED as error:
            raise BadImageFile(f"{path}: damaged or cut short ({error})") from error
        if pixels.shape != (*self._size, 3):
            raise BadImageFile(f"{path}: has changed since the evaluation started")
        return pixels
