"""Images on disk: one folder per class, brought to 8-bit grey or RGB, upright, cropped as ADM crops.

What cannot be decoded is named, and is survived where the caller allows it; an error of the file system never is,
because a lost disk must not look like a million damaged images.
"""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from runtime.seeds import derive_seed

Key = tuple[int, int]  # (epoch, index): what a batch sampler asks a data set for
Example = tuple[Tensor, int, int]  # (C, H, W) uint8 image, label, index

UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded.

    Args:
        message: one line that names the file.
        reason: what is wrong with it, without its name.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, channels: int) -> Image.Image:
    """The bytes of an image file -> an upright 8-bit image.

    Alpha is dropped, as the official loader drops it. 16-bit grey is scaled to 8 bits (PIL alone would clip it). The
    camera's EXIF orientation is obeyed.

    Args:
        data: of any format that PIL reads; of several frames the first counts.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableImageError: whatever is wrong with the bytes.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = _upright(_eight_bit(file), _orientation(file))
            return image.convert("RGB" if channels == 3 else "L")
    except MemoryError:
        raise  # the machine's fault, not the file's
    except UnidentifiedImageError as error:
        reason = "not an image of a known format" if data else "the file is empty"
        raise UnreadableImageError(f"cannot be read: {reason}", reason) from error
    except Exception as error:  # PIL's decoders raise whatever damaged bytes lead them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"cannot be read: {reason}", reason) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits to 8, palettes with transparency to RGBA; other modes are left to PIL's `convert`."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # I;16 and I;16B; I for formats that PIL widens, but they hold 16 bits
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits have no agreed range")
        return Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # straight to RGB, PIL would warn about each file
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises anything, and says nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing: box-halve while twice too large, bicubic to the shorter side, cut out the centre.

    Args:
        image: any mode that PIL can resize.
        size: side of the square result; smaller images are enlarged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_flipped(key: Key, seed: int) -> bool:
    """Whether an image is mirrored in an epoch: every other one, decided by (seed, epoch, index) alone."""
    return bool(derive_seed("flip", seed, *key) % 2)


def random_flip(image: Tensor, key: Key, seed: int) -> Tensor:
    """Mirrors every other image, whatever worker or rank it is on."""
    return image.flip(-1) if is_flipped(key, seed) else image


class ImageFolder:
    """A folder of class folders (the layout of ImageNet's train set); classes are the sorted folder names.

    In the place of an image that cannot be decoded stands the next one that can be, in the order of their indices
    (behind the last comes the first), with its own label, index and flip. That depends on the files alone, so every
    rank, worker and restart agrees; a warning names each damaged file once a process.

    Args:
        root: the folder.
        image_size: side of the square crops.
        channels: 3 for RGB, 1 for grey.
        flip: mirror at random.
        seed: of the flips.
        strict: an image that cannot be decoded is an error.

    Attributes:
        classes: folder names; a class's label is its position.
        image_shape: (C, H, W).
        vae: what `--vae` is where the user says nothing.
        worth_workers: whether loading takes long enough to be done in processes of its own.

    Raises:
        ValueError: if the folder is missing, or no class folder with an image is in it.
    """

    vae = "ema"
    worth_workers = True

    def __init__(
        self,
        root: Path,
        image_size: int,
        *,
        channels: int = 3,
        flip: bool = True,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        from torchvision.datasets import ImageFolder as Scanner  # heavy

        if not root.is_dir():
            raise ValueError(f"{root}: {'not a' if root.exists() else 'no such'} folder")
        try:
            self._samples = (scanned := Scanner(str(root))).samples
        except FileNotFoundError as error:
            raise ValueError(f"{root}: expected class folders with images in them ({error})") from error
        self.classes: list[str] = scanned.classes
        self.image_shape = (channels, image_size, image_size)
        self._root, self._flip, self._seed, self._strict = root, flip, seed, strict
        # Shared by the loader's workers: one warning a file, no second try, and `unreadable` sees what they found
        self._damaged = torch.zeros(len(self._samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Number of images, readable or not."""
        return len(self._samples)

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it looks in `epoch`, or its substitute.

        Raises:
            UnreadableImageError: if it cannot be decoded and `strict` is set.
            ValueError: if no image at all can be decoded.
            OSError: if the file cannot be opened.
        """
        epoch, first = key
        for index in itertools.chain(range(first, len(self)), range(first)):
            pixels = self._read_or_skip(index)
            if pixels is not None:
                pixels = random_flip(pixels, (epoch, index), self._seed) if self._flip else pixels
                return pixels, self._samples[index][1], index
        raise ValueError(f"{self._root}: none of its {len(self)} images can be read")

    @property
    def unreadable(self) -> list[str]:
        """Paths, relative to the root, that this process and its workers found damaged so far."""
        return [self.path(index) for index in self._damaged.nonzero().flatten().tolist()]

    def path(self, index: int) -> str:
        """Path of an image relative to the root, with forward slashes."""
        return Path(self._samples[index][0]).relative_to(self._root).as_posix()

    def label(self, index: int) -> int:
        """Label of an image, without opening it."""
        return self._samples[index][1]

    def read(self, index: int) -> Tensor:
        """Decodes and crops one image.

        Returns:
            (C, H, W) uint8, not mirrored.

        Raises:
            UnreadableImageError: naming the file, if it cannot be decoded.
            OSError: naming the file, if it cannot be opened.
        """
        path = Path(self._samples[index][0])
        channels, size, _ = self.image_shape
        data = path.read_bytes()
        try:
            image = center_crop(decode_image(data, channels), size)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{path}: {error}; replace or remove the file", error.reason) from error
        return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)

    def _read_or_skip(self, index: int) -> Tensor | None:
        if self._damaged[index]:
            return None
        try:
            return self.read(index)
        except UnreadableImageError as error:
            if self._strict:
                raise
            self._damaged[index] = True
            warnings.warn(f"{error}; until then the next readable image stands in for it", stacklevel=2)
            return None


class ArrayImages:
    """Images that fit in memory, behind the same interface.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) int64.
        classes: names of the classes.
        flip: mirror at random.
        seed: of the flips.

    Attributes:
        vae: what `--vae` is where the user says nothing.
        worth_workers: whether loading takes long enough to be done in processes of its own.
    """

    vae = "none"
    worth_workers = False

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        classes: list[str],
        *,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self._labels = labels.tolist()
        self.classes = classes
        self.image_shape = tuple(self._images.shape[1:])
        self._flip, self._seed = flip, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it looks in `epoch`."""
        image = self._images[key[1]]
        return random_flip(image, key, self._seed) if self._flip else image, self._labels[key[1]], key[1]
