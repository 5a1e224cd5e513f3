"""Images on disk: one folder per class, cropped as ADM crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from runtime.seeds import derive_seed

Key = tuple[int, int]  # (epoch, index): what a batch sampler asks a data set for
Example = tuple[Tensor, int, int]  # (C, H, W) uint8 image, label, index


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


def random_flip(image: Tensor, key: Key, seed: int) -> Tensor:
    """Mirrors every other image, decided by (seed, epoch, index) alone, so that workers and ranks do not matter."""
    return image.flip(-1) if derive_seed("flip", seed, *key) % 2 else image


class ImageFolder:
    """A folder of class folders (the layout of ImageNet's train set); classes are the sorted folder names.

    Args:
        root: the folder.
        image_size: side of the square crops.
        channels: 3 for RGB, 1 for grey.
        flip: mirror at random.
        seed: of the flips.

    Attributes:
        classes: folder names; a class's label is its position.
        image_shape: (C, H, W).

    Raises:
        ValueError: if the folder is missing, or no class folder with an image is in it.
    """

    def __init__(self, root: Path, image_size: int, *, channels: int = 3, flip: bool = True, seed: int = 0) -> None:
        from torchvision.datasets import ImageFolder as Scanner  # heavy

        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        try:
            self._samples = (scanned := Scanner(str(root))).samples
        except FileNotFoundError as error:
            raise ValueError(f"{root}: expected class folders with images in them ({error})") from error
        self.classes: list[str] = scanned.classes
        self.image_shape = (channels, image_size, image_size)
        self._flip, self._seed = flip, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self._samples)

    def __getitem__(self, key: Key) -> Example:
        """The image at `index` as it looks in `epoch`."""
        path, label = self._samples[key[1]]
        with Image.open(path) as file:
            image = center_crop(file.convert("RGB" if self.image_shape[0] == 3 else "L"), self.image_shape[1])
        pixels = torch.from_numpy(np.array(image)).view(*self.image_shape[1:], -1).permute(2, 0, 1)
        return random_flip(pixels, key, self._seed) if self._flip else pixels, label, key[1]


class ArrayImages:
    """Images that fit in memory, behind the same interface.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) int64.
        classes: names of the classes.
        flip: mirror at random.
        seed: of the flips.
    """

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
