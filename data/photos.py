"""All images of a folder, in whatever folders they are, as they are or cropped as in ADM."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.folder_scan import READ, counted, find_images
from data.image_folder import FORMATS, UnreadableImageError, center_crop, check_size, decode_image
from data.pixels import Images

LARGE = 25_000_000  # pixels from which images are decoded one at a time, since each may take gigabytes


class Header(NamedTuple):
    """Facts from an image's header.

    Attributes:
        size: Height and width as stored.
        format: Name of its format, such as "PNG".
        not_plain: Reason why it is more than 8-bit RGB; empty for plain pixels.
    """

    size: tuple[int, int]
    format: str
    not_plain: str


class Photos:
    """The images under a folder, in the order of their names, numbers in them as numbers; then of their folders.

    Images of the same names in several folders come one after the other.

    Args:
        root: The folder.

    Attributes:
        files: The images.
        left_out: What else there is, in words; empty if there is nothing.

    Raises:
        ValueError: If it has no images.
    """

    def __init__(self, root: Path) -> None:
        images, left_out = find_images(root)
        self.files = sorted(map(Path, images), key=lambda path: (_words(path.name), _words(str(path.parent))))
        self.left_out = counted(left_out)
        self._one_large = threading.Lock()
        if not images:
            raise ValueError(f"{root}: a folder without images{f': {self.left_out}' * bool(left_out)}; {READ}")

    def header(self, index: int) -> Header:
        """Read the header of an image.

        Raises:
            UnreadableImageError: Naming the file, if it is damaged, or too large to be read.
            OSError: If it cannot be opened.
        """
        path = self.files[index]
        with path.open("rb") as file:
            try:
                with Image.open(file, formats=FORMATS) as image:
                    check_size(image.width, image.height)
                    return Header((image.height, image.width), image.format or "", _not_plain(image))
            except Exception as error:  # as in `decode_image`
                reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else error
                raise UnreadableImageError(f"{path}: cannot be read: {reason}; replace or remove it") from error

    def read(self, index: int, size: tuple[int, int] | None = None) -> Images:
        """Decode an image, upright and in 8-bit RGB: (H, W, 3) uint8.

        Args:
            index: Number of the image.
            size: Height and width that it is cropped to, as ADM crops images; None keeps it whole.

        Raises:
            UnreadableImageError: Naming the file, if it cannot be decoded.
            OSError: If it cannot be opened.
        """
        path = self.files[index]
        data = path.read_bytes()
        try:
            if _pixels(data) < LARGE:
                image = decode_image(data, 3)
            else:
                with self._one_large:
                    image = decode_image(data, 3)
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"{path}: damaged or cut short ({error.reason}); replace or remove it"
            ) from error
        return np.array(image if size is None else center_crop(image, size))


def _words(text: str) -> list[tuple[int, str]]:
    """Sorting key in which 9 comes before 10."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _pixels(data: bytes) -> int:
    """Number of pixels by the header; 0 where decoding will tell what is wrong."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:
        return 0


def _not_plain(image: Image.Image) -> str:
    """Reason why pixels would change on the way to 8-bit RGB; empty if they would not."""
    if image.mode != "RGB":
        return f"is in mode {image.mode}"
    tiles = getattr(image, "tile", ())
    raw_mode = tiles[0][3] if tiles else ""
    if "transparency" in image.info or "16" in str(raw_mode) or getattr(image, "n_frames", 1) != 1:
        return "has transparency, 16 bits or frames"
    return ""
