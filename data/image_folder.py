"""Images on disk, one folder per class: converted to 8-bit grey or RGB, set upright, cropped as in ADM.

A damaged image is named, and replaced where the caller allows it. An error of the file system always ends the work,
because a lost disk must not look like a million damaged images.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from data.dataset import DatasetSettings, Example, Key, sides, with_sizes
from data.folder_scan import scan
from data.layouts import describe_layout
from runtime.seeds import derive_seed

UPRIGHT = {  # EXIF orientation -> its inverse
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Raster formats of photographs; Pillow would also open formats that start other programs (EPS) or hold scripts
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
# An image takes up to 16 bytes a pixel while it is decoded, so 3.2 GB (WebP; most PNG and JPEG files half of that)
MAX_PIXELS = 200_000_000
ROWS = 256  # of 16-bit pixels that are converted at a time
MAX_RATIO = 100  # of the sides
LONG = 16  # ratio of the sides up to which images are resized whole, to the bits of ADM
REACH = 8  # pixels around a pixel, in an image less than four times too large, that bicubic weights are not 0 for
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # bytes of a text in a PNG, such as the workflow of a generator


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded: a line that names the file, and the reason alone."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Decode an image file into an upright 8-bit image.

    Alpha is dropped, as in the official loader. 16-bit grey is scaled to 8 bits (PIL alone would clip it). The camera's
    EXIF orientation is applied. Of several frames the first counts. Channels are 3 for RGB or 1 for grey.

    Raises:
        UnreadableImageError: For bytes that cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            check_size(file.width, file.height)
            file.load()
            image, turn, mode = _eight_bit(file), UPRIGHT.get(_orientation(file)), "RGB" if channels == 3 else "L"
            image = image if image.mode == mode else image.convert(mode)  # PIL would copy it
            return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise  # not a fault of the file
    except Exception as error:  # PIL's decoders raise exceptions of all kinds on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image of a known format" if data else "the file is empty"
        raise UnreadableImageError(f"cannot be read: {reason}", reason) from error


def check_size(width: int, height: int) -> None:
    """Raise a ValueError for an image of more pixels, or longer for its width, than the stated limits."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are read")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels; a side may be at most {MAX_RATIO} times the other")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to 8, and palettes with transparency to RGBA; `convert` does the rest."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # I;16 and I;16B; I for 16-bit formats that PIL widens
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits have no agreed range")
        rounded = np.empty(levels.shape, np.uint8)
        for start in range(0, len(levels), ROWS):  # in float64 all of it would take eight times as much
            rounded[start : start + ROWS] = np.rint(levels[start : start + ROWS] / 257)
        return Image.fromarray(rounded)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # PIL would warn about each file if converted to RGB at once
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises anything, but the pixels may be fine
        return 1


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Crop as in ADM: halve by boxes while twice too large, resize bicubically to cover the crop, cut out the centre.

    If one side is more than 16 times the other, only what survives the crop is resized, and a few pixels then differ
    from ADM's by one level.

    Args:
        image: The image, of any mode that can be resized.
        size: Side of a square, or (H, W); smaller images are enlarged.
    """
    height, width = sides(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    whole = round(image.width * scale), round(image.height * scale)
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    box = left, top, left + width, top + height
    if max(whole) <= LONG * min(whole):
        return image.resize(whole, resample=Image.Resampling.BICUBIC).crop(box)
    return _resize_part(image, whole, box)


def _resize_part(image: Image.Image, whole: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Resize bicubically to (W, H) `whole`, and compute only the pixels of a box (left, top, right, bottom) in it."""
    across, down = image.width / whole[0], image.height / whole[1]
    left, top, right, bottom = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    # With the neighbours that bicubic weights reach; small coordinates, since Pillow rounds a box to float32
    x, y = max(int(left) - REACH, 0), max(int(top) - REACH, 0)
    part = image.crop((x, y, min(int(right) + REACH, image.width), min(int(bottom) + REACH, image.height)))
    # One direction at a time: Pillow chooses the order by the size, and its rounding in between depends on the order
    size = box[2] - box[0], box[3] - box[1]
    rows = part.resize((size[0], part.height), Image.Resampling.BICUBIC, (left - x, 0, right - x, part.height))
    return rows.resize(size, Image.Resampling.BICUBIC, (0, top - y, size[0], bottom - y))


def is_flipped(key: Key, seed: int) -> bool:
    """Check if an image is mirrored in an epoch: half of them are, by (seed, epoch, index) alone."""
    return bool(derive_seed("flip", seed, *key) % 2)


def random_flip(image: Tensor, key: Key, seed: int) -> Tensor:
    """Mirror half of the images, independently of workers and ranks."""
    return image.flip(-1) if is_flipped(key, seed) else image


def open_image_folder(settings: DatasetSettings) -> ImageFolder:
    """Open an image folder, by default with 256 x 256 pixels and mirrored at random; a ValueError without a path."""
    root, size = settings.require_path("an image folder"), settings.size or (256, 256)
    return ImageFolder(
        root,
        size,
        channels=settings.channels,
        flip=settings.flip is not False,
        seed=settings.seed,
        strict=settings.strict,
        captioned=settings.captioned,
    )


