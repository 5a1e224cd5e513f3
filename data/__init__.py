"""Images and latents on disk -> batches; pixels -> files."""

from __future__ import annotations

from pathlib import Path

from data.batches import GlobalBatches
from data.digits import load_digits
from data.image_folder import ArrayImages, ImageFolder

__all__ = ["DATASETS", "GlobalBatches", "ImageDataset", "load_digits", "open_dataset"]

ImageDataset = ImageFolder | ArrayImages
DATASETS = ("imagefolder", "digits")


def open_dataset(
    name: str, path: Path | None, image_size: int | None, channels: int, *, flip: bool | None = None, seed: int = 0
) -> ImageDataset:
    """Opens a training set by the value of `--dataset`.

    Args:
        name: one of `DATASETS`.
        path: root of an image folder; the embedded digits need none.
        image_size: side of the square images; None takes 256, or the digits' own 8.
        channels: 3 for RGB, 1 for grey; the digits are grey.
        flip: mirror at random; None does so for photographs and not for digits.
        seed: of the flips.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    if name == "digits":
        images, labels = load_digits("train")
        if image_size not in (None, images.shape[1]):
            raise ValueError(f"the digits are {images.shape[1]} pixels wide, not {image_size}")
        return ArrayImages(images, labels, [str(k) for k in range(10)], flip=bool(flip), seed=seed)
    if name != "imagefolder":
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if path is None:
        raise ValueError("an image folder needs --data-path")
    return ImageFolder(path, image_size or 256, channels=channels, flip=flip is not False, seed=seed)