class EncodedImages(ABC):
    """Encoded images by number, with labels; base class of image folders and of other sources of such files.

    An image that cannot be decoded is replaced by the next one that can be, in the order of indices (the first follows
    the last), with its own label, index and flip. That depends on the data alone, so all ranks, workers and restarts
    agree. A warning names each damaged image once per process.

    Args:
        root: Path of the data, which starts messages.
        classes: Names of the classes; none for data without labels.
        count: Number of images.
        settings: Settings that the data set was opened with.
        size: (H, W) of the crops.

    Attributes:
        remedy: Advice for a damaged image.
    """

    vae = "ema"
    worth_workers = True
    remedy = "replace or remove the file"

    def __init__(
        self, root: Path, classes: list[str], count: int, settings: DatasetSettings, size: tuple[int, int]
    ) -> None:
        self.classes, self._count = classes, count
        self.image_shape: tuple[int, ...] = (settings.channels, *size)
        self._root, self._seed, self._strict = root, settings.seed, settings.strict
        self._flip = settings.flip is not False
        self._digest: str | None = None
        # Shared with the loader's workers: one warning per file, no second try, and `unreadable` includes their files
        self._damaged = torch.zeros(count, dtype=torch.bool).share_memory_()

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Bytes of an encoded image; none for a missing one. An OSError if they cannot be read."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Name of an image in the data, the same on every machine."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Label of an image, without opening it; 0 without classes."""

    @abstractmethod
    def sizes(self) -> Iterator[int]:
        """Sizes of all images in bytes, in their order."""

    def __len__(self) -> int:
        """Number of images, readable or not."""
        return self._count

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it is in `epoch`, or its replacement.

        Raises:
            UnreadableImageError: If it cannot be decoded and `strict` is set.
            ValueError: If no image at all can be decoded.
            OSError: If the file cannot be opened.
        """
        epoch, first = key
        for index in itertools.chain(range(first, len(self)), range(first)):
            pixels = self._read_or_skip(index)
            if pixels is not None:
                pixels = random_flip(pixels, (epoch, index), self._seed) if self._flip else pixels
                return pixels, self.label(index) if self.classes else {}, index
        raise ValueError(f"{self._root}: none of its {len(self)} images can be read")

    @property
    def unreadable(self) -> list[str]:
        """Names of damaged images met so far by this process and its workers."""
        return [self.path(index) for index in self._damaged.nonzero().flatten().tolist()]

    def digest(self) -> str:
        """Digest of the names of all images, in their order, and of their sizes in bytes."""
        if self._digest is None:  # computed once: every checkpoint has it
            total = hashlib.sha256()
            for index in range(len(self)):
                total.update(f"{self.entry(index)}\n".encode(errors="surrogateescape"))
            self._digest = with_sizes(total.hexdigest(), self.sizes_sha256())
        return self._digest

    def entry(self, index: int) -> str:
        """Line of an image in digests; where its name does not show its class, the label is in it, too."""
        return f"{self.path(index)} {self.label(index)}"

    def sizes_sha256(self) -> str:
        """Digest of the sizes of all images in bytes, in their order."""
        total = hashlib.sha256()
        for size in self.sizes():
            total.update(f"{size}\n".encode())
        return total.hexdigest()

    def read(self, index: int) -> Tensor:
        """Decode and crop one image, not mirrored: (C, H, W) uint8.

        Raises:
            UnreadableImageError: Naming the image, if it cannot be decoded.
            OSError: Naming the file, if it cannot be opened.
        """
        channels, height, width = self.image_shape
        data = self.content(index)
        try:
            image = center_crop(decode_image(data, channels), (height, width))
        except UnreadableImageError as error:
            place = self._root / self.path(index)
            raise UnreadableImageError(f"{place}: {error}; {self.remedy}", error.reason) from error
        return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)

    def _read_or_skip(self, index: int) -> Tensor | None:
        if self._damaged[index]:
            return None
        try:
            return self.read(index)
        except UnreadableImageError as error:
            if self._strict:
                raise
            self._damaged[index] = True
            warnings.warn(f"{error}; until then the next readable image replaces it", stacklevel=2)
            return None


class ImageFolder(EncodedImages):
    """A folder of class folders (the layout of ImageNet's train set); classes are the sorted folder names.

    Args:
        root: The folder.
        image_size: Side of square crops, or (H, W).
        channels: 3 for RGB, 1 for grey.
        flip: Mirror at random.
        seed: Seed of the flips.
        strict: An image that cannot be decoded is an error.
        captioned: Captions take the place of labels, and images may be in the folder itself.

    Raises:
        ValueError: If the folder is missing, or has no class folder with an image.
    """

    def __init__(
        self,
        root: Path,
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        flip: bool = True,
        seed: int = 0,
        strict: bool = False,
        captioned: bool = False,
    ) -> None:
        if not root.is_dir():
            raise ValueError(f"{root}: {'not a' if root.exists() else 'no such'} folder")
        classes, self._samples = scan(root, captioned=captioned)
        if not self._samples:
            raise ValueError(describe_layout(root) or f"{root}: expected class folders with images in them")
        settings = DatasetSettings(root, sides(image_size), channels, flip, seed, strict)
        super().__init__(root, classes, len(self._samples), settings, sides(image_size))

    def content(self, index: int) -> bytes:
        """Bytes of an image file."""
        return Path(self._samples.path(index)).read_bytes()

    def path(self, index: int) -> str:
        """Path of an image relative to the root, with forward slashes."""
        return self._samples.name(index)

    def label(self, index: int) -> int:
        """Label of an image, without opening it."""
        return self._samples.label(index)

    def entry(self, index: int) -> str:
        """Line of an image in digests: its path, which shows its class."""
        return self.path(index)

    def sizes(self) -> Iterator[int]:
        """Sizes of all files in bytes, in their order; -1 for one that is gone, which the reading of it will name."""
        every = range(len(self))
        parts = (every[start : start + 1000] for start in range(0, len(self), 1000))
        with ThreadPoolExecutor(8) as pool:  # a file system on the network answers many at a time
            for sizes in pool.map(lambda part: [_size(self._samples.path(index)) for index in part], parts):
                yield from sizes


def _size(path: str) -> int:
    """Size of a file in bytes; -1 for one that is gone."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
